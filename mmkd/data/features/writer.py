"""Writing feature stores: of features at hand, by an extraction that may be killed at any time, and by merging.

All three end in `finish_store`: an index of ids and ``meta.json`` over shards that are there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkd.data.features import IDENTITY
from mmkd.data.features.index import FINGERPRINT, changes, fingerprinted, refuse_repeated
from mmkd.data.features.shards import is_whole, read_header, shard_file, write_shard
from mmkd.data.features.store import (
    VERSION,
    FeatureStore,
    FeatureType,
    VectorStore,
    meta_sha256,
    store_paths,
)
from mmkd.data.table import Pair, take_rows
from mmkd.files import atomic_write_text, write_json

TORCH_TYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}
SKIPPED_FILE = "skipped.jsonl"
SHARD_SIZE = 16384  # rows
SMALLEST_SHARD, SHARDS_WANTED = 256, 1024
COPIED_TOGETHER = 4096
SHOWN = 5


def finish_store(path: Path, name: str, dtype: FeatureType, shards: Sequence[Path], provenance: dict[str, Any]) -> None:
    """Write the index of ids and ``meta.json`` over shards that are there, which makes them a feature store.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: an id occurs twice, there is no row, or the shards are of several widths.
    """
    headers = [read_header(file) for file in shards]
    dims = {header.tensors["features"]["shape"][2] for header in headers}
    if len(dims) != 1:
        raise ValueError(f"{path}: the shards must be at least one and of one width, not {sorted(dims)}")
    index, digest = refuse_repeated(VectorStore(shards).ids, path).save(path)
    listed = [
        {"file": file.name, "rows": header.rows, "bytes": file.stat().st_size, "header_sha256": header.sha256}
        for file, header in zip(shards, headers, strict=True)
    ]
    count = sum(header.rows for header in headers)
    meta = {"version": VERSION, "teacher": name, "dim": dims.pop(), "dtype": dtype, "count": count, "shards": listed}
    meta |= {"ids": {"file": index, "sha256": digest}, "provenance": provenance}
    write_json(path / "meta.json", {**meta, "sha256": meta_sha256(meta)})


class FeatureWriter:
    """Writes a feature store from features that come some at a time, in whole shards."""

    def __init__(
        self,
        path: Path,
        name: str,
        dtype: FeatureType = "float16",
        shard_size: int = SHARD_SIZE,
    ) -> None:
        """Name the store; nothing is written yet.

        Args:
            path: folder of the store.
            name: the teacher.
            dtype: how numbers are stored.
            shard_size: pairs a shard.

        Raises:
            ValueError: an unknown dtype, or a shard size below 1.
        """
        if dtype not in TORCH_TYPES or shard_size < 1:
            raise ValueError(
                f"dtype {dtype!r} must be one of {', '.join(TORCH_TYPES)}, shard_size {shard_size} at least 1"
            )
        self.path, self.name, self.dtype, self.shard_size = path, name, dtype, shard_size
        self._shards: list[Path] = []
        self._ids: list[str] = []
        self._features: list[Tensor] = []
        self._fingerprints: list[np.ndarray] = []

    def add(self, ids: Sequence[str], image: Tensor, text: Tensor, fingerprints: np.ndarray | None = None) -> None:
        """Take the features of n pairs, and write the shards that they fill.

        Args:
            ids: of the pairs.
            image: (n, dim) image features.
            text: (n, dim) text features of the same pairs.
            fingerprints: (n,) of the pairs, None where they are unknown.

        Raises:
            ValueError: the shapes differ, or a number is not finite.
        """
        self.add_stored(ids, stored(image, text, self.dtype, self.path), fingerprints)

    def add_stored(self, ids: Sequence[str], features: Tensor, fingerprints: np.ndarray | None = None) -> None:
        """The same of features (n, 2, dim) that are in the type of the store already."""
        if len(ids) != len(features):
            raise ValueError(f"{self.path}: {len(ids)} ids for {len(features)} pairs; give one of each")
        self._ids += ids
        self._features.append(features)
        self._fingerprints.append(np.zeros(len(ids), FINGERPRINT) if fingerprints is None else fingerprints)
        while len(self._ids) >= self.shard_size:
            self._write(self.shard_size)

    def finish(self, provenance: dict[str, Any]) -> None:
        """Write the rest, the index and ``meta.json``, which makes the store readable.

        Args:
            provenance: JSON values: weights, preprocessing, tokenizer, licence, versions.

        Raises:
            ValueError: there are no pairs, or an id occurs twice.
        """
        self.flush()
        finish_store(self.path, self.name, self.dtype, self._shards, provenance)

    def flush(self) -> None:
        """Write what is left as a shard; the store is not finished by it."""
        if self._ids:
            self._write(len(self._ids))

    def _write(self, rows: int) -> None:
        features, fingerprints = torch.cat(self._features), np.concatenate(self._fingerprints)
        file = self.path / f"shard-{len(self._shards):05d}.safetensors"
        write_shard(file, self._ids[:rows], {"features": features[:rows]}, fingerprints[:rows])
        self._shards.append(file)
        self._ids, self._features, self._fingerprints = self._ids[rows:], [features[rows:]], [fingerprints[rows:]]


class FeatureExtraction:
    """An extraction under way: shards of fixed pairs, written by any process, that become one feature store.

    The bytes of the store depend on the pairs and the teacher alone, not on how many processes there were or how often
    they were killed. Pairs that come later become further shards; those that are there stay as they are.

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
        pairs: Sequence[Pair],
        provenance: dict[str, Any],
        dtype: FeatureType,
        size: int = 0,
    ) -> None:
        """Compare the existing store with the requested pairs; nothing is written yet.

        Args:
            path: the store.
            name: the teacher.
            pairs: to store.
            provenance: of the teacher.
            dtype: how numbers are stored.
            size: pairs a shard; 0 to choose by their number.

        Raises:
            ValueError: the store is there, but from other weights or preprocessing, in another dtype, or of other
                captions or images under the same ids.
        """
        self.path, self.name, self.provenance, self.dtype = path, name, provenance, dtype
        self._store = FeatureStore(path) if (path / "meta.json").is_file() else None
        self._pairs = pairs
        self._files: dict[int, Path] = {}
        self.missing: Sequence[int] | np.ndarray = range(len(pairs))
        if self._store is not None:
            self._refuse_other(self._store)
            self.missing = self._missing_from(self._store)
        self.size = size or shard_size(len(self.missing))
        self._identity = [dtype, *(provenance.get(key) for key in IDENTITY)]

    def __len__(self) -> int:
        """Number of shards to be made."""
        return -(-len(self.missing) // self.size)

    def positions(self, shard: int) -> np.ndarray:
        """Positions of a shard's pairs among all."""
        return np.asarray(self.missing[shard * self.size : (shard + 1) * self.size], dtype=np.int64)

    def lacks_same_pairs(self, other: FeatureExtraction) -> bool:
        """Whether the same pairs are missing as in another store."""
        if isinstance(self.missing, range) and isinstance(other.missing, range):
            return self.missing == other.missing
        return np.array_equal(self.missing, other.missing)

    def has(self, shard: int) -> bool:
        """Whether a shard is done."""
        return is_whole(self._file(shard))

    def write(self, shard: int, image: Tensor, text: Tensor, skipped: dict[str, str]) -> None:
        """Write a shard whole.

        Args:
            shard: its number.
            image: (n, dim), unit length, of those of its pairs that are not in ``skipped``, in their order.
            text: (n, dim), unit length.
            skipped: id -> reason for the others.

        Raises:
            ValueError: a number is not finite.
            OSError: the disk is full; shards that are whole stay.
        """
        ids, prints = self._ids_and_fingerprints(shard)
        kept = [k for k, id in enumerate(ids) if id not in skipped]
        features = stored(image, text, self.dtype, self.path)
        notes = {"skipped": skipped}
        write_shard(self._file(shard), [ids[k] for k in kept], {"features": features}, prints[kept], notes)

    def close(self) -> dict[str, str] | None:
        """Finish the store, all of whose shards exist.

        Returns:
            id -> reason of the pairs that were left out, or None when there was nothing to do.

        Raises:
            FileNotFoundError: a shard is missing.
            ValueError: no pair could be encoded.
        """
        files = [self._file(shard) for shard in range(len(self))]
        headers = [read_header(file) for file in files]
        skipped = {id: reason for header in headers for id, reason in header.notes["skipped"].items()}
        filled = [file for file, header in zip(files, headers, strict=True) if header.rows]
        before = self._store.files if self._store else []
        if not before + filled:
            reasons = ", ".join(sorted(set(skipped.values())))
            raise ValueError(f"{self.path}: none of the {len(skipped)} images could be read ({reasons})")
        lines = [json.dumps({"id": id, "reason": reason}) + "\n" for id, reason in skipped.items()]
        atomic_write_text(self.path / SKIPPED_FILE, "".join(lines))
        if filled:
            provenance = self._store.provenance if self._store else self.provenance
            finish_store(self.path, self.name, self.dtype, before + filled, provenance)
        self._tidy()
        return skipped if files else None

    def _tidy(self) -> None:
        """Remove files of killed runs, earlier indices and shards without a readable image."""
        store = FeatureStore(self.path)
        current = {self.path / store.meta["ids"]["file"], *store.files}
        for pattern in ("shard-*.safetensors", "ids-*.safetensors", ".*.tmp"):
            for file in self.path.glob(pattern):
                if file not in current:
                    file.unlink(missing_ok=True)

    def _file(self, shard: int) -> Path:
        if shard not in self._files:
            ids, prints = self._ids_and_fingerprints(shard)
            self._files[shard] = shard_file(self.path, VERSION, self._identity, ids, prints.tolist())
        return self._files[shard]

    def _ids_and_fingerprints(self, shard: int) -> tuple[list[str], np.ndarray]:
        """Of a shard's pairs, read again whenever they are needed: those of all pairs would stay in memory."""
        pairs = take_rows(self._pairs, self.positions(shard))
        ids, prints = zip(([], np.zeros(0, FINGERPRINT)), *fingerprinted(pairs), strict=True)
        return [*chain(*ids)], np.concatenate(prints)

    def _missing_from(self, store: FeatureStore) -> np.ndarray:
        """Positions of the pairs that a store lacks; refuses pairs that have changed."""
        missing, count, start = np.empty(len(self._pairs), np.uint32), 0, 0
        counts, changed = Counter[str](), dict[str, None]()
        for ids, now in fingerprinted(self._pairs):
            rows = store.rows(ids)
            absent = start + np.flatnonzero(rows < 0)
            missing[count : count + len(absent)] = absent
            count, start = count + len(absent), start + len(ids)
            for what, differ in changes(store.fingerprints(rows), now).items():
                counts[what] += int(differ.sum())
                changed |= dict.fromkeys(ids[row] for row in np.flatnonzero(differ)[:SHOWN].tolist())
        if changed:
            counts_shown = " and ".join(f"{number} {what}" for what, number in counts.items() if number)
            first = ", ".join(islice(changed, SHOWN))
            raise ValueError(
                f"{self.path} holds features of other captions or images: {counts_shown} of {len(self._pairs)} pairs "
                f"differ, first {first}. Give pairs that changed new ids, or remove {self.path} and extract again"
            )
        return missing[:count]

    def _refuse_other(self, store: FeatureStore) -> None:
        differing = [key for key in IDENTITY if store.provenance.get(key) != self.provenance.get(key)]
        differing += ["teacher"] * (store.name != self.name) + ["dtype"] * (store.dtype != self.dtype)
        if differing:
            raise ValueError(
                f"{self.path} was extracted with another {', '.join(differing)}; choose another --output, or remove it"
            )


def merge(folders: Sequence[Path], output: Path) -> dict[str, int]:
    """Merge feature stores of the same teachers, each into full shards; a pair that several hold is taken once.

    Numbers are copied bit by bit. One folder alone is packed into full shards.

    Args:
        folders: stores, or folders of stores.
        output: a new folder, which gets one store for each teacher.

    Returns:
        teacher -> pairs.

    Raises:
        FileNotFoundError: a folder holds no store.
        ValueError: two stores of a teacher have other weights, preprocessing or type.
    """
    by_teacher: dict[str, list[FeatureStore]] = {}
    for folder in folders:
        paths = store_paths(folder)
        if not paths:
            raise FileNotFoundError(f"{folder} holds no feature store; make one with `mmkd extract`")
        for store in map(FeatureStore, paths):
            by_teacher.setdefault(store.name, []).append(store)
    for first, *others in by_teacher.values():
        for other in others:
            differing = [key for key in IDENTITY if first.provenance.get(key) != other.provenance.get(key)]
            differing += ["dtype"] * (first.dtype != other.dtype) + ["dim"] * (first.dim != other.dim)
            if differing:
                raise ValueError(f"{first.path} and {other.path} differ in {', '.join(differing)}; keep them apart")
    return {name: _merge_teacher(stores, output / name) for name, stores in by_teacher.items()}


def _merge_teacher(stores: Sequence[FeatureStore], output: Path) -> int:
    """Rows of the first store, then those of the next that none before it has ..."""
    writer = FeatureWriter(output, stores[0].name, stores[0].dtype, SHARD_SIZE)
    total = 0
    for k, store in enumerate(stores):
        rows = store.index.missing_from([other.index for other in stores[:k]]) if k else np.arange(len(store))
        for chosen in np.split(rows, range(COPIED_TOGETHER, len(rows), COPIED_TOGETHER)):
            features = torch.from_numpy(store.gather("features", chosen)).view(TORCH_TYPES[store.dtype])
            writer.add_stored(store.ids.take(chosen), features, store.fingerprints(chosen))
        total += len(rows)
    writer.finish(stores[0].provenance)
    return total


def shard_size(pairs: int) -> int:
    """Pairs per shard: about a thousand shards of 256 to 16384 pairs."""
    size = SMALLEST_SHARD
    while size < SHARD_SIZE and size * SHARDS_WANTED < pairs:
        size *= 2
    return size


def stored(image: Tensor, text: Tensor, dtype: FeatureType, place: Path) -> Tensor:
    """Image and text features (n, dim) as (n, 2, dim) in the type of a store at a `place`.

    Raises:
        ValueError: the shapes differ, or a number is not finite or too large for ``dtype``.
    """
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            f"{place}: image {tuple(image.shape)} and text {tuple(text.shape)} features must both be (n, dim)"
        )
    features = torch.stack([image, text], dim=1).detach().cpu().float()
    stored = features.to(TORCH_TYPES[dtype])
    if not torch.isfinite(stored).all():
        largest = features.abs().max().item() if features.numel() else 0
        raise ValueError(f"{place}: features are not finite in {dtype}; the largest is {largest:.3g}")
    return stored
