"""The process group, and the gather that lets a contrastive loss see the global batch.

Every function works without a process group (one process), so nothing else in the package asks whether there is one.
With W processes, a loss that is the mean over local rows against gathered columns, averaged over processes by DDP, has
exactly the gradient of the single-process loss on the whole batch, because `gather` sends each rank the sum of what all
ranks want of its rows. Each rank computes 1/W of the logits and none twice.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process' number: in its group, without one as the launcher said (``RANK``), else 0."""
    return dist.get_rank() if _initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes: of the group, without one as the launcher said (``WORLD_SIZE``), else 1."""
    return dist.get_world_size() if _initialized() else int(os.environ.get("WORLD_SIZE", 1))


def wait_for_everyone() -> None:
    """Return when every process has come here."""
    if _initialized():
        dist.barrier()


def gather(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes in rank order, with gradient.

    Args:
        rows: `(rows, ...)`, the same shape on every process; floating point or bool.

    Returns:
        `(rows * world_size, ...)`; the rows of this process start at `rank() * rows`. The gradient that reaches
        ``rows`` is the sum over processes of their gradients of this process' part.
    """
    if not _initialized():
        return rows
    if rows.dtype == torch.bool:
        return _Gather.apply(rows.to(torch.uint8)).bool()
    return _Gather.apply(rows)


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor over processes, without gradient."""
    if not _initialized():
        return values.detach()
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def gather_lists(items: list[str]) -> list[str]:
    """The items of all processes in rank order."""
    if not _initialized():
        return list(items)
    parts: list[list[str]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = rows.shape[0]
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.narrow(0, rank() * ctx.rows, ctx.rows)


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
