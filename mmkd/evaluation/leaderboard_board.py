"""What a leaderboard is made of: the summary of a suite, its means by modality and kind, marks, names for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmkd.evaluation.encoders import ENSEMBLE, ORACLE
from mmkd.evaluation.leaderboard_means import Mean, mean_over, stored_replicates, summary_rows
from mmkd.evaluation.report_results import KINDS, METRICS

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
