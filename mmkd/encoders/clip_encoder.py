"""Encoder of a CLIP-like model of transformers, such as `MMKDClipModel`, from a loaded model and its processor."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmkd.encoders.encoder import DualEncoder, NoTokens, with_input_of
from modeling_mmkd import MMKDClipModel


class HFClipEncoder(DualEncoder):
    """A transformers model with ``get_image_features`` and ``get_text_features``, and its processor."""

    def __init__(
        self, name: str, dim: int, provenance: dict[str, Any], model: Any, processor: Any, context: int
    ) -> None:
        """Take a model in evaluation mode."""
        super().__init__(name, dim, provenance)
        self.model = model
        self.processor = processor
        self.context = context

    def prepare(self, image: Image.Image) -> Tensor:
        """See `DualEncoder`; (3, height, width)."""
        return self.processor(images=[image], return_tensors="pt")["pixel_values"][0]

    def image_features(self, prepared: list[Tensor]) -> Tensor:
        """See `DualEncoder`."""
        own = {"pooled_only": True} if isinstance(self.model, MMKDClipModel) else {}
        pixels = torch.stack(prepared).to(self.model.device)
        return _pooled(self.model.get_image_features(pixel_values=pixels, **own))

    def image_and_pooled(self, prepared: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """See `DualEncoder`; models such as SigLIP have no projection."""
        projection = getattr(self.model, "visual_projection", None)
        if projection is None:
            return self.image_features(prepared), None
        return with_input_of(projection, lambda: self.image_features(prepared))

    def text_features(self, texts: list[str]) -> Tensor:
        """See `DualEncoder`."""
        return _pooled(self.model.get_text_features(**self._tokens(texts)))

    def image_token_features(self, prepared: list[Tensor]) -> Tensor:
        """See `DualEncoder`; the rows of a convolutional tower's map follow one another."""
        states = self._tower("vision_model")(pixel_values=torch.stack(prepared).to(self.model.device)).last_hidden_state
        return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states

    def text_token_features(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """See `DualEncoder`."""
        inputs = self._tokens(texts)
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        return self._tower("text_model")(input_ids=ids, attention_mask=mask).last_hidden_state, mask.bool()

    def _tokens(self, texts: list[str]) -> Any:
        """Tokens of a batch; SigLIP pools the last position of the whole context, other towers a text's own tokens."""
        padding = "max_length" if "siglip" in self.model.config.model_type else True
        options = {"padding": padding, "truncation": True, "max_length": self.context, "return_tensors": "pt"}
        return self.processor(text=texts, **options).to(self.model.device)

    def _tower(self, name: str) -> Any:
        tower = getattr(self.model, name, None)
        if tower is None:
            raise NoTokens(f"{self.name}: {type(self.model).__name__} has no {name} that gives token sequences")
        return tower


def _pooled(output: Any) -> Tensor:
    """The projected features; since version 5, transformers wraps them."""
    return output if isinstance(output, Tensor) else output.pooler_output
