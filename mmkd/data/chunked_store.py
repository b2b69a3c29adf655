"""A feature store written from features that come some at a time, in whole shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkd.data.feature_ids import FINGERPRINT
from mmkd.data.feature_shards import FeatureType
from mmkd.data.features import SHARD_SIZE, FeatureWriter


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
