"""Embed once: every task reads the same cached image and text embeddings of an encoder.

The cache is addressed by content: a shard's name is the hash of the encoder's weights and of the very images or texts
in it, so that a killed run resumes at the shard, a changed image is embedded again and nothing else is. Vectors are
kept in half precision and read back before use; a warm and a cold cache give the same numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from mmkd.data.images import UnreadableImage, open_image, read_image_bytes
from mmkd.data.records import Pair, PairFolder
from mmkd.encoder import DualEncoder
from mmkd.evaluation.tokens import TokenSource
from mmkd.files import atomic_write_bytes, fingerprint
from mmkd.frozen_towers import FrozenEncoder

SHARD_SIZE = 4096
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.json", "*.txt", "*.yaml")
NOT_WEIGHTS = ("settings.yaml", "report.json", "provenance.json")

Vectors = NDArray[np.float32]


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
    images: dict[str, Vectors] = field(default_factory=dict)
    pooled: dict[str, Vectors] = field(default_factory=dict)
    texts: dict[str, Vectors] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    tokens: TokenSource | None = None

    def image_matrix(self, pairs: Sequence[Pair]) -> Vectors:
        """Image vectors of pairs, ``(n, dim)``."""
        return np.stack([self.images[pair.id] for pair in pairs])

    @property
    def pooled_is_joint(self) -> bool:
        """Whether `pooled_matrix` gives joint vectors for want of others."""
        return not self.pooled

    def pooled_matrix(self, pairs: Sequence[Pair]) -> Vectors:
        """Image vectors before the projection, ``(n, width)``; the joint ones where the encoder has no others."""
        return np.stack([(self.pooled or self.images)[pair.id] for pair in pairs])

    def text_matrix(self, texts: Sequence[str]) -> Vectors:
        """Text vectors, ``(n, dim)``."""
        return np.stack([self.texts[text] for text in texts])


def embed(
    encoder: DualEncoder,
    source: str,
    name: str,
    folder: PairFolder,
    digests: dict[str, str],
    texts: Sequence[str],
    cache: Path,
    batch_size: int = 32,
    quiet: bool = False,
) -> Embedded:
    """Embed the images of all pairs of ``folder`` and all ``texts``, or read them from the cache.

    Args:
        encoder: any dual encoder.
        source: the name or folder it was loaded from; a folder's files are part of the fingerprint.
        name: how the encoder is called in the results.
        folder: the pairs.
        digests: pair id -> hash of its image file (`image_digests`).
        texts: distinct captions and prompts.
        cache: folder of shards.
        batch_size: images or texts at a time.
        quiet: no progress bar.

    Returns:
        Vectors by pair id and by text; images that cannot be read are listed, not embedded.
    """
    embedded = Embedded(name, encoder_fingerprint(encoder, source), encoder.provenance)
    with tqdm(total=len(folder.pairs) + len(texts), desc=name, unit="item", disable=quiet) as bar:
        for pairs in _shards(folder.pairs):
            keys = [f"{pair.id} {digests[pair.id]}" for pair in pairs]
            compute = partial(_embed_images, encoder, folder, pairs, batch_size, bar)
            _add_images(embedded, pairs, _cached(cache, "images", [embedded.fingerprint, *keys], compute))
        for part in _shards(texts):
            compute = partial(_embed_texts, encoder, part, batch_size, bar)
            _add_texts(embedded, part, _cached(cache, "texts", [embedded.fingerprint, *part], compute))
        bar.update(len(folder.pairs) + len(texts) - bar.n)
    return embedded


def image_digests(folder: PairFolder, quiet: bool = False) -> dict[str, str]:
    """SHA-256 of every image file by pair id; ``"missing"`` where it cannot be read."""
    digests = {}
    for pair in tqdm(folder.pairs, desc="looking for changed images", unit="image", disable=quiet):
        try:
            digests[pair.id] = hashlib.sha256(read_image_bytes(folder.image_path(pair))).hexdigest()
        except ValueError:
            digests[pair.id] = "missing"
    return digests


def encoder_fingerprint(encoder: DualEncoder, source: str) -> str:
    """SHA-256 of what the encoder says of itself and, if it was loaded from a folder or file, of those files."""
    path = Path(source)
    found = {file for pattern in WEIGHT_FILES for file in path.glob(pattern)} if path.is_dir() else {path}
    files = [file for file in found if file.is_file() and file.name not in NOT_WEIGHTS]
    described = json.dumps(encoder.provenance, sort_keys=True, default=str)
    return hashlib.sha256(f"{described} {encoder.dim} {fingerprint(files)}".encode()).hexdigest()


@dataclass
class _Shard:
    """Vectors ``(n, dim)`` of what could be read, unreadable ids with their reasons, and what the encoder refused."""

    vectors: Vectors
    unreadable: dict[str, str]
    failures: list[str]


def _add_images(embedded: Embedded, pairs: Sequence[Pair], shard: _Shard) -> None:
    readable = [pair for pair in pairs if pair.id not in shard.unreadable]
    embedded.images |= {pair.id: vector for pair, vector in zip(readable, shard.vectors, strict=True)}
    embedded.unreadable |= shard.unreadable
    embedded.failures += shard.failures


def _add_texts(embedded: Embedded, texts: Sequence[str], shard: _Shard) -> None:
    embedded.texts |= dict(zip(texts, shard.vectors, strict=True))
    embedded.failures += shard.failures


def _embed_images(
    encoder: DualEncoder, folder: PairFolder, pairs: Sequence[Pair], batch_size: int, bar: tqdm
) -> _Shard:
    if isinstance(encoder, FrozenEncoder):
        vectors, unreadable = encoder.encode_pairs(folder, pairs)
        bar.update(len(pairs))
        return _Shard(vectors.numpy(), unreadable, [])
    shard = _Shard(np.zeros((0, encoder.dim), dtype=np.float32), {}, [])
    parts = [shard.vectors]
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        images = []
        for pair in batch:
            try:
                images.append(open_image(folder.image_path(pair)))
            except UnreadableImage as error:
                shard.unreadable[pair.id] = error.reason
            except ValueError:
                shard.unreadable[pair.id] = "outside"
        if images:
            parts.append(_sound(encoder, encoder.encode_images, images, shard.failures))
        bar.update(len(batch))
    shard.vectors = np.concatenate(parts)
    return shard


def _embed_texts(encoder: DualEncoder, texts: Sequence[str], batch_size: int, bar: tqdm) -> _Shard:
    failures: list[str] = []
    parts = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        parts.append(_sound(encoder, encoder.encode_texts, batch, failures))
        bar.update(len(batch))
    return _Shard(np.concatenate(parts), {}, failures)


def _sound(
    encoder: DualEncoder, encode: Callable[[Any], torch.Tensor], batch: Sequence[Any], failures: list[str]
) -> Vectors:
    """Vectors of a batch; NaN, with the encoder's own words kept, where it refuses to give any."""
    try:
        return encode(batch).float().cpu().numpy()
    except ValueError as error:
        if str(error) not in failures:
            failures.append(str(error))
        return np.full((len(batch), encoder.dim), np.nan, dtype=np.float32)


def _cached(folder: Path, kind: str, keys: Sequence[str], compute: Callable[[], _Shard]) -> _Shard:
    """The shard whose name is the hash of ``keys``, which is computed and written first if it is missing."""
    digest = hashlib.sha256(json.dumps(keys).encode()).hexdigest()
    path = folder / f"{kind}-{digest[:24]}.safetensors"
    if not path.is_file():
        shard = compute()
        notes = {"unreadable": shard.unreadable, "failures": shard.failures}
        metadata = {"notes": json.dumps(notes, sort_keys=True)}
        half = np.ascontiguousarray(shard.vectors.astype(np.float16))
        atomic_write_bytes(path, safetensors.numpy.save({"vectors": half}, metadata))
    with safetensors.safe_open(path, framework="np") as stored:
        return _Shard(stored.get_tensor("vectors").astype(np.float32), **json.loads(stored.metadata()["notes"]))


def _shards(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + SHARD_SIZE] for start in range(0, len(items), SHARD_SIZE)]
