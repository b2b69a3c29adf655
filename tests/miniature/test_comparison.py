"""Intervals of paired differences of means over tasks, seeds averaged within each replicate, against numpy by hand."""

import json

import numpy as np
import pytest
import safetensors.numpy

from mmkd.miniature.report import Results, brief, replace_between, rival_table

TASKS = {"zeroshot-a": "zeroshot", "zeroshot-b": "zeroshot", "retrieval": "retrieval"}


def write(folder, encoder, points, replicates):
    for task, kind in TASKS.items():
        (folder / "tasks").mkdir(parents=True, exist_ok=True)
        about = {"name": task, "kind": kind, "primary_metric": "score", "title": task, "ids": ["x", "y"]}
        (folder / "tasks" / f"{task}.json").write_text(json.dumps(about))
        if task in points:
            cells = folder / "cells" / encoder
            cells.mkdir(parents=True, exist_ok=True)
            cell = {"undefined": None, "metrics": {"score": {"value": points[task]}}}
            (cells / f"{task}.json").write_text(json.dumps(cell))
            safetensors.numpy.save_file({"together.score": replicates[task]}, cells / f"{task}.safetensors")


@pytest.fixture
def world(tmp_path):
    generator = np.random.default_rng(0)
    made = {}
    for encoder, level in (("s1", 0.6), ("s2", 0.7), ("teacher", 0.5)):
        points = {task: level + 0.01 * k for k, task in enumerate(TASKS)}
        replicates = {task: generator.normal(value, 0.02, 1000) for task, value in points.items()}
        write(tmp_path / ("teachers" if encoder == "teacher" else "students"), encoder, points, replicates)
        made[encoder] = points, replicates
    return tmp_path, made


def mean(values):
    return ((values["zeroshot-a"] + values["zeroshot-b"]) / 2 + values["retrieval"]) / 2


def test_paired_interval_by_hand(world):
    folder, made = world
    results = Results([folder / "students", folder / "teachers"])
    found = results.compare(results.score(["s1", "s2"]), results.score(["teacher"]))
    (p1, r1), (p2, r2), (p3, r3) = made["s1"], made["s2"], made["teacher"]
    assert found["delta"] == pytest.approx((mean(p1) + mean(p2)) / 2 - mean(p3))
    low, high = np.percentile((mean(r1) + mean(r2)) / 2 - mean(r3), [2.5, 97.5])
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))
    assert found["tasks"] == 3


def test_only_common_tasks_are_compared(world):
    folder, made = world
    (folder / "teachers" / "cells" / "teacher" / "retrieval.json").unlink()
    results = Results([folder / "students", folder / "teachers"])
    found = results.compare(results.score(["s1"]), results.score(["teacher"]))
    points = made["s1"][0], made["teacher"][0]
    assert found["tasks"] == 2
    expected = [(own["zeroshot-a"] + own["zeroshot-b"]) / 2 for own in points]
    assert found["delta"] == pytest.approx(expected[0] - expected[1])


def test_results_on_other_images_are_refused(world):
    folder, _ = world
    path = folder / "teachers" / "tasks" / "retrieval.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ids": ["z"]}))
    with pytest.raises(ValueError, match="other images"):
        Results([folder / "students", folder / "teachers"])
    with pytest.raises(FileNotFoundError, match="no results of nobody"):
        Results([folder / "students"]).score(["nobody"])


def test_the_table_goes_between_the_markers(tmp_path):
    row = {"rival": "paper", "noise": 0.4, "delta": 0.05, "low": 0.01, "high": 0.09, "ours": 0.5}
    table = rival_table([row, {**row, "rival": "stage 1", "low": -0.01}])
    assert "| paper | **+5.0 [+1.0, +9.0]** |" in table and "| stage 1 | +5.0 [-1.0, +9.0] |" in table
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- miniature -->\nold\n<!-- /miniature -->\nafter\n")
    replace_between(page, "miniature", table)
    assert page.read_text() == f"before\n<!-- miniature -->\n{table}\n<!-- /miniature -->\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="lacks the lines"):
        replace_between(page, "miniature", table)


def test_the_short_table_names_the_closest_teacher():
    def row(rival, low):
        return {"rival": rival, "noise": 0.2, "delta": low + 1, "low": low, "high": low + 2, "ours": 0.5}

    rows = brief([row("teacher: a", 2.0), row("teacher: b", -0.5), row("paper", 1.0)])
    assert [(r["rival"], r["low"]) for r in rows] == [("the closest of 2 teachers", -0.5), ("paper", 1.0)]
