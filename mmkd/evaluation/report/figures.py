"""Drawings of a suite's report: radar by modality, paired differences, learning and survival curves, confusions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mmkd.evaluation.embeddings.encoders import ENSEMBLE, ORACLE
from mmkd.evaluation.report.board import Board, Metric, Task, kind_name, task_name
from mmkd.evaluation.report.charts import Row, Series, differences, lines, radar, shade, steps
from mmkd.evaluation.report.markup import details, p_value, section, table, text
from mmkd.evaluation.report.pairs_results import label, role
from mmkd.evaluation.report.tables import difference_of, modalities_table, tone
from mmkd.evaluation.statistics.metrics import Integers
from mmkd.files import read_json

FEWEST_AXES, MOST_CLASSES, OPEN_PLOTS, COLORS = 3, 40, 4, 9


def modalities_section(board: Board) -> str:
    """Radar of the student, its best teacher, ensemble and oracle, and all numbers as a table beside it."""
    if len(board.modalities) < 2:
        return ""
    drawn = _radar(board) if len(board.modalities) >= FEWEST_AXES else ""
    lead = (
        "Each axis is the mean over the tasks of one modality; axes differ in difficulty, so compare lines along an "
        "axis, not the corners of one line."
    )
    return section("modalities", "By modality", lead, drawn, modalities_table(board))


def differences_section(board: Board) -> str:
    """A forest plot of the paired differences on every dataset for each rival, the best teacher's open."""
    best = board.mean().best(board.teachers)
    order = sorted(board.rivals, key=lambda row: (row != best, board.rivals.index(row)))
    parts = []
    for rival in order:
        found = [
            (task_name(task, name) + f" · {kind_name(task['kind'])}", difference_of(board.summary, name, rival))
            for name, task in board.tasks.items()
        ]
        rows = [_row(name, own) for name, own in found if own is not None and own["difference"] is not None]
        values = [own for _, own in found if own is not None and own["difference"] is not None]
        if not rows:
            continue
        overall = board.mean().differences.get(rival)
        if overall is not None:
            rows.insert(0, Row("All tasks", "student", overall["difference"], overall["low"], overall["high"]))
            values.insert(0, overall)
        caption = f"{board.student} minus {rival}"
        chart = differences(caption, rows, [p_value(own["p"]) for own in values], "Dataset")
        parts.append(chart if rival == order[0] else details(caption, chart))
    lead = (
        "The same draws of held-out patients, slides or images serve both sides of a difference. "
        "p is two-sided and not corrected for the number of comparisons."
    )
    return section("differences", "Paired differences", lead, *parts)


def learning_section(board: Board) -> str:
    """Learning curves of the probes: images of each class or share of the training data against the score."""
    figures = []
    for name, task in board.all_tasks.items():
        for ending, axis in (("-shot", "training images of each class"), ("%", "per cent of the training images")):
            series, places = _curves(board, task, ending) if task["kind"] == "probe" else ([], set())
            if len(places) > 1:
                caption = f"{task.get('dataset') or name}: probe by {axis}"
                figures.append(lines(caption, axis, series, [(x, f"{x:g}") for x in sorted(places)]))
    lead = "Balanced accuracy of linear probes with little data, mean over seeds; the shade is the student's interval."
    return section("learning", "Few shots", lead, *_gallery(figures, "More learning curves"))


def survival_section(board: Board) -> str:
    """Kaplan-Meier curves of the halves of higher and lower predicted risk."""
    own: list[str] = []
    others: list[str] = []
    for name, task in board.all_tasks.items():
        for row in board.rows:
            found = (task["rows"].get(row) or {}).get("extras", {}).get("kaplan_meier")
            if not found or not found.get("high") or not found.get("low"):
                continue
            series = [
                Series(
                    f"{half} risk{f', n = {n}' if (n := found.get(f'n_{half}')) else ''}",
                    style,
                    [(float(t), float(s)) for t, s in found[half]],
                )
                for half, style in (("low", "student"), ("high", "c1"))
            ]
            p = found.get("logrank_p")
            shown = "log-rank p unknown" if p is None else f"log-rank {p_value(p)}"
            caption = f"{task_name(task, name)}, {label(row, board.student)}: {shown}"
            (own if row == board.student else others).append(steps(caption, "time", series))
    lead = (
        "Share of the held-out cases alive, of those whose predicted risk lies above the median of the training cases, "
        "and of the others; p is that of the log-rank test between them."
    )
    opened = [f'<div class="figures">{"".join(own)}</div>' if own else "", *_folded(others, "Other encoders")]
    return section("survival", "Survival by predicted risk", lead, *opened)


def confusions_section(board: Board) -> str:
    """Confusion matrices of the student, rows of each summing to one."""
    figures = []
    for name, task in board.tasks.items():
        counts, classes = _confusion(board, name, task)
        if counts is None:
            continue
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        rows = [
            [f"{text(truth)} <small>n = {own.sum()}</small>", *(shade(float(share), False) for share in part)]
            for truth, own, part in zip(classes, counts, shares, strict=True)
        ]
        caption = (
            f"{task_name(task, name)}, {kind_name(task['kind'])}: share of each true class (row) by answer (column)"
        )
        figures.append(table(caption, ["True class", *classes], rows, "heat"))
    lead = f"What {text(label(board.student, board.student))} answers, on all held-out samples of each classification."
    body = details(f"More matrices ({len(figures) - 1})", "".join(figures[1:])) if len(figures) > 1 else ""
    return section("confusions", "Confusions", lead, *figures[:1], body)


def _radar(board: Board) -> str:
    means = [board.mean(modality) for modality in board.modalities]
    best = board.mean().best(board.teachers) or next(iter(board.teachers), None)
    styles = {board.student: "student", best: "c0", ENSEMBLE: "ensemble", ORACLE: "oracle"}
    series = []
    for row, style in styles.items():
        points = [(float(k), mean.rows[row]["value"]) for k, mean in enumerate(means) if row in mean.rows]
        known = [(x, y) for x, y in points if y is not None]
        if row in board.rows and known:
            series.append(Series(label(str(row), board.student), style, known))
    return radar("Mean score by modality", board.modalities, series) if series else ""


def _row(name: str, found: Metric) -> Row:
    return Row(name, tone(found), found["difference"], found["low"], found["high"])


def _curves(board: Board, task: Task, ending: str) -> tuple[list[Series], set[float]]:
    """One line for each encoder that has metrics ``NAME@AMOUNT`` of this ending, and the amounts there are."""
    series, places = [], set()
    for position, row in enumerate(board.rows):
        found = (task["rows"].get(row) or {}).get("metrics", {})
        amounts = {_amount(name, ending): metric for name, metric in found.items() if metric["value"] is not None}
        own = sorted((amount, metric) for amount, metric in amounts.items() if amount is not None)
        if not own:
            continue
        kind = role(board.summary, row)
        style = kind if kind in ("student", ENSEMBLE, ORACLE) else f"c{(position - 1) % COLORS}"
        band = [(x, metric["low"], metric["high"]) for x, metric in own if metric["low"] is not None]
        shaded = band if row == board.student else ()
        series.append(Series(label(row, board.student), style, [(x, m["value"]) for x, m in own], shaded))
        places |= {x for x, _ in own}
    return series, places


def _amount(metric: str, ending: str) -> float | None:
    """4 of ``balanced_accuracy@4-shot``."""
    _, _, setting = metric.partition("@")
    number_part = setting.removesuffix(ending)
    return float(number_part) if number_part != setting and number_part.replace(".", "", 1).isdigit() else None


def _confusion(board: Board, name: str, task: Task) -> tuple[Integers | None, list[str]]:
    """Counts ``(truth, answer)`` of the student, None where the task is no classification of single classes."""
    cell = task["rows"].get(board.student)
    file = board.results / "cells" / board.student / f"{name}.safetensors"
    described = board.results / "tasks" / f"{name}.json"
    if cell is None or cell["undefined"] or not file.is_file() or not described.is_file():
        return None, []
    asked = read_json(described)
    targets, classes = asked.get("targets"), asked.get("classes")
    if not isinstance(targets, list) or not isinstance(classes, list) or not 2 <= len(classes) <= MOST_CLASSES:
        return None, []
    answers = _answers(file)
    if answers is None or len(answers) != len(targets) or not all(isinstance(target, int) for target in targets):
        return None, []
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(counts, (np.array(targets, dtype=np.int64), answers), 1)
    return counts, [str(own) for own in classes]


def _answers(file: Any) -> Integers | None:
    try:
        with safe_open(file, "np") as tensors:
            if "outputs.image.scores" not in tensors.keys():  # noqa: SIM118
                return None
            scores = tensors.get_tensor("outputs.image.scores")
    except SafetensorError:
        return None
    return scores.argmax(axis=1) if scores.ndim == 2 else None


def _gallery(figures: list[str], rest: str) -> Iterator[str]:
    if figures:
        yield f'<div class="figures">{"".join(figures[:OPEN_PLOTS])}</div>'
        yield from _folded(figures[OPEN_PLOTS:], rest)


def _folded(figures: list[str], title: str) -> Iterator[str]:
    if figures:
        yield details(f"{title} ({len(figures)})", f'<div class="figures">{"".join(figures)}</div>')
