"""The only training loop: schedule, log, checkpoints, exact resume.

Explicit rather than configurable: one global batch is one step, read in an order that depends on the seed alone, so
that the same command gives the same model on any number of processes (to rounding) and, on one machine, the same bytes
after any interruption. There is no plain gradient accumulation, because it would silently change the negatives of a
contrastive loss: the global batch is what is compared, and a smaller ``micro_batch_size`` is exact gradient caching.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import ProjectConfiguration, send_to_device
from torch import Tensor
from tqdm import tqdm

from mmkd.command.launch import StopRequest
from mmkd.distributed import make_plain, mean_over_processes, rank, settle_group, wait_for_everyone, whole, world_size
from mmkd.files import refuse_existing
from mmkd.student.trainable import set_training_mode
from mmkd.training.batches import Batches
from mmkd.training.checkpoints import (
    Progress,
    checkpoint_bytes,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    snapshot,
)
from mmkd.training.gradient_cache import OneForward, cached_backward, set_seed
from mmkd.training.log import StepLog, not_finite, profiled_steps, timed
from mmkd.training.objectives import Objective
from mmkd.training.optimizer import (
    WeightAverage,
    build_optimizer,
    clamp_scales,
    learning_rate,
    scale_values,
    set_learning_rate,
)
from mmkd.training.run_folder import RunFolder
from mmkd.training.settings import LoopSettings, check, configure, refuse
from mmkd.training.tracking import TENSORBOARD_FOLDER, chosen_trackers
from mmkd.training.validation import Validation

__all__ = ["Batches", "LoopSettings", "fit", "start"]

logger = logging.getLogger(__name__)


def start(settings: LoopSettings) -> Accelerator:
    """Join the process group and seed, before anything random or slow.

    Raises:
        ValueError: a setting is out of range.
        FileExistsError: the output exists and may not be replaced.
    """
    check(settings)
    refuse_existing(settings.output, settings.overwrite)
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    trackers = ProjectConfiguration(logging_dir=str(RunFolder(settings.output).path / TENSORBOARD_FOLDER))
    accelerator = Accelerator(
        mixed_precision="no",
        kwargs_handlers=[ddp],
        log_with=chosen_trackers(settings.trackers) or None,
        project_config=trackers,
    )
    settle_group(str(accelerator.distributed_type))
    refuse(accelerator, settings)
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
    """Train, and write the output whole; started again after an interruption, go on from the newest checkpoint.

    Args:
        accelerator: from `start`.
        objective: what is trained.
        batches: this process' batches.
        settings: how long, how fast and where to.
        write_output: puts the trained model into the folder it is given; called on the first process.
        validation: measures the objective as it trains, and may choose which weights are the output.

    Raises:
        ValueError: settings or data differ from those of the interrupted run, or loss or gradient were not finite for
            several steps in a row; the message names the settings, or the batch's pairs.
        OSError: there is no room for the next checkpoint; the last one stays.
        SystemExit: with 0, when SIGTERM or SIGUSR1 came; everything is saved.
    """
    folder = RunFolder(settings.output).path
    with StopRequest() as request, profiled_steps(folder, settings.profile_steps) as profiled:
        run = _Run(accelerator, objective, batches, settings, validation, request)
        hidden, name = settings.quiet or rank() > 0, settings.output.name
        done, total = run.progress.step, run.total
        # The time left follows from all steps of this start, with their checkpoints and evaluations.
        with tqdm(total=total, initial=done, disable=hidden, unit="step", desc=name, smoothing=0) as bar:
            while run.progress.step < run.total:
                for _ in run.epoch():
                    bar.set_postfix_str(run.step_log.shown, refresh=False)
                    bar.update()
                    profiled()
    run.finish(write_output)


class _Run:
    """One training: what is trained, on what, and how far it has come."""

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        batches: Batches,
        settings: LoopSettings,
        validation: Validation | None,
        request: StopRequest,
    ) -> None:
        self.accelerator, self.batches, self.settings, self.request = accelerator, batches, settings, request
        self.validation, self.objective = validation, objective
        self.folder = RunFolder(settings.output)
        self.total = min(settings.epochs * len(batches), settings.max_steps or sys.maxsize)
        if 0 < self.total <= settings.warmup_steps:
            logger.warning("the warm-up of %d steps fills this run of %d", settings.warmup_steps, self.total)
        set_training_mode(objective, settings.dropout)
        objective.to(accelerator.device)
        if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            # EfficientNet-Lite0 trains 1.6 times as fast on a CPU thread so; shards must be contiguous.
            objective.to(memory_format=torch.channels_last)
        self.step_log = StepLog(self.folder, settings, getattr(objective, "model", None), accelerator)
        wrapped = OneForward(objective, accelerator.device.type, settings.precision)
        configure(accelerator, settings)
        self.trained, self.optimizer = accelerator.prepare(wrapped, build_optimizer(objective, settings))
        self.scales = {n: p for n, p in objective.named_parameters() if n.endswith("logit_scale")}
        self.average = WeightAverage(objective, settings.ema_decay) if settings.ema_decay is not None else None
        self.progress, self._is_settled = self._resume(), False
        self.step_log.begin(self.progress.step)

    def epoch(self) -> Iterator[None]:
        """Train to the end of the current epoch or of the run, a step at a time."""
        epoch, skip = divmod(self.progress.step, len(self.batches))
        for batch, waited, began in timed(self.batches.epoch(epoch, skip)):
            self._settle_buckets(batch)
            rate = learning_rate(self.progress.step, self.total, self.settings)
            values, stop = self._update({**batch, "epoch": epoch}, rate)
            line = {"step": self.progress.step, "epoch": epoch, **values, "learning_rate": rate}
            if self.progress.skipped_in_a_row:
                self._skipped(line, batch["ids"])
            seconds = time.perf_counter() - began
            line |= self._validate()
            self.step_log.write(line, batch, waited=waited, seconds=seconds)
            yield
            is_last = self.progress.step == self.total
            if not is_last and (stop or self.progress.step % self.settings.checkpoint_every == 0):
                self._checkpoint()
            if stop and not is_last:
                logger.warning("stopped as asked; saved at step %d, the same command goes on", self.progress.step)
                raise SystemExit(0)
            if is_last:
                return

    def finish(self, write_output: Callable[[Path], None]) -> None:
        """Write the output: the best weights, the average, or the last."""
        if self.validation is not None and self.validation.best_metric is not None and self.folder.best() is not None:
            tensors = self.folder.best_weights() if rank() == 0 else {}
        else:
            if self.average is not None:
                self.average.swap(self.objective)
            tensors = snapshot(self.objective)
        if rank() == 0:
            make_plain(self.objective, tensors)
            self.objective.eval()
            self.step_log.close()
            self.folder.finish(write_output)
        wait_for_everyone()

    def _update(self, batch: dict[str, Any], rate: float) -> tuple[dict[str, float], bool]:
        """One step; returns losses and norm of the gradient, means over processes, and whether to stop after it."""
        set_learning_rate(self.optimizer, rate)
        parts = self._backward(batch)
        limit = math.inf if self.settings.clip_norm is None else self.settings.clip_norm
        norm = whole(torch.as_tensor(self.accelerator.clip_grad_norm_(self.trained.parameters(), limit)))
        parts = parts | {"gradient_norm": norm.to(self.accelerator.device)} | scale_values(self.scales)
        asked = torch.tensor(float(self.request.requested), device=self.accelerator.device)
        # One sum for all processes, so that all of them skip, stop or go on together.
        told = torch.stack([*(part.detach().float() for part in parts.values()), asked])
        *values, stop = mean_over_processes(told).tolist()
        self.progress.step += 1
        if all(map(math.isfinite, values)):
            self.optimizer.step()
            clamp_scales(self.scales.values())
            if self.average is not None:
                self.average.update(self.objective, self.progress.step - 1)
            self.progress.skipped_in_a_row = 0
        else:
            self.progress.skipped += 1
            self.progress.skipped_in_a_row += 1
        self.optimizer.zero_grad()
        return dict(zip(parts, values, strict=True)), stop > 0

    def _backward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Leave the gradient in the weights; returns the loss and its parts of this process."""
        seed = (self.settings.seed, self.progress.step, rank())
        size = self.settings.micro_batch_size
        if size is not None and size < len(batch["ids"]):
            return cached_backward(
                self.trained,
                batch,
                size,
                to_device=self._to_device,
                backward=self.accelerator.backward,
                without_sync=self._without_sync,
                seed=seed,
            )
        set_seed(*seed)
        parts = self.trained("whole", self._to_device(batch))
        self.accelerator.backward(parts["loss"])
        return parts

    def _settle_buckets(self, batch: dict[str, Any]) -> None:
        """Before the first step, a backward pass for nothing: after it DDP sorts its buckets of gradients anew.

        More than two processes then add up in another order, and a resumed run would differ in the last bit.
        """
        is_first, self._is_settled = not self._is_settled, True
        if is_first and self.accelerator.distributed_type == DistributedType.MULTI_CPU and world_size() > 2:
            self._backward(batch)
            self.optimizer.zero_grad()

    @contextlib.contextmanager
    def _without_sync(self) -> Iterator[None]:
        """Backward passes only add gradients up, on this process; DeepSpeed would take a step after each."""
        with self.accelerator.no_sync(self.trained):
            self.accelerator.sync_gradients = False
            try:
                yield
            finally:
                self.accelerator.sync_gradients = True

    def _skipped(self, line: dict[str, Any], ids: list[str]) -> None:
        """Tell of a step whose loss or gradient was not finite; after several in a row, stop."""
        line["skipped"] = self.progress.skipped
        told = not_finite(line, ids)
        if self.progress.skipped_in_a_row >= self.settings.skipped_in_a_row:
            raise ValueError(f"{told}. Lower --learning_rate, or look at these pairs; the last checkpoint stays")
        if rank() == 0:
            logger.warning("step skipped, %s", told)

    def _validate(self) -> dict[str, float]:
        """Measures by ``validation_NAME`` when they are due; keeps the weights when they are the best so far."""
        validation, step = self.validation, self.progress.step
        if validation is None or (step % validation.every and step < self.total):
            return {}
        if self.average is not None:
            self.average.swap(self.objective)
        self.objective.eval()
        measured = validation.measure(self.trained, self._to_device)
        validation.keep_best(measured, step, self.folder, self.objective)
        set_training_mode(self.objective, self.settings.dropout)
        if self.average is not None:
            self.average.swap(self.objective)
        return {f"validation_{name}": value for name, value in measured.items()}

    def _checkpoint(self) -> None:
        """Keep everything that the rest of the run depends on, and see that there is room for the next time."""
        self.folder.sync_log()
        kept = self.settings.checkpoints_kept
        save_checkpoint(self.folder.checkpoints, self.progress, self.objective, self.optimizer, self.average, kept)
        self._require_space()

    def _require_space(self) -> None:
        self.folder.require_space(checkpoint_bytes(self.objective, self.average))

    def _resume(self) -> Progress:
        """Load the newest checkpoint, if there is one, and cut the log back to it; returns how far it had come."""
        newest, data = newest_checkpoint(self.folder.checkpoints), self.batches.identity()
        progress = Progress()
        if newest is not None:
            self.folder.refuse_changes(self.settings, data)
            progress = load_checkpoint(newest, self.objective, self.optimizer, self.average)
        wait_for_everyone()
        if rank() == 0:
            self.folder.begin(self.settings, data, progress.step)
        wait_for_everyone()
        self._require_space()
        return progress

    def _to_device(self, batch: Any) -> Any:
        return send_to_device(batch, self.accelerator.device, non_blocking=True)
