"""Scores with their intervals, from the results of an evaluation to a card: a table and the Hub's ``model-index``.

Results are taken only if they were made with the very weights that are published, by the fingerprint that the
evaluation kept. The index has no word for an interval, so it stands in the metric's name and, as numbers, in its
arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from mmkd.files import fingerprint, read_json

TASK_TYPES = {
    "zeroshot": "zero-shot-image-classification",
    "probe": "image-classification",
    "retrieval": "image-text-retrieval",
    "vqa": "visual-question-answering",
}
WORDS = {"zeroshot": "zero-shot", "probe": "linear probe"}


@dataclass(frozen=True)
class Scores:
    """What a card says of an evaluation.

    Attributes:
        rows: of the table, one for each task: cells by column.
        index: entries of the ``model-index``.
        on: what was evaluated on, in words: a split of pairs, or the test images of datasets.
        checks: what is known of shared groups and images, in words.
    """

    rows: list[dict[str, str]]
    index: list[EvalResult]
    on: str
    checks: str


def read_scores(results: Path, weights: list[Path]) -> Scores:
    """The scores of a model from the folder that ``mmkd eval`` wrote.

    Args:
        results: that folder.
        weights: the files that are published.

    Raises:
        FileNotFoundError: there is no ``summary.json``.
        ValueError: it is of another form, or none of its encoders has these weights.
    """
    path = results / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"--results {results} holds no summary.json; make it with `mmkd eval`")
    summary = read_json(path)
    try:
        name = _own_row(summary, weights, results)
        settings = summary["settings"]
        pairs = Path(settings["pairs"]).name if settings["pairs"] else ""
        split = settings["split"] if pairs else "test"
        rows, index, datasets = [], [], set()
        for key, task in summary["tasks"].items():
            cell = task["rows"].get(name, {})
            if cell.get("metrics"):
                dataset = pairs or task["dataset"]
                datasets.add(dataset)
                rows.append(_table_row(task, cell, summary, name))
                index += _index_entries(key, task, cell, dataset, split)
        on = f"the {split} split of {', '.join(f'`{name}`' for name in sorted(datasets))}"
        return Scores(rows, index, on, _checks(summary.get("splits", {})))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what `mmkd eval` writes ({error!r}); evaluate again") from error


def shown(metric: dict[str, float | None]) -> str:
    """``0.713 [0.655, 0.768]``, or the value alone where there is no interval."""
    if metric["value"] is None:
        return "undefined"
    if metric["low"] is None or metric["high"] is None:
        return f"{metric['value']:.3f}"
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"


def _own_row(summary: dict[str, Any], weights: list[Path], results: Path) -> str:
    """The name under which these weights were evaluated, the student's first."""
    own = fingerprint(sorted(weights))
    encoders = summary["encoders"]
    names = [name for name, row in encoders.items() if row["provenance"].get("fingerprint") == own]
    if not names:
        raise ValueError(
            f"--results {results} are of other weights ({', '.join(encoders)}) than the model; evaluate it: "
            f"`mmkd eval --encoders {weights[0].parent} --pairs ...`"
        )
    return summary["student"] if summary["student"] in names else names[0]


def _table_row(task: dict[str, Any], cell: dict[str, Any], summary: dict[str, Any], name: str) -> dict[str, str]:
    headline, frame = task["primary_metric"], _frame(task)
    best = summary["overall"].get("best_teacher") if name == summary["student"] else None
    rival = task["differences"].get(best, {}).get(headline) if best else None
    return {
        "task": task["title"],
        "kind": WORDS.get(task["kind"], task["kind"]),
        "metric": headline.replace("_", " "),
        "score": shown(cell["metrics"][headline]),
        "chance": f"{task['chance'][headline]:.3f}" if headline in task.get("chance", {}) else "",
        "images": f"{frame['n']} in {frame['groups']} groups",
        "difference": f"{_signed(rival)} ({best})" if rival else "",
    }


def _frame(task: dict[str, Any]) -> dict[str, Any]:
    """Counts of a task's images, or of the questions, cases or captions that it has instead."""
    frames: dict[str, dict[str, Any]] = task["frames"]
    return frames["image"] if "image" in frames else next(iter(frames.values()))


def _signed(rival: dict[str, float | None]) -> str:
    """``+0.041 [+0.006, +0.075]`` of a paired difference."""
    if any(rival[key] is None for key in ("difference", "low", "high")):
        return "undefined"
    return f"{rival['difference']:+.3f} [{rival['low']:+.3f}, {rival['high']:+.3f}]"


def _index_entries(key: str, task: dict[str, Any], cell: dict[str, Any], dataset: str, split: str) -> list[EvalResult]:
    """One entry for each metric; the index tells tasks apart by the dataset's configuration, so that is the task."""
    frame = _frame(task)
    return [
        EvalResult(
            task_type=TASK_TYPES.get(task["kind"], task["kind"]),
            task_name=task["title"],
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_config=key,
            dataset_split=split,
            metric_type=metric,
            metric_name=f"{metric.replace('_', ' ')}: {shown(value)}, 95 % interval over {frame['groups']} groups",
            metric_value=round(value["value"], 4),
            metric_args={
                "confidence": 0.95,
                **{side: round(value[side], 4) for side in ("low", "high") if value[side] is not None},
                "images": frame["n"],
                "groups": frame["groups"],
            },
        )
        for metric, value in cell["metrics"].items()
        if value["value"] is not None
    ]


def _checks(splits: dict[str, Any]) -> str:
    groups, images = splits.get("shared_groups"), splits.get("shared_images")
    if groups is None:
        return ""
    shared = "were not compared" if images is None else f"shared with other splits: {images}"
    return f"Groups (patients, cases) shared with other splits: {groups}; identical images {shared}."
