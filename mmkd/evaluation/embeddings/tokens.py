"""Token sequences of images and texts, for heads that look at more than one vector of each.

They are many times larger than embeddings, so only the task that asks for them has them made: the encoder is loaded
again, and what it gives is kept in half precision beside the embeddings. Maps of more than 7 x 7 patches are averaged
to that size; tokens before the map, such as the class token, are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from mmkd.data.images import to_rgb
from mmkd.data.table import Pair
from mmkd.encoders.encoder import DualEncoder
from mmkd.files import atomic_write_bytes

SIDE = 7
MOST_BEFORE = 5  # class token and registers
Halves = NDArray[np.float16]


@dataclass
class TokenSource:
    """Where token sequences of one encoder and one dataset come from.

    Attributes:
        load: gives the encoder; called once, and only if something is not in the cache.
        image: opens the image of a pair.
        digest: hash of the image of a pair.
        fingerprint: of the encoder.
        cache: folder of what was made before.
        batch_size: images or texts at a time.
        quiet: no progress bar.
    """

    load: Callable[[], DualEncoder]
    image: Callable[[Pair], Image.Image]
    digest: Callable[[Pair], str]
    fingerprint: str
    cache: Path
    batch_size: int = 32
    quiet: bool = True
    _encoder: DualEncoder | None = None

    def images(self, pairs: Sequence[Pair]) -> Halves:
        """Image tokens of n pairs, ``(n, tokens, width)``.

        Raises:
            NoTokens: the encoder gives none.
            UnreadableImage: an image cannot be read.
        """
        keys = [f"{pair.id} {self.digest(pair)}" for pair in pairs]
        return self._kept("images", keys, lambda: self._image_tokens(pairs))["tokens"]

    def texts(self, texts: Sequence[str]) -> tuple[Halves, NDArray[np.bool_]]:
        """Text tokens of n texts, ``(n, longest, width)``, and which of them are no padding, ``(n, longest)``.

        Raises:
            NoTokens: the encoder gives none.
        """
        kept = self._kept("texts", texts, lambda: self._text_tokens(texts))
        return kept["tokens"], kept["mask"]

    def _kept(self, kind: str, keys: Sequence[str], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was made of the same inputs before, or is made now and written whole."""
        digest = hashlib.sha256(json.dumps([self.fingerprint, SIDE, *keys]).encode()).hexdigest()
        path = self.cache / f"{kind}-tokens-{digest[:24]}.safetensors"
        if not path.is_file():
            atomic_write_bytes(path, safetensors.numpy.save(make()))
        return safetensors.numpy.load_file(path)

    @torch.inference_mode()
    def _image_tokens(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        encoder, found = self._loaded(), []
        for batch in self._batches(pairs, "image"):
            tokens = encoder.image_token_features([encoder.prepare(to_rgb(self.image(pair))) for pair in batch])
            found.append(at_most_a_map(tokens.float().cpu()).half().numpy())
        return {"tokens": np.concatenate(found)}

    @torch.inference_mode()
    def _text_tokens(self, texts: Sequence[str]) -> dict[str, Any]:
        encoder, found = self._loaded(), []
        for batch in self._batches(texts, "text"):
            tokens, mask = encoder.text_token_features(list(batch))
            found.append((tokens.half().cpu().numpy(), mask.cpu().numpy()))
        longest = max(int(mask.sum(axis=1).max()) for _, mask in found)
        width = found[0][0].shape[2]
        joined = np.zeros((len(texts), longest, width), dtype=np.float16)
        masks = np.zeros((len(texts), longest), dtype=bool)
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

    def _batches(self, items: Sequence[Any], unit: str) -> Any:
        starts = range(0, len(items), self.batch_size)
        for start in tqdm(starts, desc=f"{unit} tokens", unit="batch", disable=self.quiet):
            yield items[start : start + self.batch_size]


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
