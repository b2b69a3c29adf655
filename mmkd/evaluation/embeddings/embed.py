"""Embed once: every task reads the same cached image and text embeddings of an encoder.

Images go through the loader of `mmkd.encoders.extraction`, as in `mmkd extract`: read, decoded and prepared by threads
while the encoders compute, and decoded once for all of them.

The cache is addressed by content: a shard's name is the hash of the encoder's fingerprint and of the very images or
texts in it, so that a killed run resumes at the shard, a changed image is embedded again with its shard, and nothing
else is. Vectors are stored in half precision and read back before use, so that a warm and a cold cache give the same
numbers.

Sequences of tokens, for heads that use more than one vector of each image and text, are many times larger, so they are
made only for the tasks that need them: the encoder is loaded again, and its tokens are cached in half precision beside
the embeddings. Maps of more than 7 x 7 patches are averaged to that size; tokens before the map, such as the class
token, are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from mmkd.command.tasks import Progress, resident
from mmkd.data.features.shards import is_whole, read_header, shard_file, write_shard
from mmkd.data.features.store import VectorStore
from mmkd.data.images import UnreadableImageError
from mmkd.data.table import Pair
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.extraction import EncodingTask, encode_shards, share_of_cores
from mmkd.evaluation.datasets.dataset import Dataset

FORMAT, SHARD_SIZE = 3, 4096
TOKEN_FORMAT, TOKEN_SHARD_SIZE, TOKEN_SIDE = 1, 1024, 7
MOST_BEFORE = 5  # class token and registers
HALF_LIMIT = 6e4
Halves = NDArray[np.float16]
Vectors = NDArray[np.float32]


@dataclass
class TokenSource:
    """Gives the token sequences of one encoder on one dataset.

    Attributes:
        load: loads the encoder; called once, and only if something is not cached.
        image: opens the image of a pair.
        digest: hash of the image of a pair.
        fingerprint: of the encoder.
        cache: folder of cached tokens.
        batch_size: images or texts at a time.
    """

    load: Callable[[], DualEncoder]
    image: Callable[[Pair], Image.Image]
    digest: Callable[[Pair], str]
    fingerprint: str
    cache: Path
    batch_size: int = 32
    _encoder: DualEncoder | None = None

    def images(self, pairs: Sequence[Pair]) -> Halves:
        """Image tokens of n pairs, ``(n, tokens, width)``.

        Raises:
            NoTokens: the encoder has none.
            UnreadableImageError: an image cannot be read.
        """
        keys = [f"{pair.id} {self.digest(pair)}" for pair in pairs]
        parts = range(0, len(pairs), TOKEN_SHARD_SIZE)
        files = [self._file("images", keys[start : start + TOKEN_SHARD_SIZE]) for start in parts]
        if not all(map(is_whole, files)):
            task = _TokenTask(self._loaded(), files)
            shards = [(k, pairs[start : start + TOKEN_SHARD_SIZE]) for k, start in enumerate(parts)]
            encode_shards([task], shards, self.image, self.batch_size)
        for file in files:
            for id, reason in read_header(file).notes["skipped"].items():
                raise UnreadableImageError(reason, f"the image of {id} has no tokens")
        return VectorStore(files).gather("tokens", np.arange(len(pairs)))

    def texts(self, texts: Sequence[str]) -> tuple[Halves, NDArray[np.bool_]]:
        """Text tokens of n texts, ``(n, longest, width)``, and which of them are not padding, ``(n, longest)``.

        Raises:
            NoTokens: the encoder has none.
        """
        file = self._file("texts", texts)
        if not is_whole(file):
            write_shard(file, text_ids(texts), self._text_tokens(texts))
        store, rows = VectorStore([file]), np.arange(len(texts))
        return store.gather("tokens", rows), store.gather("mask", rows)

    def _file(self, kind: str, keys: Sequence[str]) -> Path:
        return shard_file(self.cache, TOKEN_FORMAT, self.fingerprint, TOKEN_SIDE, list(keys), kind=f"{kind}-tokens")

    @torch.inference_mode()
    def _text_tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        encoder = self._loaded()
        found: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(texts), self.batch_size):
            tokens, mask = encoder.text_token_features(list(texts[start : start + self.batch_size]))
            found.append((tokens.half().cpu(), mask.cpu()))
        longest = max(int(mask.sum(dim=1).max()) for _, mask in found)
        joined = torch.zeros(len(texts), longest, found[0][0].shape[2], dtype=torch.float16)
        masks = torch.zeros(len(texts), longest, dtype=torch.bool)
        start = 0
        for own, kept in found:
            length = min(longest, own.shape[1])
            joined[start : start + len(own), :length] = own[:, :length] * kept[:, :length, None]
            masks[start : start + len(own), :length] = kept[:, :length]
            start += len(own)
        return {"tokens": joined, "mask": masks}

    def _loaded(self) -> DualEncoder:
        if self._encoder is None:
            self._encoder = self.load()
        return self._encoder


class _CachedTask(EncodingTask[Pair]):
    """Arrays of images, in the shards of a cache."""

    def __init__(self, encoder: DualEncoder, files: Sequence[Path]) -> None:
        super().__init__(encoder)
        self.files = files
        self.failures: list[str] = []

    def has(self, shard: int) -> bool:
        return is_whole(self.files[shard])


class _TokenTask(_CachedTask):
    """Image tokens in half precision."""

    @torch.inference_mode()
    def encode(self, prepared: list[Any]) -> dict[str, Tensor]:
        return {"tokens": at_most_a_map(self.encoder.image_token_features(prepared).float().cpu()).half()}

    def write(self, shard: int, items: list[Pair], arrays: dict[str, Tensor], skipped: list[tuple[Pair, str]]) -> None:
        reasons = {pair.id: reason for pair, reason in skipped}
        write_shard(self.files[shard], [pair.id for pair in items], arrays, notes={"skipped": reasons})


def text_ids(texts: Sequence[str]) -> list[str]:
    """Ids of the rows of texts: their hashes."""
    return [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in texts]


def at_most_a_map(tokens: Tensor) -> Tensor:
    """Tokens ``(n, tokens, width)`` with their map of patches averaged to 7 x 7 where it is larger."""
    count = tokens.shape[1]
    side = isqrt(count)
    before = count - side**2
    if count <= TOKEN_SIDE**2 + MOST_BEFORE:
        return tokens
    if before > MOST_BEFORE:  # no square map: neighbours in reading order
        return nn.functional.adaptive_avg_pool1d(tokens.transpose(1, 2), TOKEN_SIDE**2).transpose(1, 2)
    grid = tokens[:, before:].transpose(1, 2).unflatten(2, (side, side))
    pooled = nn.functional.adaptive_avg_pool2d(grid, TOKEN_SIDE).flatten(2).transpose(1, 2)
    return torch.cat([tokens[:, :before], pooled], dim=1)


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


class _ImageTask(_CachedTask):
    """Joint and pooled vectors of images."""

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
            encode_shards(tasks, images, dataset.image, batch_size, progress=progress)
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
