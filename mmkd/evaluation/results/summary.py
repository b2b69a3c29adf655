"""From results to ``summary.json`` and ``repro.lock``: paired differences of each task, and means over tasks.

Means are for each modality, each kind of task and over all, on the tasks that every encoder has. Replicates of tasks of
one dataset share their draws, those of different datasets are independent; a mean's interval and a paired difference
follow from the mean of replicates. Each kind of task has the same weight, so that many small tasks of one kind do not
dominate. Training on a test set's source makes results optimistic, so every mean is also given without the tasks that
carry such a mark for any encoder. The lock holds the hash of everything that a result depends on.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.data.provenance import installed_versions
from mmkd.data.table import SPLITS, Pair
from mmkd.evaluation.embeddings.encoders import ENSEMBLE, ORACLE
from mmkd.evaluation.results.store import Result, ResultStore
from mmkd.evaluation.statistics.bootstrap import Metrics, difference, interval, plain_values
from mmkd.evaluation.statistics.metrics import Floats
from mmkd.training.tracking import git_state

PACKAGES = ("mmkd-clip", "torch", "transformers", "numpy", "scikit-learn", "open_clip_torch", "timm")

BRIEF = (
    *("title", "kind", "primary_metric", "frames"),
    *("chance", "classes", "class_counts", "pool", "train", "left_out"),
    *("dataset", "modality", "variant"),
)

Table = dict[str, dict[str, Result]]


def task_summary(
    description: dict[str, Any], cells: dict[str, Result], student: str, folder: ResultStore
) -> dict[str, Any]:
    """One task in brief: the results of all rows, and ``student - row`` for every other row and metric."""
    name = description["name"]
    brief = {key: description[key] for key in BRIEF if key in description}
    values = {row: folder.replicate_values(row, name) for row in cells}
    shown = {row: {k: v for k, v in cell.items() if k not in ("key", "task", "encoder")} for row, cell in cells.items()}
    ours = cells[student]["metrics"]
    differences: dict[str, Any] = {}
    for row, cell in cells.items():
        if row == student or not ours or not cell["metrics"]:
            continue
        differences[row] = {
            metric: plain_values(
                difference(_number(ours[metric]), _number(theirs), values[student][metric], values[row][metric])
            )
            for metric, theirs in cell["metrics"].items()
        }
    return brief | {"rows": shown, "differences": differences}


def split_summary(pairs: Sequence[Pair], digests: dict[str, str], split: str) -> dict[str, Any]:
    """How many pairs and groups each split has, and how many groups and images the held-out one shares.

    A pair without a group is a group of its own. Identical images are looked for only where ``digests`` covers the
    other splits too; else their number is None.
    """
    counts = {
        name: {
            "pairs": sum(pair.split == name for pair in pairs),
            "groups": len({pair.group or pair.id for pair in pairs if pair.split == name}),
            "modalities": dict(sorted(Counter(p.modality for p in pairs if p.split == name).items())),
        }
        for name in SPLITS
    }
    inside = [pair for pair in pairs if pair.split == split]
    outside = [pair for pair in pairs if pair.split != split]
    groups = {pair.group for pair in inside if pair.group} & {pair.group for pair in outside if pair.group}
    checked = all(pair.id in digests for pair in outside)
    images = {digests[pair.id] for pair in inside} & {digests.get(pair.id) for pair in outside} - {"missing"}
    return {"counts": counts, "shared_groups": len(groups), "shared_images": len(images) if checked else None}


def versions() -> dict[str, str]:
    """Python and the packages a result may depend on."""
    return {"python": platform.python_version()} | installed_versions(PACKAGES)


def _number(metric: dict[str, float | None]) -> float:
    return float("nan") if metric["value"] is None else float(metric["value"])


Summaries = dict[str, dict[str, Any]]

Replicates = Callable[[str, str], Floats]


def suite_means(tasks: Summaries, student: str, teachers: Sequence[str], replicates: Replicates) -> dict[str, Any]:
    """What `summary.json` says of all datasets together.

    Args:
        tasks: summary of each task, of any variant; variants other than the main one are left out.
        student: its row.
        teachers: their rows.
        replicates: from row and task to the primary metric's replicates ``(r,)``.

    Returns:
        ``means`` over all and over clean tasks, ``best_teachers`` by modality, ``win_tie_loss`` by row.
    """
    main = _main(tasks)
    clean = {name: task for name, task in main.items() if not task.get("contaminated")}
    means = {"all": _means(main, student, replicates), "clean": _means(clean, student, replicates)}
    return {
        "means": means,
        "best_teachers": best_teachers(means["all"]["by_modality"], teachers),
        "win_tie_loss": win_tie_loss(main),
    }


def overall(tasks: Summaries, student: str, teachers: Sequence[str], replicates: Replicates) -> dict[str, Any]:
    """The mean over all main tasks of every row but the oracle, which some tasks do not have, and the best teacher."""
    block = mean_block(_main(tasks), student, replicates)
    for rows in (block["rows"], block["differences"]):
        rows.pop(ORACLE, None)
    return block | {"best_teacher": _best(block, teachers)}


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
        row: plain_values(difference(values[student], values[row], drawn[student], drawn[row]))
        for row in values
        if row != student and student in values
    }
    return {"tasks": common, "n": len(common), "rows": rows, "differences": differences}


def best_teachers(by_modality: dict[str, dict[str, Any]], teachers: Sequence[str]) -> dict[str, Any]:
    """The teacher with the highest mean in each modality: chosen on the test sets, a mark to be measured against."""
    chosen = {modality: _best(block, teachers) for modality, block in by_modality.items()}
    return {
        modality: {"row": row, "value": by_modality[modality]["rows"][row]["value"], "n": by_modality[modality]["n"]}
        for modality, row in chosen.items()
        if row is not None
    }


def win_tie_loss(tasks: Summaries) -> dict[str, Any]:
    """On how many tasks the interval of the student's paired difference lies above, around or below zero, by row."""
    found: dict[str, dict[str, Any]] = {}
    for task in tasks.values():
        for row, metrics in task["differences"].items():
            bounds = metrics.get(task["primary_metric"]) or {}
            low, high = bounds.get("low"), bounds.get("high")
            if low is None or high is None:
                continue
            counts = found.setdefault(row, {"win": 0, "tie": 0, "loss": 0, "tasks": 0})
            counts["win" if low > 0 else "loss" if high < 0 else "tie"] += 1
            counts["tasks"] += 1
    return found


def mean_of_kinds(tasks: dict[str, dict[str, Any]], values: Metrics) -> Floats:
    """Mean over kinds of means over tasks; a task that a replicate leaves undefined is left out of that replicate."""
    kinds = sorted({tasks[task]["kind"] for task in values})
    return _nan_mean(
        [_nan_mean([own for task, own in values.items() if tasks[task]["kind"] == kind]) for kind in kinds]
    )


def _main(tasks: Summaries) -> Summaries:
    return {name: task for name, task in tasks.items() if not task.get("variant")}


def _best(block: dict[str, Any], rows: Sequence[str]) -> str | None:
    """Of some rows the one with the highest mean, the first of equals."""
    return max((row for row in rows if row in block["rows"]), key=lambda row: block["rows"][row]["value"], default=None)


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
    return metrics.get(task["primary_metric"], {}).get("value")


def _bounds(replicates: Floats) -> dict[str, float]:
    low, high = interval(replicates)
    return {"low": low, "high": high}


def _nan_mean(rows: list[Floats]) -> Floats:
    """Mean over the first axis of what is defined; NaN where nothing is."""
    stacked = np.stack(rows)
    defined = ~np.isnan(stacked)
    count, total = defined.sum(axis=0), np.where(defined, stacked, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


VERSION = 1


def lock_of(summary: dict[str, Any]) -> dict[str, Any]:
    """The lock of an evaluation.

    Args:
        summary: what ``summary.json`` says, with settings.

    Returns:
        JSON values: hash of every manifest and of all images and texts of every dataset, fingerprint and source of
        every encoder, settings, versions of packages, and the commit of the code where it runs from a checkout.
    """
    datasets = {
        name: {
            "content_sha256": hashlib.sha256(json.dumps(own["content"]).encode()).hexdigest(),
            **({"manifest_sha256": own["manifest_sha256"]} if "manifest_sha256" in own else {}),
        }
        for name, own in summary["datasets"].items()
    }
    encoders = {name: {key: own[key] for key in ("source", "fingerprint")} for name, own in summary["encoders"].items()}
    return {
        "version": VERSION,
        "encoders": encoders,
        "datasets": datasets,
        "settings": summary["settings"],
        "versions": versions(),
        "code": git_state(Path(__file__).resolve()),
    }
