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
"""Configuration of MMKD-CLIP: a vision tower, a text tower and the projections that join them, and the named sizes.

The defaults are the published student: ViT-B/16 at 224 pixels in OpenAI's form and BiomedBERT-base. The towers may be
any vision model and any BERT-like model of transformers, each described by its own configuration.

The docstrings of this package are written by hand (`trf-ignore: TRF057`): `@auto_docstring` takes them from tables that
differ between releases of transformers, and prints at import or raises where an argument is not in them.
"""

import copy
import math
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import strict  # of huggingface_hub.dataclasses

OLDEST_TRANSFORMERS = (5, 8)  # older releases name CLIP's vision tower differently and would leave it at random
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST_TRANSFORMERS:
    raise ImportError(f"MMKD-CLIP needs transformers 5.8 or newer, this is {transformers.__version__}; upgrade it")

DEFAULT_LOGIT_SCALE = math.log(1 / 0.07)
POOLINGS = ("cls", "mean")
AUTO_MAP = {  # lets a saved folder work without this package: the files are saved beside the weights
    "AutoConfig": "configuration_mmkd.MMKDClipConfig",
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
    if config.model_type in OFFSET_POSITIONS:
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


__all__ = ["PRESETS", "MMKDClipConfig"]
