"""Did alignment bring the teachers together, and what did it cost? Before and after, on a sample of pairs.

Teachers agree when the same sample has similar features across teachers while different samples of one teacher do not.
What each teacher knew must survive: its retrieval of its own captions is measured in both spaces.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.alignment.aligner import Aligner
from mmkd.data.features.lookup import MODALITIES, Features
from mmkd.pages.charts import changes
from mmkd.pages.page import Grid, Page, Section, Table, number

ROWS_AT_ONCE = 1024


def alignment_report(features: Features, aligner: Aligner) -> dict[str, Any]:
    """Compare raw and aligned features of the same samples.

    Args:
        features: raw features of n samples by teacher.
        aligner: the fitted map.

    Returns:
        ``before`` and ``after``, each with ``same_sample_cross_teacher`` and ``different_sample_same_teacher`` (per
        modality), ``image_text`` (per teacher and ``mean``), cosines or None where nothing can be compared (across
        teachers of different widths that is always so before alignment), and ``retrieval`` (per teacher and ``mean``),
        the share of samples whose own caption, or image, comes first among its n.
    """
    return {
        "aligner": aligner.kind,
        "dim": aligner.dim,
        "teachers": {name: int(teacher["mask"].sum()) for name, teacher in features.items()},
        "before": _measures(features),
        "after": _measures(aligner.transform_all(features)),
    }


def recall_at_one(image: Tensor, text: Tensor) -> float | None:
    """Share of images whose own text is most similar and of texts whose own image is, the mean of both.

    Of several that tie for the first place one would be drawn: each counts for its part.

    Args:
        image: `(n, dim)` of any norm.
        text: `(n, dim)` of the same samples.
    """
    if not len(image):
        return None
    image, text = F.normalize(image.double(), dim=1), F.normalize(text.double(), dim=1)
    hits = torch.zeros((), dtype=torch.float64)
    for queries, answers in ((image, text), (text, image)):
        for begin in range(0, len(queries), ROWS_AT_ONCE):
            scores = queries[begin : begin + ROWS_AT_ONCE] @ answers.T
            own = scores.diagonal(begin)[:, None]
            first = (scores <= own + 1e-12).all(dim=1)
            hits += (first / ((scores - own).abs() <= 1e-12).sum(dim=1)).sum()
    return round(hits.item() / (2 * len(image)), 4)


def _measures(features: Features) -> dict[str, Any]:
    known = {name: {m: teacher[m][teacher["mask"]] for m in MODALITIES} for name, teacher in features.items()}
    image_text = {name: _mean(F.cosine_similarity(of["image"], of["text"])) for name, of in known.items()}
    retrieval = {name: recall_at_one(of["image"], of["text"]) for name, of in known.items()}
    return {
        "same_sample_cross_teacher": {modality: _cross_teacher(features, modality) for modality in MODALITIES},
        "different_sample_same_teacher": {modality: _within_teacher(features, modality) for modality in MODALITIES},
        "image_text": image_text | {"mean": _mean_of(image_text)},
        "retrieval": retrieval | {"mean": _mean_of(retrieval)},
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


def _mean_of(values: dict[str, float | None]) -> float | None:
    return _mean(torch.tensor([value for value in values.values() if value is not None]))


def _mean(values: Tensor) -> float | None:
    return round(values.double().mean().item(), 4) if len(values) else None


def alignment_page(report: dict[str, Any]) -> Page:
    """What `alignment_report` measured, as a page: a line from before to after for each measure and teacher."""
    before, after = report["before"], report["after"]
    measures = {
        "same_sample_cross_teacher": "Same sample, two teachers: cosine (should rise)",
        "different_sample_same_teacher": "Two samples, one teacher: cosine (should be near 0)",
        "image_text": "Image and its caption, one teacher: cosine",
        "retrieval": "Own caption or image comes first: share (should stay)",
    }
    charts, rows = [], []
    for name, title in measures.items():
        values = {row: (before[name][row], after[name][row]) for row in before[name]}
        charts.append(changes(title, values, (-1.0, 1.0)))
        rows += [[f"{title}: {row}", number(was, 4), number(now, 4)] for row, (was, now) in values.items()]
    teachers = [[name, count] for name, count in report["teachers"].items()]
    sections = [
        Section("measures", "Before and after", "A hollow dot is before alignment, a full one after.", [Grid(charts)]),
        Section("numbers", "All numbers", "", [
            Table("Before and after", ["Measure", "before", "after"], rows),
            Table("Samples compared", ["Teacher", "samples"], teachers),
        ]),
    ]  # fmt: skip
    count = f"{len(teachers)} teachers, {report['dim']} dimensions." if report["dim"] else f"{len(teachers)} teachers."
    return Page(f"Alignment by {report['aligner']}", sections, [count], footer="Made by mmkd align.")
