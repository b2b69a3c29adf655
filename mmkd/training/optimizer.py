"""What is trained and how fast: parts, learning rates, AdamW, bounds of scales, and the moving average of weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmkd.distributed import whole
from mmkd.student.trainable import (
    TOWERS,
    enable_gradient_checkpointing,
    freeze,
    layers_of,
    require_part,
    set_attention,
)
from mmkd.training.settings import LoopSettings, ModelSettings

LOGIT_SCALE_RANGE = (0.0, math.log(100))


def make_trainable(model: PreTrainedModel, settings: ModelSettings) -> None:
    """Apply the settings to a model: frozen parts, gradient checkpointing, attention and compilation.

    Raises:
        ValueError: a part that the model does not have, or an attention that it or this machine does not support.
    """
    freeze(model, settings.freeze)
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if settings.attention is not None:
        set_attention(model, settings.attention)
    if settings.compile:
        for tower in TOWERS:
            model.get_submodule(tower).compile(dynamic=True)  # in place, so that no name in a checkpoint changes


def learning_rate(step: int, total: int, settings: LoopSettings) -> float:
    """Linear from ``peak / warmup_steps`` to the peak, then half a cosine that reaches 0 after the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return settings.learning_rate * (1 + math.cos(math.pi * share)) / 2


def build_optimizer(objective: nn.Module, settings: LoopSettings) -> torch.optim.AdamW:
    """AdamW (0.9, 0.98, 1e-6) over trainable weights; no weight decay on vectors and scalars: biases, norms, scales.

    Each group has a ``factor`` that its learning rate is multiplied by, see `rate_factors`.

    Raises:
        ValueError: a factor for a module that the model does not have; the message names those it has.
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


def set_learning_rate(optimizer: Any, step: int, total: int, settings: LoopSettings) -> float:
    """Give every group of `build_optimizer` its share of the `learning_rate` of a step, which is returned."""
    rate = learning_rate(step, total, settings)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    return rate


def rate_factors(objective: nn.Module, factors: Mapping[str, float], layer_decay: float = 1.0) -> dict[str, float]:
    """Factor of the learning rate of each parameter, by name.

    Args:
        objective: with the model as ``model``, if it has one.
        factors: for modules of the model, named as in `mmkd.student.trainable.freeze`, or what the objective has
            beside it, such as ``heads``; the longest fitting name wins.
        layer_decay: in a tower of L layers, layer k (from 0) has ``layer_decay ** (L - 1 - k)`` and everything before
            the layers ``layer_decay ** L``. Source: Howard and Ruder 2018 (ULMFiT), as used for BEiT.

    Raises:
        ValueError: a module that the model does not have.
    """
    prefix, model = next(((f"{n}.", m) for n, m in objective.named_children() if n == "model"), ("", objective))
    beside = {name for name, _ in objective.named_children()} - {"model"}
    for part in factors:
        owner = objective if part.partition(".")[0] in beside else model
        require_part(owner, part, f"--learning_rate_factors.{part}")
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
            scale.clamp_(*LOGIT_SCALE_RANGE)


def scale_values(scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scales as losses use them, exponentiated, each a scalar by the last part of its name."""
    return {name.rpartition(".")[2]: whole(scale.detach()).float().exp().mean() for name, scale in scales.items()}


class WeightAverage:
    """Exponential moving average of the trainable weights: ``a <- decay * a + (1 - decay) * w`` after each step.

    The decay is at most ``(1 + step) / (10 + step)``, so that the average soon forgets the starting weights.
    """

    def __init__(self, objective: nn.Module, decay: float | None) -> None:
        """Start from the current weights; shards stay shards. A decay of None averages nothing."""
        self.decay = decay
        self.weights: dict[str, Tensor] = {}
        if decay is not None:
            self.weights = {n: p.detach().clone() for n, p in objective.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, objective: nn.Module, step: int) -> None:
        """Add the weights after step number `step`, counted from 0."""
        if self.decay is None:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.weights.items():
            average.lerp_(objective.get_parameter(name).detach(), 1 - decay)

    @torch.no_grad()
    def reset(self, objective: nn.Module) -> None:
        """Take the current weights for the average."""
        for name, average in self.weights.items():
            average.copy_(objective.get_parameter(name))

    @contextlib.contextmanager
    def applied(self, objective: nn.Module) -> Iterator[None]:
        """Within it the objective has the averaged weights, afterwards its own again."""
        self._swap(objective)
        try:
            yield
        finally:
            self._swap(objective)

    @torch.no_grad()
    def _swap(self, objective: nn.Module) -> None:
        for name, average in self.weights.items():
            parameter = objective.get_parameter(name)
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)


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
