"""Charts that are tables: an interval is a bar in a cell, its numbers stand beside it as text.

So they flow from a phone to a wall, follow the reader's light or dark setting, and a screen reader reads them row by
row. Only the curves of training are drawn, as inline SVG whose labels are text beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mmkd.evaluation.report.markup import number, signed, text

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


# Section: Drawings of a suite's report as inline SVG: a radar, learning curves with bands, survival curves.
#
# Labels are HTML beside the drawing where they can be, and every drawing says in words what it shows.


RADIUS, CENTER, WIDE = 130.0, 170.0, 560.0

RINGS = (0.25, 0.5, 0.75, 1.0)

WIDTH, HEIGHT = 420.0, 240.0

LEFT, RIGHT, TOP, BOTTOM = 44.0, 10.0, 10.0, 34.0


@dataclass(frozen=True)
class Series:
    """One line of a drawing.

    Attributes:
        label: who.
        style: class of its color: student, ensemble, oracle or one of c0 to c8.
        points: ``(x, y)`` in order; in a radar x counts the axes.
        band: ``(x, low, high)`` in order.
    """

    label: str
    style: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


def radar(caption: str, axes: Sequence[str], series: Sequence[Series]) -> str:
    """Scores from 0 to 1 on at least three axes; a series that lacks an axis has a gap there."""
    middle = WIDE / 2

    def place(axis: float, value: float) -> tuple[float, float]:
        angle = 2 * math.pi * axis / len(axes) - math.pi / 2
        reach = RADIUS * min(1.0, max(0.0, value))
        return middle + reach * math.cos(angle), CENTER + reach * math.sin(angle)

    grid = "".join(
        f'<polygon class="ring" points="{_points(place(k, ring) for k in range(len(axes)))}"/>' for ring in RINGS
    )
    for k, axis in enumerate(axes):
        x, y = place(k, 1.0)
        angle = 2 * math.pi * k / len(axes) - math.pi / 2
        anchor = "middle" if abs(math.cos(angle)) < 0.2 else "start" if math.cos(angle) > 0 else "end"
        x2, y2 = middle + (RADIUS + 12) * math.cos(angle), CENTER + (RADIUS + 14) * math.sin(angle)
        grid += (
            f'<line class="ring" x1="{middle:.1f}" y1="{CENTER:.1f}" x2="{x:.1f}" y2="{y:.1f}"/>'
            f'<text x="{x2:.1f}" y="{y2:.1f}" '
            f'text-anchor="{anchor}" dominant-baseline="middle">{text(axis)}</text>'
        )
    drawn = ""
    for own in series:
        corners = [_points([place(x, y)]) for x, y in own.points]
        shape = "polygon" if len(corners) == len(axes) else "polyline"
        dots = "".join(f'<circle cx="{c.split(",")[0]}" cy="{c.split(",")[1]}" r="3"/>' for c in corners)
        drawn += f'<g class="{own.style}"><{shape} class="line" points="{" ".join(corners)}"/>{dots}</g>'
    words = "; ".join(
        f"{own.label}: {', '.join(f'{axes[int(x)]} {number(y)}' for x, y in own.points)}" for own in series
    )
    ticks = "".join(
        f'<text class="tick" x="{middle + 4:.1f}" y="{CENTER - RADIUS * ring:.1f}">{ring:g}</text>'
        for ring in RINGS[1:3]
    )
    return _figure(caption, words, f"0 0 {WIDE:g} {2 * CENTER:g}", grid + ticks + drawn, series, "radar")


def lines(caption: str, measure: str, series: Sequence[Series], ticks: Sequence[tuple[float, str]]) -> str:
    """Curves over a logarithmic axis with their bands.

    Args:
        caption: what is drawn.
        measure: name of the horizontal axis.
        series: x above 0.
        ticks: places on the horizontal axis and what they are called.
    """
    heights = [y for own in series for _, y in own.points]
    heights += [bound for own in series for _, low, high in own.band for bound in (low, high)]
    floor, ceiling = _round_range(heights)
    frame = _Frame(math.log(ticks[0][0]), math.log(ticks[-1][0]), floor, ceiling)
    drawn = frame.axes(measure, [(math.log(x), name) for x, name in ticks])
    for own in series:
        area = [(math.log(x), low) for x, low, _ in own.band] + [(math.log(x), high) for x, _, high in own.band[::-1]]
        band = f'<polygon class="band" points="{frame.points(area)}"/>' if area else ""
        points = [(math.log(x), y) for x, y in own.points]
        dots = "".join('<circle cx="{}" cy="{}" r="3"/>'.format(*frame.points([p]).split(",")) for p in points)
        drawn += f'<g class="{own.style}">{band}<polyline class="line" points="{frame.points(points)}"/>{dots}</g>'
    names = dict(ticks)
    words = "; ".join(
        f"{own.label}: {', '.join(f'{number(y)} at {names.get(x, x)}' for x, y in own.points)}" for own in series
    )
    return _figure(caption, words, f"0 0 {WIDTH:g} {HEIGHT:g}", drawn, series, "lines")


def steps(caption: str, measure: str, series: Sequence[Series]) -> str:
    """Step functions from 1 downward over time, as survival is drawn."""
    last = max((x for own in series for x, _ in own.points), default=1.0) or 1.0
    frame = _Frame(0.0, last, 0.0, 1.0)
    drawn = frame.axes(measure, [(at, _tick(at)) for at in _round_places(last)])
    words = []
    for own in series:
        corners, height = [(0.0, 1.0)], 1.0
        for x, y in own.points:
            corners += [(x, height), (x, y)]
            height = y
        drawn += f'<g class="{own.style}"><polyline class="line" points="{frame.points(corners)}"/></g>'
        words.append(f"{own.label}: {number(height)} at the end")
    return _figure(caption, "; ".join(words), f"0 0 {WIDTH:g} {HEIGHT:g}", drawn, series, "lines")


@dataclass(frozen=True)
class _Frame:
    """Where values lie in a drawing of 420 x 240."""

    left: float
    right: float
    low: float
    high: float

    def points(self, values: Sequence[tuple[float, float]]) -> str:
        return _points((self._x(x), self._y(y)) for x, y in values)

    def axes(self, measure: str, ticks: Sequence[tuple[float, str]]) -> str:
        drawn = ""
        for part in (0.0, 0.5, 1.0):
            value = self.low + part * (self.high - self.low)
            y = self._y(value)
            drawn += f'<line class="ring" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            drawn += f'<text x="{LEFT - 6}" y="{y:.1f}" text-anchor="end" dominant-baseline="middle">{value:.2f}</text>'
        for x, name in ticks:
            drawn += f'<text x="{self._x(x):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{text(name)}</text>'
        middle = (LEFT + WIDTH - RIGHT) / 2
        return drawn + f'<text x="{middle:.1f}" y="{HEIGHT - 4}" text-anchor="middle">{text(measure)}</text>'

    def _x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.left) / ((self.right - self.left) or 1.0)

    def _y(self, value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (self.high - value) / ((self.high - self.low) or 1.0)


def _figure(caption: str, words: str, box: str, drawn: str, series: Sequence[Series], kind: str) -> str:
    keys = "".join(f'<li class="{own.style}"><i></i>{text(own.label)}</li>' for own in series)
    return (
        f'<figure class="{kind}"><figcaption>{text(caption)}</figcaption>'
        f'<svg viewBox="{box}" role="img" aria-label="{text(f"{caption}. {words}")}">{drawn}</svg>'
        f'<ul class="keys">{keys}</ul></figure>'
    )


def _points(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _round_places(last: float) -> list[float]:
    """Three to six multiples of 1, 2 or 5 times a power of ten from 0 to ``last``."""
    power = 10.0 ** math.floor(math.log10(last / 5))
    step = next(power * times for times in (1, 2, 5, 10) if power * times * 5 >= last)
    return [step * k for k in range(int(last / step) + 1)]


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _round_range(values: Sequence[float]) -> tuple[float, float]:
    """Tenths that hold all values."""
    low, high = math.floor(min(values) * 10) / 10, math.ceil(max(values) * 10) / 10
    return (low, high) if high > low else (low - 0.1, high + 0.1)
