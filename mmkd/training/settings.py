"""What every training has in common, and the bounds of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmkd.command.settings import setting
from mmkd.training.tracking import chosen_trackers

LEAST = {"epochs": 1, "batch_size": 2, "checkpoint_every": 1, "checkpoints_kept": 1, "skipped_in_a_row": 1}

LEAST |= {"warmup_steps": 0, "workers": 0, "seed": 0}

LEAST_UNLESS_NONE = {"max_steps": 1, "micro_batch_size": 1, "profile_steps": 1}


@dataclass(kw_only=True)
class LoopSettings:
    """What every training has in common."""

    output: Path = setting(help="folder to write; OUTPUT.partial while running, from which the same command resumes")
    epochs: int = setting(1, "passes over the pairs")
    max_steps: int | None = setting(None, "stop after so many steps if epochs would take longer")
    batch_size: int = setting(64, "pairs in a global batch, over all processes")
    micro_batch_size: int | None = setting(
        None, "pairs a process encodes at once, by default its whole share; the same gradient, less memory"
    )
    learning_rate: float = setting(5e-5, "peak, reached after the warm-up, then cosine to 0")
    learning_rate_factors: dict[str, float] = setting(
        factory=dict, help="factor of the learning rate for parts of the model, such as vision_model: 0.1"
    )
    layer_decay: float = setting(1.0, "factor of the learning rate from each layer of a tower to the one below")
    warmup_steps: int = setting(0, "steps of linear warm-up")
    weight_decay: float = setting(0.2, "of AdamW, none on biases, norms and scales")
    clip_norm: float | None = setting(1.0, "largest norm of the gradient; none = not clipped")
    ema_decay: float | None = setting(
        None, "the output is the exponential moving average of the weights, with this decay a step; none = the last"
    )
    precision: Literal["fp32", "bf16"] = setting("fp32", "of the model's forward pass; losses are always fp32")
    dropout: float = setting(0.0, "of every dropout layer; above 0 results depend on the number of processes")
    workers: int = setting(2, "processes that read images, beside each training process")
    checkpoint_every: int = setting(1000, "steps between checkpoints")
    checkpoints_kept: int = setting(2, "newest checkpoints that are kept")
    skipped_in_a_row: int = setting(3, "stop at so many steps in a row that were skipped, being not finite")
    trackers: list[str] = setting(
        factory=lambda: ["auto"], help="tensorboard, wandb, trackio ...; auto = TensorBoard where installed; none"
    )
    peak_tflops: float | None = setting(None, "of one device, for the log's MFU; by default known from a GPU's name")
    profile_steps: int | None = setting(None, "record so many steps with torch's profiler, after the first two")
    seed: int = setting(42, "of order, crops, new layers and dropout")
    quiet: bool = setting(False, "no progress bar")
    overwrite: bool = setting(False, "replace OUTPUT when it exists")


def check(settings: LoopSettings) -> None:
    """Refuse values out of range.

    Raises:
        ValueError: the message names the setting, its value and what is allowed.
    """
    values: dict[str, Any] = vars(settings)
    for name, least in LEAST.items():
        if values[name] < least:
            raise ValueError(f"--{name} is {values[name]}; it must be at least {least}")
    for name, least in LEAST_UNLESS_NONE.items():
        if values[name] is not None and values[name] < least:
            raise ValueError(f"--{name} is {values[name]}; it must be at least {least}, or none")
    chosen_trackers(settings.trackers)
    if settings.peak_tflops is not None and not settings.peak_tflops > 0:
        raise ValueError(f"--peak_tflops is {settings.peak_tflops}; it must be above 0, or none")
    if settings.clip_norm is not None and not settings.clip_norm > 0:
        raise ValueError(f"--clip_norm is {settings.clip_norm}; it must be above 0, or none")
    if settings.ema_decay is not None and not 0 < settings.ema_decay < 1:
        raise ValueError(f"--ema_decay is {settings.ema_decay}; it must be above 0 and below 1, or none")
    if not settings.learning_rate > 0:
        raise ValueError(f"--learning_rate is {settings.learning_rate}; it must be above 0")
    if not 0 < settings.layer_decay <= 1:
        raise ValueError(f"--layer_decay is {settings.layer_decay}; it must be above 0 and at most 1")
    for part, factor in settings.learning_rate_factors.items():
        if not factor > 0:
            raise ValueError(f"--learning_rate_factors.{part} is {factor}; it must be above 0, or --freeze {part}")
    if not 0 <= settings.dropout < 1:
        raise ValueError(f"--dropout is {settings.dropout}; it must be at least 0 and below 1")


# Section: DeepSpeed's ZeRO, where accelerate was configured for it: what it is told, and what it cannot do.


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
