"""Calibrate a model's predictions on labelled images: temperature, thresholds, conformal sets, abstention.

Everything is fitted on the validation split and reported on the test split, with 95 % intervals over groups (patients).
``calibration.json`` beside the weights holds one calibration for each set of labels, with the fingerprint of the
weights; `mmkd predict` uses that of its labels and sentences.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mmkd.command.settings import check_arguments, run, setting
from mmkd.evaluation.statistics.bootstrap import REPLICATES, SEED


@dataclass
class CalibrateSettings:
    """Calibrate a model's predictions on labelled images.

    Example:
        mmkd calibrate mmkd-clip --pairs pairs --labels labels.txt
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "data": "pairs labels templates mode",
        "statistics": "alpha conformal thresholds sensitivity abstain replicates seed",
        "computing": "batch_size workers device quiet",
    }

    model: str = setting(help="folder or Hub id of a model, or the name of a teacher", positional=True)
    pairs: Path = setting(help="folder of pairs with labels, in a validation and a test split")
    labels: str = setting("", "a,b,c, or a file: .txt, .csv or .yaml; by default the labels of the validation pairs")
    templates: str = setting("", "modality, a sentence with {}, or a file of them, for labels without sentences")
    mode: Literal["single", "multilabel", "normal"] = setting(
        "single", "one label applies, several (written a|b in the pairs), or normal against abnormal"
    )
    alpha: float = setting(0.1, "share of images whose conformal set may lack the true label", above=0, below=1)
    conformal: Literal["lac", "aps"] = setting("lac", "conformal score: smallest sets, or more even over images")
    thresholds: Literal["f1", "sensitivity"] = setting("f1", "(multilabel) highest F1, or --sensitivity")
    sensitivity: float = setting(
        0.95, "(multilabel) share of images with a finding that reach its threshold", above=0, below=1
    )
    abstain: float = setting(
        0.05, "share of labelled images that may be refused as none of the labels; 0 refuses none", least=0, below=1
    )
    replicates: int = setting(REPLICATES, "replicates of the bootstrap", least=100)
    seed: int = setting(SEED, "seed of the bootstrap")
    output: Path | None = setting(None, "folder for calibration.json; by default that of the model")
    batch_size: int = setting(32, "images at a time", least=1)
    workers: int = setting(0, "threads that read images; 0 takes this process' share of the cores", least=0)
    device: str = setting("auto", "cpu, cuda, cuda:1 ...; auto = a GPU if there is one")
    quiet: bool = setting(False, "no progress bar, print nothing")


if __name__ == "__main__":
    check_arguments(CalibrateSettings)  # before the imports that take seconds

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmkd.data.folder import PairFolder, open_pairs
from mmkd.data.images import open_image
from mmkd.data.table import Pair
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.zoo import load_encoder
from mmkd.evaluation.statistics.bootstrap import as_text, resampling_units
from mmkd.evaluation.tasks.classification import SEPARATOR
from mmkd.serving.calibration import (
    CALIBRATION_FILE,
    Booleans,
    Calibration,
    Floats,
    conformal_scores,
    fit_abstention,
    fit_quantile,
    fit_scale,
    fit_threshold,
    prediction_metrics,
    with_intervals,
    write_calibration,
)
from mmkd.serving.encoding import encode_items
from mmkd.serving.predictor import DEFAULT_THRESHOLD, Label, Predictor, default_cache, read_labels, read_templates

LEAST_IMAGES = 2


def main(settings: CalibrateSettings) -> None:
    """Fit on validation, report on test, write.

    Raises:
        FileNotFoundError: the model, the pairs or the labels are not there.
        ValueError: settings that cannot work, or pairs that allow no calibration.
    """
    folder = check(settings)
    pairs = open_pairs(settings.pairs)
    labels = read_labels(settings.labels, settings.mode) if settings.labels else labels_of(pairs, settings.mode)
    templates = read_templates(settings.templates) if settings.templates else []
    encoder = load_encoder(settings.model, settings.device)
    encoder.batch_size = settings.batch_size
    predictor = Predictor(encoder, labels, templates, settings.mode, cache=default_cache())
    chosen = {split: labelled(pairs, split, predictor) for split in ("validation", "test")}
    vectors = {split: encode(encoder, pairs, own, split, settings) for split, own in chosen.items()}
    kept, features = vectors["validation"]
    if len(kept) < LEAST_IMAGES:
        raise ValueError(
            f"{len(kept)} readable validation images have one of the labels; at least {LEAST_IMAGES} are needed"
        )
    calibration = fit(predictor, features, targets(kept, predictor), settings)
    before = report(predictor, *vectors["test"], uncalibrated(predictor), settings)
    predictor.calibrate(calibration)
    after = report(predictor, *vectors["test"], calibration, settings)
    found = {"test": after, "uncalibrated": {k: before[k] for k in ("ece", "brier") if k in before}}
    found["images"] = {"validation": len(kept), "test": len(vectors["test"][0])}
    write_calibration(folder, Calibration(**{**vars(calibration), "report": found}))
    if not settings.quiet:
        show(folder, calibration, found)


def check(settings: CalibrateSettings) -> Path:
    """The folder for ``calibration.json``; refuses settings that cannot work, before anything is loaded.

    Raises:
        ValueError: what came, what is allowed and what to do.
    """
    folder = settings.output or Path(settings.model)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder for {CALIBRATION_FILE}; name one with --output")
    return folder


def labels_of(pairs: PairFolder, mode: str) -> list[Label]:
    """The labels of the validation pairs; none for ``normal``, which has its own.

    Raises:
        ValueError: no validation pair has a label.
    """
    if mode == "normal":
        return []
    found = {label for pair in pairs.pairs if pair.split == "validation" for label in names_of(pair, mode)}
    if not found:
        raise ValueError(f"no validation pair of {pairs.path} has a label; add a validation split with labels")
    return [Label(name) for name in sorted(found)]


def names_of(pair: Pair, mode: str) -> list[str]:
    """The labels of a pair: several in ``multilabel``."""
    names = pair.label.split(SEPARATOR) if mode == "multilabel" else [pair.label]
    return [name.strip() for name in names if name.strip()]


def labelled(pairs: PairFolder, split: str, predictor: Predictor) -> list[Pair]:
    """The pairs of a split that have one of the labels; in ``multilabel`` all, since an image may show no finding."""
    own = [pair for pair in pairs.pairs if pair.split == split]
    if predictor.mode == "multilabel":
        return own
    return [pair for pair in own if pair.label.strip() in predictor.labels]


def encode(
    encoder: DualEncoder, folder: PairFolder, pairs: Sequence[Pair], split: str, settings: CalibrateSettings
) -> tuple[list[Pair], Tensor]:
    """The pairs whose images can be read, and their vectors ``(n, dim)``."""
    kept: list[Pair] = []
    parts = [torch.zeros(0, encoder.dim)]

    def take(items: list[Pair], vectors: Tensor) -> None:
        kept.extend(items)
        parts.append(vectors)

    def read(pair: Pair) -> Image.Image:
        return open_image(folder.image_path(pair))

    encode_items(encoder, pairs, read, take, f"encoding {split}", settings.workers, settings.quiet)
    return kept, torch.cat(parts)


def targets(pairs: Sequence[Pair], predictor: Predictor) -> Booleans:
    """Which labels apply to each pair, ``(n, labels)``."""
    place = {name: k for k, name in enumerate(predictor.labels)}
    found = np.zeros((len(pairs), len(place)), dtype=bool)
    for row, pair in enumerate(pairs):
        for name in names_of(pair, predictor.mode):
            if name in place:
                found[row, place[name]] = True
    return found


def fit(predictor: Predictor, features: Tensor, positive: Booleans, settings: CalibrateSettings) -> Calibration:
    """Fit everything on validation images: features ``(n, dim)``, and which labels apply ``(n, labels)``."""
    independent = settings.mode == "multilabel"
    similarities = predictor.similarities(features)
    scale = fit_scale(similarities, positive, independent)
    own = Calibration(predictor.fingerprint, predictor.key, predictor.mode, predictor.labels, scale)
    predictor.calibrate(own)
    probabilities = predictor.probabilities(features)
    thresholds, quantile, abstain_below = {}, float("inf"), None
    if independent:
        sensitivity = settings.sensitivity if settings.thresholds == "sensitivity" else None
        for k, name in enumerate(predictor.labels):
            shown = positive[:, k]
            enough = bool(shown.any())
            thresholds[name] = fit_threshold(probabilities[:, k], shown, sensitivity) if enough else DEFAULT_THRESHOLD
    else:
        quantile = fit_quantile(conformal_scores(probabilities, settings.conformal)[positive], settings.alpha)
        abstain_below = fit_abstention(similarities.max(axis=1), settings.abstain)
    found: dict[str, Any] = {"thresholds": thresholds, "conformal": settings.conformal, "alpha": settings.alpha}
    found |= {"quantile": quantile, "abstain_below": abstain_below, "abstain_rate": settings.abstain}
    return Calibration(**{**vars(own), **found, "images": len(positive)})


def uncalibrated(predictor: Predictor) -> Calibration:
    """The model's own scale, with thresholds of one half and sets of all labels."""
    thresholds = dict.fromkeys(predictor.labels, DEFAULT_THRESHOLD)
    key = (predictor.fingerprint, predictor.key, predictor.mode, predictor.labels)
    return Calibration(*key, predictor.model_scale, thresholds)


def report(
    predictor: Predictor, pairs: Sequence[Pair], features: Tensor, calibration: Calibration, settings: CalibrateSettings
) -> dict[str, Any]:
    """Figures on test images with intervals; empty where there are none."""
    if not pairs:
        return {}
    predictor.calibrate(calibration)
    probabilities: Floats = predictor.probabilities(features)
    best: Floats = predictor.similarities(features).max(axis=1)
    metrics = partial(prediction_metrics, probabilities, best, targets(pairs, predictor), calibration)
    units = resampling_units([pair.label for pair in pairs], [pair.group for pair in pairs])
    return with_intervals(metrics, units, settings.replicates, settings.seed)


def show(folder: Path, calibration: Calibration, found: dict[str, Any]) -> None:
    """Print what was fitted, and the figures."""
    counts = found["images"]
    print(f"{folder / CALIBRATION_FILE}: {len(calibration.labels)} labels, {calibration.mode}")
    print(f"  fitted on {counts['validation']} validation images: factor of the cosines {calibration.scale:.1f}")
    if calibration.mode == "multilabel":
        for name, threshold in calibration.thresholds.items():
            print(f"  threshold {threshold:.3f}  {name}")
    elif np.isinf(calibration.quantile):
        print(f"  too few images for sets at alpha {calibration.alpha:g}: every set holds all labels")
    if not found["test"]:
        print("  no test image has one of the labels: nothing is reported")
    for name, own in found["test"].items():
        was = found["uncalibrated"].get(name)
        before = f"  (before {was['value']:.3f})" if was else ""
        print(f"  {name:<12}{as_text(own)}{before}")


if __name__ == "__main__":
    run(CalibrateSettings, main)
