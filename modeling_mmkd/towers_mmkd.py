# Copyright 2026 The mmkd-clip developers
# SPDX-License-Identifier: Apache-2.0
"""The two halves of MMKD-CLIP: a tower of transformers and the projection behind it, and what both halves share.

`MMKDClipModel` is made of both halves; each also stands alone as a model that loads from the same folder.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, CLIPVisionModel, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.processing_utils import Unpack  # typing has it from Python 3.11 on
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_mmkd import MMKDClipConfig, tower_width
from .inputs_mmkd import cut_to_context, refuse_bad_pixels, refuse_bad_tokens

PARTS = ("vision_model", "visual_projection", "text_model", "text_projection")


class MMKDClipProjection(nn.Module):
    """Two linear layers without biases, GELU between them: width -> hidden -> projection_dim."""

    def __init__(self, width: int, hidden: int, projection_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, projection_dim, bias=False)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Map `(rows, width)` to `(rows, projection_dim)`."""
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

    def post_init(self) -> None:
        """Initialize, and list in ``_no_split_modules`` the layers that are there, since FSDP looks for each of them.

        Not the layer around the input embeddings: accelerate shards these on their own after what is listed, and what
        is sharded twice fails.
        """
        super().post_init()
        inputs = self.get_input_embeddings()
        layers = set()
        for module in self.modules():
            is_listed = type(module).__name__ in (self._no_split_modules or ())
            is_layer = is_listed or isinstance(module, GradientCheckpointingLayer)
            if is_layer and all(part is not inputs for part in module.children()):
                layers.add(type(module).__name__)
        self._no_split_modules = sorted(layers)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a folder or Hub id; see `transformers.PreTrainedModel.from_pretrained` for the arguments.

        Raises:
            ValueError: the checkpoint has nothing of a whole tower or projection, which would start at random. With
                ``output_loading_info=True`` the caller is told of every key instead.
        """
        if kwargs.pop("output_loading_info", False):
            return super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if pretrained_model_name_or_path is not None:
            _refuse_missing_parts(model, set(info["missing_keys"]), str(pretrained_model_name_or_path))
        return model

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers shall also initialize containers without parameters of their own, as CLIP's tower needs.

        transformers passes over them for code of others, which might overwrite what was loaded; ours and the towers' go
        through `transformers.initialization`, which does not.
        """
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """Projections: normal with the inverse square root of the width; ``logit_scale``: the configured value."""
        if isinstance(module, nn.Linear) and getattr(module, "_is_projection", False):
            init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
        elif isinstance(scale := module._parameters.get("logit_scale"), nn.Parameter):
            init.constant_(scale, self.config.logit_scale_init_value)


class VisionHalf(MMKDClipPreTrainedModel):
    """Vision tower and image projection of a model; ``__init__`` is the model's."""

    def _add_vision(self, config: MMKDClipConfig) -> None:
        self.vision_model = build_tower(config.vision_config)
        self.visual_projection = vision_projection(vision_width(self.vision_model), config)
        tag_projection(self.visual_projection)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        interpolate_pos_encoding: bool = False,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Embed images.

        Args:
            pixel_values: `(images, channels, height, width)`, normalized by the processor.
            interpolate_pos_encoding: stretch the position embeddings to images of another size.
            pooled_only: give ``pooler_output`` alone; of a CLIP ViT the last layer is then computed for the class token
                alone, which is the same and takes about 7 % less time in 12 layers (not where a device map or sharding
                acts on whole layers).
            **kwargs: options of the tower, such as ``output_hidden_states``.

        Returns:
            The vision tower's output with ``pooler_output`` `(images, projection_dim)`, projected, not normalized.

        Raises:
            ValueError: pixels that are no normalized images of as many channels as the tower takes.
        """
        refuse_bad_pixels(pixel_values, getattr(self.config.vision_config, "num_channels", 3))
        if pooled_only and not kwargs and _parts_can_be_called(self):
            states = class_token_states(self.vision_model, pixel_values, interpolate_pos_encoding)
            return BaseModelOutputWithPooling(pooler_output=self.visual_projection(states))
        if interpolate_pos_encoding:  # only some towers have this argument
            kwargs["interpolate_pos_encoding"] = True
        output = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        pooled = output.pooler_output if output.pooler_output is not None else output.last_hidden_state[:, 0]
        return projected(output, self.visual_projection(pooled))


class TextHalf(MMKDClipPreTrainedModel):
    """Text tower and text projection of a model; ``__init__`` is the model's."""

    def _add_text(self, config: MMKDClipConfig) -> None:
        self.text_model = build_tower(config.text_config)
        width, hidden = tower_width(config.text_config), config.text_projection_hidden
        self.text_projection = MMKDClipProjection(width, hidden, config.projection_dim)
        tag_projection(self.text_projection)

    def get_input_embeddings(self) -> nn.Module:
        """Word embeddings of the text tower."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings of the text tower."""
        self.text_model.set_input_embeddings(value)

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
        """Embed texts; those longer than the context are cut to it, with one warning.

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
            ValueError: ``input_ids`` not of the vocabulary, a mask of another shape, too many ``inputs_embeds``.
        """
        padding = getattr(self.config.text_config, "pad_token_id", None)
        if input_ids is not None:
            refuse_bad_tokens(input_ids, attention_mask, getattr(self.config.text_config, "vocab_size", None))
            if attention_mask is None and padding is not None:
                attention_mask = input_ids.ne(padding).long()
        given = {"position_ids": position_ids, "token_type_ids": token_type_ids, "inputs_embeds": inputs_embeds}
        optional: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        tokens, limit = input_ids if input_ids is not None else inputs_embeds, self.config.text_limit
        if tokens is not None and tokens.shape[1] > limit:
            input_ids, attention_mask, optional = cut_to_context(input_ids, attention_mask, optional, limit)
        output = self.text_model(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **optional, **kwargs
        )
        pooled = output.last_hidden_state[:, 0]
        if self.config.text_pooling == "mean":
            pooled = masked_mean(output.last_hidden_state, attention_mask)
        return projected(output, self.text_projection(pooled))


def build_tower(config: PretrainedConfig) -> PreTrainedModel:
    """A tower from its configuration, without a pooling layer that nothing would train."""
    mapped: Any = AutoModel._model_mapping[type(config)]
    model_class = mapped[0] if isinstance(mapped, (list, tuple)) else mapped
    has_pooler = "add_pooling_layer" in inspect.signature(model_class).parameters
    return AutoModel.from_config(config, **({"add_pooling_layer": False} if has_pooler else {}))


def vision_width(tower: PreTrainedModel) -> int:
    """Width of a vision tower's pooled output; a timm backbone's is not in its configuration."""
    backbone = getattr(tower, "timm_model", None)
    if backbone is not None:
        return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)
    return tower_width(tower.config)


def vision_projection(width: int, config: MMKDClipConfig) -> nn.Module:
    """One linear layer as published, or two where the configuration states a hidden width."""
    if config.vision_projection_hidden is None:
        return nn.Linear(width, config.projection_dim, bias=False)
    return MMKDClipProjection(width, config.vision_projection_hidden, config.projection_dim)


def tag_projection(projection: nn.Module) -> None:
    """Let `_init_weights` know the layers of a projection."""
    for module in projection.modules():
        module._is_projection = isinstance(module, nn.Linear)  # type: ignore[assignment]


def class_token_states(tower: Any, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> torch.Tensor:
    """Pooled output `(images, width)` of a CLIP ViT, with the last layer computed for the class token alone."""
    states = tower.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
    states = tower.pre_layrnorm(states)
    *layers, last = tower.encoder.layers
    for layer in layers:
        states = layer(states, attention_mask=None)
    attention, normed = last.self_attn, last.layer_norm1(states)
    query, key, value = (
        projection(tokens).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        for projection, tokens in (
            (attention.q_proj, normed[:, :1]),
            (attention.k_proj, normed),
            (attention.v_proj, normed),
        )
    )
    read = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    token = states[:, :1] + attention.out_proj(read)
    token = token + last.mlp(last.layer_norm2(token))
    return tower.post_layernorm(token[:, 0])


def _parts_can_be_called(model: Any) -> bool:
    """Whether the tower is a CLIP ViT of bare layers: one that is sharded or moved must be called whole."""
    tower = model.vision_model
    if not isinstance(tower, CLIPVisionModel) or getattr(model, "hf_device_map", None) is not None:
        return False
    return type(tower.encoder.layers[-1]) is CLIPEncoderLayer


def projected(output: Any, embeddings: torch.Tensor) -> BaseModelOutputWithPooling:
    """A tower's output with the projected feature as ``pooler_output``."""
    return BaseModelOutputWithPooling(
        last_hidden_state=output.last_hidden_state,
        pooler_output=embeddings,
        hidden_states=output.get("hidden_states"),
        attentions=output.get("attentions"),
    )


def masked_mean(states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of `(texts, tokens, width)` over the tokens of the mask."""
    if attention_mask is None:
        return states.mean(dim=1)
    weights = attention_mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def _refuse_missing_parts(model: PreTrainedModel, missing: set[str], source: str) -> None:
    """Raise when a whole tower or projection was in no file: half a model must not answer as if it were one.

    Raises:
        ValueError: the message names what is missing and what can be done.
    """
    own = list(model.state_dict())
    parts = {part: {key for key in own if key.startswith(f"{part}.")} for part in PARTS}
    gone = [part for part, keys in parts.items() if keys and keys <= missing]
    if gone:
        raise ValueError(
            f"{source} has no weights for {', '.join(gone)} of {type(model).__name__}. A folder that holds one half is "
            "read by MMKDClipTextModelWithProjection or MMKDClipVisionModelWithProjection; to start a part at random, "
            "build the model from its configuration and load the other parts into it"
        )
