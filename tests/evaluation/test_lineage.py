"""What the report says about a student that validation chose among stage 1, the distilled student and averages."""

import re

import pytest
from fake_encoder import write_pairs
from suite_results import write_suite

from mmkd.data.table import Pair
from mmkd.evaluation.report.leaderboard import Leaderboard
from mmkd.evaluation.report.page import report_page
from mmkd.evaluation.settings import ReportSettings
from mmkd.files import read_json, write_json
from mmkd.pages.page import to_markdown

DATASETS = [("CT-1", "zeroshot", "CT"), ("CT-1", "probe", "CT")]
CHOICE = {"rule": "the highest mean", "pairs": 93, "not_evaluated": None}
CANDIDATES = [
    {"weight": 0.0, "value": 0.5, "ahead": 0.0, "error": 0.0},
    {"weight": 0.5, "value": 0.56, "ahead": 0.06, "error": None},
]


@pytest.fixture
def page(tmp_path):
    """The page of a student, stage 1 and the distilled student, with or without a choice."""

    def build(student, distilled, choice):
        rows, skills = ("student", "stage1", "distilled"), {"student": student, "stage1": 0.6, "distilled": distilled}
        write_suite(tmp_path, DATASETS, rows=rows, skills=skills, baselines=["stage1", "distilled"])
        if choice is not None:
            write_json(tmp_path / "choice.json", CHOICE | choice)
        inputs = ReportSettings(tmp_path, choice=tmp_path / "choice.json")
        page = report_page(Leaderboard(read_json(tmp_path / "summary.json"), tmp_path), inputs)
        return page.title, " ".join(page.claims), to_markdown(page)

    return build


def test_stage1_as_the_output_is_named_in_the_first_sentence(page):
    title, claims, text = page(0.6, 0.4, {"weight": 0.0, "candidates": CANDIDATES})
    assert title == "The student is stage 1 itself: on 93 validation pairs, distillation did not improve it."
    minus = re.search(r"the distilled student minus stage 1 is (\S+) points \[(\S+), (\S+)\]", claims).groups()
    point, low, high = (float(value.replace("−", "-")) for value in minus)
    assert low < point < high < 0 and -30 < point < -10
    assert "| 0.5 | 0.56 | +0.06 | – |" in text


def test_an_output_without_validation_states_why(page):
    reason = "none of the 9 pairs is in the validation split"
    title, claims, text = page(0.6, 0.8, {"weight": 0.0, "candidates": [], "not_evaluated": reason})
    assert title.startswith("The student is stage 1 itself: there was no validation")
    assert f"No validation: {reason}." in claims and "Candidates on validation" not in text
    assert "the distilled student minus stage 1 is +" in claims


def test_an_average_states_its_shares(page):
    title, claims, _ = page(0.9, 0.6, {"weight": 0.25, "candidates": CANDIDATES})
    assert title.startswith("Distillation improved on stage 1: +")
    assert "an average of weights: 0.25 of the distilled student and 0.75 of stage 1" in claims
    assert "the distilled student minus the student is −" in claims


def test_the_distilled_student_is_named_and_without_a_choice_nothing_is(page):
    _, claims, _ = page(0.9, 0.6, None)
    assert "validation" not in claims and "distilled" not in claims
    _, claims, _ = page(0.9, 0.9, {"weight": 1.0, "candidates": CANDIDATES})
    assert "the student is the distilled one and no average" in claims and "distilled student minus" not in claims


def test_the_page_begins_with_stage1_and_the_control_and_states_what_training_shares(tmp_path):
    skills = {"student": 0.9, "stage1": 0.3, "no-teacher": 0.4}
    write_suite(tmp_path, DATASETS, rows=tuple(skills), skills=skills, baselines=["stage1", "no-teacher"])
    write_json(tmp_path / "choice.json", CHOICE | {"weight": 1.0, "candidates": CANDIDATES})
    places = [("train", "a.dcm", "a1"), ("train", "b.dcm", "b1"), ("test", "a.dcm", "a2"), ("test", "c.dcm", "b1")]
    pairs = [
        Pair(f"p{k}", f"{k}.png", f"text {k}", "CT", "mass", group, split, source)
        for k, (split, source, group) in enumerate(places)
    ]
    write_pairs(tmp_path / "pairs", pairs)
    inputs = ReportSettings(tmp_path, pairs=tmp_path / "pairs", choice=tmp_path / "choice.json")
    page = report_page(Leaderboard(read_json(tmp_path / "summary.json"), tmp_path), inputs)
    assert page.title.startswith("Distillation improved on stage 1: +")
    assert page.claims[0].startswith("The teachers improved on the same training without a teacher: +")
    assert page.claims[1].startswith("Chosen on 93 validation pairs")
    assert dict(page.facts)["Held-out images"] == (
        "2 groups from 2 sources; training images come from 1 of these sources and 1 of these groups"
    )
