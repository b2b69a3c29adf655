# Copyright 2026 The mmkd-clip developers
# SPDX-License-Identifier: Apache-2.0
"""Configuration of MMKD-CLIP: a vision tower, a text tower and what joins them.

The defaults are the published student: ViT-B/16 at 224 pixels in OpenAI's form and BiomedBERT-base. The towers may be
any vision and any BERT-like model that transformers knows, each described by its own configuration.
"""

import copy
import math
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.activations import ACT2FN

from .presets_mmkd import PRESETS

OLDEST_TRANSFORMERS = (5, 8)  # below it CLIP's vision tower has other names, and would be left at random
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST_TRANSFORMERS:
    raise ImportError(f"MMKD-CLIP needs transformers 5.8 or newer, this is {transformers.__version__}; upgrade it")

DEFAULT_LOGIT_SCALE = math.log(1 / 0.07)
POOLINGS = ("cls", "mean")
AUTO_MAP = {  # lets a saved folder work without this package: the files are saved beside the weights
    "AutoConfig": "configuration_mmkd.MMKDClipConfig",
    "AutoModel": "modeling_mmkd.MMKDClipModel",
    "AutoModelForZeroShotImageClassification": "modeling_mmkd.MMKDClipModel",
    "AutoProcessor": "processing_mmkd.MMKDClipProcessor",
}

OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")  # their positions start behind the padding token's


class MMKDClipConfig(PretrainedConfig):
    """Configuration of an `MMKDClipModel`.

    Args:
        vision_config: configuration or dictionary of the vision tower; ``model_type`` defaults to
            ``clip_vision_model`` with a patch size of 16.
        text_config: configuration or dictionary of the text tower; ``model_type`` defaults to ``bert``.
        projection_dim: width of the joint space.
        text_projection_hidden: hidden width of the text projection, by default the mean of the text tower's width and
            ``projection_dim``.
        vision_projection_hidden: hidden width of an image projection in two layers like the text's; by default there
            is none, and the projection is one linear layer, as published.
        context_length: most tokens of a text, as in training; longer ones are cut. The text tower's positions also
            limit it.
        text_pooling: ``cls`` (first token, as published) or ``mean`` (over the attention mask).
        logit_scale_init_value: natural logarithm of the similarities' multiplier at the start.

    Raises:
        ValueError: sizes that no tower can have, an unknown pooling or activation, or a scale that is not finite.
        TypeError: a width that is no whole number.

    Example:
        >>> MMKDClipConfig.from_preset("mmkd-clip-small").vision_config.hidden_size
        384
    """

    model_type = "mmkd_clip"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = ["text_model_output", "vision_model_output"]  # noqa: RUF012

    def __init__(
        self,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        projection_dim: int = 512,
        text_projection_hidden: int | None = None,
        vision_projection_hidden: int | None = None,
        text_pooling: str = "cls",
        logit_scale_init_value: float = DEFAULT_LOGIT_SCALE,
        context_length: int = 256,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _tower(vision_config, "clip_vision_model", {"patch_size": 16})
        self.text_config = _tower(text_config, "bert", {})
        if text_pooling not in POOLINGS:
            raise ValueError(f"text_pooling is {text_pooling!r}; allowed: {', '.join(POOLINGS)}")
        widths = {"projection_dim": projection_dim, "text_projection_hidden": text_projection_hidden}
        widths |= {"vision_projection_hidden": vision_projection_hidden, "context_length": context_length}
        _check_widths(widths, optional=("text_projection_hidden", "vision_projection_hidden"))
        self.projection_dim = projection_dim
        self.text_projection_hidden = text_projection_hidden or (tower_width(self.text_config) + projection_dim) // 2
        self.vision_projection_hidden = vision_projection_hidden
        self.text_pooling = text_pooling
        self.context_length = context_length
        self.logit_scale_init_value = logit_scale_init_value
        if not isinstance(logit_scale_init_value, (int, float)) or not math.isfinite(logit_scale_init_value):
            raise ValueError(f"logit_scale_init_value is {logit_scale_init_value!r}; it must be a finite number")
        _check_sizes("vision_config", self.vision_config)
        _check_sizes("text_config", self.text_config)
        super().__init__(**{"auto_map": dict(AUTO_MAP), **kwargs})

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
        """Most tokens that a text may have: the context, or the text tower's positions if they are fewer."""
        return min(self.context_length, position_limit(self.text_config) or self.context_length)


def tower_width(config: PretrainedConfig) -> int:
    """Width of a tower's hidden states.

    Raises:
        ValueError: the configuration does not state it.
    """
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(f"a tower of type {config.model_type!r} states no hidden_size; use a ViT or BERT-like model")
    return width


def position_limit(config: PretrainedConfig) -> int | None:
    """Most tokens that a text tower has positions for; None where its configuration states no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    if config.model_type in OFFSET_POSITIONS:
        return positions - config.pad_token_id - 1
    return positions


def _check_widths(widths: dict[str, Any], optional: tuple[str, ...]) -> None:
    """Refuse what is no positive whole number, or None where that is allowed."""
    for name, value in widths.items():
        if value is None and name in optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; it must be a whole number")
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def _check_sizes(name: str, config: PretrainedConfig) -> None:
    """Refuse sizes that no tower can have, where its configuration states them.

    Raises:
        ValueError: a size below 1, heads or patches that do not divide, or an unknown activation.
    """
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
    stated = {key: value for key in sizes if isinstance(value := getattr(config, key, None), int)}
    for key, value in stated.items():
        if value < 1:
            raise ValueError(f"{name}: {key} is {value}; it must be at least 1")
    for whole, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
        if stated.get(whole, 0) % stated.get(part, 1):
            raise ValueError(f"{name}: {whole} {stated[whole]} must be a multiple of {part} {stated[part]}")
    activation = getattr(config, "hidden_act", None)
    if isinstance(activation, str) and activation not in ACT2FN:
        raise ValueError(f"{name}: hidden_act is {activation!r}; allowed: {', '.join(sorted(ACT2FN))}")


def _tower(
    config: PretrainedConfig | dict[str, Any] | None, model_type: str, defaults: dict[str, Any]
) -> PretrainedConfig:
    """A tower's configuration object; ``defaults`` hold where it is of the default type and does not say otherwise."""
    if isinstance(config, PretrainedConfig):
        return config
    values = dict(config or {})
    model_type = values.pop("model_type", model_type)
    if model_type == "clip_vision_model":
        values = {**defaults, **values}
    zeros = [key for key, value in values.items() if key.startswith("num_") and value == 0 and key != "num_labels"]
    if zeros:  # some towers' configurations divide by them
        raise ValueError(f"{', '.join(zeros)} of a {model_type} tower is 0; it must be at least 1")
    return AutoConfig.for_model(model_type, **values)


__all__ = ["MMKDClipConfig"]
