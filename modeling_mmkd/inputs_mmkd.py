# Copyright 2026 The mmkd-clip developers
# SPDX-License-Identifier: Apache-2.0
"""What may go into processor and model: what is no image, pixel, text or token is refused, texts too long are cut.

The checks run before a tower would answer with a tensor's shape. None waits for a device, none is traced or compiled.
"""

import math
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)


def cut_to_context(input_ids: Any, attention_mask: Any, optional: dict[str, Any], limit: int) -> tuple[Any, Any, Any]:
    """Texts padded on the right, cut as a tokenizer would: the first tokens, and the last one that closes the text.

    Args:
        input_ids: `(texts, tokens)` or None.
        attention_mask: `(texts, tokens)` or None.
        optional: other inputs whose second dimension is the tokens.
        limit: tokens that stay.

    Raises:
        ValueError: there are no ``input_ids``: what closes a text cannot be told from ``inputs_embeds``.
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
    """Raise on what is no batch of normalized images; a search for NaN only where it does not wait for a device."""
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
    """Raise on what are no token numbers, or a mask of other texts; numbers only where that waits for no device."""
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
                f"input_ids has {least if least < 0 else most}, but the text tower knows 0 to {vocabulary - 1}; "
                "take the tokenizer that was saved with the model"
            )


def _is_eager() -> bool:
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def refuse_bad_images(images: Any) -> None:
    """Raise on what the image processor would take for pixels and is none, or would clip without a word.

    Paths, URLs and nested lists are the image processor's to judge.

    Raises:
        ValueError: an empty list, a missing image, or one of the wrong depth, channels or values; the message says
            which, what came and what is allowed.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError("images is an empty list; give at least one image, or none with text alone")
        for number, image in enumerate(images):
            _refuse_bad_image(image, f"image {number}")
    elif getattr(images, "ndim", 0) == 4:
        for number, image in enumerate(images):
            _refuse_bad_image(image, f"image {number}")
    else:
        _refuse_bad_image(images, "the image")


def refuse_bad_texts(texts: Any, strict: bool) -> None:
    """Raise on texts that are none, such as the NaN of an empty table cell.

    Raises:
        ValueError: no text, something else than text, or with ``strict`` an empty one.
    """
    if not isinstance(texts, (str, list, tuple)):
        raise ValueError(f"text is a {type(texts).__name__}; allowed: a string or a list of strings")
    rows = [texts] if isinstance(texts, str) else texts
    if not rows:
        raise ValueError("text is an empty list; give at least one text, or none with images alone")
    for number, text in enumerate(rows):
        if not isinstance(text, (str, list, tuple)):
            raise ValueError(f"text {number} is {text!r} of type {type(text).__name__}; allowed: strings")
        if strict and not "".join(text).strip():
            raise ValueError(f"text {number} is empty; strict asks for texts that say something")


def _refuse_bad_image(image: Any, name: str) -> None:
    if image is None:
        raise ValueError(f"{name} is None; leave it out, or give a PIL image, an array or a tensor")
    mode = getattr(image, "mode", None)
    if isinstance(mode, str) and (mode == "F" or mode.startswith("I")):
        raise ValueError(
            f"{name} has the mode {mode}, more than 8 bits a channel, which would be clipped to white; window it to "
            "0-255 first: L and RGB are allowed, among others"
        )
    if hasattr(image, "dtype") and hasattr(image, "shape"):
        _refuse_bad_array(image, name)


def _refuse_bad_array(image: Any, name: str) -> None:
    allowed = "allowed: (3, height, width) or (height, width, 3), uint8 or floating point from 0 to 255"
    shape = tuple(image.shape)
    if len(shape) != 3 or 3 not in (shape[0], shape[-1]):
        raise ValueError(f"{name} has the shape {shape}; {allowed}; repeat the channel of grey images three times")
    kind = str(image.dtype).removeprefix("torch.")
    if kind != "uint8" and not kind.startswith(("float", "bfloat")):
        raise ValueError(f"{name} is {kind}; {allowed}")
    total = image.sum(dtype=torch.float64 if isinstance(image, torch.Tensor) else "float64")
    if not math.isfinite(float(total)):
        raise ValueError(f"{name} has NaN or infinity; {allowed}, every one a finite number")
