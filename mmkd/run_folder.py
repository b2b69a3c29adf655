"""``OUTPUT.partial``: settings, log and checkpoints of an unfinished run, which becomes OUTPUT in one rename."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from mmkd.files import atomic_write_text, rename_folder
from mmkd.settings import resolved, save_settings

MAY_CHANGE = ("quiet", "overwrite", "workers", "checkpoint_every", "checkpoints_kept")


class RunFolder:
    """The folder beside the output in which a run lives until it is finished."""

    def __init__(self, output: Path) -> None:
        """Name the folder; nothing is written yet."""
        self.output = output
        self.path = output.with_name(f"{output.name}.partial")
        self.checkpoints = self.path / "checkpoints"
        self._log, self._settings = self.path / "log.jsonl", self.path / "settings.yaml"

    def begin(self, settings: Any, step: int) -> None:
        """Write the settings and keep the first `step` lines of an earlier log."""
        save_settings(settings, self._settings)
        lines = self._log.read_text(encoding="utf-8").splitlines(keepends=True) if self._log.is_file() else []
        atomic_write_text(self._log, "".join(lines[:step]))

    def refuse_changes(self, settings: Any) -> None:
        """Compare with the settings of the interrupted run.

        Raises:
            ValueError: one that would change the result differs; the message names it, then and now.
        """
        before, now = yaml.safe_load(self._settings.read_text(encoding="utf-8")), resolved(settings)
        changed = [key for key in now if key not in MAY_CHANGE and before.get(key) != now[key]]
        if changed:
            listed = "; ".join(f"{key} was {before.get(key)!r}, is now {now[key]!r}" for key in changed)
            raise ValueError(
                f"{self.path} holds an unfinished run with other settings: {listed}. Start it again as it was, "
                f"choose another --output, or remove {self.path}"
            )

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to ``log.jsonl``."""
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def finish(self, write_output: Callable[[Path], None]) -> None:
        """Put what `write_output` writes, settings and log into one folder, and rename it to the output.

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
        for file in (self._settings, self._log):
            shutil.copyfile(file, final / file.name)
        rename_folder(final, self.output)
        shutil.rmtree(self.path)
