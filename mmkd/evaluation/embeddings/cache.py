"""Cached vectors of an evaluation: shards named by what is in them, and their rows by key.

The cache is addressed by content: a shard's name is the hash of the encoder's fingerprint and of the very images or
texts in it, so that a killed run resumes at the shard, a changed image is embedded again with its shard, and nothing
else is. Vectors are stored in half precision and read back before use, so that a warm and a cold cache give the same
numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mmkd.data.features.shards import is_whole, shard_file, write_shard
from mmkd.data.features.store import VectorStore
from mmkd.data.table import Pair
from mmkd.encoders.extraction import share_of_cores
from mmkd.evaluation.datasets.dataset import Dataset

FORMAT = 3
SHARD_SIZE = 4096
HALF_LIMIT = 6e4

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class EmbeddingShard:
    """Images or texts that are embedded together, and the files of the encoders that lack them.

    Attributes:
        dataset: its name.
        open: opens it.
        kind: ``images`` or ``texts``.
        keys: ids of the images, or the texts.
        files: by name of the encoder.
    """

    dataset: str
    open: Callable[[], Dataset]
    kind: str
    keys: Sequence[str]
    files: dict[str, Path]


@dataclass
class DatasetInputs:
    """What is embedded of a folder of pairs or a dataset; equal contents have equal shards.

    Attributes:
        name: sub-folder of the cache.
        open: gives the dataset; opened again where it is needed, so that not all lie in memory.
        images: ids of the pairs whose images are embedded, by shard; none of slides, whose features lie in bags.
        digests: pair id -> hash of its image, of all pairs.
        texts: captions, prompts and questions, by shard.
    """

    name: str
    open: Callable[[], Dataset]
    images: list[list[str]]
    digests: dict[str, str]
    texts: list[list[str]]

    @classmethod
    def of(
        cls,
        opened: Dataset,
        reopen: Callable[[], Dataset],
        images: Sequence[Sequence[Pair]],
        texts: Sequence[Sequence[str]],
        quiet: bool,
    ) -> DatasetInputs:
        """Hash the images of an opened dataset; ``"missing"`` where one cannot be read.

        Args:
            opened: the dataset.
            reopen: opens it again.
            images: whose images are embedded; no shard spans two of the lists, so that a run that needs the first alone
                leaves shards that a run of more tasks reuses.
            texts: that are embedded, likewise.
            quiet: no progress bar.
        """
        with ThreadPoolExecutor(share_of_cores()) as threads:
            found = threads.map(opened.digest, opened.pairs)
            shown = tqdm(found, desc="hashing images", unit="image", total=len(opened.pairs), disable=quiet)
            digests = dict(zip((pair.id for pair in opened.pairs), shown, strict=True))
        ids = [[pair.id for pair in shard] for own in images for shard in shards_of(own)]
        sentences = [list(shard) for own in texts for shard in shards_of(own)]
        return cls(opened.manifest.dataset, reopen, ids, digests, sentences)

    @cached_property
    def image_hashes(self) -> list[str]:
        """Hash over ids and images of each shard of images."""
        return [_sha256([f"{id} {self.digests[id]}" for id in part]) for part in self.images]

    @cached_property
    def text_hashes(self) -> list[str]:
        """Hash over the texts of each shard of texts."""
        return [_sha256(part) for part in self.texts]

    def lacking(self, files: Mapping[str, Sequence[Path]]) -> list[EmbeddingShard]:
        """The shards that some encoders lack; ``files`` of each by its name."""
        parts = [*(("images", ids) for ids in self.images), *(("texts", texts) for texts in self.texts)]
        found = []
        for number, (kind, keys) in enumerate(parts):
            own = {name: of[number] for name, of in files.items() if not is_whole(of[number])}
            found += [EmbeddingShard(self.name, self.open, kind, keys, own)] * bool(own)
        return found

    def files(self, cache: Path, fingerprint: str) -> list[Path]:
        """Files of all shards under an encoder's cache, those of images first."""
        parts = [*(("images", own) for own in self.image_hashes), *(("texts", own) for own in self.text_hashes)]
        return [shard_file(cache, FORMAT, fingerprint, content, kind=kind) for kind, content in parts]


def write_vectors(
    file: Path, ids: Sequence[str], arrays: dict[str, Tensor], skipped: dict[str, str], failures: Sequence[str]
) -> None:
    """Write a shard of vectors in half precision; an array with numbers beyond it is kept in single precision.

    Args:
        file: the shard.
        ids: of its n rows.
        arrays: ``vectors`` (n, dim) in the common space, and of images ``pooled`` (n, width) where there are any.
        skipped: id -> reason of the images that could not be read.
        failures: messages of the encoder, whose rows are NaN.
    """
    fitting = {
        name: array.to(torch.float32 if bool((array.abs() > HALF_LIMIT).any()) else torch.float16)
        for name, array in arrays.items()
    }
    write_shard(file, ids, fitting, notes={"skipped": skipped, "failures": list(failures)})


def shards_of(items: Sequence[Any]) -> list[Sequence[Any]]:
    """Items in order, `SHARD_SIZE` at a time."""
    return [items[start : start + SHARD_SIZE] for start in range(0, len(items), SHARD_SIZE)]


def text_ids(texts: Sequence[str]) -> list[str]:
    """Ids of the rows of texts: their hashes."""
    return [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in texts]


def _sha256(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class UndefinedMetricError(Exception):
    """An encoder cannot answer a task; the message gives the reason and replaces the numbers in its result."""


class StoredVectors(Mapping[str, Vectors]):
    """Vectors ``(dim,)`` float32 by key, read from one array of a store on demand."""

    def __init__(self, keys: Sequence[str], store: VectorStore, name: str) -> None:
        """Number the keys in the order of the store's rows.

        Raises:
            ValueError: there are not as many keys as rows.
        """
        if len(keys) != len(store):
            raise ValueError(f"{len(keys)} keys for {len(store)} vectors")
        self.store, self.name = store, name
        self.row_of = {key: row for row, key in enumerate(keys)}

    def __getitem__(self, key: str) -> Vectors:
        return Rows(self, [key])[:][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.row_of)

    def __len__(self) -> int:
        return len(self.row_of)


class Rows:
    """Vectors ``(n, dim)`` of n keys; ``rows[start:stop]`` reads a range of them as float32."""

    def __init__(self, vectors: StoredVectors, keys: Sequence[str]) -> None:
        """Look the keys up; nothing is read yet.

        Raises:
            KeyError: one of them has no vector.
        """
        self._vectors, self._rows = vectors, np.fromiter(map(vectors.row_of.__getitem__, keys), np.int64, len(keys))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: slice) -> Vectors:
        return self._vectors.store.gather(self._vectors.name, self._rows[part], np.float32)


def rows_of(vectors: Mapping[str, Vectors], keys: Sequence[str], what: str) -> Rows | Vectors:
    """Vectors of n keys, ``(n, dim)``, of which ranges can be read; ``[:]`` gives all.

    Raises:
        UndefinedMetricError: some are missing; the message states how many.
    """
    known = vectors.row_of if isinstance(vectors, StoredVectors) else vectors
    missing = sum(key not in known for key in keys)
    if missing:
        raise UndefinedMetricError(f"it has no vectors of {missing} of {len(keys)} {what}")
    return Rows(vectors, keys) if isinstance(vectors, StoredVectors) else np.stack([vectors[key] for key in keys])
