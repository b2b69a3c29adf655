"""A stage of numbered items for other processes: each writes one file; one kills its process first, once."""

import os
import signal
from pathlib import Path

FATAL, WRONG = 3, -1


def write_numbers(folder, numbers, progress):
    for number in numbers:
        if number == WRONG:
            raise ValueError("this number is wrong")
        if number == FATAL and not Path(folder, "killed").exists():
            Path(folder, "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        Path(folder, str(number)).write_text(str(number))  # of the working directory of the command
        progress(1)
