"""The gradient of a large batch in the memory of a small one.

A contrastive loss compares all pairs of the batch, so the gradients of small batches do not add up to that of the
large one: plain accumulation would train another model. Gradient caching is exact. A first pass encodes the batch
piece by piece without keeping activations; the loss of all embeddings gives the gradient of each; a second pass encodes
each piece again, with activations, and takes that gradient on to the weights. It costs one more forward pass. Dropout
draws the same in both passes, because each piece starts from a seed of its own. Source: Gao et al. 2021,
"Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"; Pham et al. 2021 (BASIC).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mmkd.training.objectives import Objective

INPUTS = (
    "pixel_values",
    "input_ids",
    "attention_mask",
    "pooled_images",
    "pooled_texts",
)  # what the model reads, and no loss does


class OneForward(nn.Module):
    """An objective whose every use is a call of `forward`.

    Wrappers for several processes act at that call: DDP synchronizes the gradients of what ran through it and of
    nothing else, sharded parallelism gathers there the weights it has spread. A loss that reaches around the wrapper
    (``ddp.module.encode(...)``) trains unsynchronized copies without a word.
    """

    def __init__(self, objective: Objective, device: str, precision: Literal["fp32", "bf16"]) -> None:
        """Wrap `objective`, whose model runs in `precision` on a `device` such as ``cuda``; losses are fp32."""
        super().__init__()
        self.objective = objective
        self._device, self._is_bf16 = device, precision == "bf16"
        names = {name for module in objective.modules() for name in getattr(module, "_no_split_modules", None) or ()}
        present = {type(module).__name__ for module in objective.modules()}
        self._no_split_modules = sorted(names & present)  # the layers that sharded parallelism gathers one by one

    def forward(self, use: Literal["whole", "encode", "loss", "compare", "replay"], *inputs: Any) -> Any:
        """One of five uses, each with its own inputs and result.

        - whole: a batch; its loss and parts.
        - encode: a batch or piece of one; its embeddings.
        - loss: embeddings and their batch; loss and parts.
        - compare: embeddings and their batch; loss and parts, the gradient of the embeddings, and by name the gradient
          of the parameters that the loss itself has, all without a graph.
        - replay: a piece, the gradient of its embeddings, and those of the loss' own parameters or nothing; a scalar
          whose gradient is the piece's share of that of the loss.

        Args:
            use: which of them.
            *inputs: what it takes.
        """
        if use == "whole":
            return self._loss(self._encode(*inputs), *inputs)
        if use == "encode":
            return self._encode(*inputs)
        if use == "loss":
            return self._loss(*inputs)
        if use == "compare":
            return self._compare(*inputs)
        return self._replay(*inputs)

    def _encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        with torch.autocast(self._device, torch.bfloat16, enabled=self._is_bf16):
            return self.objective.encode(batch)

    def _loss(self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return self.objective.loss(embeddings, batch)

    def _compare(
        self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        with torch.enable_grad():
            leaves = {name: rows.detach().requires_grad_() for name, rows in embeddings.items()}
            parts = self._loss(leaves, batch)
            own = {name: p for name, p in self.objective.named_parameters() if p.requires_grad}
            found = torch.autograd.grad(parts["loss"], [*leaves.values(), *own.values()], allow_unused=True)
        gradients = dict(zip([*leaves, *own], found, strict=True))
        return (
            {name: part.detach() for name, part in parts.items()},
            {name: torch.zeros_like(leaves[name]) if (g := gradients[name]) is None else g for name in leaves},
            {name: g for name in own if (g := gradients[name]) is not None},
        )

    def _replay(
        self, piece: Mapping[str, Any], gradients: Mapping[str, Tensor], own: Mapping[str, Tensor] | None
    ) -> Tensor:
        embeddings = self._encode(piece)
        terms = [(rows * gradients[name]).sum() for name, rows in embeddings.items()]
        terms += [(self.objective.get_parameter(name) * gradient).sum() for name, gradient in (own or {}).items()]
        return torch.stack(terms).sum()


def cached_backward(
    trained: Callable[..., Any],
    batch: Mapping[str, Any],
    micro_batch_size: int,
    *,
    to_device: Callable[[Any], Any],
    backward: Callable[[Tensor], None],
    without_sync: Callable[[], contextlib.AbstractContextManager[Any]],
    seed: Sequence[int],
) -> dict[str, Tensor]:
    """Leave in the weights the gradient of the whole batch; the device never holds more than a piece of it.

    Args:
        trained: a `OneForward`, wrapped for several processes or not.
        batch: this process' rows, anywhere.
        micro_batch_size: rows of a piece.
        to_device: brings a batch to where `trained` is.
        backward: the backward pass of a scalar.
        without_sync: within it gradients are only added up here; the last piece synchronizes them all.
        seed: of this step and process; pieces add their number.

    Returns:
        The loss and its parts, without gradient.
    """
    pieces = micro_batches(batch, micro_batch_size)
    embeddings: dict[str, Tensor] = {}  # one copy of each, filled piece by piece
    with torch.no_grad():
        for number, rows in enumerate(pieces):
            set_seed(*seed, number)
            for name, part in trained("encode", to_device(piece_of(batch, rows))).items():
                whole = embeddings.setdefault(name, part.new_empty(len(batch["ids"]), *part.shape[1:]))
                whole[rows.to(part.device)] = part
        rest = {name: value for name, value in batch.items() if name not in INPUTS}
        parts, gradients, own = trained("compare", embeddings, to_device(rest))
    for number, rows in enumerate(pieces):
        is_last = number == len(pieces) - 1
        set_seed(*seed, number)
        theirs = {name: gradient[rows] for name, gradient in gradients.items()}
        with contextlib.nullcontext() if is_last else without_sync():
            piece = to_device(piece_of(batch, rows))
            backward(trained("replay", piece, theirs, own if is_last else None))
    return parts


def micro_batches(batch: Mapping[str, Any], size: int) -> list[Tensor]:
    """Row numbers of the pieces of a batch, `size` each but the last; rows of like length of text lie together."""
    mask = batch.get("attention_mask")
    if mask is None:
        return list(torch.arange(len(batch["ids"])).split(size))
    return list(mask.sum(dim=1).argsort(descending=True, stable=True).cpu().split(size))


def piece_of(batch: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """The given rows of a batch, without columns of text that are padding in all of them."""
    piece = {name: _rows_of(value, rows) for name, value in batch.items()}
    mask = piece.get("attention_mask")
    if mask is not None:
        used = mask.any(dim=0).nonzero()
        longest = int(used.max()) + 1 if len(used) else 1
        for name in ("input_ids", "attention_mask"):
            piece[name] = piece[name][:, :longest]
    return piece


def set_seed(*parts: int) -> None:
    """Seed torch from several numbers, such as seed, step, process and piece: no state need be kept to repeat it."""
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1))


def _rows_of(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, Mapping):
        return {name: _rows_of(item, rows) for name, item in value.items()}
    return [value[row] for row in rows.tolist()] if isinstance(value, list) else value
