"""What a leaderboard is made of: the summary of a suite, its means by modality and kind, marks, names for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mmkd.evaluation.embeddings.encoders import ENSEMBLE, ORACLE
from mmkd.evaluation.report.markup import number, signed, text
from mmkd.evaluation.report.pairs_results import KINDS, METRICS
from mmkd.evaluation.results.summary import Replicates, mean_block
from mmkd.evaluation.statistics.metrics import Floats

Task = dict[str, Any]


class Board:
    """The results of a suite, read once, and the means that several sections show.

    Attributes:
        summary: as in ``summary.json``.
        results: folder it lies in.
        student: the row all others are compared with.
        rows: all rows, student first.
        rivals: all rows but the student.
        tasks: main task of each kind on each dataset, by name.
        kinds: kinds of these tasks, in their order for people.
        modalities: of these tasks, in alphabetical order.
    """

    def __init__(self, summary: dict[str, Any], results: Path) -> None:
        """Order what is there; no cell is read yet."""
        self.summary, self.results = summary, results
        self.student: str = summary["student"]
        self.rows = summary_rows(summary)
        self.rivals = [row for row in self.rows if row != self.student]
        self.all_tasks = dict(sorted(summary["tasks"].items(), key=_place))
        self.tasks = {name: task for name, task in self.all_tasks.items() if not task.get("variant")}
        present = Counter(task["kind"] for task in self.tasks.values())
        self.kinds = [kind for kind in KINDS if kind in present] + sorted(set(present) - set(KINDS))
        self.modalities = sorted({modality_of(task) for task in self.tasks.values()} - {""})
        self._replicates = stored_replicates(results, summary)
        self._means: dict[tuple[str, ...], Mean] = {}

    @property
    def teachers(self) -> list[str]:
        """Teachers that have results."""
        return [row for row in self.rows if row in self.summary["teachers"]]

    def mean(self, modality: str = "", kind: str = "", clean: bool = False) -> Mean:
        """Means over the tasks of a modality and a kind, each empty for all; clean = those marked for no row."""
        chosen = [
            name
            for name, task in self.tasks.items()
            if modality in ("", modality_of(task)) and kind in ("", task["kind"]) and not (clean and self.marks(name))
        ]
        return self.mean_of(chosen)

    def mean_of(self, tasks: Sequence[str]) -> Mean:
        """Means over these tasks."""
        key = tuple(tasks)
        if key not in self._means:
            self._means[key] = mean_over(self.summary, tasks, self._replicates)
        return self._means[key]

    def marks(self, task: str) -> dict[str, str]:
        """Rows that were trained on data of this task's dataset, and why that is thought; those made of them, too."""
        marked = self.summary["tasks"][task].get("contaminated") or {}
        found = {row: str(reason) for row, reason in marked.items()}
        members = [row for row in self.summary["teachers"] if row in found]
        if members:
            found |= {row: f"through {', '.join(members)}" for row in (ENSEMBLE, ORACLE) if row in self.rows}
        return found

    def marked_datasets(self) -> list[tuple[str, str, str]]:
        """Encoder, dataset and reason of every mark."""
        every = {
            (row, str(task.get("dataset", "")), reason)
            for name, task in self.all_tasks.items()
            for row, reason in self.marks(name).items()
            if row not in (ENSEMBLE, ORACLE)
        }
        return sorted(every, key=lambda own: (self.rows.index(own[0]) if own[0] in self.rows else -1, *own[1:]))

    def clean_against(self, rival: str) -> list[str]:
        """Main tasks that neither the student nor this rival is marked for."""
        return [name for name in self.tasks if not {self.student, rival} & set(self.marks(name))]


def modality_of(task: Task) -> str:
    """Modality of a task's dataset."""
    return str(task.get("modality", ""))


def kind_name(kind: str) -> str:
    """A kind of task for people."""
    return KINDS.get(kind, kind)


def metric_name(metric: str) -> str:
    """A metric for people."""
    return METRICS.get(metric, metric.replace("_", " ").replace("@", " at "))


def task_name(task: Task, name: str) -> str:
    """Dataset and variant of a task; its own name where it follows no dataset."""
    dataset = task.get("dataset") or name
    return f"{dataset}, {task['variant']}" if task.get("variant") else str(dataset)


def sample_count(task: Task) -> int:
    """Held-out samples of a task."""
    frames = task["frames"]
    return int((frames["image"] if "image" in frames else next(iter(frames.values())))["n"])


def skipped_sets(summary: dict[str, Any]) -> dict[str, str]:
    """Datasets and tasks that are not among the results, with reasons."""
    return {str(k): str(v) for k, v in {**summary.get("skipped_datasets", {}), **summary.get("skipped", {})}.items()}


def _place(item: tuple[str, Task]) -> tuple[int, str, str, str]:
    name, task = item
    kinds = list(KINDS)
    kind = kinds.index(task["kind"]) if task["kind"] in kinds else len(kinds)
    return kind, modality_of(task), task.get("dataset") or name, task.get("variant", "")


# Section: Means over any choice of tasks, for the report: of one modality or kind, or of what two encoders have not
# seen.


Metric = dict[str, float | None]

Summary = dict[str, Any]

NOT_STORED = np.full(1, np.nan)


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
        known = [row for row in among if row in self.rows]
        return max(known, key=lambda row: self.rows[row]["value"] or 0, default=None)


def mean_over(summary: Summary, tasks: Sequence[str], replicates: Replicates) -> Mean:
    """`mean_block` of these tasks, and who is missing from which."""
    block = mean_block({task: summary["tasks"][task] for task in tasks}, summary["student"], replicates)
    answered = {row: [t for t in tasks if value_of(summary, t, row) is not None] for row in summary_rows(summary)}
    missing = {
        row: [task for task in tasks if task not in own]
        for row, own in answered.items()
        if own and row not in (ENSEMBLE, ORACLE)
    }
    return Mean(block["tasks"] if block["rows"] else [], missing, block["rows"], block["differences"])


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
    """The headline replicates ``(replicates,)`` of each row on each task, read once.

    Where any that a value has is not there, as when someone copies the summary without its cells, all are NaN: no
    interval is better than one of some tasks.
    """
    found: dict[tuple[str, str], Floats] = {}
    for task, own in summary["tasks"].items():
        for row in own["rows"]:
            if value_of(summary, task, row) is None:
                continue
            values = _stored(results / "cells" / row / f"{task}.safetensors", own["headline"])
            if values is None:
                return lambda row, task: NOT_STORED
            found[row, task] = values
    return lambda row, task: found[row, task]


def _stored(file: Path, headline: str) -> Floats | None:
    try:
        with safe_open(file, "np") as tensors:
            name = f"together.{headline}"
            return tensors.get_tensor(name).astype(np.float64) if name in tensors.keys() else None  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


# Section: What a suite's report claims, computed from the intervals, also when the student loses.


def verdict(board: Board) -> str:
    """The headline: ahead of all teachers, ahead of the best, level with it, or behind it."""
    mean = board.mean()
    best = mean.best(board.teachers)
    over = counted(len({board.tasks[name].get("dataset") for name in mean.tasks}), "dataset")
    student = "The student" if board.student == "student" else board.student
    if not board.tasks:
        return "There is nothing to show: no task could be evaluated."
    if board.student not in mean.rows:
        return f"{student} has no common results with the others."
    if best is None or mean.differences[best]["low"] is None or mean.differences[best]["high"] is None:
        return f"{student} on {over}."
    low = [mean.differences.get(row, {}).get("low") for row in board.teachers]
    if len(low) > 1 and all(own is not None and own > 0 for own in low):
        return f"{student} is ahead of each of its teachers on {over}."
    if (mean.differences[best]["low"] or 0) > 0:
        return f"{student} is ahead of its best teacher, {best}, on {over}."
    if (mean.differences[best]["high"] or 0) < 0:
        return f"{student} stays behind its best teacher, {best}, on {over}."
    return f"{student} and its best teacher, {best}, cannot be told apart on {over}."


def claim(board: Board) -> str:
    """The numbers behind the headline, as HTML."""
    mean = board.mean()
    own = mean.rows.get(board.student)
    if not board.tasks:
        return "The reasons stand below."
    if own is None:
        return "There is no task that every encoder answered, so there is nothing to compare over all of them."
    inside = "" if own["low"] is None else f" (95 % interval {number(own['low'])} to {number(own['high'])})"
    sentences = [
        f"Mean over {counted(len(mean.tasks), 'task')}: <strong>{number(own['value'])}</strong>{inside}.",
        _against(board, mean.best(board.teachers)),
        _against(board, ENSEMBLE, "all teachers together"),
        _clean(board),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _clean(board: Board) -> str:
    """The difference to the best teacher on what neither of both was trained on, where that is less than all."""
    best = board.mean().best(board.teachers)
    tasks = board.clean_against(best) if best else []
    found = board.mean_of(tasks).differences.get(best or "")
    if not tasks or found is None or len(tasks) == len(board.tasks):
        return ""
    inside = "no interval" if found["low"] is None else f"{signed(found['low'])} to {signed(found['high'])}"
    return f"On what neither was trained on, it is <strong>{signed(found['difference'])}</strong> ({inside})."


def caveat(board: Board) -> str:
    """What the numbers are not, as HTML."""
    marked = sum(bool(board.marks(task)) for task in board.tasks)
    known = (
        f"On {marked} of {counted(len(board.tasks), 'task')} some encoder is known to have trained on the same source, "
        "marked †; clean means leave these out. "
        if marked
        else ""
    )
    return (
        f"<strong>How to read this.</strong> It is no medical result. {known}Intervals cover the choice of held-out "
        "samples, not the chance of training, and not the choice of datasets. The best teacher is chosen on these same "
        "test sets, which flatters it."
    )


def counted(count: int, noun: str) -> str:
    """A number with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _against(board: Board, rival: str | None, name: str = "") -> str:
    found = board.mean().differences.get(rival or "")
    if rival is None or found is None:
        return ""
    inside = "no interval" if found["low"] is None else f"{signed(found['low'])} to {signed(found['high'])}"
    return f"Difference to {text(name or rival)}: <strong>{signed(found['difference'])}</strong> ({inside})."
