import re

import pytest

from mmkd.pages.charts import bars
from mmkd.pages.page import (
    Cell,
    Code,
    Column,
    Filters,
    Fold,
    Grid,
    Notes,
    Page,
    Row,
    Section,
    Table,
    counted,
    number,
    signed,
    to_html,
    to_markdown,
    write_page,
)

EVIL = '<img src=https://evil.example/x onerror=alert(1)> a|b\n# [c](d) `e` "onload=" </script> &lt;'


def page(word):
    table = Table(
        word,
        [Column("A"), Column(word, {"kind": word}, hidden=True), Column("C")],
        [Row([word, Cell(word, word, 0.5, "student", True, word, 0.5), 3], "student", {"scope": word}),
         Row([word, "x", "y"], hidden=True)],
        anchor="board",
    )  # fmt: skip
    blocks = [
        table,
        Notes(word, [word]),
        Code(word),
        Filters({"kind": (word, {word: word})}),
        Grid([bars(word, {word: 1})]),
    ]
    return Page(word, [Section("a", word, word, [Fold(word, blocks)])], [word], [(word, word)], word, word)


def test_every_string_is_escaped():
    html, text = to_html(page(EVIL)), to_markdown(page(EVIL))
    body = html.split("<body>")[1]
    assert "<img" not in html and body.count("<script>") == body.count("</script>") == 1
    assert not re.search(r"<[^>]*\sonload=", html) and "evil.example" in html
    assert "<img" not in text.replace("\\<", "") and "\n# [" not in text
    assert not re.search(r"(?<!\\)\[", text) and text.count("evil") > 10


def test_only_its_own_script_may_run_and_nothing_is_loaded():
    html = to_html(page("x"))
    assert "default-src &#39;none&#39;" in html and "script-src &#39;sha256-" in html
    assert "@import" not in html and not re.search(r"""\s(src|href)=["'](?!#|data:)""", html.split("<script>")[0])
    assert html == to_html(page("x")) and html.startswith("<!doctype html>")


def test_tables_are_whole_in_both_forms():
    html, text = to_html(page("x")), to_markdown(page("x"))
    assert '<th scope="col" data-kind="x" hidden>x</th>' in html and '<tr class="" hidden>' in html
    assert '<td data-kind="x" hidden data-value="0.5" class="student" style="--v:0.500">' in html
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines == ["| A | C |", "| --- | --- |", "| x | 3 |"]


def test_a_page_is_written_by_the_ending_of_its_name(tmp_path):
    chart = bars("b", {"x": 1})
    own = Page("t", [Section("a", "h", "", [type(chart)(chart.caption, chart.words, chart.svg, "charts/b.svg")])])
    write_page(tmp_path / "a.md", own)
    write_page(tmp_path / "a.html", own)
    assert (tmp_path / "a.md").read_text() == "# t\n\n## h\n\n![b](charts/b.svg)\n"
    assert "<svg" in (tmp_path / "a.html").read_text()


def test_a_value_that_a_template_lacks_is_an_error():
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError):
        to_html(Page("t", [Section("a", "h", "", [object()])]))


def test_numbers_as_text():
    assert signed(0.123) == "+0.12" and signed(-0.001) == "0.00" and signed(None) == "–" and signed(-1.0, 1) == "−1.0"
    assert number(None) == "–" and number(0.125, 3) == "0.125"
    assert counted(1, "task") == "1 task" and counted(2000, "task") == "2,000 tasks"
