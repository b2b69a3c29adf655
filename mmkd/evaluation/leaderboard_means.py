"""Means over datasets with their intervals, for any choice of datasets: all, of one modality, of one kind, clean ones.

A mean is taken over the common subset, the tasks that every compared encoder answered; what is missing stays missing.
Its interval comes from the replicates of the cells, so that differences stay paired within each dataset. Datasets are
drawn independently of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mmkd.evaluation.bootstrap import difference, interval
from mmkd.evaluation.cells import plain
from mmkd.evaluation.metrics import Floats
from mmkd.evaluation.suite import ENSEMBLE, ORACLE
from mmkd.evaluation.summary import mean_of_kinds

Metric = dict[str, float | None]
Summary = dict[str, Any]
Replicates = Callable[[str, str], "Floats | None"]


@dataclass(frozen=True)
class Mean:
    """A mean over tasks.

    Attributes:
        tasks: the common subset it is taken over.
        missing: encoder -> tasks of the choice that it did not answer.
        rows: encoder -> value and interval.
        differences: rival -> student minus rival, with interval and p.
    """

    tasks: list[str] = field(default_factory=list)
    missing: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, Metric] = field(default_factory=dict)
    differences: dict[str, Metric] = field(default_factory=dict)

    def best(self, among: Iterable[str]) -> str | None:
        """The best of some encoders, the first of equals."""
        return max(
            (row for row in among if row in self.rows), key=lambda row: self.rows[row]["value"] or 0, default=None
        )


def mean_over(summary: Summary, tasks: Iterable[str], replicates: Replicates) -> Mean:
    """The mean over kinds of the mean over tasks of the headline metric.

    Encoders that answered none of the tasks are left out, as are ensemble and oracle where they do not cover the
    tasks that all encoders have.
    """
    chosen = list(tasks)
    answered = {row: [t for t in chosen if value_of(summary, t, row) is not None] for row in summary_rows(summary)}
    encoders = [row for row, own in answered.items() if own and row not in (ENSEMBLE, ORACLE)]
    common = [task for task in chosen if all(task in answered[row] for row in encoders)]
    if not common:
        return Mean(missing={row: [t for t in chosen if t not in answered[row]] for row in encoders})
    rows = [row for row, own in answered.items() if set(common) <= set(own)]
    points = {row: {t: np.array(value_of(summary, t, row), dtype=np.float64) for t in common} for row in rows}
    values = {row: float(mean_of_kinds(summary["tasks"], points[row])) for row in rows}
    drawn = {row: _drawn(summary, row, common, replicates) for row in rows}
    student = summary["student"]
    return Mean(
        common,
        {row: [t for t in chosen if t not in answered[row]] for row in encoders},
        {row: _metric(values[row], drawn[row]) for row in rows},
        {
            rival: _difference(values[student] - values[rival], drawn[student], drawn[rival])
            for rival in rows
            if student in rows and rival != student
        },
    )


def value_of(summary: Summary, task: str, row: str) -> float | None:
    """Headline value of a cell, None where there is none."""
    cell = summary["tasks"][task]["rows"].get(row)
    metric = cell["metrics"].get(summary["tasks"][task]["headline"]) if cell and not cell["undefined"] else None
    return metric["value"] if metric else None


def summary_rows(summary: Summary) -> list[str]:
    """Every row of the results: student, teachers, baselines, then what is made of the teachers."""
    named = [summary["student"], *summary["teachers"], *summary["baselines"], ENSEMBLE, ORACLE]
    present = {row for task in summary["tasks"].values() for row in task["rows"]}
    return [row for row in named if row in present]


def stored_replicates(results: Path, summary: Summary) -> Replicates:
    """A reader of the headline replicates ``(replicates,)`` of a row on a task, each file read once.

    Draws of tasks of one dataset are the same for all encoders; those of different datasets are independent.
    """
    known: dict[tuple[str, str], Floats | None] = {}

    def read(row: str, task: str) -> Floats | None:
        if (row, task) not in known:
            file = results / "cells" / row / f"{task}.safetensors"
            known[row, task] = _stored(file, summary["tasks"][task]["headline"])
        return known[row, task]

    return read


def _stored(file: Path, headline: str) -> Floats | None:
    if not file.is_file():
        return None
    try:
        with safe_open(file, "np") as tensors:
            name = f"together.{headline}"
            return tensors.get_tensor(name).astype(np.float64) if name in tensors.keys() else None  # noqa: SIM118
    except SafetensorError:
        return None


def _drawn(summary: Summary, row: str, tasks: list[str], replicates: Replicates) -> Floats | None:
    drawn = {task: replicates(row, task) for task in tasks}
    sound = {task: values for task, values in drawn.items() if values is not None}
    if len(sound) < len(tasks) or len({len(values) for values in sound.values()}) != 1:
        return None
    return mean_of_kinds(summary["tasks"], sound)


def _metric(value: float, drawn: Floats | None) -> Metric:
    low, high = (np.nan, np.nan) if drawn is None else interval(drawn)
    return {"value": value, "low": plain(low), "high": plain(high)}


def _difference(value: float, ours: Floats | None, theirs: Floats | None) -> Metric:
    if ours is None or theirs is None or len(ours) != len(theirs):
        return {"difference": value, "low": None, "high": None, "p": None}
    found = difference(value, 0.0, ours, theirs)
    return {name: plain(number) for name, number in found.items()}
