"""What a layer receives while a model runs, such as features before their projection into the shared space."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def with_input_of(module: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The output of `run`, and the inputs that `module` received in it, rows one after the other."""
    given: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        found = run()
    finally:
        handle.remove()
    return found, given[0] if len(given) == 1 else torch.cat(given)
