"""Shards of vectors: files named by what is in them, written whole, memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from mmkd.data.records import Pair
from mmkd.data.safetensors_map import TensorMap, read_header
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
