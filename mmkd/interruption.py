"""A request to stop, as schedulers send it: the run saves, exits with 0, and is queued again."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """While it is entered, SIGTERM and SIGUSR1 (Slurm's ``--signal``) only set `requested`.

    Outside the main thread Python can set no handlers: signals then act as they always do.
    """

    def __init__(self) -> None:
        """Nothing is requested yet."""
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
