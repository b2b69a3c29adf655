# Copyright 2026 The mmkd-clip developers. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""MMKD-CLIP: a vision tower and a text tower whose projections meet in a shared embedding space.

The towers are transformers' own modules, so that attention kernels, checkpointing and precision work as they do there.
This file adds the two projections, the pooling of the text, the scale of the similarities, and checks of the inputs.
`MMKDClipModel` is made of two halves; each half is also a model of its own that loads from the same folder.
``logit_scale`` has one element and not none, because sharded data parallelism does not take scalars.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, CLIPVisionModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPTextModelOutput, CLIPVisionModelOutput
from transformers.processing_utils import Unpack  # typing has it from Python 3.11 on
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging

from .configuration_mmkd import MMKDClipConfig, tower_width

logger = logging.get_logger(__name__)

PARTS = ("vision_model", "visual_projection", "text_model", "text_projection")


# trf-ignore: TRF057 (here and below: see configuration_mmkd.py)
@dataclass
class MMKDClipOutput(ModelOutput):
    """Output of `MMKDClipModel`; values that need a modality that was not given are None.

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
        """All values that are not None, the towers' outputs as tuples."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class MMKDClipProjection(nn.Module):
    """Two linear layers without biases, GELU between them: width -> hidden -> projection_dim."""

    def __init__(self, width: int, hidden: int, projection_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, projection_dim, bias=False)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Map `(rows, width)` to `(rows, projection_dim)`."""
        return self.fc2(nn.functional.gelu(self.fc1(pooled)))


# trf-ignore: TRF057
class MMKDClipPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization."""

    config_class = MMKDClipConfig
    base_model_prefix = "mmkd_clip"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Of the published towers; `post_init` lists those of the towers at hand. trf-ignore: TRF022 (classes of the towers)
    _no_split_modules = ["BertLayer", "CLIPEncoderLayer", "CLIPVisionEmbeddings"]

    def post_init(self) -> None:
        """Initialize, and keep in ``_no_split_modules`` the layers that are there, because FSDP requires each of them.

        The layer around the input embeddings is left out: accelerate shards these on their own after the listed layers,
        and sharding twice fails.
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
            ValueError: the checkpoint has no weight of a whole tower or projection, which would start at random. With
                ``output_loading_info=True`` the missing keys are returned instead.
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
        """False, so that transformers also initializes containers without own parameters, as CLIP's tower needs.

        transformers skips them for custom code, which might overwrite loaded weights. This file and the towers use
        `transformers.initialization`, which does not.
        """
        return False

    # trf-ignore: TRF018 (the base would draw every projection twice and change the initial weights of a seed)
    def _init_weights(self, module: nn.Module) -> None:
        """Projections: normal with ``initializer_range`` times ``initializer_factor``; ``logit_scale``: its value."""
        if isinstance(module, nn.Linear) and getattr(module, "_is_projection", False):
            spread = self.config.initializer_range
            spread = module.in_features**-0.5 if spread is None else spread
            init.normal_(module.weight, mean=0.0, std=spread * self.config.initializer_factor)
        elif isinstance(scale := module._parameters.get("logit_scale"), nn.Parameter):
            init.constant_(scale, self.config.logit_scale_init_value)


class VisionHalf(MMKDClipPreTrainedModel):
    """Vision tower and image projection of a model; ``__init__`` is the model's."""

    def _add_vision(self, config: MMKDClipConfig) -> None:
        self.vision_model = build_tower(config.vision_config)
        self.visual_projection = vision_projection(vision_width(self.vision_model), config)
        tag_projection(self.visual_projection)

    # trf-ignore: TRF057
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
            pooled_only: return ``pooler_output`` alone. The last layer of a CLIP ViT is then computed for the class
                token alone, which gives the same result and takes about 7 % less time in 12 layers (not where a device
                map or sharding acts on whole layers).
            **kwargs: options of the tower, such as ``output_hidden_states``.

        Returns:
            The vision tower's output with ``pooler_output`` `(images, projection_dim)`, projected, not normalized.

        Raises:
            ValueError: pixels that are no normalized images with the tower's number of channels.
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
        width = tower_width(config.text_config)
        hidden: Any = config.text_projection_hidden  # never None: the configuration fills it in
        self.text_projection = MMKDClipProjection(width, hidden, config.projection_dim)
        tag_projection(self.text_projection)

    def get_input_embeddings(self) -> nn.Module:
        """Word embeddings of the text tower."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings of the text tower."""
        self.text_model.set_input_embeddings(value)

    # trf-ignore: TRF057
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
        # CODEPATH: the published student pools "cls"; students whose text tower is a sentence encoder pool "mean"
        if self.config.text_pooling == "mean":
            pooled = masked_mean(output.last_hidden_state, attention_mask)
        return projected(output, self.text_projection(pooled))


# trf-ignore: TRF057
class MMKDClipModel(VisionHalf, TextHalf):
    """A biomedical CLIP: images and texts in one space."""

    _keep_in_fp32_modules_strict = ["logit_scale"]  # in bf16 a scale of 100 would be 99

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

    # trf-ignore: TRF057
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MMKDClipOutput:
        """Embed images, texts or both, and compare them when both are given; the first arguments are in CLIP's order.

        Args:
            input_ids: `(texts, tokens)`.
            pixel_values: `(images, channels, height, width)`.
            attention_mask: `(texts, tokens)`; by default every token but padding.
            position_ids: `(texts, tokens)`.
            return_loss: also the symmetric contrastive loss; text k must then belong to image k.
            interpolate_pos_encoding: stretch the position embeddings to images of another size.
            token_type_ids: `(texts, tokens)`.
            inputs_embeds: `(texts, tokens, width)` instead of ``input_ids``.
            **kwargs: options of the towers, such as ``output_hidden_states``.

        Raises:
            ValueError: neither modality is given, ``inputs_embeds`` are too long, or a loss of unpaired inputs.
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


# trf-ignore: TRF057
class MMKDClipTextModelWithProjection(TextHalf):
    """The text half alone, from the folder of a whole model or of this half."""

    input_modalities = ["text"]
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^visual_projection\.", r"^logit_scale$"]

    def __init__(self, config: MMKDClipConfig) -> None:
        super().__init__(config)
        self._add_text(config)
        self.post_init()

    # trf-ignore: TRF057
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
            ``text_embeds`` `(texts, projection_dim)`, projected, not normalized, and the tower's outputs.
        """
        output = self.get_text_features(
            input_ids, attention_mask, position_ids, token_type_ids, inputs_embeds, return_dict=True, **kwargs
        )
        states = {name: output.get(name) for name in ("last_hidden_state", "hidden_states", "attentions")}
        return CLIPTextModelOutput(text_embeds=output.pooler_output, **states)


# trf-ignore: TRF057
class MMKDClipVisionModelWithProjection(VisionHalf):
    """The vision half alone, from the folder of a whole model or of this half."""

    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$"]

    def __init__(self, config: MMKDClipConfig) -> None:
        super().__init__(config)
        self._add_vision(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The layer that embeds the patches."""
        return self.vision_model.get_input_embeddings()

    # trf-ignore: TRF057
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CLIPVisionModelOutput:
        """Embed images; arguments as in `MMKDClipModel.get_image_features`.

        Returns:
            ``image_embeds`` `(images, projection_dim)`, projected, not normalized, and the tower's outputs.
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


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A tower from its configuration, without a pooling layer, which would get no gradient."""
    mapped: Any = AutoModel._model_mapping[type(config)]
    model_class = mapped[0] if isinstance(mapped, (list, tuple)) else mapped
    has_pooler = "add_pooling_layer" in inspect.signature(model_class).parameters
    return AutoModel.from_config(config, **({"add_pooling_layer": False} if has_pooler else {}))


def vision_width(tower: PreTrainedModel) -> int:
    """Width of a vision tower's pooled output; the configuration of a timm backbone does not state it."""
    backbone = getattr(tower, "timm_model", None)
    if backbone is not None:
        return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)
    return tower_width(tower.config)


def vision_projection(width: int, config: MMKDClipConfig) -> nn.Module:
    """One linear layer as published, or two where the configuration states a hidden width."""
    # CODEPATH: None in the published student; students with frozen towers train a hidden layer
    if config.vision_projection_hidden is None:
        return nn.Linear(width, config.projection_dim, bias=False)
    return MMKDClipProjection(width, config.vision_projection_hidden, config.projection_dim)


def tag_projection(projection: nn.Module) -> None:
    """Mark the layers of a projection for `_init_weights`."""
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
    """Raise when a whole tower or projection was in no file: its outputs would be random.

    Raises:
        ValueError: the message names the missing parts and the way out.
    """
    own = list(model.state_dict())
    parts = {part: {key for key in own if key.startswith(f"{part}.")} for part in PARTS}
    gone = [part for part, keys in parts.items() if keys and keys <= missing]
    if gone:
        raise ValueError(
            f"{source} has no weights for {', '.join(gone)} of {type(model).__name__}. A folder that holds one half is "
            "loaded by MMKDClipTextModelWithProjection or MMKDClipVisionModelWithProjection; to start a part at "
            "random, build the model from its configuration and load the other parts into it"
        )


def cut_to_context(input_ids: Any, attention_mask: Any, optional: dict[str, Any], limit: int) -> tuple[Any, Any, Any]:
    """Cut texts padded on the right as a tokenizer does: the first tokens, and the last one, which closes the text.

    Args:
        input_ids: `(texts, tokens)` or None.
        attention_mask: `(texts, tokens)` or None.
        optional: other inputs whose second dimension is the tokens.
        limit: number of tokens that stay.

    Raises:
        ValueError: there are no ``input_ids``: ``inputs_embeds`` do not show which token closes a text.
    """
    if input_ids is None:
        came = optional["inputs_embeds"].shape[1]
        raise ValueError(f"inputs_embeds of {came} tokens came, but the context is at most {limit} tokens")
    logger.warning_once(f"texts longer than the context of {limit} tokens are cut to their beginning")
    last = torch.full_like(input_ids[:, :1], input_ids.shape[1] - 1)
    if attention_mask is not None:
        last = attention_mask.sum(dim=1, keepdim=True).long().clamp(min=1) - 1
    closing = torch.where(last >= limit, input_ids.gather(1, last), input_ids[:, limit - 1 : limit])
    cut = torch.cat([input_ids[:, : limit - 1], closing], dim=1)
    mask = None if attention_mask is None else attention_mask[:, :limit]
    return cut, mask, {name: value[:, :limit] for name, value in optional.items()}


def refuse_bad_pixels(pixels: torch.Tensor, channels: int) -> None:
    """Raise on pixels that are no batch of normalized images; NaN is searched on the CPU alone."""
    allowed = f"allowed: (images, {channels}, height, width), floating point, as the processor gives them"
    if not isinstance(pixels, torch.Tensor):
        raise ValueError(f"pixel_values is a {type(pixels).__name__}; {allowed}")
    if pixels.ndim != 4 or pixels.shape[1] != channels:
        raise ValueError(f"pixel_values has the shape {tuple(pixels.shape)}; {allowed}")
    if not pixels.is_floating_point():
        raise ValueError(f"pixel_values is {pixels.dtype}; {allowed}")
    if not _is_eager():
        return
    if not len(pixels):
        raise ValueError(f"pixel_values has the shape {tuple(pixels.shape)}, no image; {allowed}")
    if pixels.device.type == "cpu":
        finite = pixels.sum(dim=(1, 2, 3), dtype=torch.float32).isfinite()
        if not finite.all():
            bad = [number for number, good in enumerate(finite.tolist()) if not good]
            raise ValueError(f"pixel_values has NaN or infinity in images {bad}; {allowed}, every one a finite number")


def refuse_bad_tokens(input_ids: torch.Tensor, attention_mask: Any, vocabulary: int | None) -> None:
    """Raise on tokens that are none, or a mask of other texts; values are checked on the CPU alone."""
    allowed = "allowed: (texts, tokens), int64 or int32, as the tokenizer gives them"
    if not isinstance(input_ids, torch.Tensor):
        raise ValueError(f"input_ids is a {type(input_ids).__name__}; {allowed}")
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids is {input_ids.dtype} of the shape {tuple(input_ids.shape)}; {allowed}")
    if not _is_eager():
        return
    if not input_ids.numel():
        raise ValueError(f"input_ids has the shape {tuple(input_ids.shape)}, no token; {allowed}")
    if getattr(attention_mask, "ndim", 0) == 2 and attention_mask.shape != input_ids.shape:
        came = f"{tuple(attention_mask.shape)}, but input_ids {tuple(input_ids.shape)}"
        raise ValueError(f"attention_mask has the shape {came}; both must be of the same texts")
    if vocabulary and input_ids.device.type == "cpu":
        least, most = (int(bound) for bound in input_ids.aminmax())
        if least < 0 or most >= vocabulary:
            raise ValueError(
                f"input_ids has {least if least < 0 else most}, but the text tower has embeddings for 0 to "
                f"{vocabulary - 1}; use the tokenizer that was saved with the model"
            )


def _is_eager() -> bool:
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing()


__all__ = [
    "MMKDClipModel",
    "MMKDClipOutput",
    "MMKDClipTextModelWithProjection",
    "MMKDClipVisionModelWithProjection",
]
