"""Numbered checkpoints beside an unfinished output, each whole or absent, from which a run goes on exactly.

A checkpoint holds the objective, the optimizer and every process' random state. It is written under a temporary name
and renamed when its last file, ``checkpoint.json``, states the size of all the others; one whose sizes do not agree is
passed over. Nothing in it is unpickled.
"""

from __future__ import annotations

import io
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from mmkd.distributed import rank, wait_for_everyone
from mmkd.files import atomic_write_bytes, read_json, write_json

logger = logging.getLogger(__name__)


def save_checkpoint(folder: Path, step: int, objective: nn.Module, optimizer: Any, keep: int) -> None:
    """Write ``folder/step-00000123`` and remove all but the newest `keep` checkpoints.

    Called by every process; the first one writes all but the others' random states.

    Raises:
        OSError: the disk is full; checkpoints written before are untouched.
    """
    final = folder / _name(step)
    temporary = folder / f".{_name(step)}.tmp"
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    wait_for_everyone()
    atomic_write_bytes(temporary / f"random-{rank()}.safetensors", save(_random_state()))
    if rank() == 0:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in objective.state_dict().items()}
        atomic_write_bytes(temporary / "objective.safetensors", save(tensors))
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        atomic_write_bytes(temporary / "optimizer.pt", buffer.getvalue())
    wait_for_everyone()
    if rank() == 0:
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        write_json(temporary / "checkpoint.json", {"step": step, "sizes": sizes})
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder, or None; damaged ones are passed over with a warning."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        problem = _damage(path)
        if problem is None:
            return path
        logger.warning("%s is passed over: %s", path, problem)
    return None


def load_checkpoint(path: Path, objective: nn.Module, optimizer: Any) -> int:
    """Load what `save_checkpoint` wrote into objective and optimizer; returns the step.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    tensors = load((path / "objective.safetensors").read_bytes())
    try:
        objective.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} is a checkpoint of another model: {error}") from None
    device = next(objective.parameters()).device
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location=device, weights_only=True))
    random = path / f"random-{rank()}.safetensors"
    if random.is_file():
        _set_random_state(load(random.read_bytes()))
    return int(read_json(path / "checkpoint.json")["step"])


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None when it is whole."""
    try:
        sizes = read_json(path / "checkpoint.json")["sizes"]
    except (OSError, ValueError, KeyError) as error:
        return f"checkpoint.json cannot be read ({error})"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is truncated or missing"
    return None


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
