"""Means over datasets: for each modality, each kind of task and over all, on the tasks that every encoder has.

Replicates of tasks of one dataset share their draws, those of different datasets are independent; a mean's interval and
a paired difference follow from the mean of replicates. Each kind of task counts the same within a mean. What an encoder
was trained on flatters it, so every mean is also given without the tasks that carry such a mark for any encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mmkd.evaluation.bootstrap import difference, interval
from mmkd.evaluation.encoders import ENSEMBLE, ORACLE
from mmkd.evaluation.metrics import Floats
from mmkd.evaluation.summary import mean_of_kinds, plain_values

Summaries = dict[str, dict[str, Any]]
Replicates = Callable[[str, str], Floats]


def suite_means(tasks: Summaries, student: str, teachers: Sequence[str], replicates: Replicates) -> dict[str, Any]:
    """What `summary.json` says of all datasets together.

    Args:
        tasks: summary of each task, of any variant; variants other than the main one are left out.
        student: its row.
        teachers: their rows.
        replicates: from row and task to the headline metric's replicates ``(r,)``.

    Returns:
        ``means`` over all and over clean tasks, ``best_teachers`` by modality, ``win_tie_loss`` by rival.
    """
    main = {name: task for name, task in tasks.items() if not task.get("variant")}
    clean = {name: task for name, task in main.items() if not task.get("contaminated")}
    return {
        "means": {
            "all": _means(main, student, replicates),
            "clean": _means(clean, student, replicates),
        },
        "best_teachers": best_teachers(main, teachers),
        "win_tie_loss": win_tie_loss(main, student),
    }


def mean_block(tasks: Summaries, student: str, replicates: Replicates) -> dict[str, Any]:
    """Mean of each row over the tasks that all encoders have, and the student's paired differences.

    Args:
        tasks: summary of each task.
        student: its row.
        replicates: see `suite_means`.

    Returns:
        ``tasks``, ``n``, ``rows`` and ``differences``; an encoder that has none of the tasks is no row.
    """
    made_here = (ENSEMBLE, ORACLE)
    encoders = [row for row in _rows(tasks.values()) if row not in made_here]
    encoders = [row for row in encoders if any(_value(task, row) is not None for task in tasks.values())]
    common = [name for name, task in tasks.items() if all(_value(task, row) is not None for row in encoders)]
    extra = [row for row in made_here if all(_value(tasks[name], row) is not None for name in common)]
    if not common:
        return {"tasks": [], "n": 0, "rows": {}, "differences": {}}
    kept = {name: tasks[name] for name in common}
    values = {
        row: float(mean_of_kinds(kept, {name: np.array(_value(task, row)) for name, task in kept.items()}))
        for row in [*encoders, *extra]
    }
    drawn = {row: mean_of_kinds(kept, {name: replicates(row, name) for name in common}) for row in values}
    rows = {row: plain_values({"value": values[row], **_bounds(drawn[row])}) for row in values}
    differences = {
        rival: plain_values(difference(values[student], values[rival], drawn[student], drawn[rival]))
        for rival in values
        if rival != student and student in values
    }
    return {"tasks": common, "n": len(common), "rows": rows, "differences": differences}


def best_teachers(tasks: Summaries, teachers: Sequence[str]) -> dict[str, Any]:
    """The teacher with the highest mean in each modality: chosen on the test sets, a mark to be measured against."""
    found = {}
    for modality, own in _grouped(tasks, "modality").items():
        rows = [row for row in teachers if any(_value(task, row) is not None for task in own.values())]
        common = [task for task in own.values() if all(_value(task, row) is not None for row in rows)]
        if rows and common:
            means = {row: float(np.mean([_value(task, row) for task in common])) for row in rows}
            best = max(means, key=lambda row: means[row])
            found[modality] = {"row": best, "value": means[best], "n": len(common)}
    return found


def win_tie_loss(tasks: Summaries, student: str) -> dict[str, Any]:
    """On how many tasks the interval of the student's paired difference lies above, around or below zero, by rival."""
    found: dict[str, dict[str, Any]] = {}
    for task in tasks.values():
        for rival, metrics in task["differences"].items():
            bounds = metrics.get(task["headline"]) or {}
            low, high = bounds.get("low"), bounds.get("high")
            if low is None or high is None:
                continue
            counts = found.setdefault(rival, {"win": 0, "tie": 0, "loss": 0, "tasks": 0})
            counts["win" if low > 0 else "loss" if high < 0 else "tie"] += 1
            counts["tasks"] += 1
    return found


def _means(tasks: Summaries, student: str, replicates: Replicates) -> dict[str, Any]:
    return {
        "overall": mean_block(tasks, student, replicates),
        "by_kind": {k: mean_block(own, student, replicates) for k, own in _grouped(tasks, "kind").items()},
        "by_modality": {m: mean_block(own, student, replicates) for m, own in _grouped(tasks, "modality").items()},
    }


def _grouped(tasks: Summaries, key: str) -> dict[str, Summaries]:
    groups: dict[str, Summaries] = {}
    for name, task in tasks.items():
        if task.get(key):
            groups.setdefault(task[key], {})[name] = task
    return dict(sorted(groups.items()))


def _rows(tasks: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row for task in tasks for row in task["rows"]))


def _value(task: dict[str, Any], row: str) -> float | None:
    metrics = task["rows"].get(row, {}).get("metrics") or {}
    return metrics.get(task["headline"], {}).get("value")


def _bounds(replicates: Floats) -> dict[str, float]:
    low, high = interval(replicates)
    return {"low": low, "high": high}
