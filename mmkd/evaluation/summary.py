"""From cells to the table a reader wants: all rows of a task side by side and their paired differences."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mmkd.data.records import SPLITS, Pair
from mmkd.evaluation.bootstrap import difference
from mmkd.evaluation.cells import Cell, CellFolder, plain_values
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
