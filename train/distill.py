"""Stage 2: distil the stored features of many teachers into one student.

Teachers are not run here: their features were extracted once, and every step reads a few kilobytes of them. Reads
``pairs/``, raw features (affinity, relational, heads), aligned features (feature, interactive) and a stage-1 model;
writes a folder for ``from_pretrained``. ``--recipe paper`` is the authors' loss with the bugs in their release, each of
which is also a setting of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mmkd.command.settings import check_arguments, run, setting
from mmkd.distillation.options import LOSSES_OF_IMAGES, DistillOptions
from mmkd.training.settings import LoopSettings, ModelSettings, ValidationSettings


@dataclass(kw_only=True)
class DistillSettings(DistillOptions, LoopSettings, ModelSettings, ValidationSettings):
    """Distil the stored features of many teachers into one student.

    Example:
        mmkd distill --pairs screened --features features --model stage1 --output mmkd-clip
    """

    GROUPS: ClassVar[dict[str, str]] = {"data": "features aligned teachers", "losses": "standardizer"}

    pairs: Path = setting(help="folder of pairs, curated or the authors' published one; the training split is used")
    model: str = setting(help="folder or Hub id of the stage-1 student")
    features: Path | None = setting(None, "raw teacher features, for the losses affinity, relational and heads")
    aligned: Path | None = setting(None, "aligned teacher features, for the losses feature and interactive")
    images: Path | None = setting(
        None, "folder of pairs whose images, without their captions, join every batch in the losses of images alone"
    )
    teachers: list[str] = setting(factory=list, help="teachers to distil; empty takes all")
    standardizer: Path | None = setting(None, "folder of `mmkd align --aligner phi-s`, for standardized heads")

    def __post_init__(self) -> None:
        """Check both groups of settings, and fill in what the recipe gives."""
        DistillOptions.__post_init__(self)
        ValidationSettings.__post_init__(self)
        if self.images is not None and not any(self.losses[name] for name in LOSSES_OF_IMAGES):
            raise ValueError(
                f"--images {self.images} needs a weight of {' or '.join(LOSSES_OF_IMAGES)}; give one, "
                "or leave --images out"
            )


if __name__ == "__main__":
    check_arguments(DistillSettings)  # before the imports that take seconds

from mmkd.data.features import FeatureKind
from mmkd.data.features.lookup import (
    MODALITIES,
    Features,
    Modality,
    TeacherFeatures,
    available_features,
    seen_pairs,
)
from mmkd.data.folder import PairFolder, hold_out_split, open_pairs
from mmkd.data.provenance import teachers_of
from mmkd.data.table import Pair
from mmkd.distillation.heads import TeacherHeads, dispersions_of, open_standardizer
from mmkd.distillation.objective import DistillObjective
from mmkd.distillation.options import require_width
from mmkd.distillation.weighting import spread_scales
from mmkd.student.folder import load_student, save_student, training_provenance
from mmkd.training.batches import training_batches
from mmkd.training.dataset import TeacherStores
from mmkd.training.loop import fit, start
from mmkd.training.optimizer import make_trainable
from mmkd.training.validation import validation_of
from modeling_mmkd.modeling_mmkd import tower_width, vision_width

DISPERSION_PAIRS, SPREAD_PAIRS = 8192, 2048


def main(settings: DistillSettings) -> None:
    """Distil and write the folder."""
    accelerator = start(settings)
    folder, held_out = hold_out_split(open_pairs(settings.pairs, "train"), settings.hold_out)
    images = None if settings.images is None else open_pairs(settings.images, "train")
    features = open_features(settings, folder)
    if images is not None:
        for name, store in features.items():
            if not seen_pairs(store, images.pairs, f"--{name}").any():
                raise ValueError(f"the {name} features hold none of the images of {settings.images}; extract them, too")
    model, processor = load_student(settings.model)
    if "aligned" in features:
        require_width(features["aligned"].dims, model.config.projection_dim)
    make_trainable(model, settings)
    batches = training_batches(folder, model, processor, settings, features, images)
    validation = validation_of(settings, settings.pairs, processor, held_out, features)
    teachers = teachers_of([settings.features, settings.aligned], settings.teachers)
    provenance = training_provenance("distill", folder, [settings.model], teachers)
    objective = distill_objective(settings, model, folder.pairs, features)

    def write(path: Path) -> None:
        save_student(path, model, processor, provenance)
        if objective.heads is not None:
            objective.heads.save(path)

    fit(accelerator, objective, batches, settings, write, validation)


def distill_objective(
    settings: DistillSettings, model: Any, pairs: Sequence[Pair], features: TeacherStores
) -> DistillObjective:
    """The losses that the settings name, with weights of teachers and heads for them.

    Raises:
        ValueError: an unknown teacher or modality, or heads without a standardizer that fits.
    """
    teachers = list(dict.fromkeys(name for store in features.values() for name in store.names))
    by_modality = any("/" in name for name in settings.teacher_weights)
    settings.require_known(teachers, sorted({pair.modality for pair in pairs}) if by_modality else [])
    heads, dispersions = None, {}
    if settings.losses["heads"]:
        raw, standardizer = features["teachers"], None
        if settings.head_form == "standardized":
            standardizer = open_standardizer(settings.standardizer, raw.dims)
        else:
            dispersions = dispersions_of(features_of_some(raw, pairs, DISPERSION_PAIRS))
        heads = TeacherHeads(head_dims(settings, model), raw.dims, standardizer)
    scales = {}
    if settings.teacher_temperature == "spread" and "teachers" in features:
        scales = spread_scales(features_of_some(features["teachers"], pairs, SPREAD_PAIRS), settings.spread_factor)
    return DistillObjective(model, settings, seed=settings.seed, heads=heads, dispersions=dispersions, scales=scales)


def head_dims(settings: DistillSettings, model: Any) -> dict[Modality, int]:
    """Width of what the heads read.

    Raises:
        ValueError: the trunk, and no tower is trained.
    """
    if settings.head_input == "embedding":
        return dict.fromkeys(MODALITIES, model.config.projection_dim)
    towers = model.vision_model, model.text_model
    if not any(parameter.requires_grad for tower in towers for parameter in tower.parameters()):
        raise ValueError("--head_input trunk trains the towers, and both are frozen; train one, or take embedding")
    return {"image": vision_width(model.vision_model), "text": tower_width(model.config.text_config)}


def features_of_some(features: TeacherFeatures, pairs: Sequence[Pair], count: int) -> Features:
    """Features of about `count` pairs, evenly picked, as far as screening allows them."""
    chosen = pairs[:: max(1, len(pairs) // count)]
    return available_features(features, [pair.id for pair in chosen], [pair.teachers for pair in chosen])


def open_features(settings: DistillSettings, folder: PairFolder) -> TeacherStores:
    """Raw features as ``teachers`` and aligned ones as ``aligned``, each only when a loss with a weight reads it.

    Raises:
        ValueError: a loss needs features that were not given, or none of the pairs has any.
    """
    opened = {
        "teachers": _open("features", settings.features, "raw", settings.reasons_for_raw(), settings, folder),
        "aligned": _open("aligned", settings.aligned, "aligned", settings.reasons_for_aligned(), settings, folder),
    }
    return {key: store for key, store in opened.items() if store is not None}


def _open(
    name: str, path: Path | None, kind: FeatureKind, reasons: list[str], settings: DistillSettings, folder: PairFolder
) -> TeacherFeatures | None:
    if not reasons:
        return None
    if path is None:
        off = "null" if reasons[0] == "false_negatives" else "0"
        raise ValueError(f"--{reasons[0]} needs --{name} FOLDER; give it, or set --{reasons[0]} {off}")
    opened = TeacherFeatures.open(path, settings.teachers or None, kind)
    if not seen_pairs(opened, folder.pairs, f"--{name} {path}").any():
        raise ValueError(f"--{name} {path} has features for none of the training pairs of {settings.pairs}")
    return opened


if __name__ == "__main__":
    run(DistillSettings, main)
