# Copyright 2026 The mmkd-clip developers
# SPDX-License-Identifier: Apache-2.0
"""What may go into the model: pixels and tokens that are none are refused, texts beyond the context are cut.

The checks run before a tower would answer with a tensor's shape. None waits for a device, none is traced or compiled.
"""

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
    if pixels.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        finite = pixels.sum(dim=(1, 2, 3), dtype=torch.float32).isfinite()
        if not finite.all():
            bad = [number for number, good in enumerate(finite.tolist()) if not good]
            raise ValueError(f"pixel_values has NaN or infinity in images {bad}; {allowed}, every one a finite number")


def refuse_bad_tokens(input_ids: torch.Tensor) -> None:
    """Raise on what are no token numbers."""
    allowed = "allowed: (texts, tokens), int64 or int32, as the tokenizer gives them"
    if not isinstance(input_ids, torch.Tensor):
        raise ValueError(f"input_ids is a {type(input_ids).__name__}; {allowed}")
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids is {input_ids.dtype} of the shape {tuple(input_ids.shape)}; {allowed}")
