"""Which parts of a model learn, and in which mode they run while others do."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

_FIRST_LAYERS = re.compile(r"(?P<tower>[\w.]+)\[:(?P<count>\d+)\]")


def freeze(model: nn.Module, parts: list[str]) -> None:
    """Stop parts of a model from learning; what is wholly frozen also costs no backward pass.

    Args:
        model: the model.
        parts: each the name of a module or parameter (``vision_model``, ``text_model.embeddings``), or
            ``text_model[:4]``: everything before the tower's list of layers, and its first four layers.

    Raises:
        ValueError: a part that the model does not have; the message names what it has.
    """
    for part in parts:
        match = _FIRST_LAYERS.fullmatch(part)
        names = _first_layers(model, match["tower"], int(match["count"])) if match else [part]
        for name in names:
            found = [p for key, p in model.named_parameters() if key == name or key.startswith(f"{name}.")]
            if not found:
                known = ", ".join(name for name, _ in model.named_children())
                raise ValueError(f"--freeze {part}: the model has no {name!r}; its parts are {known}")
            for parameter in found:
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"--freeze {','.join(parts)} leaves nothing to train")


def set_training_mode(module: nn.Module, dropout: float) -> None:
    """Training mode, but batch normalization keeps its statistics and frozen parts run as in evaluation.

    Batch statistics would make a result depend on how a batch is shared out among processes, and are poor in the small
    batches of fine-tuning; the scale and shift still learn.

    Args:
        module: the objective.
        dropout: probability of every dropout layer; above 0 the result depends on the number of processes.
    """
    module.train()
    for child in module.modules():
        parameters = list(child.parameters())
        frozen = bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
        if frozen or isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.eval()
        elif isinstance(child, nn.Dropout):
            child.p = dropout


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass: less memory, about a third more time, the same gradients."""
    if hasattr(model, "activation_checkpointing_enable"):  # the only name from transformers 6 on; new in 5.23
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()


def _first_layers(model: nn.Module, tower: str, count: int) -> list[str]:
    """Names of the modules and parameters of a tower up to its `count`-th layer."""
    try:
        root = model.get_submodule(tower)
    except AttributeError:
        return [tower]
    lists = (nn.ModuleList, nn.Sequential)
    layers = next(((name, m) for name, m in root.named_modules() if name and isinstance(m, lists) and len(m) > 1), None)
    if layers is None or count > len(layers[1]):
        have = f"{len(layers[1])} layers" if layers else "no list of layers"
        raise ValueError(f"--freeze {tower}[:{count}]: {tower} has {have}")
    own = [f"{layers[0]}.{number}" for number in range(count)]
    before = [name for name, _ in root.named_parameters()]
    first = next(i for i, name in enumerate(before) if name.startswith(f"{layers[0]}."))
    return [f"{tower}.{name}" for name in before[:first] + own]
