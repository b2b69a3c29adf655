"""Charts of all reports: matplotlib draws them as SVG, the same bytes for the same values.

Colors are named by role. In a file they are plain; inlined into a page each becomes a variable of the page's style
sheet, so that a chart follows the reader's light or dark setting. A chart is 420 px wide, as a phone is, and carries
its numbers as words for those who cannot see it.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

COLORS = {
    "ink": "#1d2327", "soft": "#59626a", "line": "#dfddd3", "ground": "#fefefe",
    "student": "#0b6b66", "teacher": "#6a7580", "baseline": "#2f6699", "ensemble": "#8f6300", "oracle": "#8a4a9e",
    "ahead": "#0b6b3f", "behind": "#a63a1c", "level": "#6a7581", "unknown": "#6a7582",
    "c0": "#2f669a", "c1": "#b0502c", "c2": "#6d8a1f", "c3": "#a33d74", "c4": "#5b6f7f", "c5": "#8c6a4a",
    "c6": "#4f57b8", "c7": "#2c8a5a", "c8": "#b89000",
}  # fmt: skip

SERIES_COLORS = 9
WIDTH = 420
LONGEST_LABEL = 56

STYLE: Any = {
    "svg.hashsalt": "mmkd",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a caption may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": COLORS["line"],
    "axes.labelcolor": COLORS["soft"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": COLORS["ink"],
    "xtick.color": COLORS["soft"],
    "ytick.color": COLORS["soft"],
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "grid.color": COLORS["line"],
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.solid_capstyle": "round",
}
VARIABLES = {color: f"var(--{name})" for name, color in COLORS.items()}


@dataclass(frozen=True)
class Chart:
    """A drawing.

    Attributes:
        caption: what is drawn.
        words: its numbers in words.
        svg: a whole SVG document.
        file: where it is written beside a Markdown page; empty where it is not.
        notes: sentences below it.
    """

    block: ClassVar[str] = "chart"
    caption: str
    words: str
    svg: str
    file: str = ""
    notes: Sequence[str] = ()

    @property
    def inline(self) -> str:
        """The drawing for a page: no header, no size, no names of parts, colors as variables."""
        drawing = self.svg[self.svg.index("<svg") :]
        drawing = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", drawing, flags=re.DOTALL)
        drawing = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', drawing, count=1)
        drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)
        return re.sub(r"#[0-9a-f]{6}\b", lambda found: VARIABLES.get(found[0], found[0]), drawing)


@dataclass(frozen=True)
class Interval:
    """One line of an interval plot.

    Attributes:
        label: what it is about.
        role: a name of `COLORS`.
        value: None where it is undefined.
        low: lower end of its interval, None where there is none.
        high: upper end.
        numbers: the same as text, or why there is no number.
    """

    label: str
    role: str
    value: float | None
    low: float | None = None
    high: float | None = None
    numbers: str = ""


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: name in the legend; empty for none.
        color: a name of `COLORS`.
        points: ``(x, y)`` in order; in a radar x counts the axes.
        band: ``(x, low, high)`` in order.
        faint: whether it is the noise behind another line.
    """

    label: str
    color: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    faint: bool = False


def intervals(caption: str, rows: Sequence[Interval], mark: float | None, limits: tuple[float, float]) -> Chart:
    """Values with their intervals, one below the other, and a dashed line.

    Args:
        caption: what is drawn.
        rows: from top to bottom.
        mark: place of the dashed line: chance, or zero of a difference.
        limits: ends of the axis; what lies outside is drawn at its end.
    """

    def inside(value: float) -> float:
        return min(limits[1], max(limits[0], value))

    def plot(axes: Any) -> None:
        axes.set_axis_off()
        axes.set(xlim=limits, ylim=(0.5 - len(rows), 0.95))
        left = axes.get_yaxis_transform()  # x from 0 to 1 across the panel, y in rows
        below = axes.get_xaxis_transform()
        ticks = [limits[0] + k * (limits[1] - limits[0]) / 4 for k in range(5)]
        axes.vlines(ticks, 0, 1, transform=below, color=COLORS["line"], linewidth=0.8, zorder=0)
        for tick in ticks:
            axes.text(
                tick,
                -5 / height,
                f"{tick:g}",
                transform=below,
                ha="center",
                va="top",
                fontsize=10,
                color=COLORS["soft"],
            )
        for place, row in enumerate(rows):
            color, y = COLORS[row.role], -place
            if row.low is not None and row.high is not None:
                axes.plot([inside(row.low), inside(row.high)], [y, y], color=color, linewidth=6, alpha=0.4)
            if row.value is not None:
                shape = "D" if row.role in ("ensemble", "oracle") else "o"
                axes.plot(inside(row.value), y, shape, color=color, markersize=7, zorder=3)
            student = row.role == "student"
            own = {"color": color if student else COLORS["ink"], "fontweight": "bold" if student else "normal"}
            room = int((WIDTH - 20 - 5.7 * len(row.numbers)) / 6.6)  # characters beside the numbers, which are smaller
            axes.text(0, y + 0.25, _short(row.label, min(LONGEST_LABEL, max(12, room))), transform=left, **own)
            axes.text(1, y + 0.25, row.numbers, transform=left, ha="right", fontsize=10, color=COLORS["soft"])
        if mark is not None:
            axes.axvline(mark, color=COLORS["soft"], linestyle=(0, (4, 3)), linewidth=1, zorder=0)

    height = 34 * len(rows) + 34
    words = "; ".join(f"{row.label}: {row.numbers}" for row in rows)
    return _drawn(caption, words, height, plot, (10, 10, 0, 24))


def lines(
    caption: str,
    measure: str,
    series: Sequence[Series],
    ticks: Mapping[float, str] | None = None,
    steps: bool = False,
    height: int = 240,
    ends: str = "at the end",
) -> Chart:
    """Curves with their bands.

    Args:
        caption: what is drawn.
        measure: name of the horizontal axis.
        series: the lines.
        ticks: places above 0 on a logarithmic axis and their names; a linear axis where there are none.
        steps: whether values hold until the next point, from 1 at 0, as survival does.
        height: in pixels.
        ends: what stands behind the last value in words.
    """

    def plot(axes: Any) -> None:
        if ticks:
            axes.set_xscale("log")
        for own in series:
            points = [(0.0, 1.0), *own.points] if steps else list(own.points)
            if own.band:
                x, low, high = zip(*own.band, strict=True)
                axes.fill_between(x, low, high, color=COLORS[own.color], alpha=0.16, linewidth=0)
            x, y = zip(*points, strict=True)
            axes.plot(
                x, y,
                color=COLORS[own.color], label=_short(own.label) or None, alpha=0.35 if own.faint else 1,
                linewidth=1 if own.faint else 2.4 if own.color == "student" else 1.6,
                drawstyle="steps-post" if steps else "default", marker="o" if ticks else "", markersize=4,
            )  # fmt: skip
        if ticks:
            axes.set_xticks(list(ticks), list(ticks.values()))
            axes.minorticks_off()
        if steps:
            axes.set(xlim=(0, None), ylim=(0, 1.02))
        axes.set_xlabel(measure)
        axes.locator_params(axis="y", nbins=4)
        if not ticks:
            axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="y")
        axes.set_axisbelow(True)

    named = [own for own in series if own.label]
    words = "; ".join(
        f"{own.label}: "
        + (", ".join(f"{y:.2f} at {ticks.get(x, x)}" for x, y in own.points) if ticks else
           f"{own.points[0][1]:.3g} to {own.points[-1][1]:.3g} {ends}")
        for own in named
    )  # fmt: skip
    return _drawn(caption, words, height, plot, (46, 8, 8, 42), len(named) if len(named) > 1 else 0)


def radar(caption: str, axes: Sequence[str], series: Sequence[Series]) -> Chart:
    """Scores from 0 to 1 on at least three axes; a series that lacks an axis has a gap there."""
    angles = [2 * math.pi * k / len(axes) for k in range(len(axes))]

    def plot(polar: Any) -> None:
        polar.set_theta_offset(math.pi / 2)
        polar.set_theta_direction(-1)
        for own in series:
            points = [*own.points, own.points[0]] if len(own.points) == len(axes) else own.points
            places = [angles[int(axis)] for axis, _ in points], [min(1.0, max(0.0, value)) for _, value in points]
            width = 2.6 if own.color == "student" else 1.6
            polar.plot(*places, "o-", color=COLORS[own.color], markersize=3, label=_short(own.label), linewidth=width)
            if own.color == "student" and len(own.points) == len(axes):
                polar.fill(*places, color=COLORS["student"], alpha=0.12)
        polar.set_xticks(angles, [_short(axis, 18) for axis in axes])
        polar.set_rlim(0, 1)
        polar.set_rticks([0.25, 0.5, 0.75, 1.0], ["", "0.5", "", "1"])
        polar.spines["polar"].set_color(COLORS["line"])

    words = "; ".join(
        f"{own.label}: {', '.join(f'{axes[int(axis)]} {value:.2f}' for axis, value in own.points)}" for own in series
    )
    return _drawn(caption, words, 380, plot, (70, 70, 26, 26), len(series), polar=True)


def bars(caption: str, counts: Mapping[str, int]) -> Chart:
    """Counts as horizontal bars, from top to bottom."""

    def plot(axes: Any) -> None:
        names = list(map(str, range(len(counts))))  # two long labels may be the same when shortened
        drawn = axes.barh(names, list(counts.values()), color=COLORS["student"], height=0.7)
        axes.bar_label(drawn, [f"{count:,}" for count in counts.values()], padding=4, fontsize=10)
        axes.set_yticks(names, [_short(name, 28) for name in counts])
        axes.set(xlim=(0, (max(counts.values(), default=0) or 1) * 1.18), xticks=[])
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)

    words = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return _drawn(caption, words, 22 * max(1, len(counts)) + 16, plot, (150, 8, 4, 4))


def histograms(caption: str, counts: Mapping[str, Mapping[float, int]], width: float, mark: float | None) -> Chart:
    """Distributions one over the other, each as tall as the panel.

    Args:
        caption: what is drawn.
        counts: name -> lower edge of a bin -> how many.
        width: of a bin.
        mark: place of the dashed line.
    """

    def plot(axes: Any) -> None:
        for color, (name, bins) in zip(("teacher", "student"), counts.items(), strict=False):
            top = max(bins.values(), default=1)
            heights = [count / top for count in bins.values()]
            own = {"label": _short(name), "color": COLORS[color], "alpha": 0.6, "linewidth": 0}
            axes.bar(list(bins), heights, width, align="edge", **own)
        if mark is not None:
            axes.axvline(mark, color=COLORS["ink"], linestyle=(0, (3, 3)), linewidth=1)
        axes.set(yticks=[])
        axes.spines["left"].set_visible(False)

    words = "; ".join(f"{name}: {sum(bins.values()):,}" for name, bins in counts.items())
    words += "" if mark is None else f"; the dashed line is at {mark:.2f}"
    return _drawn(caption, words, 170, plot, (10, 10, 4, 24), len(counts))


def changes(caption: str, rows: Mapping[str, tuple[float | None, float | None]], limits: tuple[float, float]) -> Chart:
    """A line from before to after for each row: a hollow dot before, a full one after."""

    def plot(axes: Any) -> None:
        axes.plot([], "o", color=COLORS["teacher"], markerfacecolor=COLORS["ground"], label="before")
        axes.plot([], "o", color=COLORS["student"], markersize=7, label="after")
        for place, (was, now) in enumerate(rows.values()):
            if was is not None and now is not None:
                axes.plot([was, now], [place, place], color=COLORS["teacher"], linewidth=2.5, alpha=0.6)
            if was is not None:
                axes.plot(was, place, "o", color=COLORS["teacher"], markerfacecolor=COLORS["ground"])
            if now is not None:
                axes.plot(now, place, "o", color=COLORS["student"], markersize=7)
        axes.set_yticks(range(len(rows)), [_short(name, 24) for name in rows])
        axes.set(xlim=limits, ylim=(len(rows) - 0.4, -0.6))
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x")
        axes.set_axisbelow(True)

    words = "; ".join(f"{name}: {_value(was)} before, {_value(now)} after" for name, (was, now) in rows.items())
    return _drawn(caption, words, 26 * len(rows) + 54, plot, (130, 16, 4, 26), 2)


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


def _drawn(
    caption: str,
    words: str,
    height: int,
    plot: Callable[[Any], None],
    margins: tuple[int, int, int, int],
    named: int = 0,
    polar: bool = False,
) -> Chart:
    """A figure of one panel.

    Args:
        caption: what is drawn.
        words: its numbers in words.
        height: in pixels.
        plot: draws into the axes.
        margins: left, right, top and bottom of the panel in pixels; measuring them takes longer than drawing.
        named: entries of the legend, which lies below the panel.
        polar: whether the axes are polar.
    """
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    left, right, top, bottom = margins
    bottom += 18 * -(-named // 2)
    place = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (top + bottom) / height)
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the reader's fonts draw the text, not matplotlib's
        figure = Figure((WIDTH / 72, height / 72), facecolor=COLORS["ground"])
        axes = figure.add_axes(place, projection="polar" if polar else None, facecolor="none")
        plot(axes)
        if named:
            figure.legend(loc="lower left", ncols=2, handlelength=1.4, columnspacing=1.2, borderaxespad=0.2)
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Chart(caption, words, buffer.getvalue())


def _short(label: str, most: int = LONGEST_LABEL) -> str:
    flat = " ".join(label.split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def _value(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
