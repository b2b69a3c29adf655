"""Means over any choice of tasks, for the report: of one modality or kind, or of what two encoders have not seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mmkd.evaluation.encoders import ENSEMBLE, ORACLE
from mmkd.evaluation.means import Replicates, mean_block
from mmkd.evaluation.metrics import Floats

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
