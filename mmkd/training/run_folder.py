"""``OUTPUT.partial``: settings, log and checkpoints of an unfinished run, renamed to OUTPUT at its end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmkd.command.settings import resolved, save_settings
from mmkd.files import atomic_write_text, discard, read_json, read_yaml, rename_folder, write_json

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
        changed = [key for key in now if key not in MAY_CHANGE and before.get(key) != now[key]]
        if changed:
            listed = "; ".join(f"{key} was {before.get(key)!r}, is now {now[key]!r}" for key in changed)
            raise ValueError(
                f"{self.path} holds an unfinished run with other settings: {listed}. Start it with the "
                f"same settings, choose another --output, or remove {self.path}"
            )
        known = read_json(self._data)
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
        try:
            save_file(tensors, new / "objective.safetensors")
        except SafetensorError as error:
            raise OSError(f"{new} cannot be written: {error}") from error
        write_json(new / "metadata.json", metadata)
        rename_folder(new, self._best)

    def best_weights(self) -> dict[str, Tensor]:
        """The weights of `keep_best`."""
        return load_file(self._best / "objective.safetensors")

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
