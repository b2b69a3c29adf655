"""The features of several teachers, looked up together; and the writer of one teacher's store."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmkd.data.feature_ids import FINGERPRINT, JoinedIds, digests
from mmkd.data.feature_shards import STORED_AS, FeatureType, write_shard
from mmkd.data.feature_store import FeatureStore, close_store
from mmkd.data.published import META_FILE
from mmkd.data.published_features import FeatureKind, PublishedFeatures

SHARD_SIZE = 16384


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
            fingerprints: of the pairs, see `mmkd.data.pair_fingerprints`; None where they are unknown.

        Raises:
            ValueError: an id occurs twice, or the shards do not hold ``len(ids)`` rows of one width.
            FileNotFoundError: a shard is missing.
        """
        files = [shard_path(self.path, k) for k in range(-(-len(ids) // self.shard_size))]
        known = np.zeros(len(ids), dtype=FINGERPRINT) if fingerprints is None else fingerprints
        parts = (slice(start, start + self.shard_size) for start in range(0, len(ids), self.shard_size))
        chunks = ((ids[part], known[part]) for part in parts)
        close_store(self.path, self.name, self.dtype, files, chunks, provenance)


class TeacherFeatures:
    """The features of several teachers, looked up together by pair id.

    Attributes:
        names: the teachers.
        dims: teacher -> width of its features.
        stores: teacher -> its store; empty for the authors' folder.
    """

    def __init__(self, sources: dict[str, FeatureStore] | PublishedFeatures, names: Sequence[str]) -> None:
        """Use `open` instead.

        Args:
            sources: one store for each teacher, or the authors' published folder.
            names: the teachers to use.
        """
        self.names = list(names)
        self._published = sources if isinstance(sources, PublishedFeatures) else None
        self.stores = {name: sources[name] for name in names} if isinstance(sources, dict) else {}
        widths = sources.dims if isinstance(sources, PublishedFeatures) else {n: s.dim for n, s in self.stores.items()}
        self.dims = {name: widths[name] for name in names}
        self._indexes = {store.meta["ids"]["sha256"]: store.ids for store in self.stores.values()}

    @property
    def identity(self) -> dict[str, str]:
        """What a run that is resumed must find again: of each teacher the width and the checksum of its store."""
        known = {name: f", store {store.checksum[:16]}" for name, store in self.stores.items()}
        return {name: f"{dim} wide{known.get(name, '')}" for name, dim in self.dims.items()}

    @cached_property
    def ids(self) -> Sequence[str]:
        """Every pair that at least one of them has seen; for stores a sequence on disk, to be read in slices."""
        return JoinedIds(list(self._indexes.values())) if self._published is None else self._published.ids

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
            paths = store_paths(folder)
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
        rows, result = self._rows(ids), {}
        for name, store in self.stores.items():
            image, text, mask = store.read(rows[store.meta["ids"]["sha256"]])
            result[name] = {"image": image, "text": text, "mask": mask}
        return result

    def seen(self, ids: Sequence[str]) -> np.ndarray:
        """Whether at least one teacher has seen each of n pairs, (n,) bool."""
        if self._published is not None:
            known = set(self._published.ids)
            return np.fromiter((id in known for id in ids), dtype=bool, count=len(ids))
        return np.any([rows >= 0 for rows in self._rows(ids).values()], axis=0)

    def seen_as(self, ids: Sequence[str]) -> list[tuple[list[str], np.ndarray, np.ndarray]]:
        """Which of n pairs teachers have seen, and what these pairs were then.

        Returns:
            For teachers that saw the same pairs: their names, (n,) bool, and (n,) of `FINGERPRINT`, zeros if unknown.
        """
        if self._published is not None:
            return [(self.names, self.seen(ids), self._published.fingerprints(ids))]
        found = []
        for key, rows in self._rows(ids).items():
            names = [name for name, store in self.stores.items() if store.meta["ids"]["sha256"] == key]
            found.append((names, rows >= 0, self._indexes[key].fingerprints(rows)))
        return found

    def _rows(self, ids: Sequence[str]) -> dict[str, np.ndarray]:
        """Rows of the ids in each distinct index; teachers that saw the same pairs share one."""
        wanted = digests(ids)
        return {key: index.rows(wanted) for key, index in self._indexes.items()}


def store_paths(folder: Path) -> list[Path]:
    """The finished stores in a folder, or the folder itself if it is one."""
    return [folder] if (folder / "meta.json").is_file() else sorted(p.parent for p in folder.glob("*/meta.json"))


def shard_path(store: Path, shard: int) -> Path:
    """File of shard number ``shard``."""
    return store / f"shard-{shard:05d}.safetensors"
