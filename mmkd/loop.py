"""The only training loop: schedule, log, checkpoints, exact resume.

Explicit rather than configurable: one global batch is one step, read in an order that depends on the seed alone, so
that the same command gives the same model on any number of processes (to rounding) and, on one machine, the same bytes
after any interruption. There is no gradient accumulation, because it would silently change the negatives of a
contrastive loss: the global batch is what is compared.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm import tqdm

from mmkd.distributed import gather_lists, mean_over_processes, rank, wait_for_everyone, world_size
from mmkd.files import refuse_existing
from mmkd.resume import load_checkpoint, newest_checkpoint, save_checkpoint
from mmkd.run_folder import RunFolder
from mmkd.settings import setting
from mmkd.trainable import set_training_mode

logger = logging.getLogger(__name__)

LOGIT_SCALE_RANGE = (0.0, math.log(100))


@dataclass(kw_only=True)
class LoopSettings:
    """What every training has in common."""

    output: Path = setting(help="folder to write; OUTPUT.partial while running, from which the same command resumes")
    epochs: int = setting(1, "passes over the pairs")
    max_steps: int | None = setting(None, "stop after so many steps if epochs would take longer")
    batch_size: int = setting(64, "pairs in a global batch, over all processes")
    learning_rate: float = setting(5e-5, "peak, reached after the warm-up, then cosine to 0")
    warmup_steps: int = setting(0, "steps of linear warm-up")
    weight_decay: float = setting(0.2, "of AdamW, none on biases, norms and scales")
    clip_norm: float | None = setting(1.0, "largest norm of the gradient; none = not clipped")
    precision: Literal["fp32", "bf16"] = setting("fp32", "of the model's forward pass; losses are always fp32")
    dropout: float = setting(0.0, "of every dropout layer; above 0 results depend on the number of processes")
    workers: int = setting(2, "processes that read images, beside each training process")
    checkpoint_every: int = setting(1000, "steps between checkpoints")
    checkpoints_kept: int = setting(2, "newest checkpoints that are kept")
    seed: int = setting(42, "of order, crops, new layers and dropout")
    quiet: bool = setting(False, "no progress bar")
    overwrite: bool = setting(False, "replace OUTPUT when it exists")


class Batches(Protocol):
    """What the loop reads from: this process' share of every global batch."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, skip: int = 0) -> Iterable[dict[str, Any]]:
        """The batches of an epoch from number `skip` on; each has ``ids``, a list."""


def start(settings: LoopSettings) -> Accelerator:
    """Join the process group and seed, before anything random or slow.

    Raises:
        ValueError: a setting is out of range.
        FileExistsError: the output exists and may not be replaced.
    """
    bounds = {"epochs": 1, "batch_size": 2, "checkpoint_every": 1, "checkpoints_kept": 1}
    bounds |= {"warmup_steps": 0, "workers": 0, "seed": 0}
    for name, least in bounds.items():
        if vars(settings)[name] < least:
            raise ValueError(f"--{name} is {vars(settings)[name]}; it must be at least {least}")
    if settings.max_steps is not None and settings.max_steps < 1:
        raise ValueError(f"--max_steps is {settings.max_steps}; it must be at least 1, or none")
    if settings.clip_norm is not None and not settings.clip_norm > 0:
        raise ValueError(f"--clip_norm is {settings.clip_norm}; it must be above 0, or none")
    if not settings.learning_rate > 0 or not 0 <= settings.dropout < 1:
        raise ValueError(
            f"--learning_rate is {settings.learning_rate} and must be above 0; "
            f"--dropout is {settings.dropout} and must be at least 0 and below 1"
        )
    refuse_existing(settings.output, settings.overwrite)
    accelerator = Accelerator(mixed_precision="no")
    torch.manual_seed(settings.seed)
    return accelerator


def fit(
    accelerator: Accelerator,
    objective: nn.Module,
    batches: Batches,
    settings: LoopSettings,
    write_output: Callable[[Path], None],
) -> None:
    """Train, and write the output whole; started again after an interruption, go on from the newest checkpoint.

    Args:
        accelerator: from `start`.
        objective: ``forward(batch)`` gives ``loss`` and its parts, scalars.
        batches: this process' batches.
        settings: how long, how fast and where to.
        write_output: puts the trained model into the folder it is given; called on the first process.

    Raises:
        ValueError: settings differ from those of the interrupted run, or a loss or gradient is not finite; the message
            names the settings, or the batch's pairs.
        OSError: the disk is full; the last checkpoint stays.
    """
    run = _Run(accelerator, objective, batches, settings)
    hidden = settings.quiet or rank() > 0
    with tqdm(total=run.total, initial=run.step, disable=hidden, unit="step", desc=settings.output.name) as bar:
        while run.step < run.total:
            for loss in run.epoch():
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
                if run.step % settings.checkpoint_every == 0 and run.step < run.total:
                    run.save_checkpoint()
    wait_for_everyone()
    if rank() == 0:
        objective.eval()
        run.folder.finish(write_output)
    wait_for_everyone()


def learning_rate(step: int, total: int, settings: LoopSettings) -> float:
    """Linear from ``peak / warmup_steps`` to the peak, then half a cosine that reaches 0 after the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return settings.learning_rate * (1 + math.cos(math.pi * share)) / 2


def build_optimizer(objective: nn.Module, settings: LoopSettings) -> torch.optim.AdamW:
    """AdamW (0.9, 0.98, 1e-6) over what learns; no decay on vectors and scalars: biases, norms, scales."""
    learning = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


class _Run:
    """One training: what is trained, on what, and how far it has come."""

    def __init__(
        self, accelerator: Accelerator, objective: nn.Module, batches: Batches, settings: LoopSettings
    ) -> None:
        self.accelerator, self.batches, self.settings = accelerator, batches, settings
        self.folder = RunFolder(settings.output)
        self.total = min(settings.epochs * len(batches), settings.max_steps or sys.maxsize)
        if 0 < self.total <= settings.warmup_steps:
            logger.warning("the warm-up of %d steps fills this run of %d", settings.warmup_steps, self.total)
        set_training_mode(objective, settings.dropout)
        # EfficientNet-Lite0 at 128 pixels trains 1.6 times as fast on a CPU thread in this layout; a ViT ignores it.
        self.objective = objective.to(accelerator.device).to(memory_format=torch.channels_last)
        self.scales = [p for name, p in objective.named_parameters() if name.endswith("logit_scale")]
        torch.manual_seed(settings.seed + rank())
        optimizer = build_optimizer(objective, settings)
        self.step = self._resume(optimizer)
        self.trained, self.optimizer = accelerator.prepare(objective, optimizer)

    def epoch(self) -> Iterator[float]:
        """Train to the end of the current epoch or of the run; gives the loss after each step."""
        epoch, skip = divmod(self.step, len(self.batches))
        for batch, waited, began in _timed(self.batches.epoch(epoch, skip)):
            rate = learning_rate(self.step, self.total, self.settings)
            parts = self._update(send_to_device({**batch, "epoch": epoch}, self.accelerator.device), rate)
            self.step += 1
            values = mean_over_processes(torch.stack(list(parts.values()))).tolist()
            line = {"step": self.step, "epoch": epoch, **dict(zip(parts, values, strict=True)), "learning_rate": rate}
            if not all(map(math.isfinite, values)):
                raise ValueError(_not_finite(line, batch["ids"]))
            if rank() == 0:
                self.folder.log(line | _speed(len(batch["ids"]) * world_size(), waited, time.perf_counter() - began))
            yield line["loss"]
            if self.step == self.total:
                return

    def save_checkpoint(self) -> None:
        """Keep everything that the rest of the run depends on."""
        save_checkpoint(
            self.folder.checkpoints, self.step, self.objective, self.optimizer, self.settings.checkpoints_kept
        )

    def _update(self, batch: dict[str, Any], rate: float) -> dict[str, Tensor]:
        """One step; returns the loss, its parts and the norm of the gradient, without waiting for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            parts = self.trained(batch)
        self.accelerator.backward(parts["loss"])
        limit = math.inf if self.settings.clip_norm is None else self.settings.clip_norm
        norm = self.accelerator.clip_grad_norm_(self.trained.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for scale in self.scales:
                scale.clamp_(*LOGIT_SCALE_RANGE)
        return {name: part.detach().float() for name, part in parts.items()} | {"gradient_norm": norm.float()}

    def _resume(self, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest checkpoint, if there is one, and cut the log back to it; returns the steps done."""
        newest = newest_checkpoint(self.folder.checkpoints)
        step = 0
        if newest is not None:
            self.folder.refuse_changes(self.settings)
            step = load_checkpoint(newest, self.objective, optimizer)
            logger.info("resuming %s at step %d", self.settings.output, step)
        wait_for_everyone()
        if rank() == 0:
            self.folder.begin(self.settings, step)
        wait_for_everyone()
        return step


def _timed(batches: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float, float]]:
    """Each batch, the seconds waited for it, and when the waiting began."""
    iterator = iter(batches)
    while True:
        began = time.perf_counter()
        batch = next(iterator, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - began, began


def _speed(images: int, waited: float, seconds: float) -> dict[str, float]:
    return {"images_per_second": round(images / seconds, 2), "data_time": round(waited / seconds, 4)}


def _not_finite(line: dict[str, Any], ids: list[str]) -> str:
    shown = ", ".join(f"{name} {value:g}" for name, value in line.items())
    return f"not finite: {shown}; lower --learning_rate, or look at the batch's pairs: {', '.join(gather_lists(ids))}"
