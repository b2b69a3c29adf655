"""The pair ids of a feature store on disk: found by hash, read by row, without a Python object for each.

``ids-*.safetensors`` holds for every row the 96-bit BLAKE2 digest of its id, sorted (``key`` 64 bits, ``check`` 32,
``row``), and the ids themselves as UTF-8 in row order (``text``, and ``end`` within each block of rows that ``start``
begins); where they are known also the fingerprints of the pairs in row order (``caption`` and ``image``, 16 bits each,
see `mmkd.data.features.index`). Looking up n ids is one binary search in a memory map; two ids are taken for one
only if all 96 bits agree, which among 20 million happens with a probability of 1e-14. Opening reads the header alone.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import safetensors.numpy

from mmkd.data.features.shards import TensorMap
from mmkd.data.table import Pair, in_columns
from mmkd.files import atomic_write_bytes

BLOCK = 4096

DIGEST = np.dtype([("key", "<u8"), ("check", "<u4")])

FINGERPRINT = np.dtype([("caption", "<u2"), ("image", "<u2")])

MAX_ROWS = 2**32 - 1


class IdIndex(Sequence[str]):
    """The ids of a store in row order, and the row of an id."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is truncated or no index.
        """
        self._path = path
        arrays = TensorMap(path).arrays
        if set(arrays) - {"caption", "image"} != {"key", "check", "row", "text", "end", "start"}:
            raise ValueError(f"{path} is no index of ids; extract again")
        self.key, self._check, self._row = arrays["key"], arrays["check"], arrays["row"]
        self._text, self._end, self._start = arrays["text"], arrays["end"], arrays["start"]
        self._fingerprints = {name: arrays[name] for name in FINGERPRINT.names or () if name in arrays}
        self.has_fingerprints = bool(self._fingerprints)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process maps the file anew."""
        return IdIndex, (self._path,)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.key)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """The id of a row, or the ids of a range of rows."""
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.take(np.array([index % len(self)]))[0]

    def __iter__(self) -> Iterator[str]:
        """All ids in row order."""
        for begin in range(0, len(self), BLOCK):
            yield from self.take(np.arange(begin, min(begin + BLOCK, len(self))))

    def take(self, rows: np.ndarray) -> list[str]:
        """The ids of rows (n,)."""
        block = self._start[rows // BLOCK].astype(np.int64)
        begin = block + np.where(rows % BLOCK == 0, 0, self._end[np.maximum(rows - 1, 0)].astype(np.int64))
        end = block + self._end[rows]
        return [bytes(self._text[a:b]).decode() for a, b in zip(begin.tolist(), end.tolist(), strict=True)]

    def fingerprints(self, rows: np.ndarray) -> np.ndarray:
        """Fingerprints of rows (n,), zeros where they are unknown or the row is -1; (n,) of `FINGERPRINT`."""
        found = np.zeros(len(rows), dtype=FINGERPRINT)
        there = rows >= 0
        for name, stored in self._fingerprints.items():
            found[name][there] = stored[rows[there]]
        return found

    def rows(self, wanted: np.ndarray) -> np.ndarray:
        """The row of each digest (n,), -1 where there is none; (n,) int64."""
        found = np.full(len(wanted), -1, dtype=np.int64)
        order = np.argsort(wanted["key"])  # neighbours in the map are read together
        pending, at = order, np.searchsorted(self.key, wanted["key"][order])
        while len(pending):
            here = np.minimum(at, len(self) - 1)
            same = (at < len(self)) & (self.key[here] == wanted["key"][pending])
            exact = same & (self._check[here] == wanted["check"][pending])
            found[pending[exact]] = self._row[here[exact]]
            again = same & ~exact  # another id with the same 64 bits: the next entry may be the one
            pending, at = pending[again], at[again] + 1
        return found

    def missing_from(self, others: Sequence[IdIndex]) -> np.ndarray:
        """Rows, in ascending order, whose ids none of ``others`` has; (m,) int64."""
        kept = []
        for begin in range(0, len(self), 1 << 18):
            part = slice(begin, begin + (1 << 18))
            wanted = np.empty(len(self.key[part]), dtype=DIGEST)
            wanted["key"], wanted["check"] = self.key[part], self._check[part]
            absent = np.all([other.rows(wanted) < 0 for other in others], axis=0)
            kept.append(self._row[part][absent].astype(np.int64))
        return np.sort(np.concatenate(kept))


class JoinedIds(Sequence[str]):
    """Every id of several indexes, once: those of the first, then those of the second that the first lacks ..."""

    def __init__(self, indexes: Sequence[IdIndex]) -> None:
        """Compare the indexes; equal ones cost nothing but the comparison of their digests."""
        self._first = indexes[0]
        self._more = [(index, index.missing_from(indexes[:k])) for k, index in enumerate(indexes) if k]
        self._length = len(self._first) + sum(len(rows) for _, rows in self._more)

    def __len__(self) -> int:
        """Number of distinct ids."""
        return self._length

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """One id, or a range of them."""
        if isinstance(index, slice):
            return self._range(*index.indices(len(self)))
        if not -len(self) <= index < len(self):
            raise IndexError(f"position {index} of {len(self)}")
        return self._range(index % len(self), index % len(self) + 1, 1)[0]

    def _range(self, begin: int, end: int, step: int) -> list[str]:
        positions = np.arange(begin, end, step)
        found = np.empty(len(positions), dtype=object)
        offset = 0
        for index, rows in [(self._first, None), *self._more]:
            count = len(index) if rows is None else len(rows)
            here = (positions >= offset) & (positions < offset + count)
            local = positions[here] - offset
            found[here] = index.take(local if rows is None else rows[local])
            offset += count
        return found.tolist()


def digests(ids: Iterable[str]) -> np.ndarray:
    """The digests of n ids, (n,) of ``key`` and ``check``."""
    hashes = [hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=DIGEST.itemsize).digest() for id in ids]
    return np.frombuffer(b"".join(hashes), dtype=DIGEST)


def refuse_twice(ids: Sequence[str]) -> None:
    """Raise before any work when an id occurs twice.

    Raises:
        ValueError: with the first such id.
    """
    table = digests(ids)
    order = np.lexsort((table["check"], table["key"]))
    twice = np.flatnonzero(table[order][1:] == table[order][:-1])
    if len(twice):
        raise ValueError(f"id {ids[int(order[twice[0]])]!r} occurs twice; ids must be unique")


def write_index(folder: Path, chunks: Iterable[tuple[Sequence[str], np.ndarray]], count: int) -> tuple[str, str]:
    """Write the index of ids that come in row order, some at a time, under a name that tells its content.

    Args:
        folder: where.
        chunks: ids and fingerprints of pairs, which may all be unknown (zeros).
        count: rows of the store.

    Returns:
        The file's name and its SHA-256.

    Raises:
        ValueError: there are not ``count`` ids, one occurs twice, or one is not text that UTF-8 can hold.
    """
    hashes, texts, lengths = [digests([])], [], [np.zeros(0, dtype=np.int64)]
    prints = [np.zeros(0, dtype=FINGERPRINT)]
    for ids, known in chunks:
        prints.append(known)
        encoded = [_encoded(id) for id in ids]
        hashes.append(digests(ids))
        texts.append(b"".join(encoded))
        lengths.append(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)))
    table, length = np.concatenate(hashes), np.concatenate(lengths)
    if len(table) != count or not 0 < count <= MAX_ROWS:
        raise ValueError(f"{folder}: {len(table)} ids, but {count} rows; expected as many, 1 to {MAX_ROWS}")
    order = np.lexsort((table["check"], table["key"]))
    table = table[order]
    twice = np.flatnonzero(table[1:] == table[:-1])
    ends = np.cumsum(length)
    start = np.concatenate([[0], ends[BLOCK - 1 :: BLOCK]])[: -(-len(length) // BLOCK)]
    text = np.frombuffer(b"".join(texts), dtype=np.uint8)
    if len(twice):
        row = int(order[twice[0]])
        id = text[ends[row] - length[row] : ends[row]].tobytes().decode()
        raise ValueError(f"{folder}: id {id!r} occurs twice; ids must be unique")
    end = ends - np.repeat(start, BLOCK)[: len(ends)]
    if end.max() >= 2**32:
        raise ValueError(f"{folder}: ids of {end.max() // BLOCK} bytes; they must be shorter")
    arrays = {"key": table["key"], "check": table["check"], "row": order.astype("<u4"), "text": text}
    arrays |= {"end": end.astype("<u4"), "start": start.astype("<u8")}
    fingerprints = np.concatenate(prints)
    arrays |= {name: fingerprints[name] for name in FINGERPRINT.names or () if fingerprints[name].any()}
    data = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    digest = hashlib.sha256(data).hexdigest()
    name = f"ids-{digest[:12]}.safetensors"
    atomic_write_bytes(folder / name, data)
    return name, digest


def _encoded(id: str) -> bytes:
    try:
        return id.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"id {id!r} is not Unicode text ({error.reason}); give the pair another id") from None


# Section: What a pair held when it was looked at: four bytes that tell whether its caption or its image has changed
# since.
#
# Features are found by the id of a pair. A caption that is rewritten under the same id, or a manifest that deals the
# ids
# out anew, would train on targets that belong to something else, and nothing would look wrong. A feature store
# therefore
# keeps, for each of its rows, a checksum of the caption and one of the image: of the SHA-256 that the manifest states
# or, where it states none, of the file's name without its folder. 0 stands for unknown; checksums of the two kinds of
# image differ in their lowest bit and are not compared. A single change goes unnoticed once in 65,536 times (an image's
# once in 32,768), one of several pairs practically never; and the store stays small.


SHOWN = 5


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
        crc(stated.encode()) & 0xFFFF | 1 if stated else crc(_name(image)) & 0xFFFE or 2
        for stated, image in zip(hashes, images, strict=True)
    ]
    found = np.empty(len(texts), dtype=FINGERPRINT)
    found["caption"], found["image"] = texts, files
    return found


def fingerprints_of(pairs: Sequence[Pair]) -> np.ndarray:
    """Fingerprints of all pairs, (n,)."""
    parts = [np.zeros(0, dtype=FINGERPRINT), *(part for _, part in fingerprinted(pairs))]
    return np.concatenate(parts)


def fingerprinted(pairs: Sequence[Pair]) -> Iterator[tuple[list[str], np.ndarray]]:
    """Ids and fingerprints of all pairs, some thousands at a time; of a table only four columns are read."""
    for ids, *rest in in_columns(pairs, ("id", "caption", "sha256", "image")):
        yield ids, fingerprints(*rest)


def changes(before: np.ndarray, now: np.ndarray) -> dict[str, np.ndarray]:
    """Which of n captions and images are known to differ, (n,) bool each.

    Args:
        before: (n,) of `FINGERPRINT`.
        now: the same of the same pairs, later.
    """
    known = (before["image"] != 0) & (now["image"] != 0) & ((before["image"] ^ now["image"]) & 1 == 0)
    return {
        "captions": (before["caption"] != now["caption"]) & (before["caption"] != 0) & (now["caption"] != 0),
        "images": known & (before["image"] != now["image"]),
    }


def told(found: dict[str, np.ndarray], ids: Sequence[str], rows: np.ndarray) -> str:
    """How many captions and images differ, and the first of their pairs, for an error.

    Args:
        found: from `changes`.
        ids: of the n pairs.
        rows: those of the n that differ in anything.
    """
    counts = " and ".join(f"{int(wrong.sum())} {what}" for what, wrong in found.items() if wrong.any())
    first = ", ".join(ids[row] for row in rows[:SHOWN].tolist())
    return f"{counts} of {len(ids)} pairs differ, first {first}"


def _name(image: str) -> bytes:
    return image.rpartition("/")[2].encode("utf-8", "surrogatepass")
