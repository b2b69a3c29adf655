"""Floating-point operations of a training step, by formula, and the peaks of the devices they are held against.

A transformer layer of width d and feed-forward width f takes, forward and for n tokens,

    n (8 d^2 + 4 d f) + 4 n^2 d

operations: the four projections of attention, the two of the feed-forward block, and the two products of attention
itself. Two of them are one multiplication and one addition. A ViT adds ``2 n p^2 3 d`` for its patches. Other image
towers are counted by torch's counter. Training a tower costs its forward pass, another for the gradient of its
activations if anything in it learns, and another for the share of its weights that learn: three when all do. What is
computed twice to save memory is not counted twice, so that the share of the peak (MFU, Chowdhery et al. 2022) says how
fast the model trains, and padding counts for nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

COUNTED_SIDE = 224
CHANNELS = 3
# Dense peaks in TFLOP/s: bf16 (fp16 where there is no bf16), and fp32 outside tensor cores. Makers' data sheets.
PEAKS = {
    "B200": (2250.0, 75.0),
    "GH200": (989.0, 67.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "MI300X": (1307.0, 163.0),
    "MI250X": (383.0, 48.0),
    "L40S": (362.0, 92.0),
    "L4": (121.0, 30.0),
    "A10": (125.0, 31.0),
    "A10G": (125.0, 31.0),
    "A6000": (155.0, 39.0),
    "RTX 4090": (165.0, 83.0),
    "RTX 3090": (71.0, 36.0),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
}


@dataclass(frozen=True)
class StepCost:
    """Operations of training a model.

    Attributes:
        image: forward pass of one image.
        token: forward pass of a text, for each token.
        token_pair: forward pass of a text, for each pair of its tokens.
        image_passes: forward passes that training an image costs; 3 when the whole tower learns.
        text_passes: the same for a text.
        counted_side: side in pixels for which an image was counted; None where the formula knows the tower's own.
    """

    image: float
    token: float
    token_pair: float
    image_passes: float
    text_passes: float
    counted_side: int | None = None

    def at_side(self, side: int) -> StepCost:
        """The cost for images of another side; that of a convolutional tower grows with the area."""
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
    """The cost of training a model as its parameters say what learns; None where a tower's sizes are not known."""
    config = getattr(model, "config", None)
    vision, text = getattr(config, "vision_config", None), getattr(config, "text_config", None)
    layers = _encoder_sizes(text)
    if vision is None or layers is None:
        return None
    depth, width, hidden = layers
    image = _vit_cost(vision)
    return StepCost(
        image=_counted_cost(model.get_submodule("vision_model")) if image is None else image,
        token=depth * (8 * width**2 + 4 * width * hidden),
        token_pair=depth * 4 * width,
        image_passes=_passes(model.get_submodule("vision_model")),
        text_passes=_passes(model.get_submodule("text_model")),
        counted_side=COUNTED_SIDE if image is None else None,
    )


def peak_flops(device: str, precision: str) -> float | None:
    """Operations a second of a device at its best, None where its name is not known.

    Args:
        device: a name that holds one of `PEAKS`, such as ``NVIDIA H100 80GB HBM3``.
        precision: ``bf16`` or ``fp32``.
    """
    words = device.replace("-", " ").lower().split()
    for name, (half, single) in PEAKS.items():
        if all(word in words for word in name.lower().split()):
            return (half if precision == "bf16" else single) * 1e12
    return None


def _passes(tower: nn.Module) -> float:
    """Forward passes that training a tower costs."""
    total = sum(parameter.numel() for parameter in tower.parameters())
    learning = sum(parameter.numel() for parameter in tower.parameters() if parameter.requires_grad)
    return 1 + (1 + learning / total if learning else 0)


def _encoder_sizes(config: Any) -> tuple[int, int, int] | None:
    """Layers, width and feed-forward width of a transformer, None for anything else."""
    names = ("num_hidden_layers", "hidden_size", "intermediate_size")
    sizes = [size for name in names if isinstance(size := getattr(config, name, None), int)]
    return (sizes[0], sizes[1], sizes[2]) if len(sizes) == len(names) else None


def _vit_cost(config: Any) -> float | None:
    """Operations of one image through a ViT, None for another tower."""
    layers, side, patch = (
        _encoder_sizes(config),
        getattr(config, "image_size", None),
        getattr(config, "patch_size", None),
    )
    if layers is None or not isinstance(side, int) or not isinstance(patch, int):
        return None
    depth, width, hidden = layers
    patches = (side // patch) ** 2
    tokens = patches + 1
    layer = tokens * (8 * width**2 + 4 * width * hidden) + 4 * tokens**2 * width
    return depth * layer + 2 * patches * CHANNELS * patch**2 * width


def _counted_cost(tower: nn.Module) -> float:
    """Operations of one image of 224 pixels through any tower, counted on a copy that holds no numbers."""
    from torch.utils.flop_counter import FlopCounterMode

    twin = copy.deepcopy(tower).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(torch.zeros(1, CHANNELS, COUNTED_SIDE, COUNTED_SIDE, device="meta"))
    return float(counter.get_total_flops())
