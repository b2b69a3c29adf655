import re
from html.parser import HTMLParser

import numpy as np
import pytest
import safetensors.numpy
from suite_results import DATASETS, write_marked_suite, write_suite

import mmkd.train.report as recipe
from mmkd.evaluation.report.leaderboard import Leaderboard, claims, comparison, distillation, p_value, title
from mmkd.evaluation.report.page import report_page
from mmkd.evaluation.settings import ReportSettings
from mmkd.evaluation.statistics.bootstrap import interval
from mmkd.files import read_json
from mmkd.pages.page import to_html, to_markdown

EVIL = '<img src=https://evil.example/x onerror=alert(1)> | "quoted" </script>'


class Page(HTMLParser):
    """Checks that tags are closed; notes tags, attributes, words, and what has no label."""

    VOID = ("meta", "img", "br", "link", "col", "path", "use", "rect")

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.words, self.unlabelled = [], [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        missing = {"th": "scope", "svg": "aria-hidden", "img": "alt"}.get(tag)
        if missing and missing not in dict(attrs):
            self.unlabelled.append((tag, attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def words(html):
    return re.sub(r"\s+", " ", " ".join(Page(html).words))


def build(board):
    return to_html(report_page(board, ReportSettings(board.results)))


def read(folder):
    return Leaderboard(read_json(folder / "summary.json"), folder)


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    write_marked_suite(folder)
    (folder / "repro.lock").write_text('{"version": 1, "commit": "<abc>"}\n')
    return read(folder)


@pytest.fixture(scope="module")
def page(board):
    return report_page(board, ReportSettings(board.results))


def test_the_page_holds_everything_and_loads_nothing(board, page):
    html = to_html(page)
    found = Page(html)
    assert found.tags.count("script") == 1 and not {"iframe", "link", "object", "form", "img"} & set(found.tags)
    assert not {"src", "href"} & set(found.attributes) and not [a for a in found.attributes if a.startswith("on")]
    assert found.unlabelled == [] and "script-src &#39;sha256-" in html
    shown = words(html)
    for expected in (
        "Distillation improved on stage 1: +",
        "The student is better than each of its 2 teachers on 9 datasets.",
        "Not a clinical result.",
        "no model that was trained as long without a teacher",
        "test split of 10 datasets, 2,000 samples",
        "Balanced accuracy, classification",
        "; accuracy 0.",
        "Relative to chance",
        "Holm p",
        "Average rank over datasets",
        "ranks are averaged over 9 datasets",
        "signed-rank p",
        "stage1 has no result on retrieval-roco",
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
        "Mean score by modality",
        "CT of one kind CT classification CC-BY-4.0 B 200 from 90 sources 3 identical images",
        "&#34;commit&#34;: &#34;&lt;abc&gt;&#34;",
    ):
        assert expected in shown or expected in html, expected
    for scope in ("", "CT", "MRI", "OCT", "pathology"):
        assert html.count(f'data-scope="{scope}"') == 7, scope
    assert html == build(Leaderboard(board.summary, board.results))


def test_means_are_over_the_common_subset_with_paired_intervals(board):
    mean = board.mean("CT", "probe")
    assert mean.tasks == ["probe-CT-1", "probe-CT-2"]
    stored, values = {}, {}
    for row in ("student", "plip"):
        files = [board.results / "encoders" / row / f"{task}.safetensors" for task in mean.tasks]
        drawn = [safetensors.numpy.load_file(file)["together.balanced_accuracy"] for file in files]
        stored[row] = np.mean(drawn, axis=0)
        values[row] = np.mean([board.metric(task, row)["value"] for task in mean.tasks])
    assert mean.rows["student"]["value"] == pytest.approx(values["student"])
    assert board.plain_mean("student", "accuracy", mean.tasks) == pytest.approx(values["student"])
    assert (mean.rows["plip"]["low"], mean.rows["plip"]["high"]) == pytest.approx(interval(stored["plip"]))
    found = mean.differences["plip"]
    assert found["difference"] == pytest.approx(values["student"] - values["plip"])
    assert (found["low"], found["high"]) == pytest.approx(interval(stored["student"] - stored["plip"]))
    assert "retrieval-roco" not in board.mean().tasks and "stage1" in board.mean().rows
    assert "stage1" not in board.mean(kind="retrieval").rows
    clean = board.mean(clean=True).tasks
    assert not any("-CT-1" in task for task in clean) and len(clean) == len(board.mean().tasks) - 2
    assert sum(board.outcomes("plip", list(board.tasks))) == len(board.tasks)
    assert board.outcomes("stage1", ["retrieval-roco"]) == (0, 0, 0, 1)


def test_accuracy_far_from_balanced_accuracy_is_pointed_out(tmp_path):
    write_suite(tmp_path, DATASETS[:6])
    summary = read_json(tmp_path / "summary.json")
    assert not any("differ by" in sentence for sentence in claims(Leaderboard(summary, tmp_path)))
    for task in summary["tasks"].values():
        task["rows"]["student"]["metrics"]["accuracy"] = {"value": 0.96, "low": 0.9, "high": 0.99}
        task["rows"]["student"]["metrics"]["balanced_accuracy"]["value"] = 0.5
    board = Leaderboard(summary, tmp_path)
    assert any("balanced accuracy of the student differ by 46 points" in sentence for sentence in claims(board))
    assert board.accuracies("student") == pytest.approx((0.5, 0.96))
    assert "student: accuracy 0.96." in words(build(board))


def test_without_replicates_there_is_no_interval_and_no_claim(tmp_path):
    board = read(write_suite(tmp_path / "suite", DATASETS[:6]))
    bare = Leaderboard(board.summary, tmp_path)
    assert bare.mean().rows["student"]["value"] == board.mean().rows["student"]["value"]
    assert bare.mean().rows["student"]["low"] is None
    assert comparison(bare) == "The student, evaluated on 3 datasets."
    assert distillation(bare).endswith("points (no interval).")
    html = build(bare)
    assert "no interval" in words(html) and not re.search(r"\bnan\b", html.split("<script>")[0], re.IGNORECASE)


def test_the_sentences_follow_the_intervals(tmp_path):
    def board(**skills):
        folder = tmp_path / "-".join(map(str, skills.values()))
        write_suite(folder, DATASETS[:6], skills=skills)
        return read(folder)

    worse = board(student=0.3, stage1=0.5)
    assert re.match(r"Distillation did not improve on stage 1: −[\d.]+ points \[−[\d.]+, −[\d.]+\]\.$", title(worse))
    assert "The student is worse than the model that distillation started from." in claims(worse)
    assert "The student is worse than its best teacher, biomedclip, on 3 datasets." in claims(worse)
    assert any(sentence.startswith("Difference from its best teacher, biomedclip: −") for sentence in claims(worse))
    assert worse.outcomes("biomedclip", list(worse.tasks)) == (0, 0, 6, 0)
    level = board(student=0.6, stage1=0.6, biomedclip=0.6, plip=0.2)
    assert title(level).startswith("Distillation did not measurably improve on stage 1: ")
    assert (
        comparison(level) == "The student does not differ measurably from its best teacher, biomedclip, on 3 datasets."
    )
    assert "The student is worse than the model that distillation started from." not in claims(level)
    better = board(student=0.9, stage1=0.3, biomedclip=0.5, plip=0.5)
    assert title(better).startswith("Distillation improved on stage 1: +")
    assert comparison(better) == "The student is better than each of its 2 teachers on 3 datasets."


def test_tasks_of_one_dataset_have_labels_of_their_own(tmp_path):
    write_suite(tmp_path, [("pairs", "zeroshot", ""), ("pairs", "retrieval", "")])
    summary = read_json(tmp_path / "summary.json")
    task = summary["tasks"]["zeroshot-pairs"]
    summary["tasks"] |= {"zeroshot-modality": task, "zeroshot-label": {**task, "modality": "CT"}}
    del summary["tasks"]["zeroshot-pairs"]
    board = Leaderboard(summary, tmp_path)
    labels = [board.task_label(name) for name in board.tasks]
    assert labels == ["pairs: modality", "pairs: label", "pairs"]


def test_every_string_of_a_user_is_escaped(tmp_path):
    write_suite(tmp_path, DATASETS[:4], skipped_datasets={EVIL: EVIL})
    summary = read_json(tmp_path / "summary.json")
    for task in summary["tasks"].values():
        task |= {"title": EVIL, "modality": EVIL, "dataset": f"{task['dataset']} {EVIL}", "variant": ""}
        task["contaminated"] = {"plip": EVIL, "student": EVIL}
        task["rows"]["stage1"] = {"undefined": EVIL, "metrics": {}, "by_modality": {}}
    summary["encoders"]["plip"] |= {"source": EVIL, "failures": [EVIL]}
    (tmp_path / "repro.lock").write_text(EVIL)
    board = Leaderboard(summary, tmp_path)
    page = Page(build(board))
    assert "img" not in page.tags and page.tags.count("script") == 1
    assert not [name for name in page.attributes if name.startswith("on")]
    text = to_markdown(report_page(board, ReportSettings(tmp_path)))
    assert "<img" not in text.replace("\\<", "") and not re.search(r"(?<!\\)\|(?! )", text.replace(" |\n", "\n"))


ODD = {"none": [], "one": DATASETS[:1], "survival": DATASETS[-2:-1], "three": DATASETS[-3:]}


@pytest.mark.parametrize("datasets", ODD.values(), ids=ODD)
def test_missing_kinds_leave_a_whole_page(datasets, tmp_path):
    write_suite(tmp_path, datasets, skipped_datasets={"busi": "not there"})
    html = build(read(tmp_path))
    assert Page(html).unlabelled == [] and "busi" in html
    assert ('id="leaderboard"' in html) == bool(datasets)
    assert ("No task could be evaluated" in html) != bool(datasets)


def test_a_student_alone_and_one_without_numbers(tmp_path):
    alone = read(write_suite(tmp_path / "alone", DATASETS[:6], rows=("student",)))
    page = report_page(alone, ReportSettings(alone.results))
    assert 'id="wins"' not in to_html(page) and "| student |" in to_markdown(page)
    names = ["zeroshot-CT-1", "probe-CT-1"]
    write_suite(tmp_path / "broken", DATASETS[:2], undefined=[("student", name) for name in names])
    broken = read(tmp_path / "broken")
    html = build(broken)
    assert title(broken) == "The student has no results on the tasks that all encoders have."
    assert "undefined: it has no text tower" in html and Page(html).unlabelled == []


def test_markdown_holds_the_same_numbers(board, page):
    text = to_markdown(page)
    for heading in ("Leaderboard", "Best teacher of each modality", "Win, tie, loss", "Results of each task",
                    "Not evaluated"):  # fmt: skip
        assert f"## {heading}" in text
    own = board.mean().rows["student"]
    assert f"{own['value']:.2f} ({own['low']:.2f} to {own['high']:.2f})" in text
    assert "| ddi | not there; register at its site |" in text
    tables = [block for block in text.split("\n\n") if block.startswith("| ")]
    assert len(tables) > 10
    for block in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_the_command_writes_both_files(board, tmp_path):
    page = tmp_path / "own.html"
    settings = {"results": board.results, "output": page, "quiet": True}
    recipe.main(recipe.ReportSettings(**settings))
    assert page.is_file() and (tmp_path / "own.md").read_text().startswith("# Distillation improved on stage 1: +")
    with pytest.raises(FileExistsError, match="--overwrite"):
        recipe.main(recipe.ReportSettings(**settings))


def test_p_values_as_text():
    assert p_value(0.001) == "p < 0.01" and p_value(0.236) == "p = 0.24" and p_value(None) == "p unknown"
