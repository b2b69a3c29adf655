"""The only training loop: one global batch is one step, with log, validation, checkpoints and exact resume around it.

Batches are read in an order that depends on the seed alone, so that the same command gives the same model on any number
of processes (to rounding) and, on one machine, the same bytes after any interruption. There is no plain gradient
accumulation, because it would silently change the negatives of a contrastive loss: a smaller ``micro_batch_size`` is
exact gradient caching (`mmkd.training.gradient_cache`).
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, send_to_device
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from mmkd.command.launch import StopRequest
from mmkd.distributed import allow_tf32, mean_over_processes, rank, settle_group, whole, world_size
from mmkd.files import refuse_existing
from mmkd.student.trainable import set_training_mode
from mmkd.training.batches import Batches, batches_from
from mmkd.training.checkpoints import Checkpoints, RunFolder
from mmkd.training.gradient_cache import cached_backward, set_seed
from mmkd.training.log import TENSORBOARD_FOLDER, StepLog, profiled_steps, report_skipped, timed
from mmkd.training.objectives import Objective, ObjectiveWrapper
from mmkd.training.optimizer import WeightAverage, build_optimizer, clamp_scales, scale_values, set_learning_rate
from mmkd.training.settings import LoopSettings, check, chosen_trackers
from mmkd.training.validation import Validation

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(hours=1)  # a process may wait for others that validate, save or read from a slow disk


def start(settings: LoopSettings) -> Accelerator:
    """Join the process group and seed, before anything random or slow.

    Raises:
        ValueError: a setting is out of range.
        FileExistsError: the output exists and may not be replaced.
    """
    check(settings)
    if settings.quiet:
        disable_progress_bar()
    refuse_existing(settings.output, settings.overwrite)
    buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(
        mixed_precision="no",
        kwargs_handlers=[buckets, InitProcessGroupKwargs(timeout=TIMEOUT)],
        log_with=chosen_trackers(settings.trackers) or None,
        project_config=ProjectConfiguration(logging_dir=str(RunFolder(settings.output).path / TENSORBOARD_FOLDER)),
    )
    settle_group(str(accelerator.distributed_type))
    if accelerator.device.type == "cuda":
        allow_tf32(settings.tf32)
        if settings.precision == "fp32":
            logger.warning("training in fp32 on a GPU; --precision bf16 is faster and takes less memory")
    torch.manual_seed(settings.seed)
    return accelerator


def fit(
    accelerator: Accelerator,
    objective: Objective,
    batches: Batches,
    settings: LoopSettings,
    write_output: Callable[[Path], None],
    validation: Validation | None = None,
) -> None:
    """Train and write the whole output; started again after an interruption, resume from the newest checkpoint.

    Args:
        accelerator: from `start`.
        objective: what is trained.
        batches: this process' batches.
        settings: length, learning rate, output and more.
        write_output: writes the trained model into a folder; called on the first process.
        validation: measures the objective during training, and may choose which weights are the output.

    Raises:
        ValueError: settings or data differ from those of the interrupted run, or loss or gradient were not finite for
            several steps in a row; the message names the settings, or the batch's pairs.
        OSError: there is no room for the next checkpoint; the last one stays.
        SystemExit: with 0, when SIGTERM or SIGUSR1 came; everything is saved.
    """
    folder, name = RunFolder(settings.output), settings.output.name
    total = min(settings.epochs * len(batches), settings.max_steps or sys.maxsize)
    if 0 < total <= settings.warmup_steps:
        logger.warning("the warm-up of %d steps fills this run of %d", settings.warmup_steps, total)
    log = StepLog(folder, settings, getattr(objective, "model", None), accelerator)
    training = _Training(accelerator, objective, settings)
    checkpoints = Checkpoints(folder, settings, objective, training.optimizer, training.average)
    progress = checkpoints.resume(batches.identity())
    log.begin(progress.step)
    # smoothing=0: the time left follows from all steps of this start, with their checkpoints and evaluations.
    bar = tqdm(total=total, initial=progress.step, disable=log.hidden, unit="step", desc=name, smoothing=0)
    with StopRequest() as request, profiled_steps(folder.path, settings.profile_steps) as profiled, bar:
        for batch, waited, began in timed(batches_from(batches, progress.step, total)):
            rate = set_learning_rate(training.optimizer, progress.step, total, settings)
            values, is_finite, stop = training.step(batch, progress.step, request.requested)
            step = progress.count(is_finite)
            line = {"step": step, "epoch": batch["epoch"], **values, "learning_rate": rate}
            if not is_finite:
                report_skipped(line, batch["ids"], progress, settings.skipped_in_a_row)
            seconds = time.perf_counter() - began
            if validation is not None and validation.is_due(step, total):
                line |= validation.run(step, training.wrapper, objective, training.average, folder, training.to_device)
            log.write(line, batch, waited=waited, seconds=seconds)
            bar.set_postfix_str(log.shown, refresh=False)
            bar.update()
            profiled()
            if step < total and (stop or step % settings.checkpoint_every == 0):
                checkpoints.save(progress)
                if stop:
                    logger.warning("stopped by a signal; saved at step %d, run the same command to resume", step)
                    raise SystemExit(0)
    log.close()
    checkpoints.finish(write_output, best=validation is not None and validation.best_metric is not None)


class _Training:
    """The objective prepared for all processes, with its optimizer and the moving average of its weights."""

    def __init__(self, accelerator: Accelerator, objective: Objective, settings: LoopSettings) -> None:
        self.accelerator, self.objective, self.settings = accelerator, objective, settings
        self.to_device = partial(send_to_device, device=accelerator.device, non_blocking=True)
        set_training_mode(objective, settings.dropout)
        objective.to(accelerator.device)
        if accelerator.distributed_type != DistributedType.FSDP:  # shards must be contiguous
            objective.to(memory_format=torch.channels_last)  # EfficientNet-Lite0 trains 1.6 times as fast on a CPU
        self.optimizer = build_optimizer(objective, settings)
        wrapper = ObjectiveWrapper(objective, accelerator.device.type, settings.precision)
        self.wrapper, _ = accelerator.prepare(wrapper, self.optimizer)
        self.scales = {n: p for n, p in objective.named_parameters() if n.endswith("logit_scale")}
        self.average = WeightAverage(objective, settings.ema_decay)
        self.is_first = True

    def step(self, batch: dict[str, Any], number: int, stop: bool) -> tuple[dict[str, float], bool, bool]:
        """One step; returns losses and gradient norm, whether all were finite, and whether any process is to stop."""
        if self.is_first and self.accelerator.distributed_type == DistributedType.MULTI_CPU and world_size() > 2:
            # DDP sorts its buckets after the first backward pass, and more than two processes then add up in another
            # order: without this pass, whose gradient is thrown away, a resumed run would differ in the last bit.
            self._backward(batch, number)
            self.optimizer.zero_grad()
        self.is_first = False
        parts = self._backward(batch, number)
        limit = math.inf if self.settings.clip_norm is None else self.settings.clip_norm
        norm = whole(torch.as_tensor(self.accelerator.clip_grad_norm_(self.wrapper.parameters(), limit)))
        parts = parts | {"gradient_norm": norm.to(self.accelerator.device)} | scale_values(self.scales)
        # One mean over processes, so that all of them skip, stop or continue together.
        stopping = torch.tensor(float(stop), device=self.accelerator.device)
        means = mean_over_processes(torch.stack([*(part.detach().float() for part in parts.values()), stopping]))
        *values, stopped = means.tolist()
        is_finite = all(map(math.isfinite, values))
        if is_finite:
            self.optimizer.step()
            clamp_scales(self.scales.values())
            self.average.update(self.objective, number)
        self.optimizer.zero_grad()
        return dict(zip(parts, values, strict=True)), is_finite, stopped > 0

    def _backward(self, batch: dict[str, Any], number: int) -> dict[str, Tensor]:
        """Leave the gradient in the weights; returns the loss and its parts of this process."""
        seed, size = (self.settings.seed, number, rank()), self.settings.micro_batch_size
        if "micro_batches" in batch or (size is not None and size < len(batch["ids"])):
            no_sync = partial(self.accelerator.no_sync, self.wrapper)
            return cached_backward(self.wrapper, batch, size, self.to_device, self.accelerator.backward, no_sync, seed)
        set_seed(*seed)
        parts = self.wrapper(ObjectiveWrapper.loss_of_batch, self.to_device(batch))
        self.accelerator.backward(parts["loss"])
        return parts
