"""The process group, the gather that lets a contrastive loss see the global batch, and weights spread over processes.

Every function works without a process group (one process), so nothing else in the package asks whether there is one.
With W processes, a loss that is the mean over local rows against gathered columns, averaged over processes by DDP, has
exactly the gradient of the single-process loss on the whole batch, because `gather` sends each rank the sum of what all
ranks want of its rows. Each rank computes 1/W of the logits and none twice.
"""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

TORCHRUN = "torch.distributed.run"  # as a module of this interpreter; a torchrun on the PATH may be another's

DEEPSPEED_PARTS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")  # of ZeRO-1 and 2, and of ZeRO-3


def rank() -> int:
    """This process' number: in its group, without one as the launcher said (``RANK``), else 0."""
    return dist.get_rank() if _initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes: of the group, without one as the launcher said (``WORLD_SIZE``), else 1."""
    return dist.get_world_size() if _initialized() else int(os.environ.get("WORLD_SIZE", 1))


def join_group() -> None:
    """Join the processes that a launcher has started, for work that is dealt out and waited for, not for training.

    They talk over gloo, which needs no GPU, and wait for each other for days: a process that computes a long cell, or
    one that embeds the last shard, is no failure.
    """
    if world_size() > 1 and not _initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=30))
        atexit.register(_leave_group)


def settle_group(parallelism: str) -> None:
    """Once joined: refuse parallelism that was not asked for, let models be built whole, and leave at the end.

    Without leaving, gloo's threads may outlive the interpreter and abort it.

    Args:
        parallelism: what accelerate has chosen, such as ``DistributedType.FSDP``.

    Raises:
        ValueError: FSDP was asked for, but accelerate shards on accelerators alone and would take DDP without a word.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not parallelism.endswith("FSDP"):
        raise ValueError(
            f"the accelerate configuration asks for FSDP, which needs several GPUs; here it is {parallelism}"
        )
    if parallelism.endswith("DEEPSPEED"):
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        # ZeRO-3 spreads the weights when training is prepared; until then starting weights are put in whole.
        unset_hf_deepspeed_config()
    atexit.register(_leave_group)


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


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over processes, without gradient; exact for integers."""
    return _reduced(values, dist.ReduceOp.SUM) if _initialized() else values.detach()


def maximum_over_processes(values: Tensor) -> Tensor:
    """The largest of each element over processes, without gradient."""
    return _reduced(values, dist.ReduceOp.MAX) if _initialized() else values.detach()


def gather_lists(items: list[str]) -> list[str]:
    """The items of all processes in rank order."""
    if not _initialized():
        return list(items)
    parts: list[list[str]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def is_spread(tensor: Tensor) -> bool:
    """Whether sharded parallelism (FSDP2, ZeRO) keeps the truth about a parameter in parts on several processes."""
    return isinstance(tensor, DTensor) or _of_deepspeed(tensor)


def whole(tensor: Tensor) -> Tensor:
    """A parameter that is spread over the processes, put together on each; any other tensor as it is.

    Every process must ask for the same tensors in the same order.
    """
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if _of_deepspeed(tensor):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(tensor)
    return tensor


def assign(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole `value` into a tensor or, where it is spread over the processes, each its part."""
    value = value.detach().to(tensor.device, tensor.dtype)
    with torch.no_grad():
        if isinstance(tensor, DTensor):
            tensor.copy_(distribute_tensor(value, tensor.device_mesh, tensor.placements))
        elif not hasattr(tensor, "ds_id"):
            tensor.copy_(value)
    if hasattr(tensor, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_local_fp32_param

        with GatheredParameters([tensor], modifier_rank=0):
            tensor.data.copy_(value)
        safe_set_local_fp32_param(tensor, _own_part(value))
    elif _of_deepspeed(tensor):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(tensor, value)


def make_plain(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a module parameters and buffers of its own, whole and in main memory, whatever processes or GPUs held."""
    for name, parameter in list(module.named_parameters()):
        owner, _, own = name.rpartition(".")
        module.get_submodule(owner)._parameters[own] = nn.Parameter(tensors[name], parameter.requires_grad)
    for name, buffer in list(module.named_buffers()):
        owner, _, own = name.rpartition(".")
        module.get_submodule(owner)._buffers[own] = tensors.get(name, buffer).cpu()


def moments(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    """What Adam keeps of a parameter: ``exp_avg``, ``exp_avg_sq`` and ``step``, whole; nothing before its first step.

    Every process must ask for the same parameters in the same order.
    """
    if not _of_deepspeed(parameter):
        return {name: whole(value) for name, value in optimizer.state.get(parameter, {}).items()}
    from deepspeed.utils import safe_get_full_optimizer_state

    states = _deepspeed_states(optimizer)
    found = {name: safe_get_full_optimizer_state(parameter, name) for name in ("exp_avg", "exp_avg_sq")}
    return found | {"step": states[0]["step"].detach().clone().reshape(())}


def set_moments(optimizer: Any, parameter: Tensor, values: dict[str, Tensor]) -> None:
    """Give Adam what `moments` returned."""
    if _of_deepspeed(parameter):
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for state in _deepspeed_states(optimizer):
            state["step"].fill_(values["step"].item())
        for name in ("exp_avg", "exp_avg_sq"):
            value = values[name].to(parameter.device)
            if hasattr(parameter, "ds_id"):
                safe_set_local_optimizer_state(parameter, _own_part(value), name)
            else:
                safe_set_full_optimizer_state(parameter, value, name)
        return
    state = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    for name, tensor in state.items():
        assign(tensor, values[name])
    optimizer.state[parameter] = state


def _own_part(value: Tensor) -> Tensor:
    """This process' part of a tensor as ZeRO-3 spreads it: equal parts of the flat values, zeros behind the last."""
    part = -(-value.numel() // world_size())
    padded = nn.functional.pad(value.flatten(), (0, part * world_size() - value.numel()))
    return padded.narrow(0, part * rank(), part)


def _of_deepspeed(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")


def _deepspeed_states(optimizer: Any) -> list[dict[str, Tensor]]:
    """What the Adam that ZeRO wraps keeps for each flat part of the weights; begun where there was no step yet.

    ZeRO-1 and 2 find a parameter's share of it by links that they make when the first of several groups has stepped and
    the others have nothing to link to; here they are made anew.
    """
    zero = optimizer
    while not any(hasattr(zero, name) for name in DEEPSPEED_PARTS):
        zero = zero.optimizer
    parts = next(getattr(zero, name) for name in DEEPSPEED_PARTS if hasattr(zero, name))
    states = zero.optimizer.state
    for part in parts:
        if not states[part]:
            states[part] = {"exp_avg": torch.zeros_like(part), "exp_avg_sq": torch.zeros_like(part)}
            states[part]["step"] = torch.zeros((), dtype=torch.float32, device=part.device)
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    return [states[part] for part in parts]


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


def _reduced(values: Tensor, operation: Any) -> Tensor:
    """Reduced where the process group works: NCCL takes nothing on the CPU."""
    place = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else values.device
    result = values.detach().to(place, copy=True)
    dist.all_reduce(result, op=operation)
    return result.to(values.device)


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _leave_group() -> None:
    if _initialized():
        dist.destroy_process_group()


# Section: Where encoders compute: the device that was named, checked before anything is loaded onto it.


def chosen_device(name: str) -> str:
    """The device of that name; for ``auto`` this process' GPU if there is one, else the processor.

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
