"""Look up the features of several teachers together, and check that they belong to the pairs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from mmkd.data.features import FeatureKind
from mmkd.data.features.index import SHOWN, Ids, changes, digests, fingerprinted
from mmkd.data.features.store import FeatureStore, store_paths
from mmkd.data.folder import META_FILE
from mmkd.data.table import Pair
from mmkd.distributed import rank

if TYPE_CHECKING:
    from mmkd.data.features.published import PublishedFeatures

logger = logging.getLogger(__name__)
Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, Modality] = ("image", "text")
Features = dict[str, dict[str, Tensor]]


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
        self._published = None if isinstance(sources, dict) else sources
        self.stores = {name: sources[name] for name in names} if isinstance(sources, dict) else {}
        widths = {name: store.dim for name, store in self.stores.items()} if isinstance(sources, dict) else sources.dims
        self.dims = {name: widths[name] for name in names}
        self._by_index = {store.meta["ids"]["sha256"]: store for store in self.stores.values()}

    @property
    def identity(self) -> dict[str, str]:
        """Width and checksum of the store of each teacher, which must not change before a run is resumed."""
        checksums = {name: f", store {store.checksum[:16]}" for name, store in self.stores.items()}
        return {name: f"{dim} wide{checksums.get(name, '')}" for name, dim in self.dims.items()}

    @cached_property
    def ids(self) -> Sequence[str]:
        """The ids of all pairs with features of at least one teacher; for stores a sequence on disk, read in slices."""
        if self._published is not None:
            return self._published.ids
        return Ids.joined([(store.ids, store.index) for store in self._by_index.values()])

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
            from mmkd.data.features.published import PublishedFeatures  # here, because most trainings read stores

            sources = PublishedFeatures(folder, kind)
            found = list(sources.dims)
        else:
            paths = store_paths(folder)
            sources = {store.name: store for store in map(FeatureStore, paths)}
            found = list(sources)
            if len(found) != len(paths):
                raise ValueError(f"{folder}: two stores have the same teacher's name; keep one of them")
        if not found:
            raise FileNotFoundError(f"{folder} holds no teacher features; make them with `mmkd extract`")
        unknown = [name for name in names or () if name not in found]
        if unknown:
            raise ValueError(f"no features of {', '.join(unknown)} in {folder}; it has: {', '.join(found)}")
        return cls(sources, found if names is None else names)

    def lookup(self, ids: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Features of n pairs by teacher.

        Returns:
            name -> ``image`` (n, dim) float32, ``text`` (n, dim) float32 and ``mask`` (n,) bool; where a teacher has
            no features of a pair the mask is false and the features are zero.
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
        """Whether at least one teacher has features of each of n pairs, (n,) bool."""
        if self._published is not None:
            known = set(self._published.ids)
            return np.fromiter((id in known for id in ids), dtype=bool, count=len(ids))
        return np.any([rows >= 0 for rows in self._rows(ids).values()], axis=0)

    def fingerprints(self, ids: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The pairs among n with features of each teacher, and the fingerprints of these pairs at extraction.

        Returns:
            name -> (n,) bool, and (n,) of `FINGERPRINT`, zeros where they are unknown.
        """
        if self._published is not None:
            both = self.seen(ids), self._published.fingerprints(ids)
            return dict.fromkeys(self.names, both)
        rows, result = self._rows(ids), {}
        for name, store in self.stores.items():
            own = rows[store.meta["ids"]["sha256"]]
            result[name] = own >= 0, store.fingerprints(own)
        return result

    def _rows(self, ids: Sequence[str]) -> dict[str, np.ndarray]:
        """Rows of the ids in each distinct index; teachers of the same pairs share one."""
        requested = digests(ids)
        return {key: store.index.rows(requested) for key, store in self._by_index.items()}


def seen_pairs(features: TeacherFeatures, pairs: Sequence[Pair], place: object) -> np.ndarray:
    """Mask of n pairs with features of at least one teacher, (n,) bool; refuse pairs that have changed since.

    Feature stores without fingerprints are accepted with a warning.

    Args:
        features: of the teachers.
        pairs: what they are used for.
        place: where the features lie, for the message.

    Raises:
        ValueError: captions or images have changed since the features were made; with their number and first ids.
    """
    parts = [np.zeros(0, dtype=bool)]
    counts: dict[str, dict[str, int]] = {}
    first: dict[str, None] = {}
    for ids, now in fingerprinted(pairs):
        seen = np.zeros(len(ids), dtype=bool)
        for name, (mask, before) in features.fingerprints(ids).items():
            seen |= mask
            for what, differ in changes(before, now).items():
                if differ.any():
                    own = counts.setdefault(name, {})
                    own[what] = own.get(what, 0) + int(differ.sum())
                    if len(first) < SHOWN:
                        first |= dict.fromkeys(ids[row] for row in np.flatnonzero(differ)[:SHOWN].tolist())
        parts.append(seen)
    if counts:
        listed = "; ".join(
            f"{name}: {' and '.join(f'{count} {what}' for what, count in own.items())}" for name, own in counts.items()
        )
        raise ValueError(
            f"{place} holds features of other captions or images than these {len(pairs)} pairs have now ({listed}; "
            f"first {', '.join(islice(first, SHOWN))}). Extract (and align) again into a new folder, use the pairs "
            "that were extracted, or give pairs that changed new ids"
        )
    without = [name for name, store in features.stores.items() if not store.has("fingerprints")]
    if without and rank() == 0:
        logger.warning(
            "%s: the features of %s have no fingerprints of their captions and images; a change would go unnoticed",
            place,
            ", ".join(without),
        )
    return np.concatenate(parts)


def available_features(
    features: TeacherFeatures, ids: Sequence[str], teachers: Sequence[Sequence[str] | None]
) -> dict[str, dict[str, Tensor]]:
    """Teacher features of B pairs, with the masks of screening.

    Args:
        features: where they are looked up.
        ids: ids of the pairs.
        teachers: for each pair the teachers that screening left it, None for all.

    Returns:
        name -> ``image`` (B, dim), ``text`` (B, dim), ``unscreened_mask`` (B,), true where the teacher has features of
        the pair, and ``mask`` (B,), true where screening also left it available.
    """
    found = features.lookup(ids)
    for name, teacher in found.items():
        teacher["unscreened_mask"] = teacher["mask"].clone()
        teacher["mask"] &= torch.tensor([allowed is None or name in allowed for allowed in teachers])
    return found
