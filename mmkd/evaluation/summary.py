"""From cells to the table a reader wants: all rows side by side, paired differences, and one number for each row.

The overall score is the mean over kinds of task of the mean over tasks of their headline metric, over the tasks that
every row has, so that many small tasks of one kind do not outvote the others. Its interval and its differences come
from draws of held-out groups that all tasks share.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmkd.data.records import SPLITS, Pair
from mmkd.evaluation.bootstrap import Metrics, difference, interval
from mmkd.evaluation.cells import Cell, CellFolder, plain
from mmkd.evaluation.metrics import Floats
from mmkd.evaluation.suite import ENSEMBLE, ORACLE
from mmkd.versions import installed_versions

PACKAGES = ("mmkd-clip", "torch", "transformers", "numpy", "scikit-learn", "open_clip_torch", "timm")
BRIEF = (
    *("title", "kind", "headline", "frames"),
    *("chance", "classes", "class_counts", "pool", "train", "left_out"),
    *("dataset", "modality", "variant"),
)
Table = dict[str, dict[str, Cell]]


def task_summary(
    description: dict[str, Any], cells: dict[str, Cell], student: str, folder: CellFolder
) -> dict[str, Any]:
    """One task: what was asked in brief, the cells of all rows, and ``student - rival`` for every rival and metric."""
    name = description["name"]
    brief = {key: description[key] for key in BRIEF if key in description}
    values = {row: folder.replicate_values(row, name) for row in cells}
    shown = {row: {k: v for k, v in cell.items() if k not in ("key", "task", "encoder")} for row, cell in cells.items()}
    ours = cells[student]["metrics"]
    differences: dict[str, Any] = {}
    for rival, cell in cells.items():
        if rival == student or not ours or not cell["metrics"]:
            continue
        differences[rival] = {
            metric: plain_values(
                difference(_number(ours[metric]), _number(theirs), values[student][metric], values[rival][metric])
            )
            for metric, theirs in cell["metrics"].items()
        }
    return brief | {"rows": shown, "differences": differences}


def overall(
    tasks: dict[str, dict[str, Any]], table: Table, student: str, teachers: Sequence[str], folder: CellFolder
) -> dict[str, Any]:
    """The overall score of every row but the oracle, which some tasks do not have, and the student's differences.

    Args:
        tasks: `task_summary` by task.
        table: cells by task and row.
        student: its row.
        teachers: rows among which the best is named.
        folder: where the replicates are.
    """
    rows = [row for row in _ordered(table) if row != ORACLE and any(_sound(cells, row) for cells in table.values())]
    main = [task for task in table if not tasks[task].get("variant")]
    common = [task for task in main if all(_sound(table[task], row) for row in rows)]
    if not common or student not in rows:
        return {"tasks": [], "rows": {}, "differences": {}, "best_teacher": None}
    scores: dict[str, float] = {}
    replicates: dict[str, Floats] = {}
    for row in rows:
        points = {t: np.array(_headline(tasks[t], table[t][row])) for t in common}
        scores[row] = float(mean_of_kinds(tasks, points))
        drawn = {t: folder.together(row, t)[tasks[t]["headline"]] for t in common}
        replicates[row] = mean_of_kinds(tasks, drawn)
    rivals, known = [row for row in rows if row != student], [row for row in rows if row in teachers]
    return {
        "tasks": common,
        "rows": {row: _with_interval(scores[row], replicates[row]) for row in rows},
        "differences": {
            rival: plain_values(difference(scores[student], scores[rival], replicates[student], replicates[rival]))
            for rival in rivals
        },
        "best_teacher": max(known, key=lambda row: scores[row]) if known else None,
    }


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


def mean_of_kinds(tasks: dict[str, dict[str, Any]], values: Metrics) -> Floats:
    """Mean over kinds of means over tasks; a task that a replicate leaves undefined is left out of that replicate."""
    kinds = sorted({tasks[task]["kind"] for task in values})
    return _nan_mean(
        [_nan_mean([own for task, own in values.items() if tasks[task]["kind"] == kind]) for kind in kinds]
    )


def _nan_mean(rows: list[Floats]) -> Floats:
    """Mean over the first axis of what is defined; NaN where nothing is."""
    stacked = np.stack(rows)
    defined = ~np.isnan(stacked)
    count, total = defined.sum(axis=0), np.where(defined, stacked, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _with_interval(value: float, replicates: Floats) -> dict[str, float | None]:
    low, high = interval(replicates)
    return plain_values({"value": value, "low": low, "high": high})


def _ordered(table: Table) -> list[str]:
    """Rows in order of appearance, ensemble and oracle last."""
    rows = dict.fromkeys(row for cells in table.values() for row in cells)
    return [row for row in rows if row not in (ENSEMBLE, ORACLE)] + [row for row in (ENSEMBLE, ORACLE) if row in rows]


def _sound(cells: dict[str, Cell], row: str) -> bool:
    return row in cells and cells[row]["undefined"] is None


def _headline(task: dict[str, Any], cell: Cell) -> float:
    return _number(cell["metrics"][task["headline"]])


def _number(metric: dict[str, float | None]) -> float:
    return float("nan") if metric["value"] is None else float(metric["value"])


def plain_values(values: dict[str, float]) -> dict[str, float | None]:
    """Numbers as JSON knows them; see `plain`."""
    return {name: plain(value) for name, value in values.items()}
