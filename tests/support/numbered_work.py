"""A stage of numbered items for other processes: each writes one file; one kills its process first, once."""

import os
import signal
import time
from pathlib import Path

FATAL, WRONG, SLOW, WRONG_LATER = 3, -1, -2, -3
PATIENCE = 120  # seconds


def write_numbers(folder, numbers, progress):
    for number in numbers:
        if number == WRONG:
            raise ValueError("this number is wrong")
        if number == SLOW:
            sleep_until_stopped(Path(folder))
        if number == WRONG_LATER:
            wait_for(Path(folder, "slow"))
            raise ValueError("this number is wrong")
        if number == FATAL and not Path(folder, "killed").exists():
            Path(folder, "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        Path(folder, str(number)).write_text(str(number))  # of the working directory of the command
        progress(1)


def sleep_until_stopped(folder):
    """Writes ``slow``, and ``stopped`` when the task is cancelled."""
    Path(folder, "slow").touch()
    try:
        wait_for(Path(folder, "never"))
    except BaseException:
        Path(folder, "stopped").touch()
        raise


def wait_for(path):
    end = time.monotonic() + PATIENCE
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
