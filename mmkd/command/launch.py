"""Start several processes, and forward signals from `mmkd` to them.

Schedulers, containers and users send their signal to `mmkd`. torchrun ends its processes half a minute after SIGTERM
and reports a failure, whereas a training process saves after the current step and exits with 0, as then does the
launcher. Requests to stop (SIGTERM, SIGUSR1) are therefore forwarded to the training processes, other signals to the
launcher. The launcher runs in a session of its own, out of reach of a signal to the whole process group.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux; it is kept by the program that takes the place of the process
MOST_OPEN_FILES = 65536
STARTER = (
    "import os, sys; from mmkd.command.launch import end_with_parent; end_with_parent(); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
LAUNCHER_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name))


def launch(command: Sequence[str], environment: Mapping[str, str], module: str) -> int:
    """Run a launcher to its end and forward signals; outside the main thread signals keep their usual effect.

    Args:
        command: of torchrun or ``accelerate launch``.
        environment: variables to set in addition to those of this process.
        module: the module that its processes run, by which they are found.

    Returns:
        Its exit code.
    """
    here = [sys.executable, "-c", STARTER, *command]
    launcher = subprocess.Popen(here, env=os.environ | environment, start_new_session=True)

    def forward(number: int, _frame: FrameType | None) -> None:
        training = training_processes(launcher.pid, module) if number in SIGNALS else []
        for process in training or [launcher.pid]:
            _send(process, number)

    handled = (*SIGNALS, *LAUNCHER_SIGNALS) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, forward) for number in handled}
    try:
        return launcher.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Let the system end this process when the one that started it dies, even by SIGKILL; on Linux alone.

    Without it, the processes of a killed launcher go on training, and keep their GPUs.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGKILL)


def allow_open_files() -> None:
    """Raise this process' limit of open files to what the system lets the user have, at most `MOST_OPEN_FILES`.

    Each shard of features that is read stays mapped, which keeps its file open, and so does each client of a service;
    the usual limit of 1,024 is reached by nine teachers' features of two million pairs.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def training_processes(launcher: int, module: str) -> list[int]:
    """Process ids of a launcher's direct children that run a module."""
    import psutil

    found = []
    for child in psutil.Process(launcher).children():
        try:
            if module in child.cmdline():
                found.append(child.pid)
        except psutil.Error:  # it has ended
            continue
    return found


def _send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


class StopRequest:
    """A request to stop, as schedulers send it: a context in which SIGTERM and SIGUSR1 only set `requested`.

    The run saves, exits with 0, and can be queued again. Outside the main thread Python sets no handlers, and signals
    have their usual effect.
    """

    def __init__(self, forward: Callable[[int], None] | None = None) -> None:
        """Nothing is requested yet; ``forward`` also passes the signal to other processes."""
        self.requested = False
        self._forward = forward
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
        if self._forward is not None:
            self._forward(number)


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Block requests to stop within the context; a process started in it blocks them until `unblock_signals`."""
    _mask("SIG_BLOCK")
    try:
        yield
    finally:
        unblock_signals()


def unblock_signals() -> None:
    """Unblock requests to stop in this process."""
    _mask("SIG_UNBLOCK")


def _mask(how: str) -> None:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(getattr(signal, how), SIGNALS)
