"""The row of each id in a store, and fingerprints that show whether the pair behind an id has changed.

Ids are found by their 96-bit BLAKE2 digests, sorted: looking up n ids is one binary search in three arrays (``key`` 64
bits, ``check`` 32, ``row`` 32), which a finished store keeps in a memory-mapped file. Two ids are taken for one only
if all 96 bits agree, which among 20 million happens with a probability of 1e-14.

Features are found by the id of a pair. With a caption rewritten under the same id, or a manifest that assigns the ids
again, training would silently use targets of other pairs. A store therefore keeps a fingerprint for each row: a 16-bit
checksum of the caption and one of the image (of the SHA-256 that the manifest states or, if it states none, of the
file's name without its folder). 0 stands for unknown; checksums of the two kinds of
image differ in their lowest bit and are not compared. A single change goes unnoticed once in 65,536 times (an image's
once in 32,768), one of several pairs practically never.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from mmkd.data.features.shards import TensorMap
from mmkd.data.table import Pair, in_columns
from mmkd.files import atomic_file

DIGEST = np.dtype([("key", "<u8"), ("check", "<u4")])
ENTRY = np.dtype([*DIGEST.descr, ("row", "<u4")])
FINGERPRINT = np.dtype([("caption", "<u2"), ("image", "<u2")])
STORED_AS = {"<u8": "U64", "<u4": "U32"}  # in safetensors
COMPARED_TOGETHER = 1 << 16
SORTED_TOGETHER = 1 << 18
LISTED_TOGETHER = 4096
SHOWN = 5


class IdIndex:
    """The row of each id of a store.

    Attributes:
        key: (n,) first 64 bits of the digests, ascending.
        check: (n,) their other 32 bits.
        row: (n,) the row that each of them has.
    """

    def __init__(self, key: np.ndarray, check: np.ndarray, row: np.ndarray) -> None:
        """Use `of`, or `open`."""
        self.key, self.check, self.row = key, check, row

    @classmethod
    def of(cls, table: np.ndarray) -> IdIndex:
        """The index of n digests in row order, (n,) of `DIGEST`."""
        order = np.lexsort((table["check"], table["key"]))
        return cls(table["key"][order], table["check"][order], order.astype("<u4"))

    @classmethod
    def of_many(cls, ids: Sequence[str], folder: Path) -> IdIndex:
        """The index of any number of ids in row order, as arrays of files in a folder, which vanish with them.

        The digests go to disk in buckets by their leading bits, and each bucket is sorted: memory does not grow.
        """
        count = -(-len(ids) // SORTED_TOGETHER)
        if count <= 1:
            return cls.of(digests(ids))
        with contextlib.ExitStack() as stack:
            *buckets, key, check, row = (
                stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(count + 3)
            )
            for start in range(0, len(ids), COMPARED_TOGETHER):
                found = digests(ids[start : start + COMPARED_TOGETHER])
                table = np.empty(len(found), dtype=ENTRY)
                table["key"], table["check"] = found["key"], found["check"]
                table["row"] = np.arange(start, start + len(found))
                owner = (found["key"] >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)
                for k, bucket in enumerate(buckets):
                    bucket.write(table[owner == k].tobytes())
            for bucket in buckets:
                bucket.seek(0)
                table = np.frombuffer(bucket.read(), dtype=ENTRY)
                own = cls.of(table)
                key.write(own.key.tobytes())
                check.write(own.check.tobytes())
                row.write(table["row"][own.row].tobytes())
            return cls(*(np.memmap(f, t, "r") for f, t in ((key, "<u8"), (check, "<u4"), (row, "<u4"))))

    @classmethod
    def open(cls, path: Path) -> IdIndex:
        """Map the file of an index.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is truncated or no index.
        """
        arrays = TensorMap(path).arrays
        if {name: array.dtype.str for name, array in arrays.items()} != {"key": "<u8", "check": "<u4", "row": "<u4"}:
            raise ValueError(f"{path} is not an index of ids; extract again with `mmkd extract`")
        if len({array.shape for array in arrays.values()}) != 1:
            raise ValueError(f"{path} holds arrays of different lengths; extract again with `mmkd extract`")
        return cls(**arrays)

    def save(self, folder: Path) -> tuple[str, str]:
        """Write the index under a name derived from its content; returns the name and the SHA-256 of the file.

        The header is written here, because `safetensors.numpy.save` copies the arrays, 16 bytes for each id.
        """
        arrays, header, end = {"key": self.key, "check": self.check, "row": self.row}, {}, 0
        for name, array in arrays.items():
            offsets = [end, end := end + array.nbytes]
            header[name] = {"dtype": STORED_AS[array.dtype.str], "shape": list(array.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        parts: list[Any] = [len(text).to_bytes(8, "little"), text, *(array.data for array in arrays.values())]
        sha256 = hashlib.sha256()
        for part in parts:
            sha256.update(part)
        digest = sha256.hexdigest()
        name = f"ids-{digest[:12]}.safetensors"
        with atomic_file(folder / name) as file:
            file.writelines(parts)
        return name, digest

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.key)

    def rows(self, requested: np.ndarray) -> np.ndarray:
        """The row of each digest, (n,) int64; -1 if there is none."""
        found = np.full(len(requested), -1, dtype=np.int64)
        if not len(self):
            return found
        order = np.argsort(requested["key"])  # neighbours in the map are read together
        pending, at = order, np.searchsorted(self.key, requested["key"][order])
        while len(pending):
            here = np.minimum(at, len(self) - 1)
            same = (at < len(self)) & (self.key[here] == requested["key"][pending])
            exact = same & (self.check[here] == requested["check"][pending])
            found[pending[exact]] = self.row[here[exact]]
            again = same & ~exact  # another id with the same 64 bits: the next entry may be the one
            pending, at = pending[again], at[again] + 1
        return found

    def repeated(self) -> int | None:
        """A row whose id an earlier row has, too; None if all ids differ."""
        for start in range(0, len(self), COMPARED_TOGETHER):
            part = slice(start, start + COMPARED_TOGETHER + 1)
            key, check = self.key[part], self.check[part]
            same = np.flatnonzero((key[1:] == key[:-1]) & (check[1:] == check[:-1]))
            if len(same):
                return int(self.row[start + same[0] + 1])
        return None

    def missing_from(self, others: Sequence[IdIndex]) -> np.ndarray:
        """Rows whose ids none of ``others`` has, in ascending order; (m,) int64."""
        kept = [np.zeros(0, dtype=np.int64)]
        for begin in range(0, len(self), COMPARED_TOGETHER):
            part = slice(begin, begin + COMPARED_TOGETHER)
            requested = np.empty(len(self.key[part]), dtype=DIGEST)
            requested["key"], requested["check"] = self.key[part], self.check[part]
            absent = np.all([other.rows(requested) < 0 for other in others], axis=0)
            kept.append(self.row[part][absent].astype(np.int64))
        return np.sort(np.concatenate(kept))


class Ids(Sequence[str]):
    """Ids on disk as a sequence: n of them, read by their positions."""

    def __init__(self, length: int, take: Callable[[np.ndarray], list[str]]) -> None:
        """Read with `take`, which gives the ids of positions (m,)."""
        self._length, self.take = length, take

    @classmethod
    def joined(cls, parts: Sequence[tuple[Ids, IdIndex]]) -> Ids:
        """The union of several sequences: the ids of the first, then those of the second that the first lacks ..."""
        rows = [np.arange(len(index)) for _, index in parts[:1]]
        rows += [index.missing_from([other for _, other in parts[:k]]) for k, (_, index) in enumerate(parts) if k]
        starts = np.cumsum([0, *map(len, rows)])

        def take(positions: np.ndarray) -> list[str]:
            found = np.empty(len(positions), dtype=object)
            owner = np.searchsorted(starts, positions, side="right") - 1
            for k in np.unique(owner).tolist():
                here = np.flatnonzero(owner == k)
                found[here] = parts[k][0].take(rows[k][positions[here] - starts[k]])
            return found.tolist()

        return cls(int(starts[-1]), take)

    def __len__(self) -> int:
        """Number of ids."""
        return self._length

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """The id at a position, or the ids of a range."""
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.take(np.array([index % len(self)]))[0]

    def __iter__(self) -> Iterator[str]:
        """All ids in order."""
        for begin in range(0, len(self), LISTED_TOGETHER):
            yield from self[begin : begin + LISTED_TOGETHER]


def digests(ids: Iterable[str]) -> np.ndarray:
    """The digests of n ids, (n,) of ``key`` and ``check``."""
    hashes = [hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=DIGEST.itemsize).digest() for id in ids]
    return np.frombuffer(b"".join(hashes), dtype=DIGEST)


def refuse_repeated(ids: Sequence[str], folder: Path) -> IdIndex:
    """The index of a folder's ids, each of which occurs once.

    Args:
        ids: in row order.
        folder: where they lie.

    Raises:
        ValueError: an id occurs twice; the message names it.
    """
    index = IdIndex.of_many(ids, folder)
    row = index.repeated()
    if row is not None:
        raise ValueError(f"{folder}: id {ids[row]!r} occurs twice; ids must be unique")
    return index


def fingerprints(captions: Iterable[str], hashes: Iterable[str], images: Iterable[str]) -> np.ndarray:
    """Fingerprints of n pairs.

    Args:
        captions: of each pair.
        hashes: SHA-256 of each image as the manifest states it, empty where it does not.
        images: path of each image.

    Returns:
        (n,) of `FINGERPRINT`.
    """
    crc = zlib.crc32
    texts = [crc(caption.encode("utf-8", "surrogatepass")) & 0xFFFF or 1 for caption in captions]
    files = [
        crc(stated.encode()) & 0xFFFF | 1
        if stated
        else crc(image.rpartition("/")[2].encode("utf-8", "surrogatepass")) & 0xFFFE or 2
        for stated, image in zip(hashes, images, strict=True)
    ]
    found = np.empty(len(texts), dtype=FINGERPRINT)
    found["caption"], found["image"] = texts, files
    return found


def fingerprints_of(pairs: Sequence[Pair]) -> np.ndarray:
    """Fingerprints of all pairs, (n,)."""
    found, start = np.empty(len(pairs), dtype=FINGERPRINT), 0
    for ids, part in fingerprinted(pairs):
        found[start : start + len(ids)] = part
        start += len(ids)
    return found


def fingerprinted(pairs: Sequence[Pair]) -> Iterator[tuple[list[str], np.ndarray]]:
    """Ids and fingerprints of all pairs, some thousands at a time; of a table only four columns are read."""
    for ids, *rest in in_columns(pairs, ("id", "caption", "sha256", "image")):
        yield ids, fingerprints(*rest)


def changes(before: np.ndarray, now: np.ndarray) -> dict[str, np.ndarray]:
    """Which of n captions and images differ where both are known, (n,) bool each.

    Args:
        before: (n,) of `FINGERPRINT`.
        now: the same of the same pairs, later.
    """
    comparable = (before["image"] != 0) & (now["image"] != 0) & ((before["image"] ^ now["image"]) & 1 == 0)
    return {
        "captions": (before["caption"] != now["caption"]) & (before["caption"] != 0) & (now["caption"] != 0),
        "images": comparable & (before["image"] != now["image"]),
    }
