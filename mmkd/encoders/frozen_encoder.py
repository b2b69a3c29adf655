"""An encoder that reads cached outputs of its frozen towers (`mmkd.encoders.frozen`) and computes projections only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from mmkd.data.folder import PairFolder
from mmkd.data.table import Pair
from mmkd.encoders.encoder import DualEncoder, HFClipEncoder
from mmkd.encoders.extraction import EncodingTask
from mmkd.encoders.frozen import FrozenTowers
from modeling_mmkd import MMKDClipModel


class FrozenEncoder(DualEncoder):
    """Encoder of a model of this package that reads cached outputs of its towers."""

    def __init__(self, encoder: HFClipEncoder, towers: FrozenTowers) -> None:
        """Take the name, width and provenance of `encoder`."""
        super().__init__(encoder.name, encoder.dim, encoder.provenance, encoder.batch_size)
        self.encoder, self.towers = encoder, towers

    def encode_shards(
        self,
        task: EncodingTask[Pair],
        folder: PairFolder,
        shards: Iterable[tuple[int, Sequence[Pair]]],
        arrays: Callable[[Tensor, Tensor], dict[str, Tensor]],
        progress: Callable[[int], object] = lambda pairs: None,
    ) -> None:
        """Write the missing shards of a task from cached outputs; see `mmkd.encoders.extraction.encode_shards`.

        Args:
            task: what writes them.
            folder: where the images lie.
            shards: number and pairs of each.
            arrays: from joint vectors (n, dim) and the towers' outputs (n, width) to what the task writes.
            progress: called with the number of pairs of each shard.
        """
        for shard, pairs in shards:
            if not task.has(shard):
                skipped = {pair.id: reason for pair in pairs if (reason := task.refuses(pair))}
                usable = [pair for pair in pairs if pair.id not in skipped]
                outputs, unreadable = self.towers.image_outputs(folder, usable)
                skipped |= unreadable
                kept = [pair for pair in pairs if pair.id not in skipped]
                left_out = [(pair, skipped[pair.id]) for pair in pairs if pair.id in skipped]
                found = arrays(self._projected(self.encoder.model.visual_projection, outputs), outputs) if kept else {}
                task.write(shard, kept, found, left_out)
            progress(len(pairs))

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """See `DualEncoder`; equal texts are encoded once."""
        distinct = sorted(set(texts))
        rows = {text: row for row, text in enumerate(distinct)}
        encoded = self._projected(self.encoder.model.text_projection, self.towers.text_outputs(distinct))
        return encoded[[rows[text] for text in texts]]

    def prepare(self, image: Image.Image) -> Any:
        """See `DualEncoder`."""
        return self.encoder.prepare(image)

    def image_features(self, prepared: list[Any]) -> Tensor:
        """See `DualEncoder`; images without a file are not cached."""
        return self.encoder.image_features(prepared)

    def text_features(self, texts: list[str]) -> Tensor:
        """See `DualEncoder`."""
        return self.encode_texts(texts)

    def image_token_features(self, prepared: list[Any]) -> Tensor:
        """See `DualEncoder`; tokens are not cached."""
        return self.encoder.image_token_features(prepared)

    def text_token_features(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """See `DualEncoder`; tokens are not cached."""
        return self.encoder.text_token_features(texts)

    @torch.inference_mode()
    def _projected(self, projection: nn.Module, outputs: Tensor) -> Tensor:
        weights = next(projection.parameters())
        return functional.normalize(projection(outputs.to(weights)).float().cpu(), dim=-1)


def with_frozen_towers(encoder: DualEncoder, cache: Path | None, quiet: bool = True) -> DualEncoder:
    """The encoder with cached tower outputs if it is a model of this package; any other encoder unchanged."""
    if cache is None or not isinstance(encoder, HFClipEncoder) or not isinstance(encoder.model, MMKDClipModel):
        return encoder
    return FrozenEncoder(encoder, FrozenTowers(cache, encoder.model, encoder.processor, quiet))
