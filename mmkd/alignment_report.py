"""Did alignment bring the teachers together? Three cosines, before and after, on a sample of pairs.

Teachers agree when the same sample has similar features across teachers while different samples of one teacher do not.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.alignment import MODALITIES, Aligner, Features


def alignment_report(features: Features, aligner: Aligner) -> dict[str, Any]:
    """Compare raw and aligned features of the same samples.

    Args:
        features: raw features of n samples by teacher.
        aligner: the fitted map.

    Returns:
        ``before`` and ``after``, each with ``same_sample_cross_teacher`` and ``different_sample_same_teacher`` (per
        modality) and ``image_text`` (per teacher and ``mean``), cosines or None where nothing can be compared; across
        teachers of different widths that is always so before alignment.
    """
    after: Features = {
        name: {modality: aligner.transform(name, teacher[modality], modality).float() for modality in MODALITIES}
        | {"mask": teacher["mask"]}
        for name, teacher in features.items()
    }
    return {
        "aligner": aligner.kind,
        "dim": aligner.dim,
        "teachers": {name: int(teacher["mask"].sum()) for name, teacher in features.items()},
        "before": _cosines(features),
        "after": _cosines(after),
    }


def _cosines(features: Features) -> dict[str, Any]:
    image_text = {
        name: _mean(F.cosine_similarity(teacher["image"], teacher["text"])[teacher["mask"]])
        for name, teacher in features.items()
    }
    values = [value for value in image_text.values() if value is not None]
    return {
        "same_sample_cross_teacher": {modality: _cross_teacher(features, modality) for modality in MODALITIES},
        "different_sample_same_teacher": {modality: _within_teacher(features, modality) for modality in MODALITIES},
        "image_text": image_text | {"mean": _mean(torch.tensor(values))},
    }


def _cross_teacher(features: Features, modality: str) -> float | None:
    cosines = []
    for one, other in combinations(features.values(), 2):
        if one[modality].shape == other[modality].shape:
            both = one["mask"] & other["mask"]
            cosines.append(F.cosine_similarity(one[modality], other[modality])[both])
    return _mean(torch.cat(cosines)) if cosines else None


def _within_teacher(features: Features, modality: str) -> float | None:
    """Mean over teachers of the mean cosine of two different samples, from the length of the sum of unit vectors."""
    means = []
    for teacher in features.values():
        unit = F.normalize(teacher[modality][teacher["mask"]].double(), dim=1)
        if len(unit) > 1:
            means.append((unit.sum(dim=0).square().sum() - len(unit)) / (len(unit) * (len(unit) - 1)))
    return _mean(torch.stack(means)) if means else None


def _mean(values: Tensor) -> float | None:
    return round(values.double().mean().item(), 4) if len(values) else None
