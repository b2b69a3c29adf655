"""Floating-point operations of a training step, counted by torch, and the peak rates of devices.

`torch.utils.flop_counter.FlopCounterMode` counts the products of a forward pass on the meta device, where nothing is
computed: two operations are one multiplication and one addition. For a transformer layer of width d and feed-forward
width f that gives, for n tokens, n (8 d^2 + 4 d f) + 4 n^2 d: the projections of attention, the feed-forward block, and
the products of attention itself. A text's operations are therefore a n + b n^2, and two counts give a and b. (On a CPU
the counter misses fused attention: an image of the published student then counts 33.7 GFLOP instead of 35.1.)

Training a tower costs its forward pass, another for the gradient of its activations if any of its weights are trained,
and another for the share of its weights that are trained: three if all are. Recomputation that saves memory is not
counted, so that the share of the peak (MFU, Chowdhery et al. 2022) measures how fast the model trains, and padding does
not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modeling_mmkd.modeling_mmkd import build_tower, position_limit

COUNTED_SIDE = 224  # pixels, for image towers of any size
COUNTED_TOKENS = 16  # and twice as many; fewer where a tower has fewer positions
GPUS: dict[str, dict[str, float]] = yaml.safe_load(Path(__file__).with_name("gpus.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class StepCost:
    """Operations of training a model.

    Attributes:
        image: forward pass of one image.
        token: forward pass of a text, for each token.
        token_pair: forward pass of a text, for each pair of its tokens.
        image_passes: forward passes that training an image costs; 3 when the whole tower is trained.
        text_passes: the same for a text.
        counted_side: side in pixels for which an image was counted; None where the tower has a fixed size.
    """

    image: float
    token: float
    token_pair: float
    image_passes: float
    text_passes: float
    counted_side: int | None = None

    def at_side(self, side: int) -> StepCost:
        """The cost for images of another side; that of a tower of any size grows with the area."""
        if self.counted_side is None:
            return self
        return replace(self, image=self.image * (side / self.counted_side) ** 2, counted_side=side)

    def of(self, lengths: Sequence[int]) -> float:
        """Operations of training on pairs whose captions have these numbers of tokens."""
        texts = sum(self.token * length + self.token_pair * length * length for length in lengths)
        return self.image_passes * self.image * len(lengths) + self.text_passes * texts

    def formula(self) -> str:
        """The formula with its numbers."""
        return (
            f"training one pair with a caption of n tokens: {self.image_passes:.3g} x {self.image / 1e9:.4g} GFLOP + "
            f"{self.text_passes:.3g} x (n x {self.token / 1e6:.4g} + n^2 x {self.token_pair / 1e6:.3g}) MFLOP"
        )


def step_cost(model: nn.Module) -> StepCost | None:
    """The cost of training a model, given which of its parameters are trained; None for a model without two towers."""
    config = getattr(model, "config", None)
    vision, text = getattr(config, "vision_config", None), getattr(config, "text_config", None)
    if vision is None or text is None:
        return None
    own_side = getattr(vision, "image_size", None)
    side = own_side if isinstance(own_side, int) else COUNTED_SIDE
    pixels = torch.zeros(1, getattr(vision, "num_channels", 3), side, side, device="meta")
    short = max(1, min(COUNTED_TOKENS, (position_limit(text) or 2 * COUNTED_TOKENS) // 2))
    long = 2 * short
    few, many = (
        _forward_cost(text, input_ids=torch.ones(1, tokens, dtype=torch.long, device="meta"))
        for tokens in (short, long)
    )
    token_pair = (many / long - few / short) / (long - short)
    return StepCost(
        image=_forward_cost(vision, pixel_values=pixels),
        token=few / short - token_pair * short,
        token_pair=token_pair,
        image_passes=_passes(model.get_submodule("vision_model")),
        text_passes=_passes(model.get_submodule("text_model")),
        counted_side=None if isinstance(own_side, int) else COUNTED_SIDE,
    )


def peak_flops(device: str, precision: str) -> float | None:
    """Peak operations a second of a device, None for an unknown name.

    Args:
        device: a name with the words of one in ``gpus.yaml``, such as ``NVIDIA H100 80GB HBM3``.
        precision: ``bf16``, ``tf32`` or ``fp32``.
    """
    words = set(device.replace("-", " ").lower().split())
    found = next((gpu for name, gpu in GPUS.items() if words.issuperset(name.split("-"))), None)
    return None if found is None else found[precision] * 1e12


def _passes(tower: nn.Module) -> float:
    """Forward passes that training a tower costs."""
    total = sum(parameter.numel() for parameter in tower.parameters())
    trained = sum(parameter.numel() for parameter in tower.parameters() if parameter.requires_grad)
    return 1 + (1 + trained / total if trained else 0)


def _forward_cost(config: Any, **inputs: torch.Tensor) -> float:
    """Operations of a forward pass through the tower of a configuration, counted on the meta device."""
    with torch.device("meta"):
        tower = build_tower(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(**inputs)
    return float(counter.get_total_flops())
