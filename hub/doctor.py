"""Look at this installation and machine: what will not work, and why.

    mmkd doctor
    mmkd doctor --device cuda --json

Exit code 0 when everything that was asked for works (warnings are about parts that may not be needed), 1 when the
package or the device that was named will not.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from mmkd.command.settings import run, setting
from mmkd.encoders.weights import require_hub

MARKS = {"ok": "  ok      ", "warning": "  WARNING ", "problem": "  PROBLEM "}


@dataclass
class DoctorSettings:
    """Look at versions, devices, memory, disk, cache and the Hub, and say what will not work."""

    device: str = setting("auto", "that is meant to be used: cpu, cuda ...; one that is not there is a problem")
    hub: bool = setting(True, "ask the Hub, whether it answers and which teachers it lets this token have")
    json: bool = setting(False, "as JSON, for other programs")


def main(settings: DoctorSettings) -> None:
    """Print the findings.

    Raises:
        SystemExit: 1 when there is a problem.
    """
    findings = examine(settings.device, settings.hub)
    counts = {status: sum(finding.status == status for finding in findings) for status in MARKS}
    if settings.json:
        print(json.dumps({**counts, "findings": [dataclasses.asdict(f) for f in findings]}, indent=2))
    else:
        print("\n".join(map(shown, findings)))
        print(f"\n{counts['problem']} problems, {counts['warning']} warnings")
    if counts["problem"]:
        raise SystemExit(1)


def shown(finding: Finding) -> str:
    """A finding on one line, and on a second one what it breaks."""
    line = f"{MARKS[finding.status]}{finding.part}: {finding.seen}"
    return f"{line}\n            {finding.breaks}" if finding.breaks else line


if __name__ == "__main__":
    run(DoctorSettings, main)

# Section: Looks at this machine and installation, and says of every part what will not work without it, and what to do.
#
# Nothing is changed and nothing is downloaded. The network is asked once, briefly; what needs it is looked at only
# where
# it answers.


if TYPE_CHECKING:
    from mmkd.encoders.spec import TeacherSpec

Status = Literal["ok", "warning", "problem"]

LEAST_MEMORY_GB, LEAST_DISK_GB = 4, 5

PYTHON = (3, 10)

EXTRAS = {
    "train": "pretrain, distill and finetune",
    "teachers": "teachers in open_clip's and timm's form, and timm backbones",
    "eval": "linear probes and the report",
    "slides": "mmkd tile, diagnosis and survival on bags",
    "export": "mmkd export --format onnx and int8",
    "curate": "curating huge collections",
    "demo": "mmkd quickstart and the packaged images and weights",
}


@dataclass(frozen=True)
class Finding:
    """What was seen of one part.

    Attributes:
        part: what was looked at.
        status: ok, warning (something optional will not work) or problem (the package will not).
        seen: what is there.
        breaks: what will not work and what to do; empty where all is well.
    """

    part: str
    status: Status
    seen: str
    breaks: str = ""


def examine(device: str, asks_hub: bool) -> list[Finding]:
    """All findings.

    Args:
        device: that is meant to be used; auto, cpu, cuda ...
        asks_hub: look also whether the Hub answers and what it lets this token have.
    """
    found = [*versions(), *devices(device), memory(), *disk()]
    return [*found, *(hub() if asks_hub else [])]


def versions() -> list[Finding]:
    """Python, the packages that are needed, and those of every extra."""
    python = platform.python_version()
    wanted = ".".join(map(str, PYTHON))
    old = f"mmkd-clip needs {wanted} or newer" if sys.version_info < PYTHON else ""
    found = [Finding("python", "problem" if old else "ok", f"{python} on {platform.platform()}", old)]
    required: dict[str, list[str]] = {"": []}
    for line in importlib.metadata.requires("mmkd-clip") or ():
        marker = re.search(r"extra == ['\"](\w+)['\"]", line)
        required.setdefault(marker[1] if marker else "", []).append(line.partition(";")[0].strip())
    found.append(_packages("packages", required[""], "the package", "", "problem"))
    for extra, uses in EXTRAS.items():
        if extra in required:
            found.append(_packages(f"extra [{extra}]", required[extra], uses, f"[{extra}]", "warning"))
    return found


def devices(wanted: str) -> list[Finding]:
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
        found.append(_without_gpu(wanted, shutil.which("nvidia-smi") is not None, torch.version.cuda))
    return found


def memory() -> Finding:
    """Main memory that is free."""
    try:
        page = os.sysconf("SC_PAGE_SIZE") / 1e9
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return Finding("memory", "ok", "not told by this system")
    seen = f"{total:.1f} GB, {free:.1f} GB unused"
    if total < LEAST_MEMORY_GB:
        return Finding("memory", "warning", seen, "a model of the paper's size trains with 16 GB; take smaller batches")
    return Finding("memory", "ok", seen)


def disk() -> list[Finding]:
    """Room and the right to write where things are written: here, in the Hub's cache, and for temporary files."""
    places = {"this folder": Path.cwd(), "the Hub's cache": Path(constants.HF_HUB_CACHE)}
    places["temporary files"] = Path(tempfile.gettempdir())
    return [_place(name, path) for name, path in places.items()]


def hub() -> list[Finding]:
    """Whether the Hub answers, whose token there is, and which teachers it lets have."""
    from mmkd.encoders.zoo import TEACHERS

    needs = "downloads of teachers and `mmkd push`"
    rows = [row for row in TEACHERS.values() if row.weights.count("/") == 1]
    if constants.HF_HUB_OFFLINE:
        offline = Finding("hub", "warning", "HF_HUB_OFFLINE is set", f"{needs} will not work; unset it")
        return [offline, _cached(rows)]
    try:
        require_hub()
    except OSError as error:
        told = f"{needs} will not work; set HF_ENDPOINT to a mirror, or copy the cache from a machine with a network"
        return [Finding("hub", "warning", " ".join(str(error).split()), told), _cached(rows)]
    with ThreadPoolExecutor(max_workers=10) as pool:
        token = pool.submit(_token)
        access = list(pool.map(lambda row: _access(row.name, row.weights, row.repo_type), rows))
    return [Finding("hub", "ok", f"{constants.ENDPOINT} answers"), token.result(), *access]


def _packages(part: str, lines: Iterable[str], uses: str, extra: str, status: Status) -> Finding:
    seen, wrong = [], []
    for line in lines:
        name, least = re.match(r"[\w.-]+", line), re.search(r">=\s*([\d.]+)", line)
        if name is None or name[0] == "mmkd-clip":
            continue
        try:
            version = importlib.metadata.version(name[0])
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name[0]} is missing")
            continue
        seen.append(f"{name[0]} {version}")
        if least and _numbers(version) < _numbers(least[1]):
            wrong.append(f"{name[0]} {version} is older than {least[1]}")
    if wrong:
        told = f'{", ".join(wrong)}: {uses} will not work; pip install --upgrade "mmkd-clip{extra}"'
        return Finding(part, status, ", ".join(seen) or "none of it", told)
    return Finding(part, "ok", ", ".join(seen))


def _without_gpu(wanted: str, has_driver: bool, built_for: str | None) -> Finding:
    if wanted.startswith("cuda"):
        return Finding("gpu", "problem", "none", f"--device {wanted} will not work")
    if has_driver:
        built = f"for CUDA {built_for}" if built_for else "without CUDA"
        told = "everything runs on the CPU; install the torch that fits the driver (https://pytorch.org)"
        return Finding("gpu", "warning", f"nvidia-smi is there, but torch, built {built}, sees no device", told)
    told = "training at the paper's size will take months; evaluation and small models work"
    return Finding("gpu", "warning", "none", told)


def _place(name: str, path: Path) -> Finding:
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(there).free / 1e9
    seen = f"{path}, {free:.1f} GB free"
    if not os.access(there, os.W_OK):
        return Finding(name, "problem", seen, f"{there} cannot be written; choose another place")
    if free < LEAST_DISK_GB:
        return Finding(name, "warning", seen, f"less than {LEAST_DISK_GB} GB: checkpoints and downloads may not fit")
    return Finding(name, "ok", seen)


def _token() -> Finding:
    token = get_token()
    if not token:
        told = "`mmkd push` and gated teachers will not work; `hf auth login`, or set HF_TOKEN"
        return Finding("hub token", "warning", "none", told)
    try:
        return Finding("hub token", "ok", f"of {HfApi(token=token).whoami()['name']}")
    except Exception as error:  # an HTTP library of whichever name
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = f"refused (HTTP {status})" if status else f"could not be checked ({type(error).__name__})"
        return Finding("hub token", "warning", said, "`mmkd push` will not work; `hf auth login` again")


def _access(name: str, repo: str, repo_type: str) -> Finding:
    """Whether this token may have a teacher's weights."""
    part = f"teacher {name}"
    try:
        HfApi().auth_check(repo, repo_type=repo_type)
    except GatedRepoError:
        told = f"extracting with it will not work; ask for access at https://huggingface.co/{repo}, then log in"
        return Finding(part, "warning", f"{repo} is gated, and this token has no access", told)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        return Finding(part, "warning", f"{repo} cannot be had (HTTP {status})", "extracting with it will not work")
    except Exception as error:  # an HTTP library of whichever name
        return Finding(part, "warning", f"{repo} did not answer ({type(error).__name__})", "try again later")
    return Finding(part, "ok", f"{repo} can be had")


def _cached(rows: Sequence[TeacherSpec]) -> Finding:
    """Without the Hub: which teachers its cache holds something of."""
    cache, part = Path(constants.HF_HUB_CACHE), "teachers in the cache"
    found = [row.name for row in rows if (cache / f"{row.repo_type}s--{row.weights.replace('/', '--')}").is_dir()]
    missing = ", ".join(row.name for row in rows if row.name not in found)
    if missing:
        return Finding(part, "warning", ", ".join(found) or "none", f"extracting with {missing} will not work")
    return Finding(part, "ok", ", ".join(found))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])
