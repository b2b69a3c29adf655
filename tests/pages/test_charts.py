import re
from xml.etree import ElementTree

import pytest

from mmkd.pages.charts import (
    COLORS,
    Interval,
    Series,
    bars,
    changes,
    histograms,
    intervals,
    lines,
    moving_mean,
    radar,
)

EVIL = "<script>alert('x')</script> $\\frac{ \"onload=\" & 日本 " + "long " * 50
CHARTS = {
    "intervals": lambda: intervals(EVIL, [Interval(EVIL, "student", 1.2, -0.1, 1.1, EVIL),
                                          Interval("b", "teacher", None, numbers="undefined")], 0.5, (0, 1)),
    "lines": lambda: lines(EVIL, EVIL, [Series(EVIL, "student", [(1, 0.5), (32, 0.5)], [(1, 0.5, 0.5)]),
                                        Series("b", "c1", [(32, 0.4)])], {1: "1", 32: "32"}),
    "one step": lambda: lines("t", "step", [Series("", "student", [(1, 2.0)], faint=True)]),
    "survival": lambda: lines("t", "time", [Series("a", "c1", [(0.0, 1.0), (163.2, 0.5)])], steps=True),
    "radar": lambda: radar(EVIL, ["a", EVIL, "c"], [Series("s", "student", [(0, 1.4), (1, -0.2)])]),
    "bars": lambda: bars(EVIL, {EVIL: 1000, EVIL + "2": 0}),
    "no bars": lambda: bars("t", {}),
    "histograms": lambda: histograms(EVIL, {"mismatched": {}, "own": {-0.1: 3}}, 0.01, None),
    "changes": lambda: changes(EVIL, {EVIL: (None, 0.5), "b": (0.1, None)}, (-1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("draw", CHARTS.values(), ids=CHARTS)
def test_a_chart_is_sound_repeats_its_bytes_and_loads_nothing(draw):
    chart = draw()
    root = ElementTree.fromstring(chart.svg.encode())
    assert {element.tag.rpartition("}")[2] for element in root.iter()}.isdisjoint({"script", "image", "foreignObject"})
    assert not re.search(r"\bnan\b|\binf\b", chart.svg) and chart.svg == draw().svg
    assert all(target.startswith("#") for target in re.findall(r'(?:href="|url\()([^")]*)', chart.inline))


def test_an_inlined_chart_follows_the_page():
    inline = CHARTS["intervals"]().inline
    assert inline.startswith('<svg viewBox="0 0 420 ') and "<style" not in inline and "<!--" not in inline
    assert "var(--student)" in inline and not re.search("#[0-9a-f]{6}", inline)
    assert len(set(COLORS.values())) == len(COLORS)  # one variable for each color


def test_numbers_are_there_in_words():
    assert CHARTS["lines"]().words.endswith("0.50 at 1, 0.50 at 32; b: 0.40 at 32")
    assert CHARTS["survival"]().words == "a: 1 to 0.5 at the end"
    assert "b: 0.10 before, – after" in CHARTS["changes"]().words
    chart = intervals("t", [Interval("b", "teacher", None, numbers="undefined: no text tower")], None, (0, 1))
    assert chart.words == "b: undefined: no text tower" and ">undefined: no text tower<" in chart.svg


def test_moving_mean_keeps_lines_and_ends():
    line = [float(k) for k in range(100)]
    assert moving_mean(line) == pytest.approx(line)
    assert moving_mean([3.0]) == [3.0]
    jagged = moving_mean([0.0, 1.0] * 100)
    assert min(jagged[10:-10]) > 0.3 and max(jagged[10:-10]) < 0.7
