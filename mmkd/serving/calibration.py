"""Calibration of predictions on labelled images: temperature, thresholds, conformal sets, abstention.

`Calibration` holds what `mmkd calibrate` has found for one set of labels; ``calibration.json`` beside the weights holds
one for each set, and the fingerprint of the weights.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmkd.files import read_json, write_json

CALIBRATION_FILE = "calibration.json"
VERSION = 1

Conformal = Literal["lac", "aps"]
Floats = NDArray[np.float64]


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

    def conformal_set(self, probabilities: Floats) -> NDArray[np.bool_]:
        """Which labels ``(labels,)`` the set holds, from their probabilities."""
        chosen: NDArray[np.bool_] = conformal_scores(probabilities[None], self.conformal)[0] <= self.quantile
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
        return Calibration(**{**entry, "fingerprint": fingerprint, "key": key, "quantile": quantile})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path.name} is damaged ({error}); run `mmkd calibrate` again") from None


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Add a calibration to the folder's, in place of one of the same labels; those of other weights are dropped."""
    path = folder / CALIBRATION_FILE
    sets: dict[str, Any] = {}
    if path.is_file():
        content = _read(path)
        sets = content["sets"] if content.get("fingerprint") == calibration.fingerprint else {}
    entry = asdict(calibration)
    del entry["fingerprint"], entry["key"]
    entry["quantile"] = None if math.isinf(calibration.quantile) else calibration.quantile
    sets[calibration.key] = entry
    write_json(path, {"version": VERSION, "fingerprint": calibration.fingerprint, "sets": sets})


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or content.get("version") != VERSION or not isinstance(content.get("sets"), dict):
        raise ValueError(f"{path.name} is not a calibration of this version; run `mmkd calibrate` again, or remove it")
    return content
