"""The settings that every training has, and their ranges."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mmkd.command.settings import check_limits, nearest, setting

RECALLS = (1, 5, 10)
AUTO, NONE = "auto", "none"
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
DIRECTIONS = ("image_to_text", "text_to_image")
METRICS = ("loss", "mean_recall", *(f"{way}_recall@{k}" for way in DIRECTIONS for k in RECALLS))


@dataclass(kw_only=True)
class RunSettings:
    """The settings that batches and loop share."""

    GROUPS: ClassVar[dict[str, str]] = {
        "optimisation": "seed micro_batch_size",
        "checkpoints and logging": "quiet",
    }

    seed: int = setting(42, "seed of order, crops, new layers and dropout", least=0)
    micro_batch_size: int | None = setting(
        None,
        "pairs encoded at once by each process, the same gradient in less memory; null encodes all at once",
        least=1,
    )
    quiet: bool = setting(False, "show no progress bar")


@dataclass(kw_only=True)
class ModelSettings:
    """Settings of the model that every kind of training has."""

    GROUP: ClassVar[str] = "model"

    freeze: list[str] = setting(
        factory=list, help="frozen modules: vision_model, text_model.embeddings, text_model[:4]"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, more time")
    attention: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = setting(
        None, "attention implementation, by default torch's choice; flash needs its package, a GPU and bf16"
    )
    compile: bool = setting(False, "compile the towers: minutes at the start, then faster steps; not the same bytes")


@dataclass(kw_only=True)
class BatchSettings(RunSettings):
    """How pairs become batches."""

    GROUP: ClassVar[str] = "data"

    batch_size: int = setting(64, "global batch size over all processes [pairs]", least=2)
    crop: Literal["random", "center"] = setting("random", "crop of training images: a random part, or the center")
    crop_area: float = setting(0.9, "smallest area of a random crop, as a share of the image", above=0, most=1)
    workers: int = setting(2, "processes that read images, for each training process", least=0)
    cache_frozen_towers: Path | None = setting(
        None, "folder for the outputs of frozen towers, encoded once for all runs that name it; needs --crop center"
    )


@dataclass(kw_only=True)
class TaskLossSettings:
    """The task loss, of images and their captions."""

    GROUP: ClassVar[str] = "losses"

    positives: Literal["pair", "caption"] = setting(
        "pair", "positives of the task loss: the own pair, or all of an equal caption, such as views of one report"
    )
    task_form: Literal["softmax", "sigmoid"] = setting(
        "softmax", "task loss by a softmax over the batch (InfoNCE), or a sigmoid for every image and caption (SigLIP)"
    )
    prefix_widths: list[int] = setting(
        factory=list, help="task loss also of the first N numbers of embeddings, which may be cut to N (Matryoshka)"
    )


@dataclass(kw_only=True)
class LoopSettings(RunSettings):
    """The settings of the training loop."""

    GROUP: ClassVar[str] = "optimisation"
    GROUPS: ClassVar[dict[str, str]] = {
        "checkpoints and logging": "checkpoint_every checkpoints_kept trackers peak_tflops profile_steps overwrite",
    }

    output: Path = setting(help="folder to write; OUTPUT.partial while running, from which the same command resumes")
    epochs: int = setting(1, "passes over the pairs", least=1)
    max_steps: int | None = setting(None, "maximum number of training steps; null trains all epochs", least=1)
    learning_rate: float = setting(5e-5, "peak learning rate, reached after the warm-up, then cosine to 0", above=0)
    learning_rate_factors: dict[str, float] = setting(
        factory=dict, help="factors of the learning rate by module, such as vision_model: 0.1"
    )
    layer_decay: float = setting(
        1.0, "factor of the learning rate from each layer of a tower to the one below", above=0, most=1
    )
    warmup_steps: int = setting(0, "linear warm-up [steps]", least=0)
    weight_decay: float = setting(0.2, "weight decay of AdamW; none on biases, norms and scales")
    clip_norm: float | None = setting(1.0, "maximum gradient norm; null disables clipping", above=0)
    ema_decay: float | None = setting(
        None,
        "decay per step of the exponential moving average of the weights, which is the output; null disables it",
        above=0,
        below=1,
    )
    precision: Literal["fp32", "bf16"] = setting("fp32", "precision of the model's forward pass; losses are fp32")
    tf32: bool = setting(True, "on GPUs, fp32 products in TF32, except the similarities of losses")
    dropout: float = setting(
        0.0, "probability of every dropout layer; above 0 results depend on the number of processes", least=0, below=1
    )
    checkpoint_every: int = setting(1000, "interval of checkpoints [steps]", least=1)
    checkpoints_kept: int = setting(2, "number of newest checkpoints to keep", least=1)
    skipped_in_a_row: int = setting(
        3, "stop after this many consecutive steps that were not finite and skipped", least=1
    )
    trackers: list[str] = setting(
        factory=lambda: ["auto"], help="tensorboard, wandb, trackio ...; auto is TensorBoard where installed; none"
    )
    peak_tflops: float | None = setting(
        None, "peak of one device for the log's MFU; null takes it from a GPU's name", above=0
    )
    profile_steps: int | None = setting(
        None, "steps to record with torch's profiler, after two; null disables it", least=1
    )
    overwrite: bool = setting(False, "replace OUTPUT if it exists")


def check(settings: LoopSettings) -> None:
    """Refuse values out of range.

    Raises:
        ValueError: the message names the setting, its value and what is allowed.
    """
    check_limits(settings, vars(settings))
    chosen_trackers(settings.trackers)
    for part, factor in settings.learning_rate_factors.items():
        if not factor > 0:
            raise ValueError(f"--learning_rate_factors.{part} is {factor}; it must be above 0, or --freeze {part}")


def chosen_trackers(names: Sequence[str]) -> list[str]:
    """The trackers to use: ``auto`` is TensorBoard if it is installed, ``none`` is no tracker.

    Raises:
        ValueError: an unknown name, a tracker that is not installed, or ``auto`` or ``none`` beside others.
    """
    if list(names) == [AUTO]:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    if list(names) == [NONE]:
        return []
    for name in names:
        if name not in TRACKERS:
            allowed = ", ".join(TRACKERS)
            raise ValueError(f"--trackers {name}{nearest(name, TRACKERS)}: give {allowed}, or {AUTO} or {NONE} alone")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--trackers {name} is not installed; run `pip install {name}`, or give {NONE}")
    return list(names)


@dataclass(kw_only=True)
class ValidationSettings(BatchSettings):
    """Validation during training."""

    GROUP: ClassVar[str] = "validation"

    validate_every: int | None = setting(None, "interval of validation [steps]; null disables it", least=1)
    best_metric: str | None = setting(
        None, f"write the weights that are best by this metric, null the last; one of {', '.join(METRICS)}"
    )
    validation_pairs: int = setting(5000, "maximum number of validation pairs", least=2)
    hold_out: float = setting(
        0.0,
        "share of the training groups held out for validation, for a folder without a validation split",
        least=0,
        below=1,
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read.

        Raises:
            ValueError: the message names the setting and what is allowed.
        """
        check_limits(self, vars(self))
        if self.best_metric is not None and self.best_metric not in METRICS:
            hint, allowed = nearest(self.best_metric, METRICS), ", ".join(METRICS)
            raise ValueError(f"--best_metric {self.best_metric} is not measured{hint}; allowed: {allowed}")
        if self.best_metric is not None and self.validate_every is None:
            raise ValueError(f"--best_metric {self.best_metric} needs --validate_every STEPS")
        if self.hold_out and self.validate_every is None:
            raise ValueError(f"--hold_out {self.hold_out} needs --validate_every STEPS, or those pairs are never used")
