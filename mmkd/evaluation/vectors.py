"""Vectors by key: half-precision shards on disk, memory-mapped, read as the rows a task asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]


class Undefined(Exception):
    """An encoder cannot answer a task; the message says why and stands in its cell in place of numbers."""


class Table(Mapping[str, Vectors]):
    """Vectors ``(dim,)`` by key, kept as parts ``(rows, dim)`` of any floating type that are read when asked for."""

    def __init__(self, keys: Sequence[str], parts: Sequence[Any]) -> None:
        """Number the keys: in the order of the rows of all parts, one after another.

        Args:
            keys: distinct.
            parts: arrays, or what gives rows as they do (`StoredRows`).

        Raises:
            ValueError: there are not as many keys as rows.
        """
        self._parts = [part for part in parts if len(part)]
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        self._rows = {key: row for row, key in enumerate(keys)}
        if len(keys) != self._starts[-1]:
            raise ValueError(f"{len(keys)} keys for {self._starts[-1]} vectors")

    def missing(self, keys: Sequence[str]) -> int:
        """How many of some keys have no vector."""
        return sum(key not in self._rows for key in keys)

    def numbers(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Row of each key, ``(n,)``.

        Raises:
            KeyError: one of them has none.
        """
        return np.fromiter(map(self._rows.__getitem__, keys), np.int64, len(keys))

    def numbered(self, rows: NDArray[np.int64]) -> Vectors:
        """Vectors in some rows, ``(n, dim)`` float32."""
        found = np.empty((len(rows), self._parts[0].shape[1] if self._parts else 0), dtype=np.float32)
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(owner):
            places = np.flatnonzero(owner == number)
            local = rows[places] - self._starts[number]
            found[_slice(places)] = self._parts[number][_slice(local)]
        return found

    def __getitem__(self, key: str) -> Vectors:
        return self.numbered(self.numbers([key]))[0]

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class Rows:
    """Vectors ``(n, dim)`` of n keys of a table; ``rows[start:stop]`` reads a stretch of them as float32."""

    def __init__(self, table: Table, keys: Sequence[str]) -> None:
        """Look the keys up; nothing is read yet.

        Raises:
            KeyError: one of them has no vector.
        """
        self._table, self._numbers = table, table.numbers(keys)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, part: slice) -> Vectors:
        return self._table.numbered(self._numbers[part])


def rows_of(vectors: Mapping[str, Vectors], keys: Sequence[str], what: str) -> Rows | Vectors:
    """Vectors of n keys, ``(n, dim)``, of which stretches can be read.

    Raises:
        Undefined: some are not there; the message says how many of how many, and of what.
    """
    missing = vectors.missing(keys) if isinstance(vectors, Table) else sum(key not in vectors for key in keys)
    if missing:
        raise Undefined(f"it has no vectors of {missing} of {len(keys)} {what}")
    if isinstance(vectors, Table):
        return Rows(vectors, keys)
    return np.stack([vectors[key] for key in keys])


def stacked(vectors: Mapping[str, Vectors], keys: Sequence[str], what: str) -> Vectors:
    """All vectors of n keys, ``(n, dim)``; raises as `rows_of` does."""
    return rows_of(vectors, keys, what)[:]


def _slice(rows: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Neighbouring rows in order as a slice, which is copied in one go; any others as they are."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first == len(rows) - 1 and (len(rows) < 2 or bool((np.diff(rows) == 1).all())):
        return slice(first, last + 1)
    return rows
