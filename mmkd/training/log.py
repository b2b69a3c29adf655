"""The log of a run: a line per step in ``log.jsonl``, the same numbers for the trackers, a few on the progress bar.

Beside losses by name a line has the speed of the step: pairs and tokens of captions per second over all processes
(without padding), the share of tokens that was not padding, the share of time spent waiting for data, the share of the
device's peak (MFU, by the formula of `mmkd.student.flops`), memory, and each teacher's share of the pairs. On request a
few steps are recorded with torch's profiler. Beside the log lie the environment and the plot of the losses.

Nothing is sent by default: TensorBoard writes files beside the output, and a tracker that sends data to a server
(wandb, trackio ...) is used only when it is named. Names of hosts, users and folders are not written.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkd.command.settings import resolved
from mmkd.data.provenance import PACKAGE, git_commit, installed_versions
from mmkd.distributed import gather_lists, rank, world_size
from mmkd.files import write_json
from mmkd.student.embed import padding_free_share
from mmkd.student.flops import StepCost, peak_flops, step_cost
from mmkd.training.checkpoints import LOG_FILE, Progress, RunFolder
from mmkd.training.dataset import micro_batches
from mmkd.training.settings import LoopSettings

logger = logging.getLogger(__name__)

ENVIRONMENT_FILE, CURVE_FILE, TENSORBOARD_FOLDER = "environment.json", "loss.png", "tensorboard"
PACKAGES = ("mmkd-clip", "torch", "torchvision", "transformers", "accelerate", "numpy", "pillow", "simplejpeg", "peft")
CURVE_POINTS = 2000
TEACHER_KEYS = ("aligned", "teachers")
PROFILE_FOLDER = "profile"
UNPROFILED_STEPS = 2  # the first ones start workers, allocate and compile
TABLE_ROWS = 40


class StepLog:
    """Writes one line a step, on the first process."""

    def __init__(
        self, folder: RunFolder, settings: LoopSettings, model: nn.Module | None = None, accelerator: Any = None
    ) -> None:
        """Choose peak and cost to measure against, and where to write.

        Args:
            folder: its ``log.jsonl`` gets the lines.
            settings: of the run.
            model: what is trained, for its cost; before it is wrapped or sharded. None where there is no such model.
            accelerator: its trackers also take each line. None for no trackers.
        """
        self.folder, self.settings, self.accelerator = folder, settings, accelerator
        self.cost: StepCost | None = step_cost(model) if model is not None else None
        self.peak_flops = settings.peak_tflops * 1e12 if settings.peak_tflops is not None else None
        if self.peak_flops is None and torch.cuda.is_available():
            precision = "tf32" if settings.precision == "fp32" and settings.tf32 else settings.precision
            self.peak_flops = peak_flops(torch.cuda.get_device_name(), precision)
        self.shown, self.hidden = "", settings.quiet or rank() > 0

    def begin(self, step: int) -> None:
        """Write ``environment.json`` with the formula of the cost, and start the trackers at `step`."""
        settings = self.settings
        if self.accelerator is not None:
            self.accelerator.init_trackers(
                "mmkd", plain_settings(resolved(settings)), tracker_options(settings.output.name, step)
            )
        if rank() == 0:
            formula = self.cost.formula() if self.cost is not None else None
            if formula is not None:
                logger.info("%s", formula)
            measured = {"training_cost": formula, "peak_flops": self.peak_flops}
            write_json(self.folder.path / ENVIRONMENT_FILE, environment(measured))

    def close(self) -> None:
        """End the trackers, and draw the losses."""
        for tracker in self.accelerator.trackers if self.accelerator is not None else ():
            tracker.finish()
        if rank() == 0:
            draw_losses(self.folder.path / LOG_FILE, self.folder.path / CURVE_FILE)

    def write(self, line: Mapping[str, Any], batch: Mapping[str, Any], *, waited: float, seconds: float) -> None:
        """Add speed and memory of the step and write the line.

        Args:
            line: ``step``, ``epoch``, losses and rates; numbers that are not finite become null.
            batch: this process' rows, whose figures stand for those of all processes.
            waited: seconds spent waiting for the batch.
            seconds: seconds of the whole step, `waited` included.
        """
        if rank() > 0:
            return
        measured = self._speed(batch, waited, seconds) | teacher_use(batch) | {"memory_gb": memory_gb()}
        whole = {name: _plain(value) for name, value in {**line, **measured}.items()}
        self.folder.log(whole)
        self.shown = _shown(whole)
        if self.accelerator is not None:
            numbers = {name: value for name, value in whole.items() if value is not None and name != "step"}
            self.accelerator.log(numbers, step=int(line["step"]))

    def _speed(self, batch: Mapping[str, Any], waited: float, seconds: float) -> dict[str, float]:
        processes = world_size()
        speed = {
            "samples_per_second": round(len(batch["ids"]) * processes / seconds, 2),
            "data_time": round(waited / seconds, 4),
        }
        lengths = batch.get("text_lengths")
        if lengths:
            speed["tokens_per_second"] = round(sum(lengths) * processes / seconds, 1)
            speed["useful_tokens"] = round(padding_free_share(lengths, self.settings.micro_batch_size), 4)
            if self.cost is not None and self.peak_flops is not None:
                cost = self.cost.at_side(micro_batches(batch, None)[0]["pixel_values"].shape[-1])
                speed["mfu"] = round(cost.of(lengths) / seconds / self.peak_flops, 4)
        return speed


def timed(batches: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float, float]]:
    """Each batch, the seconds waited for it, and when the waiting began."""
    iterator = iter(batches)
    while True:
        began = time.perf_counter()
        batch = next(iterator, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - began, began


def report_skipped(line: dict[str, Any], ids: list[str], progress: Progress, allowed: int) -> None:
    """Add ``skipped`` to the line of a step that was not finite, and warn; called by every process.

    Args:
        line: ``step``, losses and rates.
        ids: this process' pairs.
        progress: with this step counted.
        allowed: consecutive skipped steps, with the last of which the run ends.

    Raises:
        ValueError: that many steps in a row were not finite; the message names the pairs.
    """
    line["skipped"] = progress.skipped
    values = ", ".join(f"{name} {value:g}" for name, value in line.items())
    message = f"not finite: {values}; the pairs of this step: {', '.join(gather_lists(ids))}"
    if progress.skipped_in_a_row >= allowed:
        raise ValueError(f"{message}. Lower --learning_rate, or check these pairs; the last checkpoint stays")
    if rank() == 0:
        logger.warning("step skipped, %s", message)


def teacher_use(batch: Mapping[str, Any]) -> dict[str, float]:
    """Each teacher's share of the rows, a row's available teachers counting equally.

    Returns:
        ``teacher_use/NAME``; together 1 where every row has a teacher; nothing for a batch without teachers.
    """
    features: Mapping[str, Mapping[str, Tensor]] | None = next((batch[k] for k in TEACHER_KEYS if k in batch), None)
    if not features:
        return {}
    names = sorted(features)
    masks = torch.stack([features[name]["mask"].float() for name in names], dim=1)
    shares = (masks / masks.sum(dim=1, keepdim=True).clamp(min=1)).mean(dim=0)
    return {f"teacher_use/{name}": round(share, 4) for name, share in zip(names, shares.tolist(), strict=True)}


def memory_gb() -> float:
    """Peak memory so far, in 10^9 bytes: of this process' GPU, or without one of the process itself."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e9, 3)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def _shown(line: Mapping[str, Any]) -> str:
    """A line for the progress bar."""
    parts = [f"loss {line['loss']:.4f}" if line.get("loss") is not None else "loss not finite"]
    parts.append(f"{line['samples_per_second']:.4g} pairs/s")
    parts += [f"{line['mfu']:.1%} of peak"] if "mfu" in line else []
    return ", ".join(parts)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def profiled_steps(folder: Path, steps: int | None) -> Iterator[Callable[[], None]]:
    """Record some steps of the first process with torch's profiler, after the first two.

    ``folder/profile`` gets ``trace.json``, for ``chrome://tracing`` or Perfetto, and ``operators.txt``, the most
    expensive operators.

    Args:
        folder: the run's.
        steps: how many to record; None for none.

    Yields:
        A function to call after each step.
    """
    if steps is None or rank() > 0:
        yield lambda: None
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=UNPROFILED_STEPS - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(
        activities=activities,
        schedule=schedule,
        on_trace_ready=lambda profiler: _write(profiler, folder / PROFILE_FOLDER),
        profile_memory=True,
    ) as profiler:
        yield profiler.step


def _write(profiler: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=TABLE_ROWS)
    (folder / "operators.txt").write_text(table, encoding="utf-8")


def tracker_options(name: str, step: int) -> dict[str, dict[str, Any]]:
    """Options of each tracker for a run of this name that resumes after `step`."""
    named = {"name": name}
    return {"tensorboard": {"purge_step": step + 1}, "wandb": {**named, "resume": "allow"}, "trackio": named}


def plain_settings(settings: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Settings as trackers accept them: one level, names joined by dots, other types as text."""
    flat: dict[str, str | int | float | bool] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in plain_settings(value).items()}
        else:
            flat[name] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return flat


def environment(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The environment of a run: versions, devices, processes and the commit of the code.

    Args:
        extra: further entries, as JSON values.
    """
    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if cuda else []
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": installed_versions(PACKAGES),
        "devices": devices or [platform.processor() or platform.machine()],
        "cuda": torch.version.cuda if cuda else None,
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "package_commit": git_commit(PACKAGE),
        "folder_commit": git_commit(Path.cwd()),
        **extra,
    }


def draw_losses(log: Path, output: Path) -> bool:
    """Plot the losses of a ``log.jsonl`` over steps as PNG, with their moving means.

    Args:
        log: the file.
        output: the PNG file to write.

    Returns:
        Whether it was written: it needs matplotlib and a log of at least two steps.
    """
    curves = _curves(log)
    if importlib.util.find_spec("matplotlib") is None or len(curves.get("loss", ())) < 2:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(curves), 3.2), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        steps, values = zip(*points, strict=True)
        window = max(1, len(values) // 50)
        means = [sum(values[max(0, k - window + 1) : k + 1]) / min(window, k + 1) for k in range(len(values))]
        axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
        axes.plot(steps, means, color="tab:blue", linewidth=1.6)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    figure.savefig(output, format="png", dpi=120, metadata={"Software": None})
    return True


def _curves(log: Path) -> dict[str, list[tuple[int, float]]]:
    """Points of the loss, its parts and the validation losses, thinned for the plot."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    if not lines:
        return {}
    first = list(lines[0])
    names = first[first.index("epoch") + 1 : first.index("gradient_norm")] if "gradient_norm" in first else ["loss"]
    names += sorted({name for line in lines for name in line if name.startswith("validation_loss")})
    thin = max(1, len(lines) // CURVE_POINTS)
    kept = [line for number, line in enumerate(lines) if number % thin == 0 or any(n not in first for n in line)]
    points = {name: [(line["step"], line[name]) for line in kept if line.get(name) is not None] for name in names}
    return {name: found for name, found in points.items() if found}
