"""The line that a step leaves in ``log.jsonl``: losses by name, gradient, rates, speed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mmkd.distributed import rank, world_size
from mmkd.run_folder import RunFolder


class StepLog:
    """Writes one line a step, on the first process; the console has the progress bar."""

    def __init__(self, folder: RunFolder) -> None:
        """Write into ``log.jsonl`` of `folder`."""
        self.folder = folder

    def write(self, line: Mapping[str, Any], batch: Mapping[str, Any], *, waited: float, seconds: float) -> None:
        """Add what the step cost and write the line.

        Args:
            line: ``step``, ``epoch``, losses and rates; numbers that are not finite become null.
            batch: this process' rows.
            waited: seconds spent waiting for the batch.
            seconds: seconds of the whole step, `waited` included.
        """
        if rank() > 0:
            return
        images = len(batch["ids"]) * world_size()
        speed = {"images_per_second": round(images / seconds, 2), "data_time": round(waited / seconds, 4)}
        self.folder.log({name: _plain(value) for name, value in {**line, **speed}.items()})


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
