"""Gradient caching: the gradient of a large batch in the memory of a micro-batch.

A contrastive loss compares all pairs of the batch, so the gradients of small batches do not add up to that of the
large one: plain accumulation would train another model. Gradient caching is exact. A first pass encodes the batch in
micro-batches without keeping activations; the loss of all embeddings gives the gradient of each; a second pass encodes
each micro-batch again, with activations, and propagates that gradient to the weights. It costs one more forward pass.
Dropout is the same in both passes, because each micro-batch starts from its own seed. Source: Gao et al. 2021,
"Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"; Pham et al. 2021 (BASIC).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkd.training.dataset import micro_batches, without_inputs
from mmkd.training.objectives import ObjectiveWrapper


def embedding_gradients(
    wrapper: ObjectiveWrapper, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The loss of embeddings and its gradients, all without a graph.

    Returns:
        Loss and parts; the gradient of each embedding; by name the gradient of the parameters that the loss has itself.
    """
    with torch.enable_grad():
        leaves = {name: rows.detach().requires_grad_() for name, rows in embeddings.items()}
        parts = wrapper.loss(leaves, batch)
        own = {name: p for name, p in wrapper.objective.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(parts["loss"], [*leaves.values(), *own.values()], allow_unused=True)
    gradients = dict(zip([*leaves, *own], found, strict=True))
    return (
        {name: part.detach() for name, part in parts.items()},
        {name: torch.zeros_like(leaves[name]) if (g := gradients[name]) is None else g for name in leaves},
        {name: g for name in own if (g := gradients[name]) is not None},
    )


def surrogate_loss(
    wrapper: ObjectiveWrapper,
    piece: Mapping[str, Any],
    gradients: Mapping[str, Tensor],
    own: Mapping[str, Tensor] | None,
) -> Tensor:
    """A scalar whose gradient is the micro-batch's share of that of the loss.

    Args:
        wrapper: the objective.
        piece: a micro-batch.
        gradients: of its embeddings.
        own: gradients of the loss' own parameters, None for all micro-batches but one.
    """
    embeddings = wrapper.encode(piece)
    terms = [(rows * gradients[name]).sum() for name, rows in embeddings.items()]
    terms += [(wrapper.objective.get_parameter(name) * gradient).sum() for name, gradient in (own or {}).items()]
    return torch.stack(terms).sum()


def cached_backward(
    trained: Callable[..., Any],
    batch: Mapping[str, Any],
    micro_batch_size: int | None,
    to_device: Callable[[Any], Any],
    backward: Callable[[Tensor], None],
    without_sync: Callable[[], contextlib.AbstractContextManager[Any]],
    seed: Sequence[int],
) -> dict[str, Tensor]:
    """Leave in the weights the gradient of the whole batch; the device never holds more than a micro-batch of it.

    Args:
        trained: an `ObjectiveWrapper`, wrapped for several processes or not.
        batch: this process' rows, on any device.
        micro_batch_size: rows of a micro-batch, where the batch is not in micro-batches already.
        to_device: moves a batch to the device of `trained`.
        backward: the backward pass of a scalar.
        without_sync: within it gradients are only added up locally; the last micro-batch synchronizes them all.
        seed: of this step and process; micro-batches add their number.

    Returns:
        The loss and its parts, without gradient.
    """
    pieces = micro_batches(batch, micro_batch_size)
    embeddings = encoded(trained, pieces, to_device, seed)
    with torch.no_grad():
        parts, gradients, own = trained(embedding_gradients, embeddings, to_device(without_inputs(batch)))
    begin = 0
    for number, piece in enumerate(pieces):
        end = begin + len(piece["ids"])
        is_last = number == len(pieces) - 1
        set_seed(*seed, number)
        theirs = {name: gradient[begin:end] for name, gradient in gradients.items()}
        begin = end
        with contextlib.nullcontext() if is_last else without_sync():
            backward(trained(surrogate_loss, to_device(piece), theirs, own if is_last else None))
    return parts


@torch.no_grad()
def encoded(
    trained: Callable[..., Any],
    pieces: Sequence[Mapping[str, Any]],
    to_device: Callable[[Any], Any],
    seed: Sequence[int],
) -> dict[str, Tensor]:
    """The embeddings of all rows of the micro-batches, without a graph; see `cached_backward` for the arguments."""
    parts = []
    for number, piece in enumerate(pieces):
        set_seed(*seed, number)
        parts.append(trained(ObjectiveWrapper.encode, to_device(piece)))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def set_seed(*parts: int) -> None:
    """Seed torch from several numbers, such as seed, step, process and micro-batch, so that no state is kept."""
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1))
