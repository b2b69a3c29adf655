"""One teacher's feature store: opened in no time, read by pair id or by row.

A batch of random pairs is a binary search for their ids and one fancy index into each shard it touches, in half
precision: hundreds of times faster than one small file for each pair, at 2 bytes a number. Opening reads ``meta.json``
and a header; shards are mapped when they are first touched, so that twenty million pairs open in a blink.

A store ``features/NAME/`` holds its shards (`feature_shards`), ``ids-*.safetensors`` (`feature_ids`) and ``meta.json``,
which names them and is replaced last: a reader sees the old store or the new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkd.data.features.index import FINGERPRINT, IdIndex, digests, write_index
from mmkd.data.features.shards import STORED_AS, FeatureType, TensorMap, decode, header_sha256, write_shard
from mmkd.data.published import is_folder_name
from mmkd.files import read_json, write_json

SHARD_SIZE = 16384  # rows


class FeatureWriter:
    """Writes a store shard by shard; several processes may write different shards of one store."""

    def __init__(self, path: Path, name: str, dtype: FeatureType = "float16", shard_size: int = SHARD_SIZE) -> None:
        """Name the store; nothing is written yet.

        Args:
            path: folder of the store.
            name: the teacher.
            dtype: how numbers are stored.
            shard_size: pairs a shard.

        Raises:
            ValueError: an unknown dtype, or a shard size below 1.
        """
        if dtype not in STORED_AS or shard_size < 1:
            raise ValueError(
                f"dtype {dtype!r} must be one of {', '.join(STORED_AS)}, shard_size {shard_size} at least 1"
            )
        self.path = path
        self.name = name
        self.dtype = dtype
        self.shard_size = shard_size

    def write_shard(self, shard: int, image: torch.Tensor, text: torch.Tensor) -> None:
        """Write shard number ``shard`` whole.

        Args:
            shard: rows ``shard * shard_size`` and following.
            image: (n, dim) image features.
            text: (n, dim) text features of the same pairs.

        Raises:
            ValueError: the shapes differ, there are more rows than a shard takes, or a number is not finite.
        """
        if not 0 < len(image) <= self.shard_size:
            raise ValueError(f"{self.name}: {len(image)} features must be 1 to {self.shard_size}, the size of a shard")
        write_shard(shard_path(self.path, shard), image, text, self.dtype)

    def finish(self, ids: Sequence[str], provenance: dict[str, Any], fingerprints: np.ndarray | None = None) -> None:
        """Write the ids and then ``meta.json``, which makes the store readable.

        Args:
            ids: pair ids in row order over all shards; may be a sequence on disk.
            provenance: JSON values: weights, preprocessing, tokenizer, licence, versions.
            fingerprints: of the pairs, see `mmkd.data.features.index`; None where they are unknown.

        Raises:
            ValueError: an id occurs twice, or the shards do not hold ``len(ids)`` rows of one width.
            FileNotFoundError: a shard is missing.
        """
        files = [shard_path(self.path, k) for k in range(-(-len(ids) // self.shard_size))]
        known = np.zeros(len(ids), dtype=FINGERPRINT) if fingerprints is None else fingerprints
        parts = (slice(start, start + self.shard_size) for start in range(0, len(ids), self.shard_size))
        chunks = ((ids[part], known[part]) for part in parts)
        close_store(self.path, self.name, self.dtype, files, chunks, provenance)


def shard_path(store: Path, shard: int) -> Path:
    """File of shard number ``shard``."""
    return store / f"shard-{shard:05d}.safetensors"


VERSION = 2


STRETCH = 256  # rows; from here on neighbouring rows are read ahead together


class FeatureStore:
    """The image and text features of one teacher, memory-mapped.

    Attributes:
        path: its folder.
        name: the teacher.
        dim: width of its features.
        dtype: how numbers are stored.
        ids: pair ids in row order, a sequence on disk.
        provenance: what the writer recorded about weights and preprocessing.
        checksum: SHA-256 of ``meta.json``, which holds those of all else.
        shards: ``file``, ``rows``, ``bytes`` and ``header_sha256`` of each, in row order.
    """

    def __init__(self, path: Path) -> None:
        """Read ``meta.json``, map the ids and look whether every shard is there in full length.

        Raises:
            FileNotFoundError: the store is unfinished (no ``meta.json``) or a file is missing.
            ValueError: a file is truncated, ``meta.json`` was changed or is of another version, or the teacher's name
                is none for a folder.
        """
        self.path = path
        self.meta = read_meta(path)
        self.checksum = _meta_sha256(self.meta)
        self.name: str = self.meta["teacher"]
        if not is_folder_name(self.name):
            raise ValueError(f"{path}: the teacher is called {self.name!r}, which is not the name of a folder; refused")
        self.dim: int = self.meta["dim"]
        self.dtype: FeatureType = self.meta["dtype"]
        self.provenance: dict[str, Any] = self.meta["provenance"]
        self.shards: list[dict[str, Any]] = self.meta["shards"]
        self.ids = IdIndex(path / self.meta["ids"]["file"])
        self._starts = np.cumsum([0, *(shard["rows"] for shard in self.shards)])
        if {len(self.ids), int(self._starts[-1])} != {self.meta["count"]}:
            raise ValueError(
                f"{path}: {len(self.ids)} ids, {self._starts[-1]} rows, but a count of {self.meta['count']}"
            )
        for shard in self.shards:
            file = path / shard["file"]
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing; run `mmkd extract` again")
            if file.stat().st_size != shard["bytes"]:
                raise ValueError(
                    f"{file} is truncated; remove it and {path / 'meta.json'}, and run `mmkd extract` again"
                )
        self._mapped: dict[int, TensorMap] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process maps the files anew."""
        return FeatureStore, (self.path,)

    def lookup(self, ids: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features of n pairs.

        Returns:
            image (n, dim) float32, text (n, dim) float32, mask (n,) bool; a missing pair has mask false and zeros.
        """
        return self.read(self.ids.rows(digests(ids)))

    def read(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features by row number (n,) int64, -1 for none; returns as `lookup`."""
        image, text = decode(*self.stored(rows), self.dtype)
        return image, text, torch.from_numpy(rows >= 0)

    def stored(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The bits of rows (n,) as they are stored: features (n, 2, dim) and, in int8, scales (n, 2)."""
        order = np.argsort(rows, kind="stable")
        order = order[np.searchsorted(rows[order], 0) :]
        shards = np.searchsorted(self._starts, rows[order], side="right") - 1
        bounds = np.concatenate([[0], np.flatnonzero(shards[1:] != shards[:-1]) + 1, [len(shards)]])[: len(shards) + 1]
        stored, scale = self._empty(len(rows))
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            k, chosen = int(shards[begin]), order[begin:end]
            shard, local = self._shard(k), rows[chosen] - self._starts[k]
            if len(local) >= STRETCH and local[-1] - local[0] < 2 * len(local):
                shard.announce(shard.arrays["features"][local[0] : local[-1] + 1])
            stored[chosen] = shard.arrays["features"][local]
            if scale is not None:
                scale[chosen] = shard.arrays["scale"][local]
        return stored, scale

    def _empty(self, rows: int) -> tuple[np.ndarray, np.ndarray | None]:
        types = {"float16": np.float16, "float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}
        stored = np.zeros((rows, 2, self.dim), dtype=types[self.dtype])
        return stored, np.zeros((rows, 2), dtype=np.uint16) if self.dtype == "int8" else None

    def _shard(self, k: int) -> TensorMap:
        if k not in self._mapped:
            path, rows = self.path / self.shards[k]["file"], self.shards[k]["rows"]
            mapped = TensorMap(path, scattered=True)
            if mapped.arrays.get("features", np.empty(0)).shape != (rows, 2, self.dim):
                raise ValueError(
                    f"{path} does not hold {rows} pairs of width {self.dim}; `mmkd features verify` says more"
                )
            self._mapped[k] = mapped
        return self._mapped[k]


def close_store(
    path: Path,
    name: str,
    dtype: FeatureType,
    files: Sequence[Path],
    id_chunks: Iterable[tuple[Sequence[str], np.ndarray]],
    provenance: dict[str, Any],
) -> None:
    """Write the index of ids and ``meta.json`` over shards that are there; see `FeatureWriter.finish`."""
    shards, widths, count = [], set(), 0
    for file in files:
        digest, _, (rows, dim) = header_sha256(file)
        shards.append({"file": file.name, "rows": rows, "bytes": file.stat().st_size, "header_sha256": digest})
        widths.add(dim)
        count += rows
    if len(widths) != 1:
        raise ValueError(f"{path}: the shards must be at least one and of one width, not {sorted(widths)}")
    index, digest = write_index(path, id_chunks, count)
    meta = {"version": VERSION, "teacher": name, "dim": widths.pop(), "dtype": dtype, "count": count, "shards": shards}
    meta |= {"ids": {"file": index, "sha256": digest}, "provenance": provenance}
    write_json(path / "meta.json", {**meta, "sha256": _meta_sha256(meta)})


def read_meta(path: Path) -> dict[str, Any]:
    """The ``meta.json`` of a store, checked against its own checksum.

    Raises:
        FileNotFoundError: the store is unfinished.
        ValueError: it is of another version, or was changed.
    """
    if not (path / "meta.json").is_file():
        raise FileNotFoundError(f"{path} is no finished feature store (no meta.json); run `mmkd extract` again")
    meta = read_json(path / "meta.json")
    if not isinstance(meta, dict) or meta.get("version") != VERSION:
        raise ValueError(f"{path / 'meta.json'} is not of version {VERSION}; extract again or upgrade mmkd-clip")
    if meta.pop("sha256", None) != _meta_sha256(meta):
        raise ValueError(f"{path / 'meta.json'} was changed after it was written; extract again")
    return meta


def _meta_sha256(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


# Section: A feature store written from features that come some at a time, in whole shards.


class ChunkedStore:
    """Writes one teacher's store in whole shards, of features that come some at a time."""

    def __init__(self, path: Path, name: str, dim: int, dtype: FeatureType) -> None:
        """Name the store; the first full shard is the first thing written."""
        self.writer = FeatureWriter(path, name, dtype)
        self.ids: list[str] = []
        self._fingerprints = [np.zeros(0, dtype=FINGERPRINT)]
        self._shards, self._image, self._text = 0, torch.empty(0, dim), torch.empty(0, dim)

    def add(self, ids: Sequence[str], fingerprints: np.ndarray, image: Tensor, text: Tensor) -> None:
        """Take fingerprints (n,) and features (n, dim) of n pairs, and write what fills shards."""
        self.ids += ids
        self._fingerprints.append(fingerprints)
        self._image, self._text = torch.cat([self._image, image]), torch.cat([self._text, text])
        while len(self._image) >= SHARD_SIZE:
            self._write(SHARD_SIZE)

    def finish(self, provenance: dict[str, Any]) -> None:
        """Write the rest and close the store."""
        if len(self._image):
            self._write(len(self._image))
        self.writer.finish(self.ids, provenance, np.concatenate(self._fingerprints))

    def _write(self, rows: int) -> None:
        self.writer.write_shard(self._shards, self._image[:rows], self._text[:rows])
        self._image, self._text, self._shards = self._image[rows:], self._text[rows:], self._shards + 1
