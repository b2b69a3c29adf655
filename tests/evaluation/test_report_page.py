import json

from mmkd.data.splits import spread
from mmkd.evaluation.report.leaderboard import task_notes
from mmkd.evaluation.report.page import read_log, shorten, teachers_section, training_section
from mmkd.evaluation.statistics.bootstrap import BY_IMAGE
from mmkd.pages.page import Page, Section, to_html


def test_the_notes_of_a_task_state_its_size_and_what_its_intervals_lack():
    task = {
        "kind": "vqa",
        "primary_metric": "accuracy",
        "units": {"image": {"n": 40, "groups": 30, "resampling": "groups"}},
        "chance": {"accuracy": 0.2},
    }
    assert task_notes(task) == ["Visual question answering; accuracy; 40 samples from 30 sources; chance 0.20."]
    few = {"image": {"n": 40, "groups": 3, "resampling": "groups"}}
    assert "not informative" in task_notes({**task, "units": few})[1]
    one = {"image": {"n": 40, "groups": 1, "resampling": BY_IMAGE}}
    assert "too narrow" in task_notes({**task, "units": one, "left_out": ["cyst"]})[1]
    assert task_notes({**task, "left_out": ["cyst"]})[-1].endswith("cyst.")


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
    assert not training_section({"none": None, "gone": tmp_path / "gone.jsonl"}).blocks
    assert len(training_section({"one step": log}).blocks) == 1


def test_reports_of_other_stages_are_shown_as_far_as_they_are_sound():
    cosines = {"same_sample_cross_teacher": {"image": 0.1, "text": None}, "image_text": {"<b>": 0.4}}
    section = teachers_section({"before": cosines, "after": cosines}, {"kept": 300, "dropped": {"<i>": 7, "x": []}})
    html = to_html(Page("t", [section]))
    assert "same sample, two teachers: text" in html and "dropped: &lt;i&gt;" in html and "<b>" not in html
    assert not teachers_section([], None).blocks and not teachers_section({"before": 3}, {}).blocks
    assert isinstance(section, Section)
