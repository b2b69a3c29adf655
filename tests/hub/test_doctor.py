import json
import socket
import urllib.error
from collections import namedtuple
from pathlib import Path

import pytest
from huggingface_hub import constants
from loopback_hub import TOKEN, Repository

from mmkd.command.settings import parse
from mmkd.encoders import weights as hub_access
from mmkd.hub import doctor


def run_doctor(capsys, *arguments):
    """What it prints, and its exit code."""
    try:
        doctor.main(parse(doctor.DoctorSettings, list(arguments)))
        code = 0
    except SystemExit as error:
        code = error.code
    return capsys.readouterr().out, code


def finding(findings, part):
    return next(found for found in findings if found.part == part)


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """This process' client at the stand-in, with one teacher open, one gated and the others missing."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repositories["model", "vinid/plip"] = Repository(private=False)
    hub.repositories["model", "BIOMEDICA/BMC_CLIP_CF"] = Repository(private=False, gated=True)
    return hub


def test_teachers_are_available_gated_or_missing(online):
    found = doctor.hub()
    assert finding(found, "hub").status == "ok"
    assert finding(found, "hub token").seen == "of user"
    assert finding(found, "teacher PLIP").status == "ok"
    gated = finding(found, "teacher BMCA")
    assert gated.status == "warning" and "https://huggingface.co/BIOMEDICA/BMC_CLIP_CF" in gated.breaks
    assert "is not available (HTTP 404)" in finding(found, "teacher QuiltNet").seen
    assert not any(TOKEN in part.seen + part.breaks for part in found)


def test_a_refused_token_is_a_warning(online, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_forgotten")
    refused = finding(doctor.hub(), "hub token")
    assert refused.status == "warning" and refused.seen == "refused (HTTP 401)"


def test_without_a_network_the_hub_is_tried_once_and_briefly(capsys, monkeypatch, tmp_path):
    asked = []

    def dead(request, timeout):
        asked.append(timeout)
        raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_access.urllib.request, "urlopen", dead)
    (tmp_path / "hub" / "models--vinid--plip").mkdir(parents=True)
    printed, code = run_doctor(capsys)
    assert asked == [hub_access.HUB_TIMEOUT_SECONDS] and code == 0
    assert "WARNING hub: " in printed and "does not answer" in printed
    assert "teachers in the cache: PLIP\n" in printed and "extraction with BMCA, BiomedCLIP" in printed


def test_offline_mode_makes_no_connection_and_lists_the_cache(capsys, monkeypatch, tmp_path):
    def asked(*_, **__):
        raise AssertionError("the network was asked although HF_HUB_OFFLINE is set")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_access.urllib.request, "urlopen", asked)
    monkeypatch.setattr(socket.socket, "connect", asked)
    (tmp_path / "hub" / "models--vinid--plip").mkdir(parents=True)
    printed, code = run_doctor(capsys)
    assert code == 0 and "WARNING hub: HF_HUB_OFFLINE is set\n" in printed
    assert "downloads of teachers and `mmkd push` do not work; unset it" in printed
    assert "teachers in the cache: PLIP\n" in printed


def test_a_missing_device_is_a_problem(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    printed, code = run_doctor(capsys, "--device", "cuda", "--hub", "false", "--json")
    told = json.loads(printed)
    assert code == 1 and told["problem"] == 1
    assert {"part": "gpu", "status": "problem", "seen": "none", "breaks": "--device cuda will not work"} in told[
        "findings"
    ]
    assert not any(found["part"].startswith("hub") for found in told["findings"])


def test_a_missing_or_old_package_names_what_breaks(monkeypatch):
    real = doctor.importlib.metadata.version

    def version(name):
        if name == "open_clip_torch":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return "4.57.1" if name == "transformers" else real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    found = doctor.versions()
    assert finding(found, "packages").status == "problem"
    assert "transformers 4.57.1 does not satisfy >=5" in finding(found, "packages").breaks
    teachers = finding(found, "extra [teachers]")
    assert teachers.status == "warning" and teachers.breaks.startswith("open_clip_torch is missing: teachers in")
    assert 'pip install --upgrade -e ".[teachers]"' in teachers.breaks


def test_a_full_or_closed_disk_and_a_driver_without_torch_are_found(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**9, 10**9))
    assert doctor._place("here", tmp_path / "not" / "there").status == "warning"
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    closed = doctor._place("here", tmp_path)
    assert closed.status == "problem" and f"{tmp_path} cannot be written" in closed.breaks
    driver = doctor._without_gpu("auto", True, None)
    assert "torch, built without CUDA, sees no device" in driver.seen
    assert Path(tmp_path).exists()
