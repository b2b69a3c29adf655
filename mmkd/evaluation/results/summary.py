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
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmkd.data.provenance import PACKAGE, git_commit, installed_versions
from mmkd.data.table import SPLITS, Pair
from mmkd.evaluation.embeddings.encoders import ENSEMBLE, ORACLE
from mmkd.evaluation.results.store import Result, ResultStore
from mmkd.evaluation.statistics.bootstrap import Metrics, above_chance, average_ranks, paired_differences, with_interval
from mmkd.evaluation.statistics.metrics import Floats, defined_mean

PACKAGES = ("mmkd-clip", "torch", "transformers", "numpy", "scikit-learn", "open_clip_torch", "timm")

BRIEF = (
    *("title", "kind", "primary_metric", "units"),
    *("chance", "classes", "class_counts", "pool", "train", "left_out", "folds_by", "sites"),
    *("dataset", "modality", "variant"),
)

Table = dict[str, dict[str, Result]]
Summaries = dict[str, dict[str, Any]]
Replicates = Callable[[str, str], Floats]
VERSION = 1


def task_summary(
    description: dict[str, Any], results: dict[str, Result], student: str, folder: ResultStore
) -> dict[str, Any]:
    """One task in brief: the results of all rows, and ``student - row`` for every other row and metric."""
    name = description["name"]
    brief = {key: description[key] for key in BRIEF if key in description}
    values = {row: folder.replicate_values(row, name) for row in results}
    shown = {row: {k: v for k, v in own.items() if k not in ("key", "task", "encoder")} for row, own in results.items()}
    measured = {row: own["metrics"] for row, own in results.items() if own["metrics"]}
    differences: dict[str, Any] = {row: {} for row in measured if row != student and student in measured}
    for metric in measured.get(student, {}):
        values_of = {row: own[metric]["value"] for row, own in measured.items()}
        points = {row: float("nan") if value is None else float(value) for row, value in values_of.items()}
        drawn = {row: values[row][metric] for row in measured}
        for row, found in paired_differences(student, points, drawn).items():
            differences[row][metric] = found
    return brief | {"rows": shown, "differences": differences}


def split_summary(pairs: Sequence[Pair], digests: dict[str, str], split: str) -> dict[str, Any]:
    """How many pairs and groups each split has, and how many groups and images the held-out one shares.

    A pair without a group is a group of its own. Identical images are counted only where ``digests`` covers the
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


def suite_means(tasks: Summaries, student: str, teachers: Sequence[str], replicates: Replicates) -> dict[str, Any]:
    """The entries of `summary.json` over all datasets.

    Args:
        tasks: summary of each task, of any variant; variants other than the main one are left out.
        student: its row.
        teachers: their rows.
        replicates: from row and task to the primary metric's replicates ``(r,)``.

    Returns:
        ``means`` over all and over clean tasks, ``best_teachers`` by modality, ``win_tie_loss`` by row, ``ranks`` over
        datasets.
    """
    main = _main(tasks)
    clean = {name: task for name, task in main.items() if not task.get("contaminated")}
    means = {"all": _means(main, student, replicates), "clean": _means(clean, student, replicates)}
    return {
        "means": means,
        "best_teachers": best_teachers(means["all"]["by_modality"], teachers),
        "win_tie_loss": win_tie_loss(main),
        "ranks": dataset_ranks(main, student),
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
        ``tasks``, ``n``, ``rows``, ``differences`` and ``above_chance``, the rows' means of scores relative to chance
        over the tasks whose chance is below 1; an encoder that has none of the tasks is no row.
    """
    kept, encoders = _common(tasks)
    if not kept:
        return {"tasks": [], "n": 0, "rows": {}, "differences": {}, "above_chance": {}}
    points = {row: {name: np.array(_value(task, row)) for name, task in kept.items()} for row in encoders}
    drawn = {row: {name: replicates(row, name) for name in kept} for row in encoders}
    values = {row: float(mean_of_kinds(kept, own)) for row, own in points.items()}
    means = {row: mean_of_kinds(kept, own) for row, own in drawn.items()}
    chances = {name: (task.get("chance") or {}).get(task["primary_metric"], 1.0) for name, task in kept.items()}
    known = {name: chance for name, chance in chances.items() if chance < 1}

    def relative(scores: Metrics) -> Floats:
        return mean_of_kinds(kept, {name: above_chance(scores[name], chance) for name, chance in known.items()})

    return {
        "tasks": list(kept),
        "n": len(kept),
        "rows": {row: with_interval(values[row], means[row]) for row in encoders},
        "differences": paired_differences(student, values, means) if student in values else {},
        "above_chance": {row: with_interval(float(relative(points[row])), relative(drawn[row])) for row in encoders}
        if known
        else {},
    }


def dataset_ranks(tasks: Summaries, student: str) -> dict[str, Any]:
    """Average rank of every row but the oracle over datasets, with Wilcoxon signed-rank tests; see `average_ranks`.

    A row's score on a dataset is the mean over its kinds of task, as tasks of one dataset share their images. Only the
    tasks that every encoder has count.

    Returns:
        ``datasets`` and ``rows``; no rows where there are fewer than two datasets.
    """
    kept, encoders = _common(tasks)
    datasets = _grouped(kept, "dataset")
    if len(datasets) < 2 or student not in encoders:
        return {"datasets": list(datasets), "rows": {}}
    scores = {
        row: np.array([
            mean_of_kinds(own, {name: np.array(_value(task, row)) for name, task in own.items()})
            for own in datasets.values()
        ])
        for row in encoders
        if row != ORACLE
    }  # fmt: skip
    return {"datasets": list(datasets), "rows": average_ranks(student, scores)}


def best_teachers(by_modality: dict[str, dict[str, Any]], teachers: Sequence[str]) -> dict[str, Any]:
    """The teacher with the highest mean in each modality: selected on the test sets, hence optimistic."""
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
    means = [
        defined_mean(np.stack([own for task, own in values.items() if tasks[task]["kind"] == kind], axis=-1))
        for kind in kinds
    ]
    return defined_mean(np.stack(means, axis=-1))


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


def _common(tasks: Summaries) -> tuple[Summaries, list[str]]:
    """The tasks that all encoders have, and the rows that have a value on all of these.

    An encoder without a value on any task is no row; ensemble and oracle are rows where they have a value on each.
    """
    made_here = (ENSEMBLE, ORACLE)
    listed = dict.fromkeys(row for task in tasks.values() for row in task["rows"] if row not in made_here)
    encoders = [row for row in listed if any(_value(task, row) is not None for task in tasks.values())]
    common = {name: task for name, task in tasks.items() if all(_value(task, row) is not None for row in encoders)}
    composed = [row for row in made_here if all(_value(task, row) is not None for task in common.values())]
    return common, [*encoders, *composed]


def _value(task: dict[str, Any], row: str) -> float | None:
    metrics = task["rows"].get(row, {}).get("metrics") or {}
    return metrics.get(task["primary_metric"], {}).get("value")


def lock_of(summary: dict[str, Any]) -> dict[str, Any]:
    """The lock of an evaluation.

    Args:
        summary: the content of ``summary.json``, with settings.

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
        "commit": git_commit(PACKAGE),
    }
