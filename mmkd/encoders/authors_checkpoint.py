"""Conversion between the authors' checkpoint keys and those of `MMKDClipModel`, in both directions.

The published form is open_clip's: a fused attention input, projections stored as (width, dim), a scalar scale. Every
key is accounted for in both directions; an unknown or missing key is an error that lists it, because weights left
random by a prefix that did not match are the most common cause of wrong figures.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmkd.encoders.weights import listed, require_same_keys
from modeling_mmkd import MMKDClipConfig, MMKDClipModel

HEAD_WIDTH = 64  # of the published model, in both towers
BUFFERS = {"text_encoder.transformer.embeddings.position_ids"}  # saved by transformers before 4.31, no weight

KINDS = ("weight", "bias")
BLOCK = {
    f"{theirs}.{kind}": f"{ours}.{kind}"
    for theirs, ours in {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }.items()
    for kind in KINDS
}
FUSED = ("q_proj", "k_proj", "v_proj")
VISION = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    **{f"ln_pre.{kind}": f"pre_layrnorm.{kind}" for kind in KINDS},  # the spelling is transformers'
    **{f"ln_post.{kind}": f"post_layernorm.{kind}" for kind in KINDS},
}
TEXT_PREFIX = ("text_encoder.transformer.", "text_model.")
PROJECTION = {
    "text_encoder.proj.0.weight": "text_projection.fc1.weight",
    "text_encoder.proj.2.weight": "text_projection.fc2.weight",
}
POSITIONS = "visual.positional_embedding"
_EMBEDDINGS = TEXT_PREFIX[0] + "embeddings."
MEASURED = {  # (part, size): the tensor and the axis that have this size
    ("vision", "hidden_size"): ("visual.conv1.weight", 0),
    ("vision", "num_channels"): ("visual.conv1.weight", 1),
    ("vision", "patch_size"): ("visual.conv1.weight", 2),
    ("vision", "intermediate_size"): ("visual.transformer.resblocks.0.mlp.c_fc.weight", 0),
    ("text", "vocab_size"): (_EMBEDDINGS + "word_embeddings.weight", 0),
    ("text", "hidden_size"): (_EMBEDDINGS + "word_embeddings.weight", 1),
    ("text", "max_position_embeddings"): (_EMBEDDINGS + "position_embeddings.weight", 0),
    ("text", "type_vocab_size"): (_EMBEDDINGS + "token_type_embeddings.weight", 0),
    ("text", "intermediate_size"): (TEXT_PREFIX[0] + "encoder.layer.0.intermediate.dense.weight", 0),
    ("model", "projection_dim"): ("visual.proj", 1),
    ("model", "text_projection_hidden"): ("text_encoder.proj.0.weight", 0),
}


def from_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, split and transpose the authors' tensors into those of `MMKDClipModel`; unknown keys are an error.

    Args:
        state: keys ``visual.*``, ``text_encoder.*`` and ``logit_scale``, without prefixes (`unwrap`).

    Raises:
        ValueError: a key that is not of this form.
    """
    ours: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        if key in BUFFERS:
            continue
        renamed = _renamed(key, value)
        if renamed is None:
            unknown.append(key)
        else:
            ours |= renamed
    if unknown:
        raise ValueError(f"{len(unknown)} keys are not of the authors' form: {listed(unknown)}")
    return ours


def to_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The exact inverse of `from_authors`: tensors with the authors' names, fused and transposed as they store them.

    Raises:
        ValueError: a key of a tower that the authors' form cannot hold.
    """
    vision_names = {f"vision_model.{ours}": f"visual.{theirs}" for theirs, ours in VISION.items()}
    block_names = {ours: theirs for theirs, ours in BLOCK.items()}
    theirs: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        block = re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.(.+)", key)
        if key == "logit_scale":
            theirs[key] = value.reshape(())
        elif key == "visual_projection.weight":
            theirs["visual.proj"] = value.T.contiguous()
        elif key in vision_names:
            theirs[vision_names[key]] = value
        elif block and block[2] in block_names:
            theirs[f"visual.transformer.resblocks.{block[1]}.{block_names[block[2]]}"] = value
        elif block and re.fullmatch(r"self_attn\.[qkv]_proj\.(weight|bias)", block[2]):
            kind = block[2].rpartition(".")[2]
            parts = [f"vision_model.encoder.layers.{block[1]}.self_attn.{name}.{kind}" for name in FUSED]
            require_same_keys({part: value for part in parts if part in state}, dict.fromkeys(parts, value), "a block")
            theirs[f"visual.transformer.resblocks.{block[1]}.attn.in_proj_{kind}"] = torch.cat(
                [state[p] for p in parts]
            )
        elif key in PROJECTION.values():
            theirs[next(name for name, ours in PROJECTION.items() if ours == key)] = value
        elif key.startswith(TEXT_PREFIX[1]):
            theirs[TEXT_PREFIX[0] + key.removeprefix(TEXT_PREFIX[1])] = value
        else:
            unknown.append(key)
    if any(key.startswith("visual_projection.fc") for key in unknown):
        raise ValueError(
            "its image projection has a hidden layer (vision_projection_hidden); the authors' form holds a single layer"
        )
    if unknown:
        raise ValueError(f"the authors' form holds an OpenAI-style ViT only; it has no place for {listed(unknown)}")
    return theirs


def require_same_bits(written: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Compare tensors byte by byte, so that NaN equals itself.

    Raises:
        ValueError: a tensor changed.
    """
    require_same_keys(written, state, "what was written")
    changed = [
        key
        for key, value in state.items()
        if value.dtype != written[key].dtype
        or not torch.equal(value.contiguous().view(torch.uint8), written[key].contiguous().view(torch.uint8))
    ]
    if changed:
        raise ValueError(f"{len(changed)} tensors changed when written: {listed(changed)}; is the disk sound?")


def one_precision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values, all in the widest precision among them.

    Raises:
        ValueError: tensors that are not floating-point numbers.
    """
    others = [f"{key} ({value.dtype})" for key, value in state.items() if not value.is_floating_point()]
    if others:
        raise ValueError(f"weights must be floating-point numbers, these are not: {listed(others)}")
    widest = functools.reduce(torch.promote_types, {value.dtype for value in state.values()})
    return {key: value.to(widest) for key, value in state.items()}


def empty_model(config: MMKDClipConfig) -> MMKDClipModel:
    """The model without memory for its weights: names and shapes.

    Raises:
        ValueError: the vision tower is of a kind that the authors' form does not hold.
    """
    if config.vision_config.model_type != "clip_vision_model":
        kind = config.vision_config.model_type
        raise ValueError(f"the vision tower is a {kind}; the authors' form holds a clip_vision_model only")
    with torch.device("meta"):
        return MMKDClipModel(config)


def infer_config(state: Mapping[str, Tensor], sizes: Mapping[str, Any] | None = None) -> MMKDClipConfig:
    """Derive the sizes from the authors' tensors; heads are 64 wide, as in the published model.

    Args:
        state: without prefixes (`unwrap`).
        sizes: sizes that take precedence over those of the tensors: values for ``vision`` and ``text``, and of
            `MMKDClipConfig`. Sizes that neither states are then transformers' defaults.

    Raises:
        ValueError: without ``sizes``, a tensor that shows a size is missing; or a width is not a multiple of 64.
    """
    absent = sorted({POSITIONS, *(key for key, _ in MEASURED.values())} - state.keys())
    if absent and sizes is None:
        raise ValueError(f"not a checkpoint of the authors' form: no {listed(absent)}")
    given = {"vision": {}, "text": {}, **(sizes or {})}
    measured = _measured(state)
    if given["text"].get("model_type", "bert") != "bert":
        measured["text"] = {}  # other towers have other names for their sizes
    vision, text = measured["vision"] | given["vision"], measured["text"] | given["text"]
    if POSITIONS in state and state[POSITIONS].ndim == 2 and "patch_size" in vision:
        grid = round(max(len(state[POSITIONS]) - 1, 0) ** 0.5)
        vision.setdefault("image_size", grid * vision["patch_size"])
    for tower, values in (("vision", vision), ("text", text)):
        if "hidden_size" in values:
            values.setdefault("intermediate_size", 4 * values["hidden_size"])
            if "num_attention_heads" not in values:
                values["num_attention_heads"] = _heads(values["hidden_size"], tower)
    joint = {name: value for name, value in given.items() if name not in ("vision", "text")}
    return MMKDClipConfig(vision_config=vision, text_config=text, **(measured["model"] | joint))


def _renamed(key: str, value: Tensor) -> dict[str, Tensor] | None:
    """The tensors of `MMKDClipModel` for one tensor of the authors; None for an unknown key."""
    block = re.fullmatch(r"visual\.transformer\.resblocks\.(\d+)\.(.+)", key)
    if key == "logit_scale":
        return {key: value.reshape(-1)}
    if key == "visual.proj":
        return {"visual_projection.weight": value.transpose(0, -1).contiguous()}
    if key in PROJECTION:
        return {PROJECTION[key]: value}
    if key.startswith(TEXT_PREFIX[0]):
        return {TEXT_PREFIX[1] + key.removeprefix(TEXT_PREFIX[0]): value}
    if key.removeprefix("visual.") in VISION and key.startswith("visual."):
        return {"vision_model." + VISION[key.removeprefix("visual.")]: value}
    if block and block[2] in BLOCK:
        return {f"vision_model.encoder.layers.{block[1]}.{BLOCK[block[2]]}": value}
    if block and block[2] in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = block[2].rpartition("_")[2]
        parts = zip(FUSED, torch.atleast_1d(value).tensor_split(3), strict=True)
        prefix = f"vision_model.encoder.layers.{block[1]}.self_attn"
        return {f"{prefix}.{name}.{kind}": part.contiguous() for name, part in parts}
    return None


def _measured(state: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """Sizes by part of the model, as far as tensors determine them."""
    measured: dict[str, dict[str, int]] = {"vision": {}, "text": {}, "model": {}}
    for (part, name), (key, axis) in MEASURED.items():
        if key in state and state[key].ndim > axis:
            measured[part][name] = state[key].shape[axis]
    measured["vision"]["num_hidden_layers"] = _count(state, r"visual\.transformer\.resblocks\.(\d+)\.")
    measured["text"]["num_hidden_layers"] = _count(state, r"text_encoder\.transformer\.encoder\.layer\.(\d+)\.")
    return measured


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(found[1]) for key in state if (found := re.match(pattern, key))), default=-1)


def _heads(width: int, tower: str) -> int:
    if width % HEAD_WIDTH:
        raise ValueError(
            f"the {tower} tower is {width} wide, which heads of {HEAD_WIDTH} do not divide: give the sizes with "
            f'--config FILE.json, for example {{"{tower}": {{"num_attention_heads": 4}}}}'
        )
    return width // HEAD_WIDTH
