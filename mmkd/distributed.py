"""The process group, the gather with gradient over the global batch, the state of sharded weights, and the device.

Every function works without a process group (one process), so the rest of the package needs no special case for it.
With W processes, a loss that is the mean over local rows against gathered columns, averaged over processes by DDP, has
exactly the gradient of the single-process loss on the whole batch, because the backward pass of `gather` sums over all
processes the gradient of each row. Each rank computes 1/W of the logits and none twice.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

TORCHRUN = "torch.distributed.run"  # as a module of this interpreter; a torchrun on the PATH may be another's


def rank() -> int:
    """This process' number: in its group, without a group the launcher's ``RANK``, else 0."""
    return dist.get_rank() if _initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes: of the group, without a group the launcher's ``WORLD_SIZE``, else 1."""
    return dist.get_world_size() if _initialized() else int(os.environ.get("WORLD_SIZE", 1))


def settle_group(parallelism: str) -> None:
    """After joining: refuse parallelism that was not requested, and leave the group at the end of the program.

    Without leaving, gloo's threads may outlive the interpreter and abort it.

    Args:
        parallelism: what accelerate has chosen, such as ``DistributedType.FSDP``.

    Raises:
        ValueError: FSDP was requested, but accelerate shards on GPUs only and would silently use DDP.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not parallelism.endswith("FSDP"):
        raise ValueError(
            f"the accelerate configuration requests FSDP, which needs several GPUs; here it is {parallelism}"
        )
    atexit.register(_leave_group)


def wait_for_everyone() -> None:
    """Return when every process has reached this call."""
    if _initialized():
        dist.barrier()


def gather(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes in rank order, with gradient.

    Args:
        rows: `(rows, ...)`, the same shape on every process; only floating point has a gradient.

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
    return sum_over_processes(values) / (dist.get_world_size() if _initialized() else 1)


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over processes, without gradient, on the tensor's own device."""
    if not _initialized():
        return values.detach()
    # NCCL reduces nothing on the CPU.
    place = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else values.device
    total = values.detach().to(place, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def gather_lists(items: list[str]) -> list[str]:
    """The items of all processes in rank order."""
    if not _initialized():
        return list(items)
    parts: list[list[str]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is sharded over the processes (FSDP2), put together on each; any other tensor as it is.

    Every process must call it for the same tensors in the same order.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def model_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, whole and in main memory on the first process, nothing on the others.

    The same for one process, DDP and FSDP2. Tensors that are neither sharded nor on a GPU share memory with the module.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    found: dict[str, Any] = get_model_state_dict(module, options=_on_first())
    return {name: tensor.contiguous() for name, tensor in found.items()}


def load_model_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `model_state` returned; every process must have all of it.

    Raises:
        RuntimeError: names or shapes differ.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(module, dict[str, Any](state), options=StateDictOptions(full_state_dict=True))


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of Adam as ``KIND/PARAMETER``, like `model_state`; nothing before the first step."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    if not optimizer.state:  # torch would take a step with a gradient of zero, which counts in the bias correction
        return {}
    found: dict[str, Any] = get_optimizer_state_dict(module, optimizer, options=_on_first())
    states: dict[str, dict[str, Tensor]] = found.get("state", {})
    return {f"{kind}/{name}": value.contiguous() for name, state in states.items() for kind, value in state.items()}


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Load what `optimizer_state` returned; every process must have all of it."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    if not state:
        return
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        kind, _, name = key.partition("/")
        by_parameter.setdefault(name, {})[kind] = value
    groups = get_optimizer_state_dict(module, optimizer)["param_groups"]
    found: dict[str, Any] = {"state": by_parameter, "param_groups": groups}
    set_optimizer_state_dict(module, optimizer, found, options=StateDictOptions(full_state_dict=True))
    for (
        parameter,
        loaded,
    ) in optimizer.state.items():  # fused AdamW needs the strides of the parameter, as of channels_last
        for kind, value in loaded.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                loaded[kind] = torch.empty_like(parameter).copy_(value)


def unshard(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Replace the parameters and buffers of a module by those of `model_state`, whole and in main memory."""
    for name, parameter in list(module.named_parameters()):
        owner, _, own = name.rpartition(".")
        setattr(module.get_submodule(owner), own, nn.Parameter(state[name], parameter.requires_grad))
    for name, buffer in list(module.named_buffers()):  # those that are not saved are never sharded
        owner, _, own = name.rpartition(".")
        setattr(module.get_submodule(owner), own, state.get(name, buffer).cpu())


def _on_first() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = rows.shape[0]
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = torch.empty_like(gradient[: ctx.rows], memory_format=torch.contiguous_format)
        dist.reduce_scatter(own, list(gradient.contiguous().split(ctx.rows)))
        return own


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _leave_group() -> None:
    if _initialized():
        dist.destroy_process_group()


def allow_tf32(allowed: bool) -> None:
    """Whether fp32 products and convolutions on GPUs may use TF32: 8 times as fast, with 10 bits of mantissa."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """Within it fp32 products do not use TF32, in which logits at a scale of 100 are wrong by some hundredths."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def chosen_device(name: str) -> str:
    """The device of that name, checked before anything is loaded onto it; ``auto`` is this process' GPU or the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here ({reason}); give auto, cpu, cuda or cuda:1") from None
    return name
