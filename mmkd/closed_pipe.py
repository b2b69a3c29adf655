"""Output that nobody reads any more, as of ``mmkd eval --help | head``: the command ends without a word."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

CLOSED = 141  # 128 + SIGPIPE: how a shell tells that the reader of a pipe left first


@contextlib.contextmanager
def ends_when_unread() -> Iterator[None]:
    """Flush what the block prints; where its reader has gone, nothing is said and nothing more is written.

    Other broken pipes, such as that of a process that died, stay errors.

    Raises:
        SystemExit: with 141, standard output is a closed pipe.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again as it ends
        raise SystemExit(CLOSED) from None


def _is_unread() -> bool:
    """Whether standard output takes no further line, whatever is buffered of it."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False
