import re
from html.parser import HTMLParser

import numpy as np
import pytest
import safetensors.numpy
from suite_results import write_suite

import mmkd.train.report as recipe
from mmkd.evaluation.report.board import Board, claim, verdict
from mmkd.evaluation.report.charts import Series, lines, radar, steps
from mmkd.evaluation.report.markdown import markdown, plain
from mmkd.evaluation.report.page import build_page, is_suite
from mmkd.evaluation.report.tables import outcomes
from mmkd.evaluation.statistics.bootstrap import interval
from mmkd.files import read_json

EVIL = '<img src=https://evil.example/x onerror=alert(1)> | "quoted" </script>'
DATASETS = [
    *((f"{m}-{k}", kind, m) for m in ("CT", "MRI", "OCT") for k in (1, 2) for kind in ("zeroshot", "probe")),
    ("CT-1", "probe", "CT", "shots"),
    ("roco", "retrieval", "CT"),
    ("vqa-rad", "vqa", "MRI"),
    ("tcga-blca", "survival", "pathology"),
    ("camelyon16", "diagnosis", "pathology"),
]  # fmt: skip

DATASET = {
    "title": "CT of one kind",
    "task": "classification",
    "modality": "CT",
    "license": "CC-BY-4.0",
    "tier": "B",
    "splits": {"counts": {"test": {"pairs": 200, "groups": 90}}, "shared_groups": 0, "shared_images": 3},
}


class Page(HTMLParser):
    """Checks that tags are closed; notes what a browser would load, words, and rows of tables by id."""

    VOID = ("meta", "img", "br", "link", "col", "circle", "line", "polygon", "polyline")

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.words, self.unlabelled = [], [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if (tag == "svg" and "aria-label" not in dict(attrs)) or (tag == "th" and "scope" not in dict(attrs)):
            self.unlabelled.append((tag, attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def words(html):
    return re.sub(r"\s+", " ", " ".join(Page(html).words))


def write_marked_suite(folder):
    """Every kind of task, with a row undefined, a mark of contamination, a dataset left out and one described."""
    write_suite(
        folder,
        DATASETS,
        undefined=[("stage1", "retrieval-roco")],
        marked={"CT-1": {"biomedclip": "PMC-15M holds its source"}},
        skipped_datasets={"ddi": "not there; register at its site"},
        datasets={"CT-1": DATASET},
    )


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    write_marked_suite(folder)
    (folder / "repro.lock").write_text('{"version": 1, "commit": "<abc>"}\n')
    return Board(read_json(folder / "summary.json"), folder)


def test_the_page_holds_everything_and_loads_nothing(board):
    html = build_page(board)
    page = Page(html)
    assert page.tags.count("script") == 1 and not {"iframe", "link", "object", "form", "img"} & set(page.tags)
    assert not {"src", "href"} & set(page.attributes) and not [a for a in page.attributes if a.startswith("on")]
    assert page.unlabelled == [] and "script-src &#x27;sha256-" in html
    shown = words(html)
    for expected in (
        "The student is ahead of each of its teachers on 9 datasets.",
        "stage1 did not answer retrieval-roco",
        "undefined: it has no text tower",
        "Best teacher of each modality",
        "ensemble · all teachers together",
        "Which class of camelyon16?",
        "CT-1: probe by training images of each class",
        "CT-1: probe by per cent of the training images",
        "tcga-blca, student: log-rank p < 0.01",
        "high risk, n = 40",
        "CT-1, zero-shot: share of each true class (row) by answer (column)",
        "PMC-15M holds its source",
        "through biomedclip",
        "not there; register at its site",
        "CT-1, shots · linear probe",
        "balanced accuracy at 32-shot",
        "CT of one kind CT classification CC-BY-4.0 B 200 from 90 sources 3 identical images",
        '"commit": "<abc>"',
    ):
        assert expected in shown or expected in html, expected
    assert html.count('class="radar"') == 1 and html.count("<tbody data-scope=") == 5
    assert html == build_page(Board(board.summary, board.results))


def test_means_are_over_the_common_subset_with_paired_intervals(board):
    mean = board.mean("CT", "probe")
    assert mean.tasks == ["probe-CT-1", "probe-CT-2"]
    stored, values = {}, {}
    for row in ("student", "plip"):
        files = [board.results / "cells" / row / f"{task}.safetensors" for task in mean.tasks]
        drawn = [safetensors.numpy.load_file(file)["together.balanced_accuracy"] for file in files]
        cells = [board.summary["tasks"][task]["rows"][row]["metrics"]["balanced_accuracy"] for task in mean.tasks]
        stored[row], values[row] = np.mean(drawn, axis=0), np.mean([cell["value"] for cell in cells])
    assert mean.rows["student"]["value"] == pytest.approx(values["student"])
    assert (mean.rows["plip"]["low"], mean.rows["plip"]["high"]) == pytest.approx(interval(stored["plip"]))
    found = mean.differences["plip"]
    assert found["difference"] == pytest.approx(values["student"] - values["plip"])
    assert (found["low"], found["high"]) == pytest.approx(interval(stored["student"] - stored["plip"]))
    assert "retrieval-roco" not in board.mean().tasks and "stage1" in board.mean().rows
    assert "stage1" not in board.mean(kind="retrieval").rows
    clean = board.mean(clean=True).tasks
    assert not any("-CT-1" in task for task in clean) and len(clean) == len(board.mean().tasks) - 2
    assert all(count >= 0 for count in outcomes(board, "plip", list(board.tasks)))
    assert sum(outcomes(board, "plip", list(board.tasks))) == len(board.tasks)
    assert outcomes(board, "stage1", ["retrieval-roco"]) == (0, 0, 0, 1)


def test_without_replicates_there_is_no_interval_and_no_claim(board, tmp_path):
    bare = Board(board.summary, tmp_path)
    assert bare.mean().rows["student"]["value"] == board.mean().rows["student"]["value"]
    assert bare.mean().rows["student"]["low"] is None
    assert verdict(bare) == "The student on 9 datasets."
    html = build_page(bare)
    assert "no interval" in words(html) and not re.search(r"\bnan\b", html.split("<script>")[0], re.IGNORECASE)


def test_a_loss_is_called_a_loss(tmp_path):
    write_suite(tmp_path, DATASETS[:6], skills={"student": 0.3})
    board = Board(read_json(tmp_path / "summary.json"), tmp_path)
    assert verdict(board) == "The student stays behind its best teacher, biomedclip, on 3 datasets."
    assert "Difference to biomedclip: <strong>−" in claim(board)
    assert outcomes(board, "biomedclip", list(board.tasks)) == (0, 0, 6, 0)


def test_every_string_of_a_user_is_escaped(tmp_path):
    write_suite(tmp_path, DATASETS[:4], skipped_datasets={EVIL: EVIL})
    summary = read_json(tmp_path / "summary.json")
    for task in summary["tasks"].values():
        task |= {"title": EVIL, "modality": EVIL, "dataset": f"{task['dataset']} {EVIL}", "variant": ""}
        task["contaminated"] = {"plip": EVIL, "student": EVIL}
        task["rows"]["stage1"] = {"undefined": EVIL, "metrics": {}, "by_modality": {}}
    summary["encoders"]["plip"] |= {"source": EVIL, "failures": [EVIL]}
    (tmp_path / "repro.lock").write_text(EVIL)
    board = Board(summary, tmp_path)
    page = Page(build_page(board))
    assert "img" not in page.tags and page.tags.count("script") == 1
    assert not [name for name in page.attributes if name.startswith("on")]
    text = markdown(board, EVIL)
    assert "<img" not in text.replace("\\<", "") and not re.search(r"(?<!\\)\|(?! )", text.replace(" |\n", "\n"))
    assert plain("a|b\n[c](d)") == "a\\|b \\[c\\]\\(d\\)"


ODD = {"none": [], "one": DATASETS[:1], "survival": DATASETS[-2:-1], "three": DATASETS[-3:]}


@pytest.mark.parametrize("datasets", ODD.values(), ids=ODD)
def test_missing_kinds_leave_a_whole_page(datasets, tmp_path):
    write_suite(tmp_path, datasets, skipped_datasets={"busi": "not there"})
    html = build_page(Board(read_json(tmp_path / "summary.json"), tmp_path))
    assert Page(html).unlabelled == [] and "busi" in html
    assert ('id="leaderboard"' in html) == bool(datasets)
    assert ("no task could be evaluated" in html) != bool(datasets)


def test_a_student_alone_and_one_without_numbers(tmp_path):
    write_suite(tmp_path / "alone", DATASETS, rows=("student",))
    alone = Board(read_json(tmp_path / "alone/summary.json"), tmp_path / "alone")
    assert 'id="wins"' not in build_page(alone) and "| student |" in markdown(alone, "")
    names = ["zeroshot-CT-1", "probe-CT-1"]
    write_suite(tmp_path / "broken", DATASETS[:2], undefined=[("student", name) for name in names])
    broken = Board(read_json(tmp_path / "broken/summary.json"), tmp_path / "broken")
    html = build_page(broken)
    assert "no common results" in verdict(broken) and "undefined: it has no text tower" in html
    assert Page(html).unlabelled == []


def test_markdown_holds_the_same_numbers(board):
    text = markdown(board, "{}")
    for heading in (
        "Leaderboard",
        "Best teacher of each modality",
        "Win, tie, loss",
        "Dataset by dataset",
        "Not evaluated",
    ):
        assert f"## {heading}" in text
    own = board.mean().rows["student"]
    assert f"{own['value']:.2f} ({own['low']:.2f} to {own['high']:.2f})" in text
    assert "- ddi: not there; register at its site" in text and "[repro.lock](repro.lock)" in text
    tables = [block for block in text.split("\n\n") if block.startswith("| ")]
    for block in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_drawings_of_edge_values():
    flat = [Series("a", "student", [(1, 0.5), (32, 0.5)], [(1, 0.5, 0.5)])]
    drawn = lines("t", "shots", flat, [(1, "1"), (32, "32")])
    drawn += steps("t", "time", [Series("a", "c1", [(0.0, 1.0)])])
    drawn += radar("t", ["a", "b", "c"], [Series("s", "student", [(0, 1.4), (1, -0.2)])])
    Page(drawn)
    assert not re.search(r"\bnan|\binf", drawn) and '<polygon class="line"' not in drawn
    assert "0.50 at 32" in drawn and "1.00 at the end" in drawn
    times = re.findall(r'text-anchor="middle">([\d,]+)<', steps("t", "time", [Series("a", "c1", [(163.2, 0.5)])]))
    assert times == ["0", "50", "100", "150"]


def test_the_command_writes_both_files(board, tmp_path):
    page = tmp_path / "own.html"
    settings = {"results": board.results, "output": page, "quiet": True}
    recipe.main(recipe.ReportSettings(**settings))
    assert page.is_file() and (tmp_path / "own.md").read_text().startswith("# The student is ahead")
    with pytest.raises(FileExistsError, match="--overwrite"):
        recipe.main(recipe.ReportSettings(**settings))
    with pytest.raises(ValueError, match="--pairs: these results are of datasets"):
        recipe.main(recipe.ReportSettings(pairs=tmp_path, overwrite=True, **settings))
    assert is_suite(board.summary) and not is_suite({"tasks": {"zeroshot-label": {}}})
