"""The most private memory of a process while something runs: what the kernel cannot take back, no mapped files."""

import threading
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.02


class PrivateMemory:
    """Within it a thread reads RssAnon of this process; ``peak`` is the most, in bytes."""

    def __init__(self) -> None:
        self.peak = private_bytes()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PrivateMemory":
        self._watcher.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            self.peak = max(self.peak, private_bytes())


def private_bytes() -> int:
    """RssAnon of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
