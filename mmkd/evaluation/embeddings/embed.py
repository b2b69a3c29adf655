"""Embed once: every task reads the same cached image and text embeddings of an encoder.

Images go through the loader of `mmkd.encoders.extraction`, as in `mmkd extract`: read, decoded and prepared by threads
while the encoders compute, and decoded once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkd.command.tasks import Progress, resident
from mmkd.data.features.shards import is_whole, read_header
from mmkd.data.features.store import VectorStore
from mmkd.data.table import Pair
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.extraction import EncodingTask, Readable, encode_shards, read_or_reason
from mmkd.evaluation.datasets.dataset import Dataset
from mmkd.evaluation.embeddings.cache import (
    DatasetInputs,
    EmbeddingShard,
    Rows,
    StoredVectors,
    Vectors,
    rows_of,
    text_ids,
    write_vectors,
)
from mmkd.evaluation.embeddings.tokens import TokenSource


@dataclass
class Embedded:
    """The vectors of all images and texts of an evaluation by one encoder.

    Attributes:
        name: of the encoder in the results.
        fingerprint: of its weights and preprocessing.
        provenance: of the encoder.
        images: pair id -> image vector ``(dim,)``, unit length; unreadable images are absent.
        pooled: pair id -> image vector before the projection ``(width,)``; empty where the encoder has none.
        texts: text -> text vector ``(dim,)``, unit length.
        unreadable: pair id -> reason.
        failures: messages of the encoder where it gave no finite vectors; those are NaN.
        tokens: gives sequences of tokens, for tasks that use more than vectors; None where there are none.
    """

    name: str
    fingerprint: str
    provenance: dict[str, Any] = field(default_factory=dict)
    images: Mapping[str, Vectors] = field(default_factory=dict)
    pooled: Mapping[str, Vectors] = field(default_factory=dict)
    texts: Mapping[str, Vectors] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    tokens: TokenSource | None = None

    def image_matrix(self, pairs: Sequence[Pair]) -> Vectors:
        """Image vectors of pairs, ``(n, dim)``.

        Raises:
            UndefinedMetricError: some have no vectors.
        """
        return self.image_rows(pairs)[:]

    def image_rows(self, pairs: Sequence[Pair]) -> Rows | Vectors:
        """The same as `image_matrix`, of which ranges are read on demand."""
        return rows_of(self.images, [pair.id for pair in pairs], "images")

    def pooled_matrix(self, pairs: Sequence[Pair]) -> Vectors:
        """Image vectors before the projection, ``(n, width)``; the joint ones where the encoder has no others."""
        return rows_of(self.pooled or self.images, [pair.id for pair in pairs], "images")[:]

    def text_matrix(self, texts: Sequence[str]) -> Vectors:
        """Text vectors, ``(n, dim)``.

        Raises:
            UndefinedMetricError: some have no vectors.
        """
        return self.text_rows(texts)[:]

    def text_rows(self, texts: Sequence[str]) -> Rows | Vectors:
        """The same as `text_matrix`, of which ranges are read on demand."""
        return rows_of(self.texts, texts, "sentences")


class _ImageTask(EncodingTask[Pair]):
    """Joint and pooled vectors of images, in the shards of a cache."""

    def __init__(self, encoder: DualEncoder, files: Sequence[Path]) -> None:
        super().__init__(encoder)
        self.files = files
        self.failures: list[str] = []

    def has(self, shard: int) -> bool:
        return is_whole(self.files[shard])

    def encode(self, prepared: list[Any]) -> dict[str, Tensor]:
        joint, pooled = _or_nan(self.encoder, self.encoder.encode_prepared_and_pooled, prepared, self.failures)
        return {"vectors": joint} if pooled is None else {"vectors": joint, "pooled": pooled}

    def write(self, shard: int, items: list[Pair], arrays: dict[str, Tensor], skipped: list[tuple[Pair, str]]) -> None:
        reasons = {pair.id: reason for pair, reason in skipped}
        arrays = arrays or {"vectors": torch.zeros(0, self.encoder.dim)}
        write_vectors(self.files[shard], [pair.id for pair in items], arrays, reasons, self.failures)
        self.failures = []


def embed(
    encoders: Mapping[str, DualEncoder],
    batch_size: int,
    shards: Sequence[EmbeddingShard],
    progress: Progress = lambda items: None,
) -> None:
    """Write shards; an image is read and decoded once for all encoders.

    Args:
        encoders: by name.
        batch_size: images or texts at a time.
        shards: what is embedded.
        progress: called with the number of images or texts.
    """
    for (_, kind, names), group in groupby(shards, lambda shard: (shard.dataset, shard.kind, tuple(shard.files))):
        own = list(group)
        if kind == "images":
            dataset = own[0].open()
            pairs = {pair.id: pair for pair in dataset.image_pairs}
            images = [(number, [pairs[id] for id in shard.keys]) for number, shard in enumerate(own)]
            tasks = [_ImageTask(encoders[name], [shard.files[name] for shard in own]) for name in names]
            encode_shards(tasks, images, partial(_read, dataset), batch_size, progress=progress)
            continue
        for shard in own:
            for name in names:
                _embed_texts(encoders[name], shard.keys, shard.files[name], batch_size)
            progress(len(shard.keys))


def load_and_embed(
    run: str,
    load: Callable[[str], DualEncoder],
    sources: Mapping[str, str],
    batch_size: int,
    shards: Sequence[EmbeddingShard],
    progress: Progress,
) -> None:
    """A task of `mmkd.command.tasks`; a process loads each encoder for its first shard of a run."""
    loaded: dict[str, DualEncoder] = resident(run, dict)
    for name in dict.fromkeys(name for shard in shards for name in shard.files):
        if name not in loaded:
            loaded[name] = load(sources[name])
    embed(loaded, batch_size, shards, progress)


def read_embedded(
    name: str, fingerprint: str, provenance: dict[str, Any], inputs: DatasetInputs, cache: Path
) -> Embedded:
    """The vectors that `embed` wrote, memory-mapped; images that could not be read are listed.

    Raises:
        FileNotFoundError: a shard is missing.
    """
    files = inputs.files(cache, fingerprint)
    headers = [read_header(file) for file in files]
    count = len(inputs.images)
    images = VectorStore(files[:count], [header.rows for header in headers[:count]], keep_open=False)
    texts = VectorStore(files[count:], [header.rows for header in headers[count:]], keep_open=False)
    unreadable = {key: reason for header in headers for key, reason in header.notes["skipped"].items()}
    ids = [id for part in inputs.images for id in part if id not in unreadable]
    has_pooled = any("pooled" in header.tensors for header in headers)
    return Embedded(
        name,
        fingerprint,
        provenance,
        StoredVectors(ids, images, "vectors"),
        StoredVectors(ids, images, "pooled") if has_pooled else {},
        StoredVectors([text for part in inputs.texts for text in part], texts, "vectors"),
        unreadable,
        list(dict.fromkeys(failure for header in headers for failure in header.notes["failures"])),
    )


def _read(dataset: Dataset, pair: Pair) -> Readable | str:
    return read_or_reason(lambda: dataset.image(pair))


def _embed_texts(encoder: DualEncoder, texts: Sequence[str], file: Path, batch_size: int) -> None:
    failures: list[str] = []
    parts = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        parts.append(_or_nan(encoder, lambda own: (encoder.encode_texts(own), None), batch, failures)[0])
    write_vectors(file, text_ids(texts), {"vectors": torch.cat(parts)}, {}, failures)


def _or_nan(
    encoder: DualEncoder,
    encode: Callable[[Any], tuple[Tensor, Tensor | None]],
    batch: Sequence[Any],
    failures: list[str],
) -> tuple[Tensor, Tensor | None]:
    """Vectors of a batch; NaN, with the encoder's message among the failures, where it raises an error."""
    try:
        return encode(batch)
    except ValueError as error:
        if str(error) not in failures:
            failures.append(str(error))
        return torch.full((len(batch), encoder.dim), torch.nan), None
