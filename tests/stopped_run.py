"""A training in a process of its own, asked to stop once it has logged two steps."""

import signal
import time


def stop_while_training(process, log, patience):
    """Send SIGTERM after two lines of ``log``; returns what the process printed and its errors.

    Args:
        process: with pipes of text; killed if anything fails.
        log: file that the training fills.
        patience: seconds until the second line.
    """
    try:
        began = time.monotonic()
        while not (log.is_file() and len(log.read_text().splitlines()) >= 2):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() - began < patience
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        return process.communicate(timeout=100)
    finally:
        process.kill()
