# Copyright 2026 The mmkd-clip developers
# SPDX-License-Identifier: Apache-2.0
"""Configuration of MMKD-CLIP: a vision tower, a text tower and what joins them.

The defaults are the published student: ViT-B/16 at 224 pixels in OpenAI's form and BiomedBERT-base. The towers may be
any vision and any BERT-like model that transformers knows, each described by its own configuration.
"""

import math
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.activations import ACT2FN

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
        text_pooling: ``cls`` (first token, as published) or ``mean`` (over the attention mask).
        logit_scale_init_value: natural logarithm of the similarities' multiplier at the start.

    Raises:
        ValueError: sizes that no tower can have, an unknown pooling or activation, or a scale that is not finite.
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
        **kwargs: Any,
    ) -> None:
        self.vision_config = _tower(vision_config, "clip_vision_model", {"patch_size": 16})
        self.text_config = _tower(text_config, "bert", {})
        if text_pooling not in POOLINGS:
            raise ValueError(f"text_pooling is {text_pooling!r}; allowed: {', '.join(POOLINGS)}")
        self.projection_dim = projection_dim
        self.text_projection_hidden = text_projection_hidden or (tower_width(self.text_config) + projection_dim) // 2
        self.vision_projection_hidden = vision_projection_hidden
        self.text_pooling = text_pooling
        self.logit_scale_init_value = logit_scale_init_value
        for name in ("projection_dim", "text_projection_hidden", "vision_projection_hidden"):
            width = getattr(self, name)
            if width is not None and width < 1:
                raise ValueError(f"{name} is {width}; it must be at least 1")
        if not math.isfinite(logit_scale_init_value):
            raise ValueError(f"logit_scale_init_value is {logit_scale_init_value}; it must be a finite number")
        _check_sizes("vision_config", self.vision_config)
        _check_sizes("text_config", self.text_config)
        super().__init__(**{"auto_map": dict(AUTO_MAP), **kwargs})


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
