import json

import pytest

from mmkd.evaluation.report.charts import Row, curve, differences, forest, moving_mean, shade
from mmkd.evaluation.report.markup import p_value, page, signed, table, text
from mmkd.evaluation.report.pairs_page import Answer, caption_card, image_card, shorten, spread
from mmkd.evaluation.report.pairs_results import claim, task_order, tasks_section, verdict
from mmkd.evaluation.report.pipeline import read_log, training_section

EVIL = "<script>alert('x')</script> \"onload=\" & https://evil.example"


def summary(**differences):
    rows = {"student": {"value": 0.5, "low": 0.4, "high": 0.6}}
    found = {}
    for name, (difference, low, high) in differences.items():
        rows[name] = {"value": 0.5 - difference, "low": 0.3, "high": 0.7}
        found[name] = {"difference": difference, "low": low, "high": high, "p": 0.5}
    best = max((name for name in rows if name != "student"), key=lambda name: rows[name]["value"], default=None)
    overall = {"rows": rows, "differences": found, "best_teacher": best, "tasks": ["a", "b"]}
    return {"student": "student", "teachers": list(differences), "overall": overall}


@pytest.mark.parametrize(
    ("rivals", "expected"),
    [
        ({"a": (0.2, 0.1, 0.3), "b": (0.1, 0.02, 0.2)}, "One student, ahead of each of its two teachers."),
        ({"a": (0.2, 0.1, 0.3)}, "One student, ahead of its teacher."),
        ({"a": (0.2, -0.1, 0.3), "b": (0.1, 0.02, 0.2)}, "The student is ahead of its best teacher, b."),
        ({"a": (0.2, 0.1, 0.3), "b": (0.01, -0.02, 0.2)}, "its best teacher, b, cannot be told apart"),
        ({"a": (-0.2, -0.3, -0.1), "b": (0.1, 0.0, 0.2)}, "The student stays behind its best teacher, a."),
        ({"a": (0.2, None, None)}, "One student, measured on images it has not seen."),
        ({}, "One student, measured on images it has not seen."),
    ],
)
def test_the_headline_follows_the_intervals(rivals, expected):
    assert expected in verdict(summary(**rivals))


def test_the_claim_states_a_loss_as_a_loss():
    stated = claim(summary(a=(-0.2, -0.3, -0.1)))
    assert "0.50" in stated and "−0.20" in stated and "−0.30 to −0.10" in stated
    assert "not finite" in claim({**summary(), "overall": {"rows": {}, "tasks": [], "best_teacher": None}})


def test_every_string_of_a_user_is_escaped():
    answers = [Answer(EVIL, 0.5, "wrong")]
    pieces = [
        text(EVIL),
        table(EVIL, [EVIL], [[text(EVIL)]]),
        forest(EVIL, [Row(EVIL, "teacher", None, note=EVIL)]),
        differences(EVIL, [Row(EVIL, "teacher", 0.1, 0.0, 0.2)], [EVIL]),
        curve(EVIL, [(1, 1.0), (2, 0.5)]),
        image_card("", EVIL, EVIL, answers),
        caption_card(EVIL, [("", answers[0])]),
        page(EVIL, ""),
    ]
    assert not any("<script" in piece or '"onload' in piece for piece in pieces)


def test_chart_of_edge_values():
    html = forest(
        "t", [Row("a", "student", 1.2, -0.1, 1.1), Row("b", "teacher", None, note="undefined"), Row("c", "x", 0.3)], 0.5
    )
    assert "left:100.00%" in html and "undefined" in html and "no interval" in html and 'scope="row"' in html
    assert "−0.3" in differences("d", [Row("a", "teacher", -0.21, -0.28, -0.1)], ["p = 0.1"])
    assert "NaN" not in curve("flat", [(5, 2.0)], small=True) and "NaN" not in curve("flat", [(1, 2.0), (2, 2.0)])
    assert "–" in shade(None, False) and "best" in shade(0.5, True)


def test_tasks_without_classes_have_a_card():
    metric = {"accuracy": {"value": 0.4, "low": 0.3, "high": 0.5}}
    task = {
        "title": "Which answer?",
        "kind": "vqa",
        "headline": "accuracy",
        "frames": {"image": {"n": 40, "groups": 30, "resampling": "groups"}},
        "chance": {"accuracy": 0.2},
        "rows": {"student": {"undefined": None, "metrics": metric, "by_modality": {}}},
        "differences": {},
    }
    html = tasks_section({"tasks": {"vqa": task}, "student": "student", "teachers": [], "baselines": [], "skipped": {}})
    assert "Visual question answering; accuracy; 40 images from 30 sources; chance 0.20." in html


def test_numbers_as_text():
    assert signed(0.123) == "+0.12" and signed(-0.001) == "0.00" and signed(None) == "–"
    assert p_value(0.001) == "p < 0.01" and p_value(0.236) == "p = 0.24" and p_value(None) == "p unknown"


def test_moving_mean_keeps_lines_and_ends():
    line = [float(k) for k in range(100)]
    assert moving_mean(line) == pytest.approx(line)
    assert moving_mean([3.0]) == [3.0]
    jagged = moving_mean([0.0, 1.0] * 100)
    assert min(jagged[10:-10]) > 0.3 and max(jagged[10:-10]) < 0.7


def test_examples_take_modalities_in_turn_and_the_same_ones_each_time():
    keys, modalities = [f"k{n}" for n in range(20)], ["CT"] * 15 + ["MRI"] * 5
    chosen = spread(keys, modalities, 6)
    assert [modalities[k] for k in chosen] == ["CT", "MRI"] * 3 and chosen == spread(keys, modalities, 6)
    assert len(spread(keys, modalities, 99)) == 20 and spread([], [], 3) == []


def test_long_captions_are_cut_at_a_word():
    cut = shorten("word " * 1000)
    assert len(cut) < 230 and cut.endswith("word …")
    assert len(shorten("x" * 5000)) < 230


def test_broken_lines_of_a_log_are_left_out(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [
        {"step": 1, "loss": 2.0, "task": 1.0, "learning_rate": 1e-4},
        {"step": 2, "loss": float("nan")},
        [1],
        {"loss": 1},
    ]
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
    assert read_log(log) == {"loss": [(1, 2.0)], "task": [(1, 1.0)]}
    assert training_section({"none": None, "gone": tmp_path / "gone.jsonl"}) == ""


def test_broad_tasks_stand_before_those_within_a_modality():
    kinds = {
        "probe-label": "probe",
        "zeroshot-label": "zeroshot",
        "zeroshot-label-ct": "zeroshot",
        "retrieval": "retrieval",
    }
    kinds["zeroshot-modality"] = "zeroshot"
    ordered = task_order({"tasks": {name: {"kind": kind} for name, kind in kinds.items()}})
    assert [name for name, _ in ordered] == [
        "zeroshot-modality",
        "zeroshot-label",
        "retrieval",
        "probe-label",
        "zeroshot-label-ct",
    ]
