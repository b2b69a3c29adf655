"""Encoders as they are named on the command line: a source, or ``NAME=SOURCE``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence


def by_name(
    entries: Sequence[str], name_of: Callable[[str], str], what: str, taken: Sequence[str] = ()
) -> dict[str, str]:
    """Sources by name, in the order given.

    Args:
        entries: each a source, or a name, ``=`` and a source.
        name_of: the name of a source that was given none.
        what: what they are, for messages.
        taken: names that stand for something else.

    Raises:
        ValueError: an entry has no name or no source, two have one name, or a name is taken.
    """
    named: dict[str, str] = {}
    for entry in entries:
        before, equals, after = entry.partition("=")
        source = after if equals else before
        name = folder_name(before if equals or not source else name_of(source))
        if not name or not source or name in taken:
            other = f" with a name other than {' and '.join(taken)}" if taken else ""
            raise ValueError(f"{what} {entry!r}: give a source, or NAME=SOURCE{other}")
        if name.lower() in map(str.lower, named):
            raise ValueError(f"two {what}s are called {name!r}; tell them apart with NAME=SOURCE")
        named[name] = source
    return named


def folder_name(name: str) -> str:
    """A name fit for a folder: what is neither letter, digit, ``_``, ``.``, ``+`` nor ``-`` becomes a hyphen."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.")
