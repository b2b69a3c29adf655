"""Charts that are tables: an interval is a bar in a cell, its numbers stand beside it as text.

So they flow from a phone to a wall, follow the reader's light or dark setting, and a screen reader reads them row by
row. Only the curves of training are drawn, as inline SVG whose labels are text beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmkd.evaluation.markup import number, signed, text

TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_POINTS = 400


@dataclass(frozen=True)
class Row:
    """One line of a forest plot.

    Attributes:
        label: who.
        role: style of the line: student, teacher, baseline, ensemble or oracle.
        note: shown in place of numbers where the value is undefined.
    """

    label: str
    role: str
    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""


def forest(caption: str, rows: Sequence[Row], chance: float | None = None) -> str:
    """Scores from 0 to 1 with their intervals, and chance as a dashed line."""
    body = "\n".join(_line(row, 0.0, 1.0, chance, _score(row)) for row in rows)
    return _forest(caption, "Score with 95 % interval", body, [(f"{tick:g}", tick) for tick in TICKS])


def differences(caption: str, rows: Sequence[Row], p_values: Sequence[str], what: str = "Encoder") -> str:
    """Differences with their intervals around a line at zero; ``p_values`` stand beside, ``what`` heads the rows."""
    bounds = [abs(bound) for row in rows for bound in (row.value, row.low, row.high) if bound is not None]
    reach = max(0.1, math.ceil(max(bounds, default=0.1) * 10) / 10)
    body = "\n".join(_line(row, -reach, reach, 0.0, _difference(row, p)) for row, p in zip(rows, p_values, strict=True))
    ticks = [(signed(at, 1) if at else "0", (at + reach) / (2 * reach)) for at in (-reach, 0.0, reach)]
    return _forest(caption, "Difference with 95 % interval", body, ticks, what)


def curve(title: str, points: Sequence[tuple[float, float]], small: bool = False) -> str:
    """A training curve: every step faint, a moving mean bold.

    Args:
        title: what is drawn.
        points: ``(step, value)`` in order, finite.
        small: a sparkline without axes.
    """
    smooth = moving_mean([value for _, value in points])
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = min(values), max(values)
    pad = (high - low) * 0.06 or max(abs(high), 1.0) * 0.1
    box = (steps[0], steps[-1], low - pad, high + pad)
    described = f"{title}: {values[0]:.3g} at step {steps[0]:g}, {smooth[-1]:.3g} at step {steps[-1]:g}"
    drawing = (
        f'<svg viewBox="0 0 1000 300" preserveAspectRatio="none" role="img" aria-label="{text(described)}">'
        f'<path class="faint" d="{_path(steps, values, box)}"/>'
        f'<path class="bold" d="{_path(steps, smooth, box)}"/></svg>'
    )
    ends = f'<span class="ends">{values[0]:.3g} → {smooth[-1]:.3g}</span>'
    heading = f"<figcaption>{text(title)} {ends}</figcaption>"
    if small:
        return f'<figure class="curve small">{heading}<div class="plot">{drawing}</div></figure>'
    labels = "".join(
        f'<span class="y" style="top:{100 * (box[3] - at) / (box[3] - box[2]):.1f}%">{at:.3g}</span>'
        for at in dict.fromkeys((high, (high + low) / 2, low))
    )
    axis = f'<div class="x"><span>step {steps[0]:g}</span><span>step {steps[-1]:g}</span></div>'
    return f'<figure class="curve">{heading}<div class="plot">{labels}{drawing}</div>{axis}</figure>'


def shade(value: float | None, best: bool) -> str:
    """A cell of a heat table: the number on a tint that grows with it; the best of a column carries a mark."""
    if value is None:
        return '<span class="heat none">–</span>'
    mark = ' <b aria-label="best">●</b>' if best else ""
    return f'<span class="heat" style="--v:{value:.3f}">{number(value)}{mark}</span>'


def moving_mean(values: Sequence[float]) -> list[float]:
    """Mean over a window around each value, a thirtieth of the run to either side, narrower at the ends."""
    reach = max(1, len(values) // 30)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for k in range(len(values)):
        own = min(reach, k, len(values) - 1 - k)
        means.append((sums[k + own + 1] - sums[k - own]) / (2 * own + 1))
    return means


def _forest(caption: str, measure: str, body: str, ticks: Sequence[tuple[str, float]], what: str = "Encoder") -> str:
    axis = "".join(f'<span style="left:{100 * at:.1f}%">{text(label)}</span>' for label, at in ticks)
    return (
        f'<table class="forest"><caption>{text(caption)}</caption>'
        '<colgroup><col class="who"><col><col class="how"></colgroup>'
        f'<thead><tr><th scope="col">{text(what)}</th><th scope="col">{text(measure)}</th>'
        '<th scope="col">Value</th></tr></thead>'
        f'\n<tbody>\n{body}\n</tbody><tfoot aria-hidden="true"><tr><td></td><td><div class="axis">{axis}</div></td>'
        "<td></td></tr></tfoot></table>"
    )


def _line(row: Row, start: float, stop: float, mark: float | None, numbers: str) -> str:
    def place(value: float) -> float:
        return 100 * min(1.0, max(0.0, (value - start) / (stop - start)))

    inside = "" if mark is None else f'<i class="mark" style="left:{place(mark):.2f}%"></i>'
    if row.low is not None and row.high is not None:
        left, right = place(row.low), place(row.high)
        inside += f'<i class="bar" style="left:{left:.2f}%;width:{max(right - left, 0.4):.2f}%"></i>'
    if row.value is not None:
        inside += f'<i class="dot" style="left:{place(row.value):.2f}%"></i>'
    return (
        f'<tr class="{row.role}"><th scope="row">{text(row.label)}</th>'
        f'<td><div class="track">{inside}</div></td><td class="numbers">{numbers}</td></tr>'
    )


def _score(row: Row) -> str:
    if row.value is None:
        return f"<small>{text(row.note or 'undefined')}</small>"
    if row.low is None:
        return f"{number(row.value)} <small>no interval</small>"
    return f"{number(row.value)} <small>{number(row.low)} to {number(row.high)}</small>"


def _difference(row: Row, p: str) -> str:
    if row.low is None:
        return f"{signed(row.value)} <small>no interval</small>"
    return f"{signed(row.value)} <span>{text(p)}</span><small>{signed(row.low)} to {signed(row.high)}</small>"


def _path(steps: Sequence[float], values: Sequence[float], box: tuple[float, float, float, float]) -> str:
    left, right, low, high = box
    stride = max(1, len(steps) // MOST_POINTS)
    kept = [*range(0, len(steps) - 1, stride), len(steps) - 1]
    width = (right - left) or 1.0
    points = (f"{1000 * (steps[k] - left) / width:.1f} {300 * (high - values[k]) / (high - low):.1f}" for k in kept)
    return "M" + " L".join(points)
