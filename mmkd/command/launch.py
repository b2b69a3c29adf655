"""A launcher of several processes, watched: a signal to `mmkd` reaches those whom it concerns.

Schedulers, containers and users stop the process they know, which is `mmkd`. torchrun would answer SIGTERM by ending
its processes after half a minute and report a failure; the training processes themselves save after the step at hand
and exit with 0, whereupon the launcher does too. So requests to stop go to them, and all else to the launcher. It runs
in a session of its own, since a scheduler that signals the whole group would reach the launcher as well.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

TO_THE_LAUNCHER = tuple(getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name))


def launch(command: Sequence[str], environment: Mapping[str, str], module: str) -> int:
    """Run a launcher to its end; outside the main thread, where Python sets no handlers, signals act as they always do.

    Args:
        command: of torchrun or ``accelerate launch``.
        environment: what is set for it beside this process' own.
        module: what its processes run, by which they are known.

    Returns:
        Its exit code.
    """
    launcher = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)

    def pass_on(number: int, _frame: FrameType | None) -> None:
        asked = training_processes(launcher.pid, module) if number in SIGNALS else []
        for process in asked or [launcher.pid]:
            _send(process, number)

    handled = (*SIGNALS, *TO_THE_LAUNCHER) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, pass_on) for number in handled}
    try:
        return launcher.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def training_processes(launcher: int, module: str) -> list[int]:
    """Numbers of the processes that a launcher has started to run a module, without those that these started."""
    import psutil

    found = []
    for child in psutil.Process(launcher).children():
        try:
            if module in child.cmdline():
                found.append(child.pid)
        except psutil.Error:  # it has just ended
            continue
    return found


def _send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


# Section: A request to stop, as schedulers send it: the run saves, exits with 0, and is queued again.


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
