"""An unfinished run: ``OUTPUT.partial`` with its settings, log and checkpoints, from which it resumes exactly.

Checkpoints are numbered, each whole or absent. One holds weights, their average and Adam's moments as safetensors under
the names of the parameters, whole even where they are sharded, so that a run may resume on another number of processes.
Random state is not saved: every step has its own seed. A checkpoint is written under a temporary name and renamed when
its last file, ``checkpoint.json``, states the checksums of all the others; one whose checksums do not agree is skipped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from mmkd.command.settings import resolved, save_settings
from mmkd.distributed import (
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
    rank,
    unshard,
    wait_for_everyone,
    world_size,
)
from mmkd.files import (
    as_written,
    atomic_write_text,
    discard,
    fingerprint,
    is_folder_name,
    read_json,
    read_object,
    read_yaml,
    rename_folder,
    write_json,
)
from mmkd.training.optimizer import WeightAverage
from mmkd.training.settings import LoopSettings

logger = logging.getLogger(__name__)

WEIGHTS, OPTIMIZER, AVERAGE = "objective.safetensors", "optimizer.safetensors", "average.safetensors"
PROGRESS = "checkpoint.json"
MAY_CHANGE = (
    *("quiet", "overwrite", "workers", "checkpoint_every", "checkpoints_kept", "skipped_in_a_row"),
    *("micro_batch_size", "gradient_checkpointing"),  # the same gradient, to rounding
    *("trackers", "peak_tflops", "profile_steps"),
    *("executor", "tasks", "resources"),
)
LOG_FILE, SETTINGS_FILE = "log.jsonl", "settings.yaml"
KEPT = (SETTINGS_FILE, LOG_FILE, "environment.json", "loss.png", "tensorboard", "profile")  # beside the output
SPARE_BYTES = 64 * 1024**2  # for logs and tokenizer, beside weights


class RunFolder:
    """The folder of an unfinished run, beside the output."""

    def __init__(self, output: Path) -> None:
        """Choose the paths; nothing is written yet."""
        self.output = output
        self.path = output.with_name(f"{output.name}.partial")
        self.checkpoints = self.path / "checkpoints"
        self._log, self._settings = self.path / LOG_FILE, self.path / SETTINGS_FILE
        self._data, self._best = self.path / "data.json", self.path / "best"
        self.best_weights = self._best / WEIGHTS

    def begin(self, settings: Any, data: Mapping[str, Any], step: int) -> None:
        """Write the settings and the identity of the data, and cut an earlier log after `step`."""
        save_settings(settings, self._settings)
        write_json(self._data, data)
        lines = self._log.read_text(encoding="utf-8").splitlines(keepends=True) if self._log.is_file() else []
        atomic_write_text(self._log, "".join(line for line in lines if _step(line) <= step))

    def refuse_changes(self, settings: Any, data: Mapping[str, Any]) -> None:
        """Compare with the settings and the data of the interrupted run.

        Raises:
            ValueError: one that would change the result differs; the message names the old and the new value.
        """
        before, now = read_yaml(self._settings), resolved(settings)
        with as_written():
            changed = [key for key in now if key not in MAY_CHANGE and before.get(key) != now[key]]
        if changed:
            listed = "; ".join(f"{key} was {before.get(key)!r}, is now {now[key]!r}" for key in changed)
            raise ValueError(
                f"{self.path} holds an unfinished run with other settings: {listed}. Start it with the "
                f"same settings, choose another --output, or remove {self.path}"
            )
        known = read_object(self._data)
        changed = [key for key in data if known.get(key) != data[key]]
        if changed:
            listed = "; ".join(f"{key} was {known.get(key)}, is now {data[key]}" for key in changed)
            raise ValueError(
                f"{self.path} holds an unfinished run on other data: {listed}. Restore the data (and a "
                "number of processes that divides the batch in the same way), choose another --output, or remove "
                f"{self.path}"
            )

    def require_space(self, checkpoint_bytes: int) -> None:
        """Refuse to continue if the next checkpoint would not fit on the disk.

        Raises:
            OSError: the message states the free and the required space.
        """
        free = shutil.disk_usage(self.path).free
        if free < checkpoint_bytes + SPARE_BYTES:
            raise OSError(
                f"{self.path}: {free / 1e9:.2f} GB are free, but the next checkpoint needs "
                f"{(checkpoint_bytes + SPARE_BYTES) / 1e9:.2f} GB; free some space and run the same command to resume"
            )

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to ``log.jsonl``."""
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def sync_log(self) -> None:
        """Flush the log to the disk, before a checkpoint relies on it."""
        if self._log.is_file():
            with self._log.open("rb") as file:
                os.fsync(file.fileno())

    def best(self) -> dict[str, Any] | None:
        """The metadata of the weights that `keep_best` kept last."""
        metadata = self._best / "metadata.json"
        return read_json(metadata) if metadata.is_file() else None

    def keep_best(self, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Keep weights and their metadata, instead of those kept before.

        Raises:
            OSError: the disk is full; those kept before stay.
        """
        new = self._best.with_name("best.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        _write(new / WEIGHTS, tensors)
        write_json(new / "metadata.json", metadata)
        rename_folder(new, self._best)

    def finish(self, write_output: Callable[[Path], None]) -> None:
        """Write the output with settings, log and the other files in `KEPT` into one folder, and rename it.

        Raises:
            OSError: the disk is full; the checkpoints stay, and the same command finishes the run.
        """
        final = self.path / "final"
        shutil.rmtree(final, ignore_errors=True)
        final.mkdir()
        try:
            write_output(final)
        except SafetensorError as error:
            raise OSError(f"{final} cannot be written: {error}") from error
        for source in (self.path / name for name in KEPT if (self.path / name).exists()):
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, final / source.name)
        rename_folder(final, self.output)
        discard(self.path, self.output)


def _step(line: str) -> float:
    """The step of a line; infinite for a truncated line."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return int(json.loads(line)["step"])
    return float("inf")


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

    def count(self, is_finite: bool) -> int:
        """Count a step, as skipped where it was not finite; returns the steps done."""
        self.step += 1
        self.skipped += not is_finite
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        return self.step


class Checkpoints:
    """Saves and resumes one run; every method is called by every process, and the first one writes."""

    def __init__(
        self,
        folder: RunFolder,
        settings: LoopSettings,
        objective: nn.Module,
        optimizer: Optimizer,
        average: WeightAverage,
    ) -> None:
        """Keep the state of `objective`, `optimizer` and `average`, prepared for all processes, in `folder`."""
        self.folder, self.settings = folder, settings
        self.objective, self.optimizer, self.average = objective, optimizer, average

    def resume(self, data: Mapping[str, Any]) -> Progress:
        """Load the newest whole checkpoint, if there is one, and cut the log back to it.

        Args:
            data: identity of the batches.

        Raises:
            ValueError: settings or data differ from those of the interrupted run, or it trained another model.
            OSError: there is no room for the next checkpoint.
        """
        newest, progress = newest_checkpoint(self.folder.checkpoints), Progress()
        if newest is not None:
            self.folder.refuse_changes(self.settings, data)
            progress = self._load(newest)
        wait_for_everyone()
        if rank() == 0:
            self.folder.begin(self.settings, data, progress.step)
        wait_for_everyone()
        self.folder.require_space(self._bytes())
        return progress

    def save(self, progress: Progress) -> None:
        """Write ``checkpoints/step-00000123`` and remove all but the newest few; the next one must fit, too.

        Raises:
            OSError: the disk is full; checkpoints written before are untouched.
        """
        self.folder.sync_log()
        place = self.folder.checkpoints
        final = place / f"step-{progress.step:08d}"
        temporary = place / f".{final.name}.tmp"
        if rank() == 0:
            place.mkdir(parents=True, exist_ok=True)
            for left in place.glob(".step-*.tmp"):
                shutil.rmtree(left)
            temporary.mkdir()
        _write(temporary / WEIGHTS, model_state(self.objective))
        _write(temporary / OPTIMIZER, optimizer_state(self.objective, self.optimizer))
        if self.average.weights:
            with self.average.applied(self.objective):
                averaged = model_state(self.objective)
                _write(temporary / AVERAGE, {n: tensor for n, tensor in averaged.items() if n in self.average.weights})
        if rank() == 0:
            sums = {path.name: fingerprint([path]) for path in sorted(temporary.iterdir())}
            write_json(temporary / PROGRESS, asdict(progress) | {"processes": world_size(), "sha256": sums})
            if final.exists():  # damaged, or the run would have resumed from it
                shutil.rmtree(final)
            temporary.rename(final)
            _sync(place)
            for old in sorted(place.glob("step-*"))[: -self.settings.checkpoints_kept]:
                shutil.rmtree(old)
        wait_for_everyone()
        self.folder.require_space(self._bytes())

    def finish(self, write_output: Callable[[Path], None], best: bool) -> None:
        """Write the output: the `best` weights where validation kept some, else the average, else the last."""
        if best and self.folder.best() is not None:
            state = load_file(self.folder.best_weights) if rank() == 0 else {}
        else:
            with self.average.applied(self.objective):
                state = {name: tensor.clone() for name, tensor in model_state(self.objective).items()}
        if rank() == 0:
            unshard(self.objective, state)
            self.objective.eval()
            self.folder.finish(write_output)

    def _load(self, path: Path) -> Progress:
        weights = load_file(path / WEIGHTS)
        try:
            if self.average.weights:
                load_model_state(self.objective, weights | load_file(path / AVERAGE))
                self.average.reset(self.objective)
            load_model_state(self.objective, weights)
        except RuntimeError as error:
            raise ValueError(f"{path} is a checkpoint of another model: {error}") from None
        load_optimizer_state(self.objective, self.optimizer, load_file(path / OPTIMIZER))
        found = read_json(path / PROGRESS)
        progress = Progress(**{field.name: int(found[field.name]) for field in fields(Progress)})
        logger.info("resuming from %s", path)
        if progress.processes != world_size():
            logger.warning("%s was written by %d processes, now there are %d", path, progress.processes, world_size())
        return progress

    def _bytes(self) -> int:
        """Approximate size of the next checkpoint."""
        weights = sum(tensor.nbytes for tensor in self.objective.state_dict().values())
        trainable = sum(4 * p.numel() for p in self.objective.parameters() if p.requires_grad)
        return weights + (2 + bool(self.average.weights)) * trainable


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder, or None; damaged ones are skipped with a warning."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("%s is skipped: %s", path, problem)
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None when it is whole."""
    try:
        found = read_json(path / PROGRESS)
        sums = {name: str(found["sha256"][name]) for name in found["sha256"] if is_folder_name(name)}
        numbers = [int(found[field.name]) for field in fields(Progress)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{PROGRESS} cannot be read ({error})"
    if not {WEIGHTS, OPTIMIZER} <= sums.keys() or min(numbers) < 0:
        return f"{PROGRESS} lacks entries"
    for name, expected in sums.items():
        if not (path / name).is_file() or fingerprint([path / name]) != expected:
            return f"{name} is missing, or not as it was written"
    return None


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
