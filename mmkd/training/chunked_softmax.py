"""Softmax cross-entropy over similarities, without the matrix of similarities.

Every contrastive loss compares N rows with N columns, and written plainly keeps several N x N matrices until the
backward pass. Here some rows at a time meet all columns: their logits, softmax and gradient live for a moment, and the
gradients with respect to features and scale are summed on the way, in closed form. Memory is N x chunk instead of
N x N, nothing is computed twice, and the gradients are those of the plain form to rounding. They are made in the
forward pass, since the loss is a scalar that the backward pass only multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Block = Callable[[int, int], Tensor]
"""From the first row and the one after the last to a matrix `(end - begin, columns)`."""

CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
EXCLUDED = -1e30  # a logit whose exponential is zero, finite so that zero times it is zero


def chunk_rows(rows: int, columns: int, device: torch.device) -> int:
    """How many rows at a time: as many as make matrices that fit a CPU's cache, or keep a GPU busy."""
    return max(1, min(rows, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"]) // max(1, columns)))


def softmax_cross_entropy(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor | float,
    target: Tensor | Block,
    excluded: Block | None = None,
    *,
    divergence: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """``- sum_i sum_j p_ij log q_ij`` with ``q_i. = softmax_j(scale * <r_i, c_j>)``, in fp32, autocast or not.

    With G = q - p (each row of q times the sum of its row of p): dL/dr = scale G c, dL/dc = scale G^T r and
    dL/dscale = sum_ij G_ij <r_i, c_j>.

    Args:
        rows: `(rows, dim)`.
        columns: `(columns, dim)`.
        scale: the multiplier of similarities (already exponentiated), a float or a tensor of one element.
        target: the column of each row `(rows,)` int64, -1 for a row that does not count; or blocks of p, whose rows sum
            to one, or to zero where they do not count.
        excluded: blocks of bool, True where a column does not compete.
        divergence: add ``sum p log p``, which makes it a Kullback-Leibler divergence of the same gradient.
        chunk: rows at a time, by default `chunk_rows`.

    Returns:
        The sum over rows, a float32 scalar.
    """
    multiplier = torch.as_tensor(scale, device=rows.device)
    size = chunk or chunk_rows(len(rows), len(columns), rows.device)
    return _SoftmaxCrossEntropy.apply(rows, columns, multiplier, target, excluded, divergence, size)


class _SoftmaxCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        target: Tensor | Block,
        excluded: Block | None,
        divergence: bool,
        size: int,
    ) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            r, c, multiplier = rows.float(), columns.float(), scale.float()
            total = r.new_zeros(())
            pulls = torch.empty_like(r), torch.zeros_like(c)
            for begin in range(0, len(r), size):
                end = min(begin + size, len(r))
                logits = (r[begin:end] @ c.T).mul_(multiplier)
                if excluded is not None:
                    logits.masked_fill_(excluded(begin, end), EXCLUDED)
                picked = target[begin:end] if isinstance(target, Tensor) else target(begin, end)
                if divergence:
                    total += torch.xlogy(picked, picked).sum()
                loss, gradient = _closed_form(logits, picked)
                total += loss
                if any(ctx.needs_input_grad):
                    torch.mm(gradient, c, out=pulls[0][begin:end])
                    pulls[1].addmm_(gradient.T, r[begin:end])
            ctx.like = rows, columns, scale
            ctx.save_for_backward(pulls[0], pulls[1], (pulls[0] * r).sum(), multiplier)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        row_pull, column_pull, scale_pull, multiplier = ctx.saved_tensors
        rows, columns, scale = ctx.like
        factor = gradient * multiplier
        return (
            (row_pull * factor).to(rows.dtype) if ctx.needs_input_grad[0] else None,
            (column_pull * factor).to(columns.dtype) if ctx.needs_input_grad[1] else None,
            (scale_pull * gradient).to(scale.dtype).reshape(scale.shape) if ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
            None,
        )


def _closed_form(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of some rows and its gradient with respect to their logits, which are overwritten with it."""
    if target.dtype == torch.int64:
        mass = (target >= 0).float()
        column = target.clamp(min=0)[:, None]
        reached = (logits.gather(1, column)[:, 0] * mass).sum()
    else:
        mass = target.sum(dim=1)
        reached = (target * logits).sum()
    largest = logits.amax(dim=1)
    # On a CPU ten times as fast as logsumexp followed by exp, and nothing but the logits is held.
    shares = logits.sub_(largest[:, None]).exp_()
    total = shares.sum(dim=1)
    loss = (mass * (largest + total.log())).sum() - reached
    gradient = shares.mul_((mass / total)[:, None])
    if target.dtype == torch.int64:
        return loss, gradient.scatter_add_(1, column, -mass[:, None])
    return loss, gradient.sub_(target)
