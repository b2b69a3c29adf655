"""Teachers that are published as two separate towers: an image tower and a BERT, each with a projection of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.weights import TOKENIZER_FILES, companion, load_config, read_part

# Hidden states and attention mask of a text tower to one vector a text, (batch, width).
Pooling = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Towers:
    """The parts of a tower pair, in evaluation mode.

    Attributes:
        image: pixels (batch, 3, size, size) to pooled features (batch, width).
        image_projection: (width, dim); None where the image tower ends in the shared space.
        text: a BERT.
        text_projection: (width, dim).
        pooling: of the text tower's output.
        needs_hidden_states: whether the pooling reads the hidden states of every layer.
    """

    image: Callable[[Tensor], Tensor]
    image_projection: Tensor | None
    text: nn.Module
    text_projection: Tensor
    pooling: Pooling
    needs_hidden_states: bool = False


class TowerPairEncoder(DualEncoder):
    """An image tower, a BERT with its tokenizer, and their projections."""

    def __init__(
        self,
        name: str,
        provenance: dict[str, Any],
        towers: Towers,
        transform: Callable[[Image.Image], Tensor],
        tokenizer: Any,
        context: int,
    ) -> None:
        """Take towers on one device."""
        super().__init__(name, towers.text_projection.shape[1], provenance)
        self.towers, self.transform, self.tokenizer, self.context = towers, transform, tokenizer, context
        self.device = towers.text_projection.device

    def prepare(self, image: Image.Image) -> Tensor:
        """See `DualEncoder`; (3, size, size)."""
        return self.transform(image)

    def image_features(self, prepared: list[Tensor]) -> Tensor:
        """See `DualEncoder`."""
        return self.image_and_pooled(prepared)[0]

    def image_and_pooled(self, prepared: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """See `DualEncoder`."""
        features = self.towers.image(torch.stack(prepared).to(self.device))
        if self.towers.image_projection is None:
            return features, None
        return features @ self.towers.image_projection, features

    def text_features(self, texts: list[str]) -> Tensor:
        """See `DualEncoder`; texts are padded to the longest of the batch."""
        options = {"padding": True, "truncation": True, "max_length": self.context, "return_tensors": "pt"}
        inputs = self.tokenizer(texts, **options).to(self.device)
        output = self.towers.text(**inputs, output_hidden_states=self.towers.needs_hidden_states)
        return self.towers.pooling(output, inputs["attention_mask"]) @ self.towers.text_projection


def bert_files(folder: Path, hub_id: str) -> tuple[Any, Any]:
    """Configuration and tokenizer of the BERT that a teacher builds on: in a sub-folder of ``folder``, or on the Hub.

    Raises:
        FileNotFoundError: neither is there.
    """
    from transformers import AutoTokenizer

    bert = companion(folder, hub_id, ["config.json", *TOKENIZER_FILES])
    config = load_config(bert)
    return config, read_part(AutoTokenizer, bert)
