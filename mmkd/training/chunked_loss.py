"""Losses over the similarities of many samples, without the whole matrix of similarities.

A contrastive loss compares N rows with N columns and, written plainly, keeps several N x N matrices until the backward
pass. It is also a sum over rows. `sum_over_rows` takes such a loss as it is written and evaluates it for some rows at a
time: their logits live for a moment, and the gradients with respect to features and scale are summed in the forward
pass, since the loss is a scalar that the backward pass only multiplies. Memory is N x chunk instead of N x N, nothing
is computed twice, and loss and gradients are those of the plain form to rounding. Source: the chunked losses of
Hsu et al. 2024 (Liger Kernel).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

RowLoss = Callable[[Tensor, Tensor, Tensor, slice], Tensor]
"""From rows `(n, dim)`, columns `(columns, dim)`, the scale and which rows these n are to the sum of their losses."""

LARGEST_MATRIX = {"cpu": 2**20, "cuda": 2**26}  # elements that fit a CPU's cache, or keep a GPU busy


def rows_at_once(rows: int, columns: int, device: torch.device) -> int | None:
    """Chunk size for a matrix of similarities that is large for the device; None where it may be whole."""
    fitting = LARGEST_MATRIX.get(device.type, LARGEST_MATRIX["cuda"]) // max(1, columns)
    return None if rows <= fitting else max(1, fitting)


def sum_over_rows(loss: RowLoss, rows: Tensor, columns: Tensor, scale: Tensor | float, chunk: int | None) -> Tensor:
    """``loss(rows, columns, scale, slice(0, n))`` in fp32, autocast or not.

    Args:
        loss: a sum over rows, written plainly.
        rows: `(n, dim)`.
        columns: `(columns, dim)`.
        scale: the multiplier of the similarities (already exponentiated), a float or a tensor of one element.
        chunk: rows at a time, with the same result to rounding; None takes all at once.

    Returns:
        A float32 scalar.
    """
    multiplier = torch.as_tensor(scale, device=rows.device)
    if chunk is not None and chunk < len(rows):
        return _ChunkedSum.apply(rows, columns, multiplier, loss, chunk)
    with torch.autocast(rows.device.type, enabled=False):
        return loss(rows.float(), columns.float(), multiplier.float(), slice(0, len(rows)))


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, loss: RowLoss, chunk: int) -> Tensor:
        c, s = (tensor.detach().float().requires_grad_() for tensor in (columns, scale))
        total = s.new_zeros(())
        gradients = torch.empty_like(rows, dtype=torch.float32), torch.zeros_like(c), torch.zeros_like(s)
        with torch.autocast(rows.device.type, enabled=False), torch.enable_grad():
            for begin in range(0, len(rows), chunk):
                part = slice(begin, min(begin + chunk, len(rows)))
                r = rows[part].detach().float().requires_grad_()
                value = loss(r, c, s, part)
                total += value.detach()
                if not any(ctx.needs_input_grad):
                    continue
                gradients[0][part], of_columns, of_scale = torch.autograd.grad(value, (r, c, s))
                gradients[1].add_(of_columns)
                gradients[2].add_(of_scale)
        inputs = (rows, columns, scale)
        ctx.save_for_backward(*(found.to(given.dtype) for found, given in zip(gradients, inputs, strict=True)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        found = ctx.saved_tensors
        return *(g * gradient if need else None for g, need in zip(found, needed, strict=True)), None, None
