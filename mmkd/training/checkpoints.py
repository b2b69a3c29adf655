"""Numbered checkpoints beside an unfinished output, each whole or absent, from which a run goes on exactly.

A checkpoint holds weights, their average and Adam's moments as safetensors under the names of the parameters, whole
even where they are spread over processes, so that a run may go on at another number of them. Random state is not kept:
every step seeds its own. A checkpoint is written under a temporary name and renamed when its last file,
``checkpoint.json``, states the size of all the others; one whose sizes do not agree is passed over.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmkd.distributed import assign, moments, rank, set_moments, wait_for_everyone, whole, world_size
from mmkd.files import read_json, write_json
from mmkd.training.optimizer import WeightAverage

logger = logging.getLogger(__name__)

WEIGHTS, OPTIMIZER, AVERAGE = "objective.safetensors", "optimizer.safetensors", "average.safetensors"
FACTS = "checkpoint.json"


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: steps done, skipped ones included.
        skipped: steps that changed nothing, because loss or gradient were not finite.
        skipped_in_a_row: those since the last step that did.
        processes: number of processes that wrote the checkpoint.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    processes: int = 1


def save_checkpoint(
    folder: Path,
    progress: Progress,
    objective: nn.Module,
    optimizer: Any,
    average: WeightAverage | None = None,
    keep: int = 1,
) -> None:
    """Write ``folder/step-00000123`` and remove all but the newest `keep` checkpoints.

    Called by every process; the first one writes.

    Raises:
        OSError: the disk is full; checkpoints written before are untouched.
    """
    final = folder / f"step-{progress.step:08d}"
    temporary = folder / f".{final.name}.tmp"
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*.tmp"):
            shutil.rmtree(left)
        temporary.mkdir()
    _write(temporary / WEIGHTS, snapshot(objective))
    _write(temporary / OPTIMIZER, _moments(objective, optimizer))
    if average is not None:
        _write(temporary / AVERAGE, _on_first_process(average.weights.items()))
    if rank() == 0:
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        write_json(temporary / FACTS, asdict(progress) | {"processes": world_size(), "sizes": sizes})
        if final.exists():  # damaged, or the run would have gone on from it
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(folder)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    wait_for_everyone()


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder, or None; damaged ones are passed over with a warning."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("%s is passed over: %s", path, problem)
    return None


def load_checkpoint(path: Path, objective: nn.Module, optimizer: Any, average: WeightAverage | None = None) -> Progress:
    """Load what `save_checkpoint` wrote, at the same number of processes or another.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    restore(objective, load_file(path / WEIGHTS), str(path))
    state = load_file(path / OPTIMIZER)
    for name, parameter in objective.named_parameters():
        values = {key: state[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq", "step") if f"{key}/{name}" in state}
        if values and parameter.requires_grad:
            set_moments(optimizer, parameter, values)
    if average is not None:
        for name, tensor in load_file(path / AVERAGE).items():
            assign(average.weights[name], tensor)
    facts = read_json(path / FACTS)
    progress = Progress(**{field.name: int(facts[field.name]) for field in fields(Progress)})
    logger.info("resuming from %s", path)
    if progress.processes != world_size():
        logger.warning("%s was written by %d processes, now %d go on", path, progress.processes, world_size())
    return progress


def snapshot(objective: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, whole, in the memory of the first process; nothing on the others."""
    parameters = dict(objective.named_parameters())
    return _on_first_process((name, parameters.get(name, tensor)) for name, tensor in objective.state_dict().items())


def restore(objective: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Put a `snapshot` back, on every process.

    Raises:
        ValueError: it is of another model; the message names `source`.
    """
    own = objective.state_dict() | dict(objective.named_parameters())
    names = sorted(own.keys() ^ tensors.keys())
    names += [n for n in own.keys() & tensors.keys() if not _fits(own[n], tensors[n])]
    if names:
        raise ValueError(f"{source} is a checkpoint of another model: {', '.join(names[:5])} differ")
    for name, tensor in own.items():
        assign(tensor, tensors[name])


def checkpoint_bytes(objective: nn.Module, average: WeightAverage | None) -> int:
    """About how large the next checkpoint will be."""
    weights = sum(tensor.nbytes for tensor in objective.state_dict().values())
    learning = sum(4 * p.numel() for p in objective.parameters() if p.requires_grad)
    return weights + (2 + (average is not None)) * learning


def _fits(own: Tensor, other: Tensor) -> bool:
    return tuple(getattr(own, "ds_shape", own.shape)) == tuple(other.shape)


def _moments(objective: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Adam's state by ``kind/parameter``."""
    found: dict[str, Tensor] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            state = moments(optimizer, parameter)
            found |= _on_first_process((f"{key}/{name}", value) for key, value in state.items())
    return found


def _on_first_process(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    kept = {}
    for name, tensor in tensors:
        full = whole(tensor)
        if rank() == 0:
            kept[name] = full.detach().cpu().contiguous()
    return kept


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file on disk; on the first process only.

    Raises:
        OSError: the disk is full.
    """
    if rank() > 0:
        return
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    _sync(path)


def _sync(path: Path) -> None:
    """Let a file or folder survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None when it is whole."""
    try:
        sizes = read_json(path / FACTS)["sizes"]
    except (OSError, ValueError, KeyError) as error:
        return f"{FACTS} cannot be read ({error})"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is truncated or missing"
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            return f"{name} is no safetensors file ({error})"
    return None
