"""An extraction under way: shards of fixed pairs, written whole by any process, that become one feature store.

A shard is named by what it holds (the teacher's identity, the ids of its pairs and their fingerprints): a shard that is
there is done, whoever made it and whenever, and one of other weights is never taken for it. Whichever process finds all
shards closes the store by writing its index and ``meta.json``; no process waits for another. The bytes of the store
depend on the pairs and the teacher alone, not on how many processes there were or how often they were killed. Pairs
that come later become further shards; those that are there stay as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmkd.data.features.index import changes, digests, told
from mmkd.data.features.shards import FeatureType, header_sha256, write_shard
from mmkd.data.features.store import SHARD_SIZE, FeatureStore, close_store
from mmkd.files import atomic_write_text

IDENTITY = ("fingerprint", "preprocessing", "tokenizer", "context", "pooling", "precision")
SKIPPED_FILE = "skipped.jsonl"
SMALLEST_SHARD, SHARDS_WANTED = 256, 1024


class FeatureParts:
    """What is still to be extracted for one store.

    Attributes:
        path: the store.
        name: the teacher.
        missing: positions of the pairs that the store does not hold yet.
        size: pairs a shard.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        ids: Sequence[str],
        fingerprints: np.ndarray,
        provenance: dict[str, Any],
        dtype: FeatureType,
        part_size: int,
    ) -> None:
        """Compare what is there with what is wanted; nothing is written yet.

        Args:
            path: the store.
            name: the teacher.
            ids: the pairs that the store shall hold.
            fingerprints: of these pairs, (n,).
            provenance: of the teacher.
            dtype: how numbers are stored.
            part_size: pairs a shard; 0 to choose by their number.

        Raises:
            ValueError: the store is there, but from other weights or preprocessing, in another dtype, or of other
                captions or images under the same ids.
        """
        self.path, self.name, self.provenance, self.dtype = path, name, provenance, dtype
        self._meta_before = self._meta()
        self._store = FeatureStore(path) if self._meta_before else None
        self._ids, self._fingerprints = ids, fingerprints
        self._names: dict[int, str] = {}
        self.missing = np.arange(len(ids))
        if self._store is not None:
            self._refuse_other(self._store)
            rows = self._store.ids.rows(digests(ids))
            self.missing = np.flatnonzero(rows < 0)
            self._refuse_changed(self._store.ids.fingerprints(rows))
        self.size = part_size or shard_size(len(self.missing))
        self._identity = json.dumps([dtype, *(provenance.get(key) for key in IDENTITY)])

    def __len__(self) -> int:
        """Number of shards to be made."""
        return -(-len(self.missing) // self.size)

    def positions(self, part: int) -> np.ndarray:
        """Positions of a shard's pairs among all."""
        return self.missing[part * self.size : (part + 1) * self.size]

    def ids(self, part: int) -> list[str]:
        """Ids of a shard's pairs."""
        return [self._ids[position] for position in self.positions(part).tolist()]

    def same_work(self, other: FeatureParts) -> bool:
        """Whether another store lacks the same pairs, in shards of the same size."""
        return self.size == other.size and np.array_equal(self.missing, other.missing)

    def has(self, part: int) -> bool:
        """Whether a shard is done, or another process has closed the store since; a damaged one is to be made anew."""
        try:
            header_sha256(self._file(part))
            return True
        except (FileNotFoundError, ValueError):
            return self._meta() != self._meta_before

    def write(self, part: int, image: Tensor, text: Tensor, skipped: dict[str, str]) -> None:
        """Write a shard whole.

        Args:
            part: its number.
            image: (n, dim), unit length, of those of its pairs that are not in ``skipped``, in their order.
            text: (n, dim), unit length.
            skipped: id -> reason for the others.

        Raises:
            OSError: the disk is full; shards that are whole stay.
        """
        write_shard(self._file(part), image, text, self.dtype, {"skipped": json.dumps(skipped)})

    def close(self) -> dict[str, str] | None:
        """Make the store of all shards, if they are all there and it has not been made.

        Returns:
            id -> reason of the pairs that were left out, or None when it was not this process that closed the store.

        Raises:
            ValueError: no pair could be encoded.
        """
        if not all(map(self.has, range(len(self)))) or self._meta() != self._meta_before:
            return None
        try:
            return self._close()
        except FileNotFoundError:
            if self._meta() != self._meta_before:  # another process closed the store at the same moment and tidied up
                return None
            raise

    def _close(self) -> dict[str, str] | None:
        files = [self._file(part) for part in range(len(self))]
        headers = [header_sha256(file) for file in files]
        skipped = {id: why for _, notes, _ in headers for id, why in json.loads(notes["skipped"]).items()}
        filled = [file for file, (_, _, (rows, _)) in zip(files, headers, strict=True) if rows]
        before = [self.path / shard["file"] for shard in self._store.shards] if self._store else []
        if not before + filled:
            reasons = ", ".join(sorted(set(skipped.values())))
            raise ValueError(f"{self.path}: none of the {len(skipped)} images could be read ({reasons})")
        lines = [json.dumps({"id": id, "reason": reason}) + "\n" for id, reason in skipped.items()]
        atomic_write_text(self.path / SKIPPED_FILE, "".join(lines))
        if filled:
            provenance = self._store.provenance if self._store else self.provenance
            close_store(self.path, self.name, self.dtype, before + filled, self._all_ids(skipped), provenance)
        self._tidy()
        return skipped if files else None

    def _all_ids(self, skipped: dict[str, str]) -> Iterator[tuple[list[str], np.ndarray]]:
        """Ids and fingerprints of the store as it is, then of every shard."""
        if self._store is not None:
            index = self._store.ids
            for start in range(0, len(index), SHARD_SIZE):
                rows = np.arange(start, min(start + SHARD_SIZE, len(index)))
                yield index.take(rows), index.fingerprints(rows)
        for part in range(len(self)):
            ids = self.ids(part)
            kept = np.array([id not in skipped for id in ids], dtype=bool)
            yield [id for id in ids if id not in skipped], self._fingerprints[self.positions(part)][kept]

    def _tidy(self) -> None:
        """Take away what a killed run, an earlier index or a shard without a readable image left in the folder."""
        store = FeatureStore(self.path)
        wanted = {store.meta["ids"]["file"], *(shard["file"] for shard in store.shards)}
        for pattern in ("shard-*.safetensors", "ids-*.safetensors", ".*.tmp"):
            for file in self.path.glob(pattern):
                if file.name not in wanted:
                    file.unlink(missing_ok=True)

    def _file(self, part: int) -> Path:
        if part not in self._names:
            content = json.dumps([self._identity, self.ids(part), self._fingerprints[self.positions(part)].tolist()])
            self._names[part] = f"shard-{hashlib.sha256(content.encode()).hexdigest()[:16]}.safetensors"
        return self.path / self._names[part]

    def _meta(self) -> bytes:
        """The bytes of ``meta.json``, none when the store is unfinished."""
        try:
            return (self.path / "meta.json").read_bytes()
        except FileNotFoundError:
            return b""

    def _refuse_changed(self, before: np.ndarray) -> None:
        found = changes(before, self._fingerprints)
        rows = np.flatnonzero(np.any(list(found.values()), axis=0))
        if len(rows):
            raise ValueError(
                f"{self.path} holds features of other captions or images: {told(found, self._ids, rows)}. Give pairs "
                f"that changed new ids, or remove {self.path} and extract again"
            )

    def _refuse_other(self, store: FeatureStore) -> None:
        differing = [key for key in IDENTITY if store.provenance.get(key) != self.provenance.get(key)]
        differing += ["teacher"] * (store.name != self.name) + ["dtype"] * (store.dtype != self.dtype)
        if differing:
            raise ValueError(
                f"{self.path} was extracted with another {', '.join(differing)}; choose another --output, or remove it"
            )


def shard_size(pairs: int) -> int:
    """Pairs a shard: about a thousand shards, none of fewer than 256 pairs and none larger than the reader's best."""
    size = SMALLEST_SHARD
    while size < SHARD_SIZE and size * SHARDS_WANTED < pairs:
        size *= 2
    return size
