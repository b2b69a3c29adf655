"""The script for a GPU runs without one, and finds what it looks for."""

import json
from pathlib import Path

import checks
import torch


def test_the_checks_run_on_a_cpu(monkeypatch, capsys, tmp_path):
    assert "python tests/device/checks.py" in Path(checks.__file__).with_name("run.sh").read_text()
    monkeypatch.setattr("sys.argv", ["checks.py", "--cpu", "--output", str(tmp_path / "report.json")])
    assert checks.main() == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["failed"] == [] and report["waits"]["loss"] == 0
    assert len(report["gradients"]) == 9  # two stages in fp32 and bf16, whole and in micro-batches; and seconds


def test_a_wrong_gradient_fails(monkeypatch, tmp_path):
    world = checks.make_world(tmp_path)
    honest = checks.backward
    monkeypatch.setattr(checks, "backward", lambda *given: honest(*given) * (1.5 if given[4] else 1))
    wrong = checks.gradients(world, "cpu")[1]
    assert len(wrong) == 4 and all("micro-batches" in what for what in wrong)
    assert not torch.cuda.is_initialized()
