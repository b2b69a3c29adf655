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
from mmkd.evaluation.report.markup import text

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
    after: Features = {
        name: {modality: aligner.transform(name, teacher[modality], modality).float() for modality in MODALITIES}
        | {"mask": teacher["mask"]}
        for name, teacher in features.items()
    }
    return {
        "aligner": aligner.kind,
        "dim": aligner.dim,
        "teachers": {name: int(teacher["mask"].sum()) for name, teacher in features.items()},
        "before": _measures(features),
        "after": _measures(after),
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


# Section: The alignment report as one SVG: a line from before to after for each measure and teacher.


WIDTH, LEFT, RIGHT, ROW = 760, 250, 640, 30

INK, SOFT, LINE, BEFORE, AFTER = "#1d2733", "#5c6b7a", "#d7dde4", "#94a3b8", "#0f766e"


def alignment_chart(report: dict[str, Any]) -> str:
    """Draw what `mmkd.alignment.report.alignment_report` measured, as SVG.

    Every row is a measure between -1 and 1; a hollow dot is before alignment, a full one after.
    """
    before, after = report["before"], report["after"]
    groups = [
        ("Same sample, two teachers: cosine (should rise)", _by_modality(before, after, "same_sample_cross_teacher")),
        (
            "Two samples, one teacher: cosine (should be near 0)",
            _by_modality(before, after, "different_sample_same_teacher"),
        ),
        ("Image and its caption, one teacher: cosine", _by_teacher(before, after, "image_text")),
        ("Own caption or image comes first: share (should stay)", _by_teacher(before, after, "retrieval")),
    ]
    body, y = [], 74
    for title, rows in groups:
        body.append(f'<text x="24" y="{y}" font-weight="700">{text(title)}</text>')
        body += [_row(label, values, y + ROW * (k + 1)) for k, (label, values) in enumerate(rows)]
        y += ROW * (len(rows) + 1) + 22
    ticks = "".join(
        f'<path d="M{_x(at):.1f} 56V{y - 34}" stroke="{LINE}"/>'
        f'<text x="{_x(at):.1f}" y="{y - 14}" fill="{SOFT}" text-anchor="middle">{at:g}</text>'
        for at in (-1, -0.5, 0, 0.5, 1)
    )
    heading = f"Alignment by {report['aligner']}, {len(report['teachers'])} teachers"
    legend = (
        f'<circle cx="{RIGHT - 150}" cy="27" r="5" fill="#fff" stroke="{BEFORE}" stroke-width="2"/>'
        f'<text x="{RIGHT - 138}" y="32" fill="{SOFT}">before</text>'
        f'<circle cx="{RIGHT - 70}" cy="27" r="6" fill="{AFTER}"/>'
        f'<text x="{RIGHT - 58}" y="32" fill="{SOFT}">after</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img" aria-label="{text(heading)}" '
        f'font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" font-size="14" fill="{INK}">\n'
        f'<rect width="{WIDTH}" height="{y}" rx="14" fill="#fff"/>\n'
        f'<text x="24" y="34" font-size="18" font-weight="700">{text(heading)}</text>{legend}\n{ticks}\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


Values = tuple[float | None, float | None]


def _by_modality(before: dict[str, Any], after: dict[str, Any], measure: str) -> list[tuple[str, Values]]:
    return [(f"{modality}s", (before[measure][modality], after[measure][modality])) for modality in MODALITIES]


def _by_teacher(before: dict[str, Any], after: dict[str, Any], measure: str) -> list[tuple[str, Values]]:
    return [(name, (value, after[measure][name])) for name, value in before[measure].items()]


def _row(label: str, values: Values, y: int) -> str:
    was, now = values
    marks = f'<text x="{LEFT - 24}" y="{y}" text-anchor="end">{text(label)}</text>'
    middle = y - 5
    if was is not None and now is not None:
        marks += f'<path d="M{_x(was):.1f} {middle}H{_x(now):.1f}" stroke="{BEFORE}" stroke-width="3"/>'
    if was is not None:
        marks += f'<circle cx="{_x(was):.1f}" cy="{middle}" r="5" fill="#fff" stroke="{BEFORE}" stroke-width="2"/>'
    if now is not None:
        marks += f'<circle cx="{_x(now):.1f}" cy="{middle}" r="6" fill="{AFTER}"/>'
    numbers = f"{_number(was)} → {_number(now)}"
    return marks + f'<text x="{WIDTH - 24}" y="{y}" text-anchor="end" fill="{SOFT}" font-size="12">{numbers}</text>'


def _x(value: float) -> float:
    return LEFT + (RIGHT - LEFT) * (value + 1) / 2


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
