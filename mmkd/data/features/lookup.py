"""The features of several teachers, looked up together; and the writer of one teacher's store."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mmkd.data.features.index import SHOWN, JoinedIds, changes, digests, fingerprinted
from mmkd.data.features.published import FeatureKind, PublishedFeatures
from mmkd.data.features.store import FeatureStore
from mmkd.data.published import META_FILE
from mmkd.data.table import Pair
from mmkd.distributed import rank


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


# Section: Whether features belong to the pairs they are used with.


logger = logging.getLogger(__name__)


def seen_pairs(features: TeacherFeatures, pairs: Sequence[Pair], place: object) -> np.ndarray:
    """Which of n pairs at least one teacher has seen, (n,) bool, all of them as they are now.

    Stores that were written without fingerprints are taken as they are, with a warning.

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
        for names, known, before in features.seen_as(ids):
            seen |= known
            for what, wrong in changes(before, now).items():
                if wrong.any():
                    own = counts.setdefault(", ".join(names), {})
                    own[what] = own.get(what, 0) + int(wrong.sum())
                    if len(first) < SHOWN:
                        first |= dict.fromkeys(ids[row] for row in np.flatnonzero(wrong)[:SHOWN].tolist())
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
    without = [name for name, store in features.stores.items() if not store.ids.has_fingerprints]
    if without and rank() == 0:
        logger.warning(
            "%s: the features of %s do not say which captions and images they are of; a change would go unnoticed",
            place,
            ", ".join(without),
        )
    return np.concatenate(parts)


def available_features(
    features: TeacherFeatures, ids: Sequence[str], teachers: Sequence[Sequence[str] | None]
) -> dict[str, dict[str, torch.Tensor]]:
    """Teacher features of B pairs, as far as screening allows them.

    Args:
        features: where they are looked up.
        ids: ids of the pairs.
        teachers: for each pair the teachers that screening left it, None for all.

    Returns:
        name -> ``image`` (B, dim), ``text`` (B, dim), ``seen`` (B,), true where the teacher has features of the pair,
        and ``mask`` (B,), true where screening also left it available.
    """
    found = features.lookup(ids)
    for name, teacher in found.items():
        teacher["seen"] = teacher["mask"].clone()
        teacher["mask"] &= torch.tensor([allowed is None or name in allowed for allowed in teachers])
    return found


Modality = Literal["image", "text"]

MODALITIES: tuple[Modality, Modality] = ("image", "text")

Features = dict[str, dict[str, Tensor]]
