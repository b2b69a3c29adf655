"""Embed once: every task reads the same cached image and text embeddings of an encoder.

The cache is addressed by content: a shard's name is the hash of the encoder's weights, of what it does to its input and
of the very images or texts in it, so that a killed run resumes at the shard, a changed image is embedded again and
nothing else is. Processes share the missing shards; which of them writes one changes nothing. Vectors are kept in half
precision and read back before use, so that a warm and a cold cache give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from mmkd.data.images import UnreadableImage
from mmkd.data.table import Pair
from mmkd.distributed import rank, world_size
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.frozen import FrozenEncoder
from mmkd.evaluation.datasets.pairs import PairsDataset
from mmkd.evaluation.embeddings.cache import (
    Content,
    Rows,
    Shard,
    Table,
    Vectors,
    completed,
    rows_of,
    shards_of,
    stacked,
)
from mmkd.evaluation.embeddings.tokens import TokenSource


@dataclass
class Embedded:
    """What one encoder makes of all images and texts of an evaluation.

    Attributes:
        name: the encoder as it is called in the results.
        fingerprint: of its weights and preprocessing.
        provenance: what the encoder says of itself.
        images: pair id -> image vector ``(dim,)``, unit length; unreadable images are absent.
        pooled: pair id -> image vector before the projection ``(width,)``; empty where the encoder has none.
        texts: text -> text vector ``(dim,)``, unit length.
        unreadable: pair id -> reason.
        failures: what the encoder said where it gave no sound vectors; those are NaN.
        tokens: where sequences of tokens come from, for tasks that look at more than vectors; None where from nowhere.
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
            Undefined: the encoder has not seen some of them.
        """
        return stacked(self.images, [pair.id for pair in pairs], "images")

    def image_rows(self, pairs: Sequence[Pair]) -> Rows | Vectors:
        """What `image_matrix` gives, to be read in stretches."""
        return rows_of(self.images, [pair.id for pair in pairs], "images")

    @property
    def pooled_is_joint(self) -> bool:
        """Whether `pooled_matrix` gives joint vectors for want of others."""
        return not self.pooled

    def pooled_matrix(self, pairs: Sequence[Pair]) -> Vectors:
        """Image vectors before the projection, ``(n, width)``; the joint ones where the encoder has no others."""
        return stacked(self.images if self.pooled_is_joint else self.pooled, [pair.id for pair in pairs], "images")

    def text_matrix(self, texts: Sequence[str]) -> Vectors:
        """Text vectors, ``(n, dim)``.

        Raises:
            Undefined: the encoder has not read some of them.
        """
        return stacked(self.texts, texts, "sentences")

    def text_rows(self, texts: Sequence[str]) -> Rows | Vectors:
        """What `text_matrix` gives, to be read in stretches."""
        return rows_of(self.texts, texts, "sentences")


def embed(
    encoder: DualEncoder,
    fingerprint: str,
    content: Content,
    source: ImageSource,
    texts: Sequence[str],
    cache: Path,
    batch_size: int = 32,
    quiet: bool = False,
) -> None:
    """Write this process' share of the shards that are missing in the cache.

    Args:
        encoder: any dual encoder.
        fingerprint: of it (`encoder_fingerprint`).
        content: of the source's pairs and `texts`.
        source: pairs and their images.
        texts: distinct captions and prompts.
        cache: folder of the encoder's shards.
        batch_size: images or texts at a time.
        quiet: no progress bar.
    """
    files = content.files(cache, fingerprint)
    pairs = source.pairs if content.images else []  # slides have features in bags, and no image to embed
    parts = [("image", part) for part in shards_of(pairs)] + [("text", part) for part in shards_of(texts)]
    own = content.missing(cache, fingerprint)[rank() :: world_size()]
    total = sum(len(parts[number][1]) for number in own)
    hidden = quiet or rank() > 0 or not own
    with tqdm(total=total, desc=encoder.name, unit="item", disable=hidden) as bar:
        for number in own:
            kind, part = parts[number]
            work = _image_shard(encoder, source, batch_size) if kind == "image" else _text_shard(encoder, batch_size)
            work(part, bar.update).write(files[number])


def read_embedded(
    name: str,
    fingerprint: str,
    provenance: dict[str, Any],
    content: Content,
    pairs: Sequence[Pair],
    texts: Sequence[str],
    cache: Path,
) -> Embedded:
    """What `embed` wrote, memory-mapped; images that could not be read are listed.

    Raises:
        FileNotFoundError: a shard is missing.
    """
    shards = [Shard.read(file) for file in content.files(cache, fingerprint)]
    images, read_texts = shards[: len(content.images)], shards[len(content.images) :]
    unreadable = {key: reason for shard in images for key, reason in shard.unreadable.items()}
    ids = [pair.id for pair in pairs if pair.id not in unreadable]
    pooled = completed([shard.pooled for shard in images], [len(shard.vectors) for shard in images])
    return Embedded(
        name,
        fingerprint,
        provenance,
        Table(ids, [shard.vectors for shard in images]),
        Table(ids, pooled) if pooled else {},
        Table(texts, [shard.vectors for shard in read_texts]),
        unreadable,
        list(dict.fromkeys(failure for shard in shards for failure in shard.failures)),
    )


def _image_shard(
    encoder: DualEncoder, source: ImageSource, batch_size: int
) -> Callable[[Sequence[Pair], Callable[[int], Any]], Shard]:
    def run(pairs: Sequence[Pair], done: Callable[[int], Any]) -> Shard:
        if isinstance(encoder, FrozenEncoder) and isinstance(source, PairsDataset):
            projected, outputs, unreadable = encoder.encode_pairs_and_pooled(source.folder, pairs)
            done(len(pairs))
            return Shard(projected.numpy(), outputs.numpy(), unreadable, [])
        shard = Shard(np.zeros((0, encoder.dim), dtype=np.float32), None, {}, [])
        joints: list[Vectors] = [shard.vectors]
        pooled: list[Vectors | None] = [None]
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            images = []
            for pair in batch:
                try:
                    images.append(source.image(pair))
                except UnreadableImage as error:
                    shard.unreadable[pair.id] = error.reason
                except ValueError:
                    shard.unreadable[pair.id] = "outside"
            if images:
                joint, before = _sound(encoder, encoder.encode_images_and_pooled, images, shard.failures)
                joints.append(joint)
                pooled.append(before)
            done(len(batch))
        shard.vectors = np.concatenate(joints)
        found = completed(pooled, [len(part) for part in joints])
        shard.pooled = np.concatenate(found) if found else None
        return shard

    return run


def _text_shard(encoder: DualEncoder, batch_size: int) -> Callable[[Sequence[str], Callable[[int], Any]], Shard]:
    def run(texts: Sequence[str], done: Callable[[int], Any]) -> Shard:
        failures: list[str] = []
        parts = []
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            parts.append(_sound(encoder, lambda own: (encoder.encode_texts(own), None), batch, failures)[0])
            done(len(batch))
        return Shard(np.concatenate(parts), None, {}, failures)

    return run


def _sound(
    encoder: DualEncoder,
    encode: Callable[[Any], tuple[torch.Tensor, torch.Tensor | None]],
    batch: Sequence[Any],
    failures: list[str],
) -> tuple[Vectors, Vectors | None]:
    """Vectors of a batch; NaN, with the encoder's own words kept, where it refuses to give any."""
    try:
        joint, pooled = encode(batch)
        return joint.float().cpu().numpy(), None if pooled is None else pooled.numpy()
    except ValueError as error:
        if str(error) not in failures:
            failures.append(str(error))
        return np.full((len(batch), encoder.dim), np.nan, dtype=np.float32), None


# Section: Where the images of an evaluation come from: a folder of pairs, or a dataset that a manifest describes.


class ImageSource(Protocol):
    """Pairs, and the image and the hash of each."""

    @property
    def pairs(self) -> Sequence[Pair]:
        """In the order in which they are embedded."""

    def image(self, pair: Pair) -> Image.Image:
        """The image of a pair.

        Raises:
            UnreadableImage: it cannot be read; the reason says why.
            ValueError: it lies outside the folder.
        """

    def digest(self, pair: Pair) -> str:
        """A hash of the stored image; ``"missing"`` where it cannot be read."""


def image_digests(source: ImageSource, quiet: bool = False) -> dict[str, str]:
    """A hash of every image by pair id; ``"missing"`` where it cannot be read."""
    shown = tqdm(source.pairs, desc="looking for changed images", unit="image", disable=quiet)
    return {pair.id: source.digest(pair) for pair in shown}
