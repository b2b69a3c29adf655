"""The alignment report as one SVG: a line from before to after for each measure and teacher."""

from __future__ import annotations

from typing import Any

from mmkd.alignment import MODALITIES
from mmkd.evaluation.markup import text

WIDTH, LEFT, RIGHT, ROW = 760, 250, 640, 30
INK, SOFT, LINE, BEFORE, AFTER = "#1d2733", "#5c6b7a", "#d7dde4", "#94a3b8", "#0f766e"


def alignment_chart(report: dict[str, Any]) -> str:
    """Draw what `mmkd.alignment_report.alignment_report` measured, as SVG.

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
