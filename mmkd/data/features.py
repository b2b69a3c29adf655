"""Teacher features on disk: fixed-size shards of safetensors, mapped into memory and indexed by pair id.

A batch of random pairs is one fancy index into a memory map for each shard it touches, in half precision: hundreds of
times faster than one small file for each pair, at 2 bytes a number. Shards are written whole and carry the fingerprint
of the work they belong to: an interrupted extraction continues where it stopped and never mixes two teachers.

A store ``features/NAME/`` holds ``shard-00000.safetensors`` ... (``image`` and ``text``, each (n, dim)), ``ids.json``
and, written last, ``meta.json``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.numpy
import torch

from mmkd.data.published import META_FILE, is_folder_name
from mmkd.data.published_features import FeatureKind, PublishedFeatures
from mmkd.files import atomic_write_bytes, read_json, write_json

FeatureType = Literal["float16", "float32"]
STORED_AS = {"float16": "F16", "float32": "F32"}
SHARD_SIZE = 8192


class FeatureStore:
    """The image and text features of one teacher, memory-mapped.

    Attributes:
        name: the teacher.
        dim: width of its features.
        ids: pair ids in row order.
        provenance: what the writer recorded about weights and preprocessing.
    """

    def __init__(self, path: Path) -> None:
        """Map every shard and check it against ``meta.json``.

        Raises:
            FileNotFoundError: the store is unfinished (no ``meta.json``) or a shard is missing.
            ValueError: a shard is truncated or does not have the shape that ``meta.json`` states, or the teacher's name
                is none for a folder.
        """
        if not (path / "meta.json").is_file():
            raise FileNotFoundError(f"{path} is no finished feature store (no meta.json); run `mmkd extract` again")
        meta = read_json(path / "meta.json")
        self.name: str = meta["teacher"]
        if not is_folder_name(self.name):
            raise ValueError(f"{path}: the teacher is called {self.name!r}, which is not the name of a folder; refused")
        self.dim: int = meta["dim"]
        self.provenance: dict[str, Any] = meta["provenance"]
        self.ids: list[str] = read_json(path / "ids.json")
        if len(self.ids) != meta["count"]:
            raise ValueError(f"{path}: ids.json lists {len(self.ids)} pairs but meta.json counts {meta['count']}")
        self._shard_size: int = meta["shard_size"]
        self._shards = [
            _map_shard(shard_path(path, k), (min(self._shard_size, len(self.ids) - start), self.dim), meta["dtype"])
            for k, start in enumerate(range(0, len(self.ids), self._shard_size))
        ]
        self._rows = {id: row for row, id in enumerate(self.ids)}

    def lookup(self, ids: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features of n pairs.

        Returns:
            image (n, dim) float32, text (n, dim) float32, mask (n,) bool; a missing pair has mask false and zeros.
        """
        return self.read(np.array([self._rows.get(id, -1) for id in ids], dtype=np.int64))

    def read(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features by row number (n,) int64, -1 for none; returns as `lookup`."""
        image = np.zeros((len(rows), self.dim), dtype=np.float32)
        text = np.zeros_like(image)
        shards = np.where(rows < 0, -1, rows // self._shard_size)
        for k in np.unique(shards[shards >= 0]):
            chosen = np.flatnonzero(shards == k)
            local = rows[chosen] - k * self._shard_size
            image[chosen] = self._shards[k]["image"][local]
            text[chosen] = self._shards[k]["text"][local]
        return torch.from_numpy(image), torch.from_numpy(text), torch.from_numpy(rows >= 0)


class FeatureWriter:
    """Writes a store shard by shard; several processes may write different shards of one store."""

    def __init__(
        self, path: Path, name: str, dtype: FeatureType = "float16", shard_size: int = SHARD_SIZE, fingerprint: str = ""
    ) -> None:
        """Name the store; nothing is written yet.

        Args:
            path: folder of the store.
            name: the teacher.
            dtype: how numbers are stored.
            shard_size: pairs a shard.
            fingerprint: identifies pairs and weights; shards found with another one are refused.

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
        self.fingerprint = fingerprint

    def has(self, shard: int) -> bool:
        """Whether shard number ``shard`` is already there.

        Raises:
            ValueError: it is there, but of another extraction.
        """
        path = shard_path(self.path, shard)
        if not path.is_file():
            return False
        header, _ = _read_header(path)
        if header.get("__metadata__", {}).get("fingerprint", "") != self.fingerprint:
            raise ValueError(f"{path} was extracted from other pairs or weights; remove {self.path} or choose another")
        return True

    def write_shard(self, shard: int, image: torch.Tensor, text: torch.Tensor) -> None:
        """Write shard number ``shard`` whole.

        Args:
            shard: rows ``shard * shard_size`` and following.
            image: (n, dim) image features.
            text: (n, dim) text features of the same pairs.

        Raises:
            ValueError: the shapes differ, there are more rows than a shard takes, or a number is not finite.
        """
        if image.ndim != 2 or image.shape != text.shape or not 0 < len(image) <= self.shard_size:
            raise ValueError(
                f"{self.name}: image {tuple(image.shape)} and text {tuple(text.shape)} features must both be (n, dim) "
                f"with n at most {self.shard_size}"
            )
        arrays = {"image": _as_stored(image, self.dtype), "text": _as_stored(text, self.dtype)}
        for side, array in arrays.items():
            if not np.isfinite(array).all():
                raise ValueError(f"{self.name}: {side} features of shard {shard} are not finite in {self.dtype}")
        data = safetensors.numpy.save(arrays, metadata={"fingerprint": self.fingerprint})
        atomic_write_bytes(shard_path(self.path, shard), data)

    def finish(self, ids: Sequence[str], provenance: dict[str, Any]) -> None:
        """Write ``ids.json`` and then ``meta.json``, which makes the store readable.

        Args:
            ids: pair ids in row order over all shards.
            provenance: JSON values: weights, preprocessing, tokenizer, licence, versions.

        Raises:
            ValueError: an id occurs twice, or the shards do not hold ``len(ids)`` rows of one width.
            FileNotFoundError: a shard is missing.
        """
        if not ids or len(set(ids)) != len(ids):
            raise ValueError(f"{self.path}: the {len(ids)} ids must be at least one and unique")
        dim = _read_header(shard_path(self.path, 0))[0]["image"]["shape"][1]
        for k, start in enumerate(range(0, len(ids), self.shard_size)):
            rows = min(self.shard_size, len(ids) - start)
            _map_shard(shard_path(self.path, k), (rows, dim), self.dtype)
        write_json(self.path / "ids.json", list(ids))
        meta = {"teacher": self.name, "dim": dim, "dtype": self.dtype, "count": len(ids), "shard_size": self.shard_size}
        write_json(self.path / "meta.json", {**meta, "provenance": provenance})


class TeacherFeatures:
    """The features of several teachers, looked up together by pair id.

    Attributes:
        names: the teachers.
        dims: teacher -> width of its features.
        ids: every pair that at least one of them has seen.
    """

    def __init__(self, sources: dict[str, FeatureStore] | PublishedFeatures, names: Sequence[str]) -> None:
        """Use `open` instead.

        Args:
            sources: one store for each teacher, or the authors' published folder.
            names: the teachers to use.
        """
        self.names = list(names)
        self._published = sources if isinstance(sources, PublishedFeatures) else None
        self._stores = {name: sources[name] for name in names} if isinstance(sources, dict) else {}
        if isinstance(sources, PublishedFeatures):
            self.dims = {name: sources.dims[name] for name in names}
            self.ids = sources.ids
            return
        self.dims = {name: store.dim for name, store in self._stores.items()}
        self.ids = list(dict.fromkeys(chain.from_iterable(store.ids for store in self._stores.values())))
        self._index = {id: row for row, id in enumerate(self.ids)}
        self._rows = {name: self._store_rows(store) for name, store in self._stores.items()}

    @classmethod
    def open(cls, folder: Path, names: Sequence[str] | None = None, kind: FeatureKind = "raw") -> TeacherFeatures:
        """Open a folder of stores (one subfolder for each teacher), one store, or the authors' published folder.

        Args:
            folder: the folder.
            names: the teachers to use, by default all.
            kind: which features of the published folder; stores hold one kind only.

        Raises:
            FileNotFoundError: the folder holds no features.
            ValueError: a name is not among the teachers found.
        """
        sources: dict[str, FeatureStore] | PublishedFeatures
        if (folder / META_FILE).is_file():
            sources = PublishedFeatures(folder, kind)
            known = list(sources.dims)
        else:
            paths = (
                [folder] if (folder / "meta.json").is_file() else sorted(p.parent for p in folder.glob("*/meta.json"))
            )
            sources = {store.name: store for store in map(FeatureStore, paths)}
            known = list(sources)
            if len(known) != len(paths):
                raise ValueError(f"{folder}: two stores bear the same teacher's name; keep one of each")
        if not known:
            raise FileNotFoundError(f"{folder} holds no teacher features; make them with `mmkd extract`")
        unknown = [name for name in names or () if name not in known]
        if unknown:
            raise ValueError(f"no features of {', '.join(unknown)} in {folder}; it has: {', '.join(known)}")
        return cls(sources, known if names is None else names)

    def lookup(self, ids: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
        """Features of n pairs by teacher.

        Returns:
            name -> ``image`` (n, dim) float32, ``text`` (n, dim) float32 and ``mask`` (n,) bool; where a teacher has
            not seen a pair the mask is false and the features are zero.
        """
        if self._published is not None:
            found = self._published.lookup(ids)
            return {name: found[name] for name in self.names}
        positions = np.array([self._index.get(id, -1) for id in ids], dtype=np.int64)
        result = {}
        for name, store in self._stores.items():
            image, text, mask = store.read(np.where(positions < 0, -1, self._rows[name][positions]))
            result[name] = {"image": image, "text": text, "mask": mask}
        return result

    def _store_rows(self, store: FeatureStore) -> np.ndarray:
        """For each of ``ids`` its row in ``store`` or -1, (len(ids),) int64."""
        rows = np.full(len(self.ids), -1, dtype=np.int64)
        rows[[self._index[id] for id in store.ids]] = np.arange(len(store.ids))
        return rows


def shard_path(store: Path, shard: int) -> Path:
    """File of shard number ``shard``."""
    return store / f"shard-{shard:05d}.safetensors"


def _as_stored(features: torch.Tensor, dtype: FeatureType) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinities are refused by the caller
        return np.ascontiguousarray(features.detach().cpu().float().numpy().astype(dtype))


def _map_shard(path: Path, shape: tuple[int, int], dtype: FeatureType) -> dict[str, np.ndarray]:
    """Both tensors of a shard as read-only memory maps of the expected shape."""
    header, data_start = _read_header(path)
    mapped: dict[str, np.ndarray] = {}
    for side in ("image", "text"):
        entry = header.get(side, {})
        if tuple(entry.get("shape", ())) != shape or entry.get("dtype") != STORED_AS[dtype]:
            raise ValueError(f"{path}: {side} is {entry.get('dtype')} {entry.get('shape')}, expected {dtype} {shape}")
        start, end = entry["data_offsets"]
        if path.stat().st_size < data_start + end:
            raise ValueError(f"{path} is truncated; remove it and run `mmkd extract` again")
        mapped[side] = np.memmap(path, dtype=dtype, mode="r", offset=data_start + start, shape=shape)
    return mapped


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and where its data start, in bytes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run `mmkd extract` again")
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        text = file.read(length) if 0 < length < 1 << 20 else b""
    try:
        return json.loads(text), 8 + length
    except ValueError as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file; remove it and run `mmkd extract` again"
        ) from error
