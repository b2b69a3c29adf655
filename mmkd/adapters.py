"""Low-rank adapters (LoRA, DoRA) on both towers and the projections, through peft.

The adapters sit inside the model's own layers, so an objective trains the model as it is; what is saved is a folder of
peft's with a few megabytes. ``logit_scale`` is a bare parameter, which no adapter can hold: it stays as it was unless
the merged model is kept.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

from torch import nn

from modeling_mmkd import MMKDClipModel

TOWERS = ("vision_model", "text_model")
PROJECTIONS = ("visual_projection", "text_projection")
QUERIES_AND_VALUES = ("q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "qkv", "query_proj", "value_proj")


def add_adapter(
    model: MMKDClipModel, kind: Literal["lora", "dora"], rank: int, targets: Literal["attention", "all"]
) -> Any:
    """Put an adapter into a model and freeze the rest.

    Args:
        model: changed in place; its forward pass runs through the adapter.
        kind: ``W + BA`` (LoRA, Hu et al. 2021), or the same with a learned norm of each output (DoRA, Liu et al. 2024).
        rank: rows of ``A``; ``BA`` is scaled by 2.
        targets: see `adapter_targets`.

    Returns:
        The ``peft.PeftModel`` around the model: it saves and merges the adapter.

    Raises:
        ValueError: a rank below 1.
        ModuleNotFoundError: peft is not installed.
    """
    if rank < 1:
        raise ValueError(f"--rank is {rank}; it must be at least 1")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=adapter_targets(model, targets), use_dora=kind == "dora"
    )
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 by a name that is deprecated there
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(model, config)


def adapter_targets(model: MMKDClipModel, targets: Literal["attention", "all"]) -> list[str]:
    """Names of the layers that get an adapter, always with both projections.

    Args:
        model: a model without adapters.
        targets: ``attention`` takes queries and values of every attention layer, ``all`` every linear layer. A tower
            without attention gives its 1x1 convolutions either way.
    """
    chosen = [
        name
        for part in PROJECTIONS
        for name, module in model.named_modules()
        if name.split(".")[0] == part and isinstance(module, nn.Linear)
    ]
    for tower in TOWERS:
        layers = [(name, m) for name, m in model.named_modules() if name.startswith(f"{tower}.")]
        linear = [name for name, module in layers if isinstance(module, nn.Linear)]
        attention = [name for name in linear if name.rsplit(".", 1)[-1] in QUERIES_AND_VALUES]
        chosen += (attention if targets == "attention" else linear) if attention else _pointwise(layers)
    return chosen


def _pointwise(layers: list[tuple[str, nn.Module]]) -> list[str]:
    return [name for name, m in layers if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.groups == 1]
