"""The report in a browser: what its one script does, and that nothing is loaded and nothing complains."""

import pytest
from chromium_page import PROGRAM, ChromiumPage
from suite_results import DATASETS, write_marked_suite

from mmkd.evaluation.report.page import write_report
from mmkd.evaluation.settings import ReportSettings

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium on the PATH: apt-get install chromium")
DRAWN = "[...document.querySelectorAll('{}')].filter((own) => own.checkVisibility())"
BOARD = DRAWN.format("#board tbody tr:not(.counts)") + ".map((row) => row.cells[0].textContent)"
TASKS = DRAWN.format("#results tbody tr") + ".map((row) => [row.dataset.modality, row.dataset.kind])"
COLUMNS = DRAWN.format("#board thead th") + ".map((head) => head.textContent)"
CHOOSE = """(() => {{
  const select = document.querySelector('#filters select[name={}]');
  select.value = '{}';
  select.dispatchEvent(new Event('change'));
}})()"""
CLICK = "document.querySelectorAll('#{} thead th button')[{}].click()"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browsed")
    write_marked_suite(folder)
    write_report(ReportSettings(folder, output=folder / "report.html"))
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def page(tmp_path_factory, address):
    own = ChromiumPage(tmp_path_factory.mktemp("profile"))
    own.open(address)
    yield own
    own.close()


def test_it_loads_itself_alone_and_complains_of_nothing(page, address):
    assert page.requests == [address] and page.complaints == []


def test_a_click_sorts_by_a_column_and_another_one_turns_it_round(page):
    page.run(CLICK.format("board", 0))
    names = page.run(BOARD)
    assert names == sorted(names, key=str.lower) and len(names) == 6
    page.run(CLICK.format("board", 0))
    assert page.run(BOARD) == names[::-1]
    page.run(CLICK.format("board", 1))
    assert page.run(BOARD)[0] == "student" and page.run(BOARD)[-1] == "stage1"
    page.run(CLICK.format("results", 7))
    values = page.run("[...document.querySelectorAll('#results tbody tr')].map((row) => row.cells[7].dataset.value)")
    numbers = [float(value) for value in values if value]
    assert numbers == sorted(numbers, reverse=True) and values[-1] in (None, "") and len(numbers) == 16


def test_filters_leave_the_rows_that_were_asked_for(page, address):
    every = page.run(TASKS)
    assert len(every) == len(DATASETS) == 17
    page.run(CHOOSE.format("modality", "CT"))
    assert page.run(TASKS) == [own for own in every if own[0] == "CT"] and len(page.run(TASKS)) == 6
    assert page.run("document.getElementById('shown').textContent") == "6 tasks shown"
    page.run(CHOOSE.format("kind", "probe"))
    assert page.run(TASKS) == [["CT", "probe"]] * 3
    assert "modality=CT&kind=probe" in page.run("location.hash") and len(page.run(COLUMNS)) < 4
    page.open(f"{address}#modality=OCT")
    page.run("location.hash = 'modality=MRI'")
    page.run("new Promise((done) => setTimeout(done, 50))")
    assert {modality for modality, _ in page.run(TASKS)} == {"MRI"}
    page.open(f"{address}#modality=OCT")
    assert {modality for modality, _ in page.run(TASKS)} == {"OCT"} and len(page.run(BOARD)) == 6
    page.run(CHOOSE.format("modality", ""))
    assert sorted(page.run(TASKS)) == sorted(every)


def test_everything_that_was_measured_is_drawn(page, address):
    page.open(address)
    page.run("document.querySelectorAll('details').forEach((own) => { own.open = true; })")
    drawings = page.run(DRAWN.format("svg") + ".filter((own) => own.getBoundingClientRect().height > 5).length")
    assert drawings == page.run("document.querySelectorAll('svg').length") >= 9
    assert page.run(DRAWN.format("figure, table.heat") + ".length") > 30
    assert page.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.complaints == []
