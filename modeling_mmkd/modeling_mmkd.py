# Copyright 2026 The mmkd-clip developers
# SPDX-License-Identifier: Apache-2.0
"""MMKD-CLIP: a vision tower and a text tower whose projections meet in one space.

The towers are transformers' own modules, so that attention kernels, checkpointing and precision work as they do there.
Ours are only the two projections, the pooling of the text and the scale of the similarities. ``logit_scale`` has one
element rather than none, because sharded data parallelism does not take scalars.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack  # typing has it from Python 3.11 on
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_mmkd import MMKDClipConfig, position_limit, tower_width


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


class MMKDClipProjection(nn.Module):
    """Two linear layers without biases, GELU between them: width -> hidden -> projection_dim."""

    def __init__(self, width: int, hidden: int, projection_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, projection_dim, bias=False)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Map `(texts, width)` to `(texts, projection_dim)`."""
        return self.fc2(nn.functional.gelu(self.fc1(pooled)))


class MMKDClipPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization."""

    config_class = MMKDClipConfig
    base_model_prefix = "mmkd_clip"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        """Projections: normal with the inverse square root of the width; ``logit_scale``: the configured value."""
        if isinstance(module, nn.Linear) and getattr(module, "_is_projection", False):
            init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
        elif isinstance(module, MMKDClipModel):
            init.constant_(module.logit_scale, module.config.logit_scale_init_value)


class MMKDClipModel(MMKDClipPreTrainedModel):
    """A biomedical CLIP: images and texts in one space."""

    def __init__(self, config: MMKDClipConfig) -> None:
        super().__init__(config)
        self.vision_model = _build_tower(config.vision_config)
        self.text_model = _build_tower(config.text_config)
        text_width, hidden = tower_width(config.text_config), config.text_projection_hidden
        self.visual_projection = _vision_projection(_vision_width(self.vision_model), config)
        self.text_projection = MMKDClipProjection(text_width, hidden, config.projection_dim)
        for projection in (*self.visual_projection.modules(), *self.text_projection.modules()):
            projection._is_projection = isinstance(projection, nn.Linear)  # type: ignore[assignment]
        self.logit_scale = nn.Parameter(torch.full((1,), float(config.logit_scale_init_value)))
        self.post_init()
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(present & set(self._no_split_modules or ()))

    def get_input_embeddings(self) -> nn.Module:
        """Word embeddings of the text tower."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings of the text tower."""
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Embed images.

        Args:
            pixel_values: `(images, channels, height, width)`, normalized by the processor.
            interpolate_pos_encoding: stretch the position embeddings to images of another size.
            **kwargs: options of the tower, such as ``output_hidden_states``.

        Returns:
            The vision tower's output with ``pooler_output`` `(images, projection_dim)`, projected, not normalized.
        """
        if interpolate_pos_encoding:  # only some towers have this argument
            kwargs["interpolate_pos_encoding"] = True
        output = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        pooled = output.pooler_output if output.pooler_output is not None else output.last_hidden_state[:, 0]
        return _projected(output, self.visual_projection(pooled))

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Embed texts.

        Args:
            input_ids: `(texts, tokens)`.
            attention_mask: `(texts, tokens)`; by default every token but padding.
            position_ids: `(texts, tokens)`.
            token_type_ids: `(texts, tokens)`, for towers that have them.
            inputs_embeds: `(texts, tokens, width)` instead of ``input_ids``.
            **kwargs: options of the tower, such as ``output_hidden_states``.

        Returns:
            The text tower's output with ``pooler_output`` `(texts, projection_dim)`, projected, not normalized.

        Raises:
            ValueError: more tokens than the tower has positions for.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        limit = position_limit(self.config.text_config)
        if tokens is not None and limit is not None and tokens.shape[1] > limit:
            raise ValueError(
                f"texts of {tokens.shape[1]} tokens came, but the text tower takes at most {limit}; cut them with the "
                f"tokenizer's truncation=True, max_length={limit}"
            )
        padding = getattr(self.config.text_config, "pad_token_id", None)
        if attention_mask is None and input_ids is not None and padding is not None:
            attention_mask = input_ids.ne(padding).long()
        optional = {"position_ids": position_ids, "token_type_ids": token_type_ids, "inputs_embeds": inputs_embeds}
        kwargs.update({name: value for name, value in optional.items() if value is not None})
        output = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        pooled = output.last_hidden_state[:, 0]
        if self.config.text_pooling == "mean":
            pooled = _masked_mean(output.last_hidden_state, attention_mask)
        return _projected(output, self.text_projection(pooled))

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
            scale = self.logit_scale.exp().to(text_embeds.device)
            logits_per_text = scale * text_embeds @ image_embeds.to(text_embeds.device).T
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


def _build_tower(config: PretrainedConfig) -> PreTrainedModel:
    """A tower from its configuration, without a pooling layer that nothing would train."""
    mapped: Any = AutoModel._model_mapping[type(config)]
    model_class = mapped[0] if isinstance(mapped, (list, tuple)) else mapped
    has_pooler = "add_pooling_layer" in inspect.signature(model_class).parameters
    return AutoModel.from_config(config, **({"add_pooling_layer": False} if has_pooler else {}))


def _vision_width(tower: PreTrainedModel) -> int:
    """Width of a vision tower's pooled output; a timm backbone's is not in its configuration."""
    backbone = getattr(tower, "timm_model", None)
    if backbone is not None:
        return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)
    return tower_width(tower.config)


def _vision_projection(width: int, config: MMKDClipConfig) -> nn.Module:
    """One linear layer as published, or two where the configuration states a hidden width."""
    if config.vision_projection_hidden is None:
        return nn.Linear(width, config.projection_dim, bias=False)
    return MMKDClipProjection(width, config.vision_projection_hidden, config.projection_dim)


def _projected(output: Any, projected: torch.Tensor) -> BaseModelOutputWithPooling:
    """A tower's output with the projected feature as ``pooler_output``."""
    return BaseModelOutputWithPooling(
        last_hidden_state=output.last_hidden_state,
        pooler_output=projected,
        hidden_states=output.get("hidden_states"),
        attentions=output.get("attentions"),
    )


def _masked_mean(states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of `(texts, tokens, width)` over the tokens of the mask."""
    if attention_mask is None:
        return states.mean(dim=1)
    weights = attention_mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def _contrastive_loss(logits_per_text: torch.Tensor | None) -> torch.Tensor:
    """``1/2 [CE(logits) + CE(logits^T)]`` with the diagonal as classes, in fp32 (Radford et al. 2021)."""
    if logits_per_text is None or logits_per_text.shape[0] != logits_per_text.shape[1]:
        shape = None if logits_per_text is None else tuple(logits_per_text.shape)
        raise ValueError(f"return_loss needs as many texts as images, pair by pair; (texts, images) is {shape}")
    logits = logits_per_text.float()
    target = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


__all__ = ["MMKDClipModel", "MMKDClipOutput", "MMKDClipPreTrainedModel"]
