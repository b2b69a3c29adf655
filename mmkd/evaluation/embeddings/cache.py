"""Cached vectors of an evaluation: shards named by what is in them, and their rows by key.

The cache is addressed by content: a shard's name is the hash of the encoder's fingerprint and of the very images or
texts in it, so that a killed run resumes at the shard, a changed image is embedded again with its shard, and nothing
else is. Vectors are stored in half precision and read back before use, so that a warm and a cold cache give the same
numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmkd.data.features.shards import shard_file, write_shard
from mmkd.data.features.store import VectorStore
from mmkd.data.table import Pair

FORMAT = 3
SHARD_SIZE = 4096
HALF_LIMIT = 6e4

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Content:
    """What is embedded, as hashes: equal contents have equal shards.

    Attributes:
        images: hash of each shard's images.
        texts: hash of each shard's texts.
    """

    images: list[str]
    texts: list[str]

    @classmethod
    def of(cls, pairs: Sequence[Pair], digests: dict[str, str], texts: Sequence[str]) -> Content:
        """Hashes over ids and image hashes, and over texts, `SHARD_SIZE` at a time."""
        images = [_sha256([f"{pair.id} {digests[pair.id]}" for pair in part]) for part in shards_of(pairs)]
        return cls(images, [_sha256(list(part)) for part in shards_of(texts)])

    def files(self, cache: Path, fingerprint: str) -> list[Path]:
        """Files of all shards under an encoder's cache, those of images first."""
        parts = [("images", content) for content in self.images] + [("texts", content) for content in self.texts]
        return [shard_file(cache, FORMAT, fingerprint, content, kind=kind) for kind, content in parts]


def write_vectors(
    file: Path, ids: Sequence[str], arrays: dict[str, Tensor], skipped: dict[str, str], failures: Sequence[str]
) -> None:
    """Write a shard of vectors in half precision; an array with numbers beyond it is kept in single precision.

    Args:
        file: the shard.
        ids: of its n rows.
        arrays: ``vectors`` (n, dim) in the common space, and of images ``pooled`` (n, width) where there are any.
        skipped: id -> reason of the images that could not be read.
        failures: messages of the encoder, whose rows are NaN.
    """
    fitting = {
        name: array.to(torch.float32 if bool((array.abs() > HALF_LIMIT).any()) else torch.float16)
        for name, array in arrays.items()
    }
    write_shard(file, ids, fitting, notes={"skipped": skipped, "failures": list(failures)})


class Column:
    """One array of a store, ``(n, width)``, of which rows are read as float32."""

    def __init__(self, store: VectorStore, name: str) -> None:
        """Name the array; no row is read yet."""
        self._store, self._name = store, name
        self.shape = (len(store), *store.gather(name, np.arange(0)).shape[1:])

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Vectors:
        """A copy of some rows."""
        chosen = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        return self._store.gather(self._name, chosen, np.float32)


def shards_of(items: Sequence[Any]) -> list[Sequence[Any]]:
    """Items in order, `SHARD_SIZE` at a time."""
    return [items[start : start + SHARD_SIZE] for start in range(0, len(items), SHARD_SIZE)]


def _sha256(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class UndefinedMetricError(Exception):
    """An encoder cannot answer a task; the message gives the reason and replaces the numbers in its result."""


class Table(Mapping[str, Vectors]):
    """Vectors ``(dim,)`` by key, in parts ``(rows, dim)`` of any floating type, read on demand."""

    def __init__(self, keys: Sequence[str], parts: Sequence[Any]) -> None:
        """Number the keys: in the order of the rows of all parts, one after another.

        Args:
            keys: distinct.
            parts: arrays, or columns of stores.

        Raises:
            ValueError: there are not as many keys as rows.
        """
        self._parts = [part for part in parts if len(part)]
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        self._rows = {key: row for row, key in enumerate(keys)}
        if len(keys) != self._starts[-1]:
            raise ValueError(f"{len(keys)} keys for {self._starts[-1]} vectors")

    def missing(self, keys: Sequence[str]) -> int:
        """Number of those keys that have no vector."""
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
        UndefinedMetricError: some are not there; the message says how many of how many, and of what.
    """
    missing = vectors.missing(keys) if isinstance(vectors, Table) else sum(key not in vectors for key in keys)
    if missing:
        raise UndefinedMetricError(f"it has no vectors of {missing} of {len(keys)} {what}")
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
