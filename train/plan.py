"""Estimate what a training takes before it starts: memory, time and cost of each stage.

The model is built (or read) and measured on the CPU; nothing is trained. Every assumption is a setting, and is printed
beside the figures that rest on it. Exit code 1 means that a stage cannot run with these settings.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from mmkd.command.settings import check_arguments, check_limits, resolved, run, setting

PAPER = "paper"


@dataclass(kw_only=True)
class PlanSettings:
    """Estimate memory, time and cost of each stage.

    Example:
        mmkd plan --gpus 8 --gpu h100 --pairs 2900000 --batch_size 4096
    """

    gpus: int = setting(8, "number of GPUs, over all machines", above=0)
    gpu: str = setting("h100", "name of a GPU, such as b200, h100, a100, l40s or rtx-4090")
    model: str = setting(PAPER, "folder of a student, or paper: ViT-B/16 and BERT-base")
    pairs: int = setting(2_900_000, "number of training pairs", above=0)
    teachers: int = setting(9, "number of teachers to extract, each at the cost of the student's forward pass", least=0)
    pretrain_epochs: float = setting(20.0, "epochs of stage 1", above=0)
    distill_epochs: float = setting(20.0, "epochs of stage 2", above=0)
    batch_size: int = setting(4096, "global batch size [pairs]", above=0)
    micro_batch_size: int | None = setting(None, "pairs that a GPU encodes at once; null is its whole share")
    gradient_checkpointing: bool = setting(False, "recompute activations")
    precision: Literal["fp32", "bf16"] = setting("bf16", "precision of the forward pass")
    sharded: bool = setting(False, "shard weights and optimizer over the GPUs (FSDP2)")
    mean_tokens: float = setting(60.0, "mean length of a caption [tokens]", above=0)
    efficiency: float = setting(
        0.35, "share of a GPU's peak that a step reaches, mfu in the log of a run", above=0, most=1
    )
    cores_per_gpu: int = setting(8, "cores that read images for each GPU, --workers", above=0)
    images_per_core: float = setting(
        700.0, "images per second of one core; tests/benchmarks/loader.py measures it", above=0
    )
    price: float = setting(2.5, "price of a GPU for an hour, in your currency", least=0)
    output: Path | None = setting(None, "JSON file to write with the same figures")

    def __post_init__(self) -> None:
        """Refuse values out of range, see `check_limits`."""
        check_limits(self, vars(self))


if __name__ == "__main__":
    check_arguments(PlanSettings)  # before the imports that take seconds

from mmkd.encoders.weights import CONFIG_FILES, fetch, load_config
from mmkd.files import as_written, write_json
from mmkd.training.planning import Estimate, Hardware, ModelSize, Stage, estimate, fitting, measure
from modeling_mmkd import MMKDClipConfig, MMKDClipModel

EXTRACTED_AT_ONCE = 256


def main(settings: PlanSettings) -> None:
    """Measure, estimate and print.

    Raises:
        SystemExit: with 1 where a stage cannot run with these settings.
    """
    with as_written():
        size = measured_model(settings.model, settings.precision)
    hardware = hardware_of(settings)
    estimates = [estimate(stage, size, hardware) for stage in stages_of(settings)]
    print("\n".join(report(settings, size, estimates)))
    if settings.output is not None:
        write_json(settings.output, {"settings": resolved(settings), "stages": [asdict(each) for each in estimates]})
    if any(each.warnings for each in estimates):
        raise SystemExit(1)


def measured_model(name: str, precision: Literal["fp32", "bf16"]) -> ModelSize:
    """The size of the paper's student, or of the one in a folder, with random weights."""
    config = MMKDClipConfig() if name == PAPER else load_config(fetch(name, CONFIG_FILES[:1]))
    side = getattr(config.vision_config, "image_size", None)
    return measure(MMKDClipModel(config), side if isinstance(side, int) else 224, precision)


def stages_of(settings: PlanSettings) -> list[Stage]:
    """Pretraining, extraction and distillation."""

    def stage(name: str, epochs: float) -> Stage:
        return Stage(
            name=name,
            pairs=settings.pairs,
            epochs=epochs,
            batch_size=settings.batch_size,
            micro_batch_size=settings.micro_batch_size,
            gradient_checkpointing=settings.gradient_checkpointing,
        )

    at_once = EXTRACTED_AT_ONCE * settings.gpus
    extract = Stage(name="extract", pairs=settings.pairs, models=settings.teachers, trains=False, batch_size=at_once)
    return [stage("pretrain", settings.pretrain_epochs), extract, stage("distill", settings.distill_epochs)]


def hardware_of(settings: PlanSettings) -> Hardware:
    """The GPUs."""
    known = {field.name for field in fields(Hardware)}
    return Hardware(**{name: value for name, value in vars(settings).items() if name in known})


def commands(settings: PlanSettings, size: ModelSize) -> list[str]:
    """The command of each training stage, with the largest batch and micro-batch that fit."""
    found = []
    for stage in stages_of(settings):
        fits = fitting(stage, size, hardware_of(settings)) if stage.trains else None
        if fits is not None:
            micro = f" --micro_batch_size {fits.micro_batch_size}" if fits.micro_batch_size else ""
            again = " --gradient_checkpointing true" if fits.gradient_checkpointing else ""
            found.append(
                f"fits: mmkd {stage.name} --num_processes {settings.gpus} --batch_size {fits.batch_size}{micro}{again} "
                f"--precision {settings.precision} --epochs {stage.epochs:g} ..."
            )
    return found


def report(settings: PlanSettings, size: ModelSize, estimates: list[Estimate]) -> list[str]:
    """Lines of the plan: figures, assumptions, the commands with a batch that fits, hints and warnings."""
    lines = [f"{'stage':<10}{'steps':>10}{'hours':>10}{'GPU hours':>12}{'price':>12}{'GB per GPU':>12}  limited by"]
    for each in estimates:
        lines.append(
            f"{each.stage:<10}{each.steps:>10,}{each.hours:>10.1f}{each.gpu_hours:>12,.0f}{each.price:>12,.0f}"
            f"{each.memory_gb:>12.1f}  {each.limit}"
        )
    gpu_hours = sum(each.gpu_hours for each in estimates)
    price = sum(each.price for each in estimates)
    lines.append(f"{'total':<20}{sum(each.hours for each in estimates):>10.1f}{gpu_hours:>12,.0f}{price:>12,.0f}")
    features = settings.pairs * settings.teachers * 2 * size.dim * 2
    measured = (
        f"measured: {size.parameters / 1e6:.0f} M parameters; activations {size.image_bytes / 1e6:.0f} MB per image, "
        f"{size.token_bytes / 1e6:.2f} MB per token ({settings.precision})"
    )
    assumed = (
        f"assumed: {settings.gpus} x {settings.gpu} at {settings.efficiency:.0%} of peak; {settings.pairs:,} pairs; "
        f"{settings.mean_tokens:g} tokens per caption, 10 % padding; {settings.cores_per_gpu} cores per GPU, "
        f"{settings.images_per_core:g} images/s each; {settings.price:g} per GPU hour; communication overlaps with the "
        "backward pass; curate, screen, align and eval are small and not counted"
    )
    disk = f"features of {settings.teachers} teachers on disk: {features / 1e9:.0f} GB in half precision"
    hints = [f"hint: {hint}" for each in estimates for hint in each.hints]
    warnings = [f"warning: {warning}" for each in estimates for warning in each.warnings]
    return [*lines, "", measured, size.cost.formula(), assumed, disk, *commands(settings, size), *hints, *warnings]


if __name__ == "__main__":
    run(PlanSettings, main)
