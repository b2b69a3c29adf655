"""A few steps under torch's profiler, for whoever asks where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmkd.distributed import rank

PROFILE_FOLDER = "profile"
SKIPPED_STEPS = 2  # the first ones start workers, allocate and compile
TABLE_ROWS = 40


@contextmanager
def profiled_steps(folder: Path, steps: int | None) -> Iterator[Callable[[], None]]:
    """Record some steps of the first process, after the first two.

    ``folder/profile`` gets ``trace.json``, which a browser's ``chrome://tracing`` or Perfetto shows, and
    ``operators.txt``, the dearest operators.

    Args:
        folder: the run's.
        steps: how many to record; None for none.

    Yields:
        What to call after each step.
    """
    if steps is None or rank() > 0:
        yield lambda: None
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(
        activities=activities,
        schedule=schedule,
        on_trace_ready=lambda profiler: _write(profiler, folder / PROFILE_FOLDER),
        profile_memory=True,
    ) as profiler:
        yield profiler.step


def _write(profiler: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=TABLE_ROWS)
    (folder / "operators.txt").write_text(table, encoding="utf-8")
