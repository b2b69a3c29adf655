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
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

RowLoss = Callable[[Tensor, Tensor, Tensor, slice], Tensor]
"""From rows `(n, dim)`, columns `(columns, dim)`, the scale and which rows these n are to the sum of their losses."""


LARGEST_MATRIX = {"cpu": 2**20, "cuda": 2**26}  # elements that fit a CPU's cache, or keep a GPU busy


class RowMask(Protocol):
    """A bool matrix `(rows, columns)` that is read by slices of rows: a tensor, or one computed when it is read."""

    def __getitem__(self, part: slice, /) -> Tensor: ...


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


def pairwise_sigmoid(
    image: Tensor,
    text: Tensor,
    all_images: Tensor,
    all_texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_offset: int = 0,
    mask: RowMask | None = None,
    chunk: int | None = None,
    captions: Tensor | None = None,
) -> Tensor:
    """SigLIP: ``mean_i sum_j -log sigmoid(z_ij (scale * <x_i, y_j> + bias))``, z 1 for positives and -1 for others.

    Source: Zhai et al. 2023 (SigLIP).

    Args:
        image: `(rows, dim)`; the arguments are those of `mmkd.training.objectives.contrastive`.
        text: `(rows, dim)`, not read: the rows of images meet every text.
        all_images: `(columns, dim)`, not read.
        all_texts: `(columns, dim)`.
        scale: ``exp(logit_scale)``.
        bias: `(1,)`, learned.
        row_offset: column of the first row.
        mask: `(rows, columns)` bool, False where a column is excluded.
        chunk: rows at a time, None for all.
        captions: `(columns,)`, equal for columns that are positives of each other.
    """
    numbers = torch.arange(len(all_texts), device=image.device) if captions is None else captions
    own = numbers[row_offset : row_offset + len(image), None]

    def cross_entropy(rows: Tensor, columns: Tensor, scale: Tensor, part: slice) -> Tensor:
        logits, same = scale * (rows @ columns.T), own[part] == numbers
        errors = F.softplus(torch.where(same, -logits, logits))
        return (errors if mask is None else errors.masked_fill(~(mask[part] | same), 0)).sum()

    ones, biases = torch.ones_like(all_texts[:, :1]), (bias / scale).expand(len(image), 1)
    rows, columns = torch.cat([image, biases], dim=1), torch.cat([all_texts, ones], dim=1)
    return sum_over_rows(cross_entropy, rows, columns, scale, chunk) / len(image)


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
