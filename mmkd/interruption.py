"""A request to stop, as schedulers send it: the run saves, exits with 0, and is queued again."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """While it is entered, SIGTERM and SIGUSR1 (Slurm's ``--signal``) only set `requested`.

    Outside the main thread Python can set no handlers: signals then act as they always do.
    """

    def __init__(self, pass_on: Callable[[int], None] | None = None) -> None:
        """Nothing is requested yet; ``pass_on`` hands a signal to whom else it concerns."""
        self.requested = False
        self._pass_on = pass_on
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

    def _take(self, number: int, _frame: FrameType | None) -> None:
        self.requested = True
        if self._pass_on is not None:
            self._pass_on(number)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Requests to stop wait until the block ends; a process that is started in it holds them until `let_through`."""
    _mask("SIG_BLOCK")
    try:
        yield
    finally:
        let_through()


def let_through() -> None:
    """Requests to stop reach this process again."""
    _mask("SIG_UNBLOCK")


def _mask(how: str) -> None:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(getattr(signal, how), SIGNALS)
