"""Convert results of an evaluation to a card: a table of scores with intervals, and the Hub's ``model-index``.

Only results of the published weights are accepted, by the fingerprint that the evaluation stores. The index has no
field for an interval, so it is in the metric's name and, as numbers, in its arguments.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from mmkd.evaluation.datasets.manifest import catalog
from mmkd.evaluation.report.leaderboard import kind_label, sample_counts
from mmkd.evaluation.statistics.bootstrap import as_text
from mmkd.files import fingerprint, read_json
from mmkd.publishing.card import Scores, escape

TASK_TYPES = {
    "zeroshot": "zero-shot-image-classification",
    "probe": "image-classification",
    "retrieval": "image-text-retrieval",
    "vqa": "visual-question-answering",
}
HUB_DATASETS = "https://huggingface.co/datasets/"


def read_scores(results: Path, weights: list[Path]) -> Scores:
    """The scores of a model from the folder that ``mmkd eval`` wrote.

    Args:
        results: that folder.
        weights: the files that are published.

    Raises:
        FileNotFoundError: there is no ``summary.json``.
        ValueError: it is not of this form, or no encoder in it has these weights.
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
        rows, drawn, index, datasets = [], [], [], {}
        for key, task in summary["tasks"].items():
            result = task["rows"].get(name, {})
            if result.get("metrics"):
                dataset = pairs or task["dataset"]
                datasets[dataset] = summary["datasets"][task["dataset"]]["splits"]
                rows.append(_table_row(task, result, summary, name))
                drawn.append((task, result["metrics"][task["primary_metric"]]))
                index += _index_entries(key, task, result, dataset, split)
        on = f"the {split} split of {', '.join(f'`{escape(name)}`' for name in sorted(datasets))}"
        return Scores(rows, index, on, _checks(list(datasets.values())), _picture(drawn, name))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if str(results) in str(error):
            raise
        raise ValueError(f"{path} is not what `mmkd eval` writes ({error!r}); evaluate again") from error


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


def _table_row(task: dict[str, Any], result: dict[str, Any], summary: dict[str, Any], name: str) -> dict[str, str]:
    metric, (count, groups) = task["primary_metric"], sample_counts(task)
    best = summary["overall"].get("best_teacher") if name == summary["student"] else None
    difference = task["differences"].get(best, {}).get(metric) if best else None
    return {
        "task": escape(task["title"]),
        "kind": kind_label(task["kind"]),
        "metric": metric.replace("_", " "),
        "score": as_text(result["metrics"][metric]),
        "chance": f"{task['chance'][metric]:.3f}" if metric in task.get("chance", {}) else "",
        "images": f"{count} in {groups} groups",
        "difference": f"{as_text(difference, 'difference', sign='+')} ({escape(best)})" if difference else "",
    }


def _picture(drawn: list[tuple[dict[str, Any], dict[str, Any]]], name: str) -> str | None:
    """The primary metric of every task with its interval as SVG."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from mmkd.pages.charts import Interval, intervals

    rows = [
        Interval(
            f"{task['title']}, {task['primary_metric'].replace('_', ' ')}",
            "student",
            metric["value"],
            metric["low"],
            metric["high"],
            as_text(metric),
        )
        for task, metric in drawn
    ]
    return intervals(name, rows, None, (0, 1)).svg if rows else None


def _index_entries(
    key: str, task: dict[str, Any], result: dict[str, Any], dataset: str, split: str
) -> list[EvalResult]:
    """One entry for each metric; the task is the dataset's configuration, by which the index distinguishes entries."""
    images, groups = sample_counts(task)
    return [
        EvalResult(
            task_type=TASK_TYPES.get(task["kind"], task["kind"]),
            task_name=task["title"],
            dataset_type=_hub_dataset(dataset),
            dataset_name=dataset,
            dataset_config=key,
            dataset_split=split,
            metric_type=metric,
            metric_name=f"{metric.replace('_', ' ')}: {as_text(value)}, 95 % interval over {groups} groups",
            metric_value=round(value["value"], 4),
            metric_args={
                "confidence": 0.95,
                **{side: round(value[side], 4) for side in ("low", "high") if value[side] is not None},
                "images": images,
                "groups": groups,
            },
        )
        for metric, value in result["metrics"].items()
        if value["value"] is not None
    ]


def _hub_dataset(name: str) -> str:
    """Hub id of a dataset whose page the catalog states; the name itself of one that is not on the Hub."""
    known = catalog().get(name)
    return known.register.removeprefix(HUB_DATASETS) if known and known.register.startswith(HUB_DATASETS) else name


def _checks(splits: list[dict[str, Any]]) -> str:
    """What the evaluated datasets share with their other splits."""
    images = [own["shared_images"] for own in splits]
    shared = "were not compared" if None in images else f"shared with other splits: {sum(images)}"
    groups = sum(own["shared_groups"] for own in splits)
    return f"Groups (patients, cases) shared with other splits: {groups}; identical images {shared}."
