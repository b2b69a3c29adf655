"""Diagnose the installation and the machine: versions, devices, memory, disk, and access to the Hub.

Nothing is changed and nothing is downloaded. Exit code 0 unless the package itself or the device given does not work;
warnings are about parts that may not be needed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from mmkd.command.settings import check_arguments, run, setting


@dataclass
class DoctorSettings:
    """Diagnose versions, devices, memory, disk, cache and access to the Hub.

    Example:
        mmkd doctor --device cuda
    """

    device: str = setting("auto", "device to be used: cpu, cuda ...; a missing one is a problem")
    hub: bool = setting(True, "check that the Hub answers and which teachers the token may download")
    json: bool = setting(False, "print JSON")


if __name__ == "__main__":
    check_arguments(DoctorSettings)  # before the imports that take seconds

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from packaging.requirements import Requirement

from mmkd.encoders.weights import require_hub

if TYPE_CHECKING:
    from mmkd.encoders.spec import TeacherSpec

Status = Literal["ok", "warning", "problem"]
MARKS = {"ok": "  ok      ", "warning": "  WARNING ", "problem": "  PROBLEM "}
MINIMUM_MEMORY_GB, MINIMUM_DISK_GB = 4, 5
PYTHON = (3, 10)
EXTRAS = {
    "train": "pretrain, distill and finetune",
    "teachers": "teachers in open_clip's and timm's form, and timm backbones",
    "eval": "linear probes and the report",
    "slides": "mmkd tile, diagnosis and survival on bags",
    "export": "mmkd export --format onnx and int8",
    "curate": "curation of large collections",
    "demo": "mmkd quickstart and the packaged images and weights",
}


@dataclass(frozen=True)
class Finding:
    """The state of one part.

    Attributes:
        part: what was examined.
        status: ok, warning (something optional does not work) or problem (the package does not).
        seen: what was found.
        breaks: what does not work and what to do; empty for ok.
    """

    part: str
    status: Status
    seen: str
    breaks: str = ""

    def __str__(self) -> str:
        """One line, and a second one for what does not work."""
        line = f"{MARKS[self.status]}{self.part}: {self.seen}"
        return f"{line}\n            {self.breaks}" if self.breaks else line


def main(settings: DoctorSettings) -> None:
    """Print the findings.

    Raises:
        SystemExit: 1 when there is a problem.
    """
    findings = [*versions(), *devices(settings.device), memory(), *disk(), *(hub() if settings.hub else [])]
    counts = {status: sum(finding.status == status for finding in findings) for status in MARKS}
    if settings.json:
        print(json.dumps({**counts, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print(*findings, sep="\n")
        print(f"\n{counts['problem']} problems, {counts['warning']} warnings")
    if counts["problem"]:
        raise SystemExit(1)


def versions() -> list[Finding]:
    """Python, the required packages, and those of every extra."""
    minimum = ".".join(map(str, PYTHON))
    old = f"mmkd-clip needs {minimum} or newer" if sys.version_info < PYTHON else ""
    seen = f"{platform.python_version()} on {platform.platform()}"
    required = [Requirement(line) for line in importlib.metadata.requires("mmkd-clip") or ()]
    base = [requirement for requirement in required if requirement.marker is None]
    found = [Finding("python", "problem" if old else "ok", seen, old), _packages("packages", base, "the package", "")]
    for extra, uses in EXTRAS.items():
        chosen = [item for item in required if item.marker is not None and item.marker.evaluate({"extra": extra})]
        found.append(_packages(f"extra [{extra}]", chosen, uses, f"[{extra}]"))
    return found


def devices(requested: str) -> list[Finding]:
    """The CPU, and every accelerator that torch sees."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = [Finding("cpu", "ok", f"{cores} cores, {torch.get_num_threads()} threads for torch")]
    for k in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(k)
        half = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: train in fp32"
        seen = f"{card.name}, {card.total_memory / 1e9:.0f} GB, compute capability {card.major}.{card.minor}, {half}"
        found.append(Finding(f"cuda:{k}", "ok", seen))
    if not torch.cuda.is_available():
        found.append(_without_gpu(requested, shutil.which("nvidia-smi") is not None, torch.version.cuda))
    return found


def memory() -> Finding:
    """Unused main memory."""
    try:
        page = os.sysconf("SC_PAGE_SIZE") / 1e9
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return Finding("memory", "ok", "not reported by this system")
    seen = f"{total:.1f} GB, {free:.1f} GB unused"
    if total < MINIMUM_MEMORY_GB:
        return Finding("memory", "warning", seen, "a model of the paper's size needs 16 GB; use smaller batches")
    return Finding("memory", "ok", seen)


def disk() -> list[Finding]:
    """Free space and write permission in this folder, the Hub's cache and the folder of temporary files."""
    places = {"this folder": Path.cwd(), "the Hub's cache": Path(constants.HF_HUB_CACHE)}
    places["temporary files"] = Path(tempfile.gettempdir())
    return [_place(name, path) for name, path in places.items()]


def hub() -> list[Finding]:
    """Whether the Hub answers, whose token is used, and which teachers it may download."""
    from mmkd.encoders.zoo import TEACHERS

    needs = "downloads of teachers and `mmkd push`"
    rows = [row for row in TEACHERS.values() if row.weights.count("/") == 1]
    if constants.HF_HUB_OFFLINE:
        offline = Finding("hub", "warning", "HF_HUB_OFFLINE is set", f"{needs} do not work; unset it")
        return [offline, _cached(rows)]
    try:
        require_hub()
    except OSError as error:
        breaks = f"{needs} do not work; set HF_ENDPOINT to a mirror, or copy the cache from a machine with a network"
        return [Finding("hub", "warning", " ".join(str(error).split()), breaks), _cached(rows)]
    with ThreadPoolExecutor(max_workers=10) as pool:
        token = pool.submit(_token)
        access = list(pool.map(lambda row: _access(row.name, row.weights, row.repo_type), rows))
    return [Finding("hub", "ok", f"{constants.ENDPOINT} answers"), token.result(), *access]


def _packages(part: str, requirements: Iterable[Requirement], uses: str, extra: str) -> Finding:
    """A problem where packages of the base installation are missing or old, a warning for those of an extra."""
    seen, wrong = [], []
    for requirement in requirements:
        name = requirement.name
        if name == "mmkd-clip":
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        seen.append(f"{name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{name} {version} does not satisfy {requirement.specifier}")
    if wrong:
        breaks = f'{", ".join(wrong)}: {uses} will not work; pip install --upgrade -e ".{extra}" in your clone'
        return Finding(part, "warning" if extra else "problem", ", ".join(seen) or "none installed", breaks)
    return Finding(part, "ok", ", ".join(seen))


def _without_gpu(requested: str, has_driver: bool, cuda: str | None) -> Finding:
    if requested.startswith("cuda"):
        return Finding("gpu", "problem", "none", f"--device {requested} will not work")
    if has_driver:
        build = f"for CUDA {cuda}" if cuda else "without CUDA"
        breaks = "everything runs on the CPU; install the torch build for the driver (https://pytorch.org)"
        return Finding("gpu", "warning", f"nvidia-smi is installed, but torch, built {build}, sees no device", breaks)
    breaks = "training at the paper's size takes months; evaluation and small models work"
    return Finding("gpu", "warning", "none", breaks)


def _place(name: str, path: Path) -> Finding:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(existing).free / 1e9
    seen = f"{path}, {free:.1f} GB free"
    if not os.access(existing, os.W_OK):
        return Finding(name, "problem", seen, f"{existing} cannot be written; choose another folder")
    if free < MINIMUM_DISK_GB:
        return Finding(name, "warning", seen, f"less than {MINIMUM_DISK_GB} GB: checkpoints and downloads may not fit")
    return Finding(name, "ok", seen)


def _token() -> Finding:
    token = get_token()
    if not token:
        breaks = "`mmkd push` and gated teachers do not work; run `hf auth login`, or set HF_TOKEN"
        return Finding("hub token", "warning", "none", breaks)
    try:
        return Finding("hub token", "ok", f"of {HfApi(token=token).whoami()['name']}")
    except Exception as error:  # the HTTP library of huggingface_hub depends on its version
        status = getattr(getattr(error, "response", None), "status_code", None)
        seen = f"refused (HTTP {status})" if status else f"could not be checked ({type(error).__name__})"
        return Finding("hub token", "warning", seen, "`mmkd push` does not work; run `hf auth login` again")


def _access(name: str, repo: str, repo_type: str) -> Finding:
    """Whether the token may download a teacher's weights."""
    part = f"teacher {name}"
    try:
        HfApi().auth_check(repo, repo_type=repo_type)
    except GatedRepoError:
        breaks = f"its extraction does not work; request access at https://huggingface.co/{repo}, then log in"
        return Finding(part, "warning", f"{repo} is gated, and this token has no access", breaks)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        return Finding(part, "warning", f"{repo} is not available (HTTP {status})", "its extraction does not work")
    except Exception as error:  # the HTTP library of huggingface_hub depends on its version
        return Finding(part, "warning", f"{repo} did not answer ({type(error).__name__})", "try again later")
    return Finding(part, "ok", f"{repo} is available")


def _cached(rows: Sequence[TeacherSpec]) -> Finding:
    """Without the Hub: the teachers of which its cache holds anything."""
    cache, part = Path(constants.HF_HUB_CACHE), "teachers in the cache"
    found = [row.name for row in rows if (cache / f"{row.repo_type}s--{row.weights.replace('/', '--')}").is_dir()]
    missing = ", ".join(row.name for row in rows if row.name not in found)
    if missing:
        return Finding(part, "warning", ", ".join(found) or "none", f"extraction with {missing} does not work")
    return Finding(part, "ok", ", ".join(found))


if __name__ == "__main__":
    run(DoctorSettings, main)
