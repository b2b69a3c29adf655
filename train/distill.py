"""Stage 2: distil the stored features of many teachers into one student.

Teachers are not run here: their features were extracted once, and every step reads a few kilobytes of them. Reads
``pairs/``, raw features (relational loss), aligned features (feature and interactive losses) and a stage-1 model;
writes a folder for ``from_pretrained``. ``--recipe paper`` is the authors' loss with its slips, each of which is also a
setting of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers.utils.logging import disable_progress_bar

from mmkd.data.batches import pair_batches
from mmkd.data.features import TeacherFeatures
from mmkd.data.published_features import FeatureKind
from mmkd.data.records import PairFolder, open_pairs
from mmkd.loop import LoopSettings, fit, start
from mmkd.objectives import ALIGNED_LOSSES, DistillObjective, checked_weights, require_width
from mmkd.provenance import teachers_of, training_provenance
from mmkd.settings import run, setting
from mmkd.student import load_student, save_student
from mmkd.trainable import ModelSettings, make_trainable
from mmkd.validation import ValidationSettings, validation_of

RECIPES: dict[str, dict[str, Any]] = {
    "default": {
        "losses": {"task": 1.0, "feature": 1.0, "interactive": 0.0, "relational": 1.0},
        "target": "mean",  # of the sample's available teachers, each step
        "target_norm": "unit",
        "feature_form": "cosine",
        "interactive_scale": "learnable",
    },
    "paper": {
        "losses": {"task": 1.0, "feature": 50.0, "interactive": 1.0, "relational": 0.0},
        "target": "random",  # one available teacher, drawn anew each epoch
        "target_norm": "stored",
        "feature_form": "squared",
        "interactive_scale": "constant",  # ln(1/0.07), not exponentiated and not learned
    },
}


@dataclass(kw_only=True)
class DistillSettings(LoopSettings, ModelSettings, ValidationSettings):
    """Distil the stored features of many teachers into one student."""

    pairs: Path = setting(help="folder of pairs, ours or the authors' published one; the training split is used")
    model: str = setting(help="folder or Hub id of the stage-1 student")
    features: Path | None = setting(None, "raw teacher features, for the relational loss")
    aligned: Path | None = setting(None, "aligned teacher features, for the feature and interactive losses")
    teachers: list[str] = setting(factory=list, help="teachers to learn from, by default all")
    recipe: Literal["default", "paper"] = setting("default", "gives the following settings where they are not given")
    losses: dict[str, float] = setting(factory=dict, help="weights of task, feature, interactive, relational")
    target: Literal["mean", "random"] | None = setting(
        None, "of the available teachers, or one of them drawn each epoch"
    )
    target_norm: Literal["unit", "stored"] | None = setting(None, "aligned features of unit norm, or as stored")
    feature_form: Literal["cosine", "squared"] | None = setting(None, "1 - cos, or mean squared difference")
    interactive_scale: Literal["learnable", "constant"] | None = setting(None, "exp'd and learned, or ln(1/0.07)")
    relational_scale: float = setting(20.0, "inverse temperature of the relational loss")
    crop: Literal["random", "center"] = setting("random", "crop of training images: 90-100 % of the area, or none")

    def __post_init__(self) -> None:
        """Take from the recipe what was not given, so that the saved settings say everything."""
        super().__post_init__()
        preset = RECIPES[self.recipe]
        self.losses = checked_weights({**preset["losses"], **self.losses})
        self.target = self.target or preset["target"]
        self.target_norm = self.target_norm or preset["target_norm"]
        self.feature_form = self.feature_form or preset["feature_form"]
        self.interactive_scale = self.interactive_scale or preset["interactive_scale"]


def main(settings: DistillSettings) -> None:
    """Distil and write the folder."""
    accelerator = start(settings)
    if settings.quiet:
        disable_progress_bar()
    folder = open_pairs(settings.pairs, "train")
    features, aligned = open_features(settings, folder)
    model, processor = load_student(settings.model)
    if aligned is not None:
        require_width(aligned.dims, model.config.projection_dim)
    make_trainable(model, settings)
    batches = pair_batches(
        folder,
        processor,
        batch_size=settings.batch_size,
        crop=settings.crop,
        workers=settings.workers,
        seed=settings.seed,
        features=features,
        aligned=aligned,
    )
    validation = validation_of(
        settings,
        settings.pairs,
        processor,
        batch_size=settings.batch_size,
        workers=settings.workers,
        seed=settings.seed,
        features=features,
        aligned=aligned,
    )
    teachers = teachers_of([settings.features, settings.aligned], settings.teachers)
    provenance = training_provenance("distill", folder, [settings.model], teachers)
    fit(
        accelerator,
        objective(settings, model),
        batches,
        settings,
        lambda path: save_student(path, model, processor, provenance),
        validation,
    )


def objective(settings: DistillSettings, model: Any) -> DistillObjective:
    """The losses that the settings name."""
    assert settings.target and settings.target_norm and settings.feature_form and settings.interactive_scale
    return DistillObjective(
        model,
        settings.losses,
        target=settings.target,
        target_norm=settings.target_norm,
        feature_form=settings.feature_form,
        interactive_scale=settings.interactive_scale,
        relational_scale=settings.relational_scale,
        seed=settings.seed,
    )


def open_features(
    settings: DistillSettings, folder: PairFolder
) -> tuple[TeacherFeatures | None, TeacherFeatures | None]:
    """Raw and aligned features, each only when a loss with a weight reads it.

    Raises:
        ValueError: a loss needs features that were not given, or none of the pairs has any.
    """
    raw_losses = [name for name in ("relational",) if settings.losses[name]]
    aligned_losses = [name for name in ALIGNED_LOSSES if settings.losses[name]]
    return (
        _open("features", settings.features, "raw", raw_losses, settings, folder),
        _open("aligned", settings.aligned, "aligned", aligned_losses, settings, folder),
    )


def _open(
    name: str, path: Path | None, kind: FeatureKind, losses: list[str], settings: DistillSettings, folder: PairFolder
) -> TeacherFeatures | None:
    if not losses:
        return None
    if path is None:
        raise ValueError(f"the loss {losses[0]} needs --{name} FOLDER; give it, or set --losses.{losses[0]} 0")
    opened = TeacherFeatures.open(path, settings.teachers or None, kind)
    if not opened.seen([pair.id for pair in folder.pairs]).any():
        raise ValueError(f"--{name} {path} has features for none of the training pairs of {settings.pairs}")
    return opened


if __name__ == "__main__":
    run(DistillSettings, main)
