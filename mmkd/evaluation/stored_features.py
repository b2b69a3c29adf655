"""Precomputed features as an encoder: images and captions are known by pair, no other sentence is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmkd.data.feature_ids import digests
from mmkd.data.feature_store import FeatureStore
from mmkd.data.pair_fingerprints import changes, fingerprints_of
from mmkd.data.records import Pair
from mmkd.evaluation.embedding import Embedded
from mmkd.evaluation.vectors import Table

TINY = np.finfo(np.float32).tiny


class StoredFeatures:
    """One teacher's feature store (`mmkd extract`), looked up by pair id."""

    def __init__(self, folder: Path) -> None:
        """Open the store.

        Raises:
            FileNotFoundError: there is no store; the message names those below the folder, if there are any.
        """
        if not (folder / "meta.json").is_file():
            below = sorted(path.parent.name for path in folder.glob("*/meta.json"))
            hint = f"; give one of {', '.join(f'features:{folder / name}' for name in below)}" if below else ""
            raise FileNotFoundError(f"features:{folder} holds no meta.json, as every store of `mmkd extract`{hint}")
        self.store = FeatureStore(folder)
        self.fingerprint = hashlib.sha256(f"store {self.store.checksum}".encode()).hexdigest()
        self.provenance = {"features": self.store.name, "dim": self.store.dim, **self.store.provenance}

    def embedded(self, name: str, pairs: Sequence[Pair]) -> Embedded:
        """The vectors of those pairs that the store holds; of pairs that have changed since, none.

        Args:
            name: how the encoder is called in the results.
            pairs: whose images and captions are asked for.
        """
        rows = self.store.ids.rows(digests([pair.id for pair in pairs]))
        known = np.flatnonzero(rows >= 0)
        found = [pairs[k] for k in known.tolist()]
        before, now = self.store.ids.fingerprints(rows[known]), fingerprints_of(found)
        changed = np.logical_or.reduce(list(changes(before, now).values())) if found else np.zeros(0, dtype=bool)
        kept = [pair for pair, gone in zip(found, changed.tolist(), strict=True) if not gone]
        image, text, _ = self.store.read(rows[known[~changed]])
        count = int(changed.sum())
        failures = [f"{count} pairs have changed since these features were made; they count as missing"] * (count > 0)
        captions = {pair.caption: row for row, pair in enumerate(kept) if pair.caption.strip()}
        return Embedded(
            name,
            self.fingerprint,
            self.provenance,
            Table([pair.id for pair in kept], [_unit(image.numpy())]),
            {},
            Table(list(captions), [_unit(text.numpy()[list(captions.values())])]),
            failures=failures,
        )


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows (n, dim) at unit length."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), TINY)
