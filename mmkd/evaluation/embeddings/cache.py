"""Shards of vectors: files named by what is in them, written whole, memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from mmkd.data.features.shards import TensorMap, read_header
from mmkd.data.table import Pair
from mmkd.files import atomic_write_bytes

FORMAT = 2

SHARD_SIZE = 4096

HALF_LIMIT = 6e4


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
        named = [("images", content) for content in self.images] + [("texts", content) for content in self.texts]
        return [
            cache / f"{kind}-{_sha256([str(FORMAT), fingerprint, content])[:24]}.safetensors" for kind, content in named
        ]

    def missing(self, cache: Path, fingerprint: str) -> list[int]:
        """Numbers of the shards in `files` that are not there or not whole."""
        return [number for number, file in enumerate(self.files(cache, fingerprint)) if not _is_whole(file)]


@dataclass(frozen=True)
class StoredRows:
    """A tensor ``(n, width)`` of a shard that is mapped only while rows of it are read.

    Ten encoders of a million images have thousands of shards: so many files cannot stay open, and pages that were read
    once shall not stay in memory.
    """

    path: Path
    name: str
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[Any]:
        """A copy of some rows."""
        return np.array(TensorMap(self.path).arrays[self.name][rows])


@dataclass
class Shard:
    """Vectors ``(n, dim)`` of what could be read and, of images, those before the projection ``(n, width)``.

    Attributes:
        vectors: in the common space; an array, or `StoredRows` of a shard that was read, as of the others.
        pooled: before the projection; None for texts, or where there are none.
        unreadable: ids with their reasons.
        failures: what the encoder said where it refused.
    """

    vectors: Any
    pooled: Any
    unreadable: dict[str, str]
    failures: list[str]

    def write(self, path: Path) -> None:
        """Write it whole; numbers too large for half precision are kept in single."""
        notes = {"unreadable": self.unreadable, "failures": self.failures}
        arrays = {"vectors": self.vectors} if self.pooled is None else {"vectors": self.vectors, "pooled": self.pooled}
        fitting = {
            name: np.ascontiguousarray(array, np.float32 if (np.abs(array) > HALF_LIMIT).any() else np.float16)
            for name, array in arrays.items()
        }
        atomic_write_bytes(path, safetensors.numpy.save(fitting, {"notes": json.dumps(notes, sort_keys=True)}))

    @classmethod
    def read(cls, path: Path) -> Shard:
        """What `write` wrote; its vectors are read when asked for."""
        notes = json.loads(read_header(path)[1]["__metadata__"]["notes"])
        stored = {name: StoredRows(path, name, array.shape) for name, array in TensorMap(path).arrays.items()}
        return cls(stored["vectors"], stored.get("pooled"), **notes)


def shards_of(items: Sequence[Any]) -> list[Sequence[Any]]:
    """Items in order, `SHARD_SIZE` at a time."""
    return [items[start : start + SHARD_SIZE] for start in range(0, len(items), SHARD_SIZE)]


def completed(parts: Sequence[Any], rows: Sequence[int]) -> list[Any]:
    """Pooled vectors of all parts, NaN where a part has none but others do; nothing where no part has any."""
    widths = {part.shape[1] for part in parts if part is not None and len(part)}
    if not widths:
        return []
    empty = max(widths)
    return [
        part if part is not None and len(part) == count else np.full((count, empty), np.nan, dtype=np.float32)
        for part, count in zip(parts, rows, strict=True)
    ]


def _is_whole(file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        read_header(file)
    except ValueError:  # cut off by whatever broke the disk; made again
        return False
    return True


def _sha256(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# Section: Vectors by key: half-precision shards on disk, memory-mapped, read as the rows a task asks for.


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
