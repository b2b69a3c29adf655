"""DeepSpeed's ZeRO, where accelerate was configured for it: what it is told, and what it cannot do."""

from __future__ import annotations

from typing import Any

from mmkd.loop_settings import LoopSettings


def refuse(accelerator: Any, settings: LoopSettings) -> None:
    """Refuse what would go wrong under ZeRO, some of it without a word.

    Args:
        accelerator: an ``accelerate.Accelerator``; any other kind of parallelism passes.
        settings: of the run.

    Raises:
        ValueError: a moving average of the weights, or under ZeRO-3 a batch in pieces.
    """
    if not _is_used(accelerator):
        return
    if settings.ema_decay is not None:
        raise ValueError(
            f"--ema_decay {settings.ema_decay} does not work under DeepSpeed, which keeps the true weights in parts of "
            "its own; use DDP or FSDP2, or --ema_decay none"
        )
    share = settings.batch_size // accelerator.num_processes
    pieces = settings.micro_batch_size is not None and settings.micro_batch_size < share
    if pieces and accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise ValueError(
            f"--micro_batch_size {settings.micro_batch_size} is below the {share} pairs of a process, and ZeRO-3 "
            "cannot encode a batch in pieces: what it fetches ahead must be the same in every pass. Use FSDP2, ZeRO-2 "
            "or DDP, or leave --micro_batch_size out"
        )


def configure(accelerator: Any, settings: LoopSettings) -> None:
    """Give DeepSpeed, where it is used, what it does itself: the batch's size and clipping."""
    if _is_used(accelerator):
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = max(1, settings.batch_size // accelerator.num_processes)
        config["gradient_clipping"] = settings.clip_norm or 0.0
        config["zero_allow_untested_optimizer"] = True


def _is_used(accelerator: Any) -> bool:
    return str(accelerator.distributed_type).endswith("DEEPSPEED")
