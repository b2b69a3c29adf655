"""Trackers of a run, its environment and commit, and the plot of its losses.

Nothing is sent by default: TensorBoard writes files beside the output, and a tracker that sends data to a server
(wandb, trackio ...) is used only when it is named. Names of hosts, users and folders are not written.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmkd.command.settings import nearest
from mmkd.data.provenance import installed_versions
from mmkd.distributed import world_size
from mmkd.files import is_inside, write_json

AUTO, NONE = "auto", "none"
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
ENVIRONMENT_FILE, CURVE_FILE, TENSORBOARD_FOLDER = "environment.json", "loss.png", "tensorboard"
PACKAGES = ("mmkd-clip", "torch", "torchvision", "transformers", "accelerate", "numpy", "pillow", "simplejpeg", "peft")
CURVE_POINTS = 2000
PACKAGE = Path(__file__).resolve().parents[2]  # the checkout, or site-packages


def chosen_trackers(names: Sequence[str]) -> list[str]:
    """The trackers to use: ``auto`` is TensorBoard if it is installed, ``none`` is no tracker.

    Raises:
        ValueError: an unknown name, a tracker that is not installed, or ``auto`` or ``none`` beside others.
    """
    if list(names) == [AUTO]:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    if list(names) == [NONE]:
        return []
    for name in names:
        if name not in TRACKERS:
            allowed = ", ".join(TRACKERS)
            raise ValueError(f"--trackers {name}{nearest(name, TRACKERS)}: give {allowed}, or {AUTO} or {NONE} alone")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--trackers {name} is not installed; run `pip install {name}`, or give {NONE}")
    return list(names)


def tracker_options(name: str, step: int) -> dict[str, dict[str, Any]]:
    """Options of each tracker for a run of this name that resumes after `step`."""
    named = {"name": name}
    return {"tensorboard": {"purge_step": step + 1}, "wandb": {**named, "resume": "allow"}, "trackio": named}


def plain_settings(settings: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Settings as trackers accept them: one level, names joined by dots, other types as text."""
    flat: dict[str, str | int | float | bool] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in plain_settings(value).items()}
        else:
            flat[name] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return flat


def environment(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The environment of a run: versions, devices, processes and the commit of the code.

    Args:
        extra: further entries, as JSON values.
    """
    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if cuda else []
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": installed_versions(PACKAGES),
        "devices": devices or [platform.processor() or platform.machine()],
        "cuda": torch.version.cuda if cuda else None,
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "package_commit": git_commit(PACKAGE),
        "folder_commit": git_commit(Path.cwd()),
        **extra,
    }


def git_commit(folder: Path) -> str | None:
    """Commit that is checked out in a folder with a ``.git``; None elsewhere.

    The files of git are read and git itself is never started: the configuration of a repository can name programs that
    git then runs, and the folder may be anybody's.
    """
    place = folder / ".git"
    try:
        if place.is_file():  # a worktree or submodule: ``gitdir: FOLDER``
            place = folder / place.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        head = (place / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return _commit(head)
        reference = head.removeprefix("ref: ")
        shared = place / "commondir"
        common = place / shared.read_text(encoding="utf-8").strip() if shared.is_file() else place
        if is_inside(reference) and (common / reference).is_file():
            return _commit((common / reference).read_text(encoding="utf-8").strip())
        packed = (common / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next((_commit(line.split()[0]) for line in packed if line.endswith(f" {reference}")), None)
    except (OSError, ValueError):
        return None


def _commit(text: str) -> str | None:
    return text if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) else None


def write_environment(folder: Path, extra: Mapping[str, Any]) -> None:
    """Write ``environment.json``."""
    write_json(folder / ENVIRONMENT_FILE, environment(extra))


def draw_losses(log: Path, output: Path) -> bool:
    """Plot the losses of a ``log.jsonl`` over steps as PNG, with their moving means.

    Args:
        log: the file.
        output: the PNG file to write.

    Returns:
        Whether it was written: it needs matplotlib and a log of at least two steps.
    """
    curves = _curves(log)
    if importlib.util.find_spec("matplotlib") is None or len(curves.get("loss", ())) < 2:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(curves), 3.2), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        steps, values = zip(*points, strict=True)
        window = max(1, len(values) // 50)
        means = [sum(values[max(0, k - window + 1) : k + 1]) / min(window, k + 1) for k in range(len(values))]
        axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
        axes.plot(steps, means, color="tab:blue", linewidth=1.6)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    figure.savefig(output, format="png", dpi=120, metadata={"Software": None})
    return True


def _curves(log: Path) -> dict[str, list[tuple[int, float]]]:
    """Points of the loss, its parts and the validation losses, thinned for the plot."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    if not lines:
        return {}
    first = list(lines[0])
    names = first[first.index("epoch") + 1 : first.index("gradient_norm")] if "gradient_norm" in first else ["loss"]
    names += sorted({name for line in lines for name in line if name.startswith("validation_loss")})
    thin = max(1, len(lines) // CURVE_POINTS)
    kept = [line for number, line in enumerate(lines) if number % thin == 0 or any(n not in first for n in line)]
    points = {name: [(line["step"], line[name]) for line in kept if line.get(name) is not None] for name in names}
    return {name: found for name, found in points.items() if found}
