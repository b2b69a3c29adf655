# Copyright 2026 The mmkd-clip developers
# SPDX-License-Identifier: Apache-2.0
"""MMKD-CLIP: a vision tower and a text tower whose projections meet in one space.

The towers are transformers' own modules, so that attention kernels, checkpointing and precision work as they do there.
Ours are only the two projections, the pooling of the text and the scale of the similarities. ``logit_scale`` has one
element rather than none, because sharded data parallelism does not take scalars.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput, CLIPVisionModelOutput
from transformers.processing_utils import Unpack  # typing has it from Python 3.11 on
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_mmkd import MMKDClipConfig
from .towers_mmkd import TextHalf, VisionHalf

if TYPE_CHECKING:  # from a folder, transformers 5.8 brings along only the files that this one names itself
    from .inputs_mmkd import refuse_bad_pixels  # noqa: F401
    from .presets_mmkd import PRESETS  # noqa: F401


@dataclass
class MMKDClipOutput(ModelOutput):
    """Output of `MMKDClipModel`; what needs a modality that was not given is None.

    Attributes:
        loss: symmetric contrastive loss of the batch, when ``return_loss``.
        logits_per_image: `(images, texts)`, ``exp(logit_scale)`` times the cosine similarities.
        logits_per_text: `(texts, images)`, its transpose.
        text_embeds: `(texts, projection_dim)`, unit norm.
        image_embeds: `(images, projection_dim)`, unit norm.
        text_model_output: output of the text tower; ``pooler_output`` is projected, not normalized.
        vision_model_output: output of the vision tower; ``pooler_output`` is projected, not normalized.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """All values that are not None, towers' outputs as tuples."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class MMKDClipModel(VisionHalf, TextHalf):
    """A biomedical CLIP: images and texts in one space."""

    _keep_in_fp32_modules_strict = ["logit_scale"]  # noqa: RUF012  # in bf16 a scale of 100 would be 99

    def __init__(self, config: MMKDClipConfig) -> None:
        super().__init__(config)
        self._add_vision(config)
        self._add_text(config)
        scale = torch.full((1,), float(config.logit_scale_init_value), dtype=torch.float32)
        self.logit_scale = nn.Parameter(scale)
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the towers; ``logit_scale`` keeps its own."""
        return next(self.visual_projection.parameters()).dtype

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MMKDClipOutput:
        """Embed images, texts or both, and compare them when both are given.

        Args:
            input_ids: `(texts, tokens)`.
            pixel_values: `(images, channels, height, width)`.
            attention_mask: `(texts, tokens)`; by default every token but padding.
            position_ids: `(texts, tokens)`.
            token_type_ids: `(texts, tokens)`.
            inputs_embeds: `(texts, tokens, width)` instead of ``input_ids``.
            return_loss: also the symmetric contrastive loss; text k must then belong to image k.
            interpolate_pos_encoding: stretch the position embeddings to images of another size.
            **kwargs: options of the towers, such as ``output_hidden_states``.

        Raises:
            ValueError: neither modality is given, texts are too long, or a loss is asked of unpaired inputs.
        """
        has_text = input_ids is not None or inputs_embeds is not None
        if not has_text and pixel_values is None:
            raise ValueError("give pixel_values, input_ids or both: neither came")
        vision = text = image_embeds = text_embeds = logits_per_image = logits_per_text = None
        if pixel_values is not None:
            vision = self.get_image_features(
                pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
            )
            image_embeds = nn.functional.normalize(vision.pooler_output, dim=-1)
        if has_text:
            text = self.get_text_features(
                input_ids, attention_mask, position_ids, token_type_ids, inputs_embeds, return_dict=True, **kwargs
            )
            text_embeds = nn.functional.normalize(text.pooler_output, dim=-1)
        if image_embeds is not None and text_embeds is not None:
            scale = self.logit_scale.float().exp().to(text_embeds.device)
            logits_per_text = scale * (text_embeds.float() @ image_embeds.float().to(text_embeds.device).T)
            logits_per_image = logits_per_text.T
        return MMKDClipOutput(
            loss=_contrastive_loss(logits_per_text) if return_loss else None,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
        )


class MMKDClipTextModelWithProjection(TextHalf):
    """The text half alone, from the folder of a whole model or of this half."""

    input_modalities = ["text"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^visual_projection\.", r"^logit_scale$"]  # noqa: RUF012

    def __init__(self, config: MMKDClipConfig) -> None:
        super().__init__(config)
        self._add_text(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CLIPTextModelOutput:
        """Embed texts; arguments as in `MMKDClipModel.get_text_features`.

        Returns:
            ``text_embeds`` `(texts, projection_dim)`, projected, not normalized, and what the tower gives.
        """
        output = self.get_text_features(
            input_ids, attention_mask, position_ids, token_type_ids, inputs_embeds, return_dict=True, **kwargs
        )
        states = {name: output.get(name) for name in ("last_hidden_state", "hidden_states", "attentions")}
        return CLIPTextModelOutput(text_embeds=output.pooler_output, **states)


class MMKDClipVisionModelWithProjection(VisionHalf):
    """The vision half alone, from the folder of a whole model or of this half."""

    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$"]  # noqa: RUF012

    def __init__(self, config: MMKDClipConfig) -> None:
        super().__init__(config)
        self._add_vision(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The layer that makes patches of pixels."""
        return self.vision_model.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CLIPVisionModelOutput:
        """Embed images; arguments as in `MMKDClipModel.get_image_features`.

        Returns:
            ``image_embeds`` `(images, projection_dim)`, projected, not normalized, and what the tower gives.
        """
        output = self.get_image_features(pixel_values, interpolate_pos_encoding, return_dict=True, **kwargs)
        states = {name: output.get(name) for name in ("last_hidden_state", "hidden_states", "attentions")}
        return CLIPVisionModelOutput(image_embeds=output.pooler_output, **states)


def _contrastive_loss(logits_per_text: torch.Tensor | None) -> torch.Tensor:
    """``1/2 [CE(logits) + CE(logits^T)]`` with the diagonal as classes, in fp32 (Radford et al. 2021)."""
    if logits_per_text is None or logits_per_text.shape[0] != logits_per_text.shape[1]:
        shape = None if logits_per_text is None else tuple(logits_per_text.shape)
        raise ValueError(f"return_loss needs as many texts as images, pair by pair; (texts, images) is {shape}")
    logits = logits_per_text.float()
    target = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


__all__ = [
    "MMKDClipModel",
    "MMKDClipOutput",
    "MMKDClipTextModelWithProjection",
    "MMKDClipVisionModelWithProjection",
]
