"""Token sequences of images and texts, for heads that use more than one vector of each.

They are many times larger than embeddings, so they are made only for the tasks that need them: the encoder is loaded
again, and its tokens are cached in half precision beside the embeddings. Maps of more than 7 x 7 patches are averaged
to that size; tokens before the map, such as the class token, are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mmkd.data.features.shards import is_whole, read_header, shard_file, write_shard
from mmkd.data.features.store import VectorStore
from mmkd.data.images import UnreadableImageError
from mmkd.data.table import Pair
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.extraction import EncodingTask, encode_shards

FORMAT = 1
SIDE = 7
MOST_BEFORE = 5  # class token and registers
SHARD_SIZE = 1024
Halves = NDArray[np.float16]


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
        parts = range(0, len(pairs), SHARD_SIZE)
        files = [self._file("images", keys[start : start + SHARD_SIZE]) for start in parts]
        if not all(map(is_whole, files)):
            task = _TokenTask(self._loaded(), files)
            shards = [(k, pairs[start : start + SHARD_SIZE]) for k, start in enumerate(parts)]
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
        return shard_file(self.cache, FORMAT, self.fingerprint, SIDE, list(keys), kind=f"{kind}-tokens")

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


class _TokenTask(EncodingTask[Pair]):
    """Image tokens, half precision, in the shards of a cache."""

    def __init__(self, encoder: DualEncoder, files: Sequence[Path]) -> None:
        super().__init__(encoder)
        self.files = files

    def has(self, shard: int) -> bool:
        return is_whole(self.files[shard])

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
    if count <= SIDE**2 + MOST_BEFORE:
        return tokens
    if before > MOST_BEFORE:  # no square map: neighbours in reading order
        return nn.functional.adaptive_avg_pool1d(tokens.transpose(1, 2), SIDE**2).transpose(1, 2)
    grid = tokens[:, before:].transpose(1, 2).unflatten(2, (side, side))
    pooled = nn.functional.adaptive_avg_pool2d(grid, SIDE).flatten(2).transpose(1, 2)
    return torch.cat([tokens[:, :before], pooled], dim=1)
