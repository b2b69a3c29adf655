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
This file adds their configuration with its named sizes, the two projections, the pooling of the text, the scale of the
similarities, and checks of sizes and inputs. Configuration and model are one file, because users of a saved folder are
asked to read each file of code that they download.

The defaults of the configuration are the published student: ViT-B/16 at 224 pixels in OpenAI's form and
BiomedBERT-base. The towers may be any vision model and any BERT-like model of transformers, each described by its own
configuration. `MMKDClipModel` is made of two halves; each half is also a model of its own that loads from the same
folder. ``logit_scale`` has one element and not none, because sharded data parallelism does not take scalars.

The docstrings of this package are written by hand (`trf-ignore: TRF057`): `@auto_docstring` takes them from tables that
differ between releases of transformers, and prints at import or raises where an argument is not in them.
"""

import copy
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPVisionModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.configuration_utils import strict  # of huggingface_hub.dataclasses
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPTextModelOutput, CLIPVisionModelOutput
from transformers.processing_utils import Unpack  # typing has it from Python 3.11 on
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging

logger = logging.get_logger(__name__)

OLDEST_TRANSFORMERS = (5, 8)  # older releases name CLIP's vision tower differently and would leave it at random
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST_TRANSFORMERS:
    raise ImportError(f"MMKD-CLIP needs transformers 5.8 or newer, this is {transformers.__version__}; upgrade it")

DEFAULT_LOGIT_SCALE = math.log(1 / 0.07)
POOLINGS = ("cls", "mean")
AUTO_MAP = {  # lets a saved folder work without this package: the files are saved beside the weights
    "AutoConfig": "modeling_mmkd.MMKDClipConfig",
    "AutoModel": "modeling_mmkd.MMKDClipModel",
    "AutoModelForZeroShotImageClassification": "modeling_mmkd.MMKDClipModel",
    "AutoImageProcessor": "processing_mmkd.MMKDClipImageProcessor",
    "AutoProcessor": "processing_mmkd.MMKDClipProcessor",
}
OWN_CODE = tuple({name.partition(".")[0] + "." for name in AUTO_MAP.values()})

# What a configuration file may give a timm backbone: sizes and choices of its form. Others name files, which old
# releases of timm load by unpickling.
TIMM_ARGUMENTS = (
    *("img_size", "patch_size", "in_chans", "dynamic_img_size", "dynamic_img_pad", "global_pool", "class_token"),
    *("reg_tokens", "no_embed_class", "drop_rate", "drop_path_rate", "output_stride", "features_only", "out_indices"),
)
LARGEST_SIZE, MOST_LAYERS = 1 << 20, 1 << 10  # beyond those of any model; a forged file must not fill the memory
SIZES = ("size", "dim", "hidden", "width", "length", "embeddings", "heads", "channels", "layers", "depth", "depths")

OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")  # their positions start behind the padding token's

# Named sizes, from the paper's student to one for a telephone; each holds arguments of `MMKDClipConfig`. The widths are
# those of towers with public weights, so that a student of one of these sizes can also start from them (``mmkd pretrain
# --vision timm:... --text ...``): ViT-S and ViT-Ti of timm, MobileNetV4, and BERTs of 384 and 312 wide.
_SMALL_TEXT = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
_TINY_TEXT = {"hidden_size": 312, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 1200}
PRESETS: dict[str, dict[str, Any]] = {
    "mmkd-clip-base": {},  # ViT-B/16 and BiomedBERT-base, as published
    "mmkd-clip-small": {
        "vision_config": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
        "text_config": _SMALL_TEXT,
        "projection_dim": 384,
    },
    "mmkd-clip-tiny": {
        "vision_config": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
        "text_config": _TINY_TEXT,
        "projection_dim": 256,
    },
    "mmkd-clip-mobile": {
        "vision_config": {"model_type": "timm_wrapper", "architecture": "mobilenetv4_conv_small"},
        "text_config": _TINY_TEXT,
        "projection_dim": 256,
    },
}


# trf-ignore: TRF057
@strict
class MMKDClipConfig(PreTrainedConfig):
    """Configuration of an `MMKDClipModel`; all arguments are keywords.

    Args:
        vision_config: configuration or dictionary of the vision tower; ``model_type`` defaults to
            ``clip_vision_model`` with a patch size of 16.
        text_config: configuration or dictionary of the text tower; ``model_type`` defaults to ``bert``.
        projection_dim: width of the shared embedding space.
        text_projection_hidden: hidden width of the text projection, by default the mean of the text tower's width and
            ``projection_dim``.
        vision_projection_hidden: hidden width of an image projection in two layers like the text's; by default the
            projection is one linear layer, as published.
        text_pooling: ``cls`` (first token, as published) or ``mean`` (over the attention mask).
        logit_scale_init_value: natural logarithm of the factor of the similarities at the start.
        context_length: maximum number of tokens of a text, as in training; longer texts are cut. The text tower's
            positions also limit it.
        initializer_range: standard deviation of the projections' initial weights, by default 1 / sqrt(width).
        initializer_factor: factor of that standard deviation.

    Raises:
        ValueError: sizes that no tower can have, an unknown pooling or activation, or a scale that is not finite.
        huggingface_hub.errors.StrictDataclassFieldValidationError: an argument of another type.

    Example:
        >>> MMKDClipConfig.from_preset("mmkd-clip-small").vision_config.hidden_size
        384
    """

    model_type = "mmkd_clip"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference = ["text_model_output", "vision_model_output"]

    vision_config: Any = None  # a PreTrainedConfig from `__post_init__` on
    text_config: Any = None
    projection_dim: int = 512
    text_projection_hidden: int | None = None
    vision_projection_hidden: int | None = None
    text_pooling: str = "cls"
    logit_scale_init_value: float | int = DEFAULT_LOGIT_SCALE
    context_length: int = 256
    initializer_range: float | None = None
    initializer_factor: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the towers' configurations, fill in the derived width and check every size."""
        self.vision_config = _tower(self.vision_config, "clip_vision_model", {"patch_size": 16})
        self.text_config = _tower(self.text_config, "bert", {})
        if self.text_pooling not in POOLINGS:
            raise ValueError(f"text_pooling is {self.text_pooling!r}; allowed: {', '.join(POOLINGS)}")
        for name in ("projection_dim", "text_projection_hidden", "vision_projection_hidden", "context_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not math.isfinite(self.logit_scale_init_value):
            raise ValueError(f"logit_scale_init_value is {self.logit_scale_init_value}; it must be a finite number")
        if self.text_projection_hidden is None:
            self.text_projection_hidden = (tower_width(self.text_config) + self.projection_dim) // 2
        _check_sizes("vision_config", self.vision_config)
        _check_sizes("text_config", self.text_config)
        stated = kwargs.pop("auto_map", None) or {}  # of a file; what others' code it names is not passed on
        own = {key: name for key, name in stated.items() if str(name).startswith(OWN_CODE)}
        super().__post_init__(auto_map=own or dict(AUTO_MAP), **kwargs)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "MMKDClipConfig":
        """Configuration of a named size.

        Args:
            name: a key of `PRESETS`: ``mmkd-clip-base``, ``-small``, ``-tiny`` or ``-mobile``.
            **changes: arguments of the configuration that replace the preset's.

        Raises:
            ValueError: an unknown name; the message lists the known ones.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset is called {name!r}; known: {', '.join(PRESETS)}")
        return cls(**(copy.deepcopy(PRESETS[name]) | changes))

    @property
    def text_limit(self) -> int:
        """Maximum number of tokens of a text: the context, or the text tower's positions if they are fewer."""
        return min(self.context_length, position_limit(self.text_config) or self.context_length)


def tower_width(config: Any) -> int:
    """Width of a tower's hidden states.

    Raises:
        ValueError: the configuration does not state it.
    """
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(f"a tower of type {config.model_type!r} states no hidden_size; use a ViT or BERT-like model")
    return width


def position_limit(config: Any) -> int | None:
    """Maximum number of tokens that a text tower has positions for; None where its configuration states no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    if config.model_type in OFFSET_POSITIONS:  # CODEPATH: students of RoBERTa towers; those of BERT take the other
        return positions - config.pad_token_id - 1
    return positions


def check_bounds(name: str, values: dict[str, Any]) -> None:
    """Refuse sizes beyond any model's and files that timm would open, at any depth of a configuration.

    Args:
        name: of the configuration, for the error.
        values: what a file states, before a model or a configuration is built from it.

    Raises:
        ValueError: a size that no model has, or a value by which timm or transformers would open files or run code.
    """
    for key, value in ((str(key), value) for key, value in values.items()):
        if isinstance(value, dict):
            check_bounds(key, value)
        most = MOST_LAYERS if key.endswith(("layers", "depth", "depths")) else LARGEST_SIZE
        for size in value if isinstance(value, list | tuple) else [value]:
            if key.endswith(SIZES) and isinstance(size, int | float) and not -most <= size <= most:
                raise ValueError(f"{name}: {key} is {size}; allowed: 1 to {most}")
        if key.endswith(SIZES) and isinstance(value, str):
            raise ValueError(f"{name}: {key} is {value!r}; allowed: 1 to {most}")
        if key in ("output_hidden_states", "output_attentions") and not isinstance(value, bool | None):
            raise ValueError(f"{name}: {key} is {value!r}; allowed: true and false")
        # timm opens the folder, transformers downloads and runs the kernel that stands in place of a name
        is_name = key in ("architecture", "timm_model_name") or "attn_implementation" in key
        if is_name and isinstance(value, str) and (":" in value or "/" in value):
            raise ValueError(f"{name}: {key} is {value!r}; allowed: a name, not a file or repository")
    for key, value in (values.get("model_args") or {}).items():
        if key not in TIMM_ARGUMENTS or not isinstance(value, int | float | str | bool | list | tuple):
            raise ValueError(f"{name}: model_args has {key!r}; allowed: {', '.join(TIMM_ARGUMENTS)}")


def _check_sizes(name: str, config: PreTrainedConfig) -> None:
    """Refuse sizes that no tower can have, where its configuration states them, and files that timm would open.

    Raises:
        ValueError: see `check_bounds`; a size below 1, heads or patches that do not divide, or an unknown activation.
    """
    check_bounds(name, config.to_dict())
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
    stated = {key: value for key in sizes if isinstance(value := getattr(config, key, None), int)}
    for key, value in stated.items():
        if value < 1:
            most = MOST_LAYERS if key == "num_hidden_layers" else LARGEST_SIZE
            raise ValueError(f"{name}: {key} is {value}; allowed: 1 to {most}")
    for whole, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
        if stated.get(whole, 0) % stated.get(part, 1):
            raise ValueError(f"{name}: {whole} {stated[whole]} must be a multiple of {part} {stated[part]}")
    activation = getattr(config, "hidden_act", None)
    if isinstance(activation, str) and activation not in ACT2FN:
        raise ValueError(f"{name}: hidden_act is {activation!r}; allowed: {', '.join(sorted(ACT2FN))}")


def _tower(config: Any, model_type: str, defaults: dict[str, Any]) -> PreTrainedConfig:
    """A tower's configuration object; ``defaults`` hold for the values that a CLIP vision tower leaves out."""
    if isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, dict | None):
        raise ValueError(f"a tower's configuration is {config!r}; allowed: a configuration, a dictionary or None")
    values = dict(config or {})
    model_type = values.pop("model_type", model_type)
    if model_type == "clip_vision_model":
        values = {**defaults, **values}
    zeros = [key for key, value in values.items() if key.startswith("num_") and value == 0 and key != "num_labels"]
    if zeros:  # some towers' configurations divide by them
        raise ValueError(f"{', '.join(zeros)} of a {model_type} tower is 0; it must be at least 1")
    return AutoConfig.for_model(model_type, **values)


PARTS = ("vision_model", "visual_projection", "text_model", "text_projection")


# trf-ignore: TRF057
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
    "PRESETS",
    "MMKDClipConfig",
    "MMKDClipModel",
    "MMKDClipOutput",
    "MMKDClipTextModelWithProjection",
    "MMKDClipVisionModelWithProjection",
]
