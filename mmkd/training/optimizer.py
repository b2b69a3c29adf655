"""Which weights learn how fast: the schedule, AdamW's groups, the bounds of scales and the average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmkd.distributed import assign, is_spread, whole
from mmkd.student.trainable import layers_of, require_part
from mmkd.training.settings import LoopSettings

LOGIT_SCALE_RANGE = (0.0, math.log(100))


def learning_rate(step: int, total: int, settings: LoopSettings) -> float:
    """Linear from ``peak / warmup_steps`` to the peak, then half a cosine that reaches 0 after the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return settings.learning_rate * (1 + math.cos(math.pi * share)) / 2


def build_optimizer(objective: nn.Module, settings: LoopSettings) -> torch.optim.AdamW:
    """AdamW (0.9, 0.98, 1e-6) over what learns; no decay on vectors and scalars: biases, norms, scales.

    Each group has a ``factor`` that its learning rate is multiplied by, see `rate_factors`.

    Raises:
        ValueError: a factor for a part that the model does not have; the message names those it has.
    """
    factors = rate_factors(objective, settings.learning_rate_factors, settings.layer_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((factors[name], parameter.ndim > 1), []).append(parameter)
    listed = [
        {"params": members, "factor": factor, "weight_decay": settings.weight_decay if decays else 0.0}
        for (factor, decays), members in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
    return torch.optim.AdamW(listed, lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Give every group of `build_optimizer` its share of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def rate_factors(objective: nn.Module, factors: Mapping[str, float], layer_decay: float = 1.0) -> dict[str, float]:
    """Factor of the learning rate of each parameter, by name.

    Args:
        objective: with the model as ``model``, if it has one.
        factors: for parts of the model, named as in `mmkd.student.trainable.freeze`; the longest name that fits counts.
        layer_decay: in a tower of L layers, layer k (from 0) has ``layer_decay ** (L - 1 - k)`` and what comes before
            the layers ``layer_decay ** L``. Source: Howard and Ruder 2018 (ULMFiT), as used for BEiT.

    Raises:
        ValueError: a part that the model does not have.
    """
    prefix, model = next(((f"{n}.", m) for n, m in objective.named_children() if n == "model"), ("", objective))
    for part in factors:
        require_part(model, part, f"--learning_rate_factors.{part}")
    result = {}
    decays = _layer_factors(model, layer_decay) if layer_decay != 1 else {}
    for name, _ in objective.named_parameters():
        own = name.removeprefix(prefix)
        fitting = [part for part in factors if own == part or own.startswith(f"{part}.")]
        chosen = factors[max(fitting, key=len)] if fitting else 1.0
        result[name] = chosen * decays.get(own, 1.0)
    return result


def clamp_scales(scales: Iterable[Tensor]) -> None:
    """Keep scales within [0, ln 100], as CLIP does."""
    with torch.no_grad():
        for scale in scales:
            if is_spread(scale):
                assign(scale, whole(scale).clamp(*LOGIT_SCALE_RANGE))
            else:
                scale.clamp_(*LOGIT_SCALE_RANGE)


def scale_values(scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scales as losses use them, exponentiated, each a scalar by the last part of its name."""
    return {name.rpartition(".")[2]: whole(scale.detach()).float().exp().mean() for name, scale in scales.items()}


class WeightAverage:
    """Exponential moving average of what learns: ``a <- decay * a + (1 - decay) * w`` after each step.

    The first steps count in full (``decay`` is at most ``(1 + step) / (10 + step)``), so that the average soon forgets
    where the weights began.
    """

    def __init__(self, objective: nn.Module, decay: float) -> None:
        """Start from the weights as they are; shards stay shards."""
        self.decay = decay
        self.weights = {n: p.detach().clone() for n, p in objective.named_parameters() if p.requires_grad}

    def update(self, objective: nn.Module, step: int) -> None:
        """Take in the weights after step number `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, parameter in objective.named_parameters():
                if name in self.weights:
                    self.weights[name].lerp_(parameter.detach(), 1 - decay)

    def swap(self, objective: nn.Module) -> None:
        """Exchange average and weights; twice leaves everything as it was."""
        with torch.no_grad():
            for name, parameter in objective.named_parameters():
                if name in self.weights:
                    kept = parameter.detach().clone()
                    parameter.copy_(self.weights[name])
                    self.weights[name].copy_(kept)


def _layer_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """Factors of the parameters in and before the layers of each tower."""
    factors: dict[str, float] = {}
    for tower, _ in model.named_children():
        layers = layers_of(model, tower)
        if layers is None:
            continue
        before, blocks = layers
        factors |= dict.fromkeys(before, decay ** len(blocks))
        for number, block in enumerate(blocks):
            factors |= dict.fromkeys(block, decay ** (len(blocks) - 1 - number))
    return factors
