"""Trainable and frozen parts of a model, its mode in training, attention and compilation, and low-rank adapters.

Adapters (LoRA, DoRA) are peft's. They are inside the model's own layers, so that an objective trains the model
unchanged, and are saved as a folder of peft's with a few megabytes. ``logit_scale`` is a bare parameter, which no
adapter can hold: it stays as it was unless the merged model is kept.
"""

from __future__ import annotations

import re
import warnings
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_mmkd import MMKDClipModel

_FIRST_LAYERS = re.compile(r"(?P<tower>[\w.]+)\[:(?P<count>\d+)\]")
BATCH_NORMALIZATION = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
TOWERS = ("vision_model", "text_model")
PROJECTIONS = ("visual_projection", "text_projection")
QUERIES_AND_VALUES = ("q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "qkv", "query_proj", "value_proj")


def freeze(model: nn.Module, parts: list[str]) -> None:
    """Freeze parts of a model; a completely frozen tower needs no backward pass.

    Args:
        model: the model.
        parts: each the name of a module or parameter (``vision_model``, ``text_model.embeddings``), or
            ``text_model[:4]``: everything before the tower's list of layers, and its first four layers.

    Raises:
        ValueError: a part that the model does not have; the message lists its parts, or nothing is left to train.
    """
    for part in parts:
        match = _FIRST_LAYERS.fullmatch(part)
        if match:
            found = _first_layers(model, match["tower"], int(match["count"]))
        else:
            found = require_part(model, part, f"--freeze {part}")
        for name in found:
            model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"--freeze {','.join(parts)} leaves nothing to train")


def require_part(model: nn.Module, part: str, given: str) -> list[str]:
    """Names of the parameters of a module, or of one parameter.

    Raises:
        ValueError: the model has no such part; the message begins with `given` and names the parts it has.
    """
    found = [name for name, _ in model.named_parameters() if name == part or name.startswith(f"{part}.")]
    if not found:
        known = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"{given}: the model has no {part!r}; its parts are {known}")
    return found


def layers_of(model: nn.Module, tower: str) -> tuple[list[str], list[list[str]]] | None:
    """Names of a tower's parameters before its list of layers, and of each layer; None when it has no such list."""
    root = model.get_submodule(tower)
    lists = (nn.ModuleList, nn.Sequential)
    found = next(((name, m) for name, m in root.named_modules() if name and isinstance(m, lists) and len(m) > 1), None)
    if found is None:
        return None
    names = [name for name, _ in root.named_parameters()]
    first = next(i for i, name in enumerate(names) if name.startswith(f"{found[0]}."))
    layers = [[n for n in names if n.startswith(f"{found[0]}.{number}.")] for number in range(len(found[1]))]
    return [f"{tower}.{n}" for n in names[:first]], [[f"{tower}.{n}" for n in layer] for layer in layers]


def set_training_mode(module: nn.Module, dropout: float) -> None:
    """Training mode, but batch normalization keeps its statistics and frozen parts run as in evaluation.

    Batch statistics would make a result depend on how a batch is split among processes, and are poor in the small
    batches of fine-tuning; scale and shift are still trained.

    Args:
        module: the objective.
        dropout: probability of every dropout layer; above 0 the result depends on the number of processes.
    """
    module.train()
    for child in module.modules():
        parameters = list(child.parameters())
        frozen = bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
        if frozen or isinstance(child, BATCH_NORMALIZATION):
            child.eval()
        elif isinstance(child, nn.Dropout):
            child.p = dropout


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass: less memory, about a third more time, the same gradients."""
    if hasattr(model, "activation_checkpointing_enable"):  # the only name from transformers 6 on; new in 5.23
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()


def set_attention(model: PreTrainedModel, attention: str) -> None:
    """Set the attention implementation of both towers.

    Raises:
        ValueError: a tower or this machine does not support it.
    """
    if attention.startswith("flash") and not torch.cuda.is_available():
        raise ValueError(f"--attention {attention} needs a GPU; --attention sdpa works everywhere")
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise ValueError(f"--attention {attention}: {error}") from None
    for name in TOWERS:
        chosen = getattr(model.get_submodule(name).config, "_attn_implementation", None)
        if chosen != attention:
            raise ValueError(f"--attention {attention}: the {name} keeps {chosen}; leave the option out")


def _first_layers(model: nn.Module, tower: str, count: int) -> list[str]:
    """Names of the parameters of a tower up to its `count`-th layer."""
    require_part(model, tower, f"--freeze {tower}[:{count}]")
    layers = layers_of(model, tower)
    if layers is None or count > len(layers[1]):
        have = f"{len(layers[1])} layers" if layers else "no list of layers"
        raise ValueError(f"--freeze {tower}[:{count}]: {tower} has {have}")
    return layers[0] + [name for layer in layers[1][:count] for name in layer]


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
    with warnings.catch_warnings():  # peft 0.21 uses a name that is deprecated in transformers 5.23
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
        convolutions = [(name, module) for name, module in layers if isinstance(module, nn.Conv2d)]
        pointwise = [name for name, module in convolutions if module.kernel_size == (1, 1) and module.groups == 1]
        chosen += (attention if targets == "attention" else linear) if attention else pointwise
    return chosen
