"""Calibration of predictions on labelled images: temperature, thresholds, conformal sets, abstention.

`Calibration` holds what `mmkd calibrate` has found for one set of labels; ``calibration.json`` beside the weights holds
one for each set, and the fingerprint of the weights.

- *Temperature* (Guo et al. 2017): the factor of the cosines with the least negative log-likelihood.
- *Thresholds* of findings: the highest F1, or the highest threshold with a chosen sensitivity.
- *Conformal sets* (split conformal): with ``n`` labelled images, the scores of their true labels have the quantile
  ``ceil((n + 1)(1 - alpha)) / n``; the set of a further image, all labels whose score is at most that, holds the true
  label with a probability of at least ``1 - alpha``. This holds if images are exchangeable, on average over images: not
  for each label, and not on images of another hospital.
- *Abstention*: an image whose cosine with the most similar label is below that of all but a chosen share of the
  labelled images is none of the labels. At most this share of images of the same kind is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mmkd.evaluation.statistics.bootstrap import ResamplingUnits, interval, plain, replicate
from mmkd.evaluation.statistics.metrics import calibration_error, share_of, weighted_mean
from mmkd.files import exclusive, read_json, write_json

CALIBRATION_FILE = "calibration.json"
VERSION = 1

SCALES = (0.1, 1e4)  # between which the factor of the cosines is sought

Conformal = Literal["lac", "aps"]
Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True)
class Calibration:
    """What was found for one set of labels.

    Attributes:
        fingerprint: of the weights.
        key: of the labels; see `mmkd.serving.predictor.label_key`.
        mode: ``single``, ``multilabel`` or ``normal``.
        labels: their names.
        scale: factor of the cosines, the inverse of the temperature.
        thresholds: (multilabel) least probability of each label.
        conformal: (single, normal) how sets are made: by the probability of each label (``lac``), or by the sum of the
            probabilities from the highest to it (``aps``).
        alpha: share of images whose set may lack the true label.
        quantile: of the conformal scores; infinite where there were too few images, which gives sets of all labels.
        abstain_below: least cosine with the most similar label; None never abstains.
        abstain_rate: share of labelled images that may be refused.
        images: how many there were.
        report: figures on the test split.
    """

    fingerprint: str
    key: str
    mode: str
    labels: list[str]
    scale: float
    thresholds: dict[str, float] = field(default_factory=dict)
    conformal: Conformal = "lac"
    alpha: float = 0.1
    quantile: float = math.inf
    abstain_below: float | None = None
    abstain_rate: float = 0.0
    images: int = 0
    report: dict[str, Any] = field(default_factory=dict)

    def require(self, fingerprint: str, key: str) -> None:
        """Refuse other weights or labels.

        Raises:
            ValueError: they differ.
        """
        if self.fingerprint != fingerprint:
            raise ValueError("the calibration is of other weights; calibrate again, or leave it out")
        if self.key != key:
            raise ValueError("the calibration is of other labels, sentences or another mode; calibrate again")

    def conformal_set(self, probabilities: Floats) -> Booleans:
        """Which labels ``(labels,)`` the set holds, from their probabilities."""
        chosen: Booleans = conformal_scores(probabilities[None], self.conformal)[0] <= self.quantile
        return chosen

    def abstains(self, best: float) -> bool:
        """Whether an image is none of the labels, from its cosine with the most similar one."""
        return self.abstain_below is not None and best < self.abstain_below


def conformal_scores(probabilities: Floats, method: Conformal) -> Floats:
    """Nonconformity ``(n, labels)`` of each label: how unusual the image were, were it the true one.

    ``lac``: ``1 - p_k`` (Sadinle et al. 2019). ``aps``: the sum of all probabilities that are at least ``p_k`` (Romano
    et al. 2020, without randomisation, which makes sets larger and coverage at least as high).
    """
    if method == "lac":
        return 1 - probabilities
    order = np.argsort(-probabilities, axis=1, kind="stable")
    sums = np.cumsum(np.take_along_axis(probabilities, order, axis=1), axis=1)
    found = np.empty_like(sums)
    np.put_along_axis(found, order, sums, axis=1)
    return found


def fit_scale(similarities: Floats, positive: Booleans, independent: bool) -> float:
    """The factor of the cosines with the least negative log-likelihood; see `Predictor` for the probabilities.

    Args:
        similarities: ``(n, labels)``.
        positive: which labels apply, ``(n, labels)``; one of each row unless ``independent``.
        independent: each label by itself.
    """
    from scipy.optimize import minimize_scalar

    def loss(logarithm: float) -> float:
        scaled = np.exp(logarithm) * similarities
        if independent:
            return float(np.logaddexp(0, np.where(positive, -scaled, scaled)).mean())
        return float((np.logaddexp.reduce(scaled, axis=1) - scaled[positive]).mean())

    bounds = tuple(np.log(SCALES))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x))


def fit_threshold(probabilities: Floats, positive: Booleans, sensitivity: float | None) -> float:
    """The least probability of a finding.

    Args:
        probabilities: of it, ``(n,)``.
        positive: which images show it, ``(n,)``, at least one.
        sensitivity: the share of these that must reach the threshold, which is the highest that does; None for the
            threshold with the highest F1, the lowest of equals.
    """
    if sensitivity is not None:
        needed = math.ceil(sensitivity * positive.sum() - 1e-9)
        return float(np.sort(probabilities[positive])[::-1][max(needed, 1) - 1])
    candidates = np.unique(probabilities)
    above = len(probabilities) - np.searchsorted(np.sort(probabilities), candidates)
    true = positive.sum() - np.searchsorted(np.sort(probabilities[positive]), candidates)
    return float(candidates[np.argmax(2 * true / (above + positive.sum()))])


def fit_quantile(scores: Floats, alpha: float) -> float:
    """The ``ceil((n + 1)(1 - alpha))``-th smallest of the scores ``(n,)`` of true labels; infinite if n is small."""
    place = math.ceil((len(scores) + 1) * (1 - alpha) - 1e-9)
    return float(np.sort(scores)[place - 1]) if place <= len(scores) else math.inf


def fit_abstention(best: Floats, rate: float) -> float | None:
    """The cosine below which at most a share ``rate`` of images falls, from the best cosines ``(n,)``.

    None where there are too few images for this share.
    """
    place = math.floor(rate * (len(best) + 1) + 1e-9)
    return float(np.sort(best)[place - 1]) if place >= 1 else None


def prediction_metrics(
    probabilities: Floats, best: Floats, positive: Booleans, calibration: Calibration, weights: Floats
) -> dict[str, Floats]:
    """Figures of calibrated predictions for weighted images.

    Args:
        probabilities: ``(n, labels)``.
        best: cosines with the most similar label, ``(n,)``.
        positive: which labels apply, ``(n, labels)``.
        calibration: of the labels.
        weights: ``(replicates, n)``.

    Returns:
        ``(replicates,)`` of each: ``ece`` and ``brier``; for findings also ``sensitivity`` and ``specificity`` over all
        labels at the thresholds, else ``accuracy``, ``coverage`` and ``set_size`` of the conformal sets, and
        ``abstained``.
    """
    brier = weighted_mean(np.square(probabilities - positive).sum(axis=1), weights)
    if calibration.mode == "multilabel":
        found = probabilities >= np.array([calibration.thresholds[name] for name in calibration.labels])
        return {
            "ece": calibration_error(probabilities, positive, weights),
            "brier": brier / probabilities.shape[1],
            "sensitivity": share_of(found, positive, weights),
            "specificity": share_of(~found, ~positive, weights),
        }
    right = positive[np.arange(len(positive)), probabilities.argmax(axis=1)]
    chosen = conformal_scores(probabilities, calibration.conformal) <= calibration.quantile
    refused = np.array([calibration.abstains(value) for value in best], dtype=np.float64)
    return {
        "ece": calibration_error(probabilities.max(axis=1)[:, None], right[:, None], weights),
        "brier": brier,
        "accuracy": weighted_mean(right.astype(np.float64), weights),
        "coverage": share_of(chosen, positive, weights),
        "set_size": weighted_mean(chosen.sum(axis=1).astype(np.float64), weights),
        "abstained": weighted_mean(refused, weights),
    }


def with_intervals(
    metrics: Callable[[Floats], dict[str, Floats]], units: ResamplingUnits, replicates: int, seed: int
) -> dict[str, dict[str, float | None]]:
    """Each metric with its 95 % interval over groups of images, as JSON values; None where it is undefined."""
    points, drawn = replicate(lambda weights: metrics(weights["image"]), {"image": units}, replicates, seed)
    return {
        name: dict(zip(("value", "low", "high"), map(plain, (points[name], *interval(drawn[name]))), strict=True))
        for name in points
    }


def read_calibration(folder: Path, fingerprint: str, key: str) -> Calibration | None:
    """The calibration of a set of labels; None where the folder has none for it.

    Raises:
        ValueError: the file is damaged, or of other weights.
    """
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        return None
    content = _read(path)
    if content.get("fingerprint") != fingerprint:
        raise ValueError(f"{path.name} is of other weights; run `mmkd calibrate` again, or remove it")
    entry = content["sets"].get(key)
    if entry is None:
        return None
    try:
        quantile = math.inf if entry["quantile"] is None else entry["quantile"]
        found = Calibration(**{**entry, "fingerprint": fingerprint, "key": key, "quantile": quantile})
        _check(found)
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path.name} is damaged ({error}); run `mmkd calibrate` again") from None
    return found


def _check(found: Calibration) -> None:
    """Raise on values that no calibration has: `math.isnan` takes numbers alone."""
    numbers = [found.scale, found.alpha, found.quantile, found.abstain_rate, *found.thresholds.values()]
    numbers += [] if found.abstain_below is None else [found.abstain_below]
    if any(map(math.isnan, numbers)) or not 0 < found.scale < math.inf:
        raise ValueError("its numbers are impossible")
    if found.conformal not in get_args(Conformal):
        raise ValueError(f"unknown method {found.conformal!r}")
    if found.mode == "multilabel" and {*found.thresholds} != {*found.labels}:
        raise ValueError("its thresholds are of other labels")


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Add a calibration to the folder's, in place of one of the same labels; those of other weights are dropped."""
    path = folder / CALIBRATION_FILE
    entry = asdict(calibration)
    del entry["fingerprint"], entry["key"]
    entry["quantile"] = None if math.isinf(calibration.quantile) else calibration.quantile
    with exclusive(path):  # another run may add one between reading and writing
        content = _read(path) if path.is_file() else {}
        sets = content["sets"] if content.get("fingerprint") == calibration.fingerprint else {}
        sets[calibration.key] = entry
        write_json(path, {"version": VERSION, "fingerprint": calibration.fingerprint, "sets": sets})


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or content.get("version") != VERSION or not isinstance(content.get("sets"), dict):
        raise ValueError(f"{path.name} is not a calibration of this version; run `mmkd calibrate` again, or remove it")
    return content
