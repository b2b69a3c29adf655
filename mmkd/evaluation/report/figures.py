"""Sections of charts: each task, differences, modalities, learning and survival curves; and confusion matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mmkd.evaluation.embeddings.encoders import ENSEMBLE, ORACLE
from mmkd.evaluation.report.leaderboard import (
    Leaderboard,
    Metric,
    Task,
    accuracies_beside,
    between,
    interval_text,
    kind_label,
    p_value,
    p_values,
    section,
    task_notes,
    tone,
)
from mmkd.evaluation.report.tables import differences_table, heat, modalities_tables
from mmkd.evaluation.results.store import stored_array
from mmkd.evaluation.settings import STAGE1
from mmkd.evaluation.statistics.metrics import Integers
from mmkd.files import read_json
from mmkd.pages.charts import SERIES_COLORS, Chart, Interval, Series, intervals, lines, radar
from mmkd.pages.page import Block, Cell, Fold, Grid, Row, Section, Table, number

FEWEST_AXES, MOST_CLASSES, OPEN_CHARTS, TASK_CHARTS = 3, 40, 4, 24


def means_section(board: Leaderboard) -> Section:
    """The mean of every row, and the student's difference from each."""
    mean = board.mean()
    order = sorted(mean.rows, key=lambda row: -(mean.rows[row]["value"] or 0))
    scores = [_interval(board.label(row), board.role(row), mean.rows[row]) for row in order]
    charts = [intervals(f"Mean over {len(mean.tasks)} tasks", scores, None, (0, 1))] if scores else []
    found = {row: mean.differences[row] for row in order if row in mean.differences}
    if found:
        charts.append(_differences("Student minus each encoder", {board.label(row): own for row, own in found.items()}))
    kinds = ", ".join(dict.fromkeys(kind_label(board.tasks[name]["kind"]) for name in mean.tasks))
    return section("overall", [Grid(charts)] if charts else [], kinds=kinds)


def tasks_section(board: Leaderboard) -> Section:
    """The primary metric of every row on each task, and chance; of the first tasks where there are many."""
    charts = []
    for name in list(board.tasks)[:TASK_CHARTS]:
        task = board.tasks[name]
        rows = [
            _interval(board.label(row), board.role(row), found) if (found := board.metric(name, row))
            else Interval(board.label(row), board.role(row), None, numbers=board.reason(name, row))
            for row in board.rows if board.result(name, row)
        ]  # fmt: skip
        chance = (task.get("chance") or {}).get(task["primary_metric"])
        chart = intervals(f"{board.task_label(name)}: {task['title']}", rows, chance, (0, 1))
        beside = accuracies_beside(board, name, board.student)
        also = [f"{board.student}: {', '.join(beside)}."] if beside else []
        charts.append(replace(chart, notes=[*task_notes(task), *also]))
    drawn = ""
    if len(board.tasks) > TASK_CHARTS:
        drawn = f" Drawn are the first {TASK_CHARTS} of {len(board.tasks)} tasks; all numbers are in the table above."
    return section("tasks", _gallery(charts, "More tasks", 2 * OPEN_CHARTS), drawn=drawn)


def differences_section(board: Leaderboard) -> Section:
    """The paired differences on every task: a chart against the best teacher and against stage 1, a table for all."""
    charts = []
    for row in dict.fromkeys([board.mean().best(board.teachers), STAGE1]):
        if row is None or row not in board.others:
            continue
        overall = board.mean().differences.get(row)
        found = {f"All {len(board.mean().tasks)} tasks": overall} if overall else {}
        for name, task in list(board.tasks.items())[:TASK_CHARTS]:
            if (own := board.difference(name, row)) is not None:
                found[f"{board.task_label(name)} · {kind_label(task['kind'])}"] = own
        if found:
            charts.append(_differences(f"{board.student} minus {row}", found))
    blocks: list[Block] = [Grid(charts), differences_table(board)] if board.others else []
    return section("differences", blocks)


def modalities_section(board: Leaderboard) -> Section:
    """Radar of the student, its best teacher, ensemble and oracle, and all numbers as tables."""
    tables: list[Block] = list(modalities_tables(board))
    if len(board.modalities) >= FEWEST_AXES:
        means = [board.mean(modality) for modality in board.modalities]
        best = board.mean().best(board.teachers) or next(iter(board.teachers), None)
        series = []
        for row, color in {board.student: "student", best: "c0", ENSEMBLE: "ensemble", ORACLE: "oracle"}.items():
            found = [(float(k), mean.rows[row]["value"]) for k, mean in enumerate(means) if row in mean.rows]
            points = [(axis, value) for axis, value in found if value is not None]
            if row in board.rows and points:
                series.append(Series(board.label(str(row)), color, points))
        if series:
            tables.insert(0, radar("Mean score by modality", board.modalities, series))
    return section("modalities", tables)


def learning_section(board: Leaderboard) -> Section:
    """Learning curves of the probes: images of each class or share of the training data against the score."""
    charts = []
    for name, task in board.all_tasks.items():
        for ending, axis in (("-shot", "training images of each class"), ("%", "per cent of the training images")):
            series, places = _learning_curves(board, task, ending) if task["kind"] == "probe" else ([], set())
            if len(places) > 1:
                caption = f"{task.get('dataset') or name}: probe by {axis}"
                charts.append(lines(caption, axis, series, {x: f"{x:g}" for x in sorted(places)}))
    return section("learning", _gallery(charts, "More learning curves"))


def survival_section(board: Leaderboard) -> Section:
    """Kaplan-Meier curves of the halves of higher and lower predicted risk."""
    own: list[Chart] = []
    others: list[Chart] = []
    for name in board.all_tasks:
        for row in board.rows:
            found = (board.result(name, row) or {}).get("extras", {}).get("kaplan_meier")
            if not found or not found.get("high") or not found.get("low"):
                continue
            series = []
            for half, color in (("low", "student"), ("high", "c1")):
                size = f", n = {found[f'n_{half}']}" if found.get(f"n_{half}") else ""
                points = [(float(time), float(share)) for time, share in found[half]]
                series.append(Series(f"{half} risk{size}", color, points))
            caption = f"{board.task_label(name)}, {board.label(row)}: log-rank {p_value(found.get('logrank_p'))}"
            (own if row == board.student else others).append(lines(caption, "time", series, steps=True))
    blocks: list[Block] = [Grid(own)] if own else []
    blocks += [Fold(f"Other encoders ({len(others)})", [Grid(others)])] if others else []
    return section("survival", blocks)


def confusions_section(board: Leaderboard) -> Section:
    """Confusion matrices of the student, each row summing to one."""
    tables = []
    for name, task in board.tasks.items():
        counts, classes = _confusion(board, name, task)
        if counts is None:
            continue
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        rows = [
            Row([Cell(truth, f"n = {own.sum()}"), *(heat({"value": float(x), "low": None}, False) for x in part)])
            for truth, own, part in zip(classes, counts, shares, strict=True)
        ]  # fmt: skip
        label = f"{board.task_label(name)}, {kind_label(task['kind'])}"
        caption = f"{label}: share of each true class (row) by answer (column)"
        tables.append(Table(caption, ["True class", *classes], rows, "heat"))
    blocks: list[Block] = [*tables[:1]]
    blocks += [Fold(f"More matrices ({len(tables) - 1})", tables[1:])] if len(tables) > 1 else []
    return section("confusions", blocks, student=board.label(board.student))


def _interval(label: str, role: str, metric: Metric) -> Interval:
    numbers = f"{number(metric['value'])} ({interval_text(metric)})"
    return Interval(label, role, metric["value"], metric["low"], metric["high"], numbers)


def _differences(caption: str, found: dict[str, Metric]) -> Chart:
    bounds = [abs(own[key] or 0) for own in found.values() for key in ("difference", "low", "high")]
    reach = max(0.1, math.ceil(max(bounds) * 10) / 10)
    rows = [
        Interval(label, tone(own), own["difference"], own["low"], own["high"], f"{between(own)}, {p_values(own)}")
        for label, own in found.items()
    ]
    return intervals(caption, rows, 0.0, (-reach, reach))


def _learning_curves(board: Leaderboard, task: Task, ending: str) -> tuple[list[Series], set[float]]:
    """One line for each row that has metrics ``NAME@AMOUNT`` of this ending, and the amounts there are."""
    series, places = [], set()
    for position, row in enumerate(board.rows):
        metrics = (task["rows"].get(row) or {}).get("metrics", {})
        amounts = {_amount(name, ending): metric for name, metric in metrics.items() if metric["value"] is not None}
        own = sorted((amount, metric) for amount, metric in amounts.items() if amount is not None)
        if not own:
            continue
        role = board.role(row)
        color = role if role in ("student", ENSEMBLE, ORACLE) else f"c{(position - 1) % SERIES_COLORS}"
        band = [(x, metric["low"], metric["high"]) for x, metric in own if metric["low"] is not None]
        points = [(x, metric["value"]) for x, metric in own]
        series.append(Series(board.label(row), color, points, band if row == board.student else ()))
        places |= {x for x, _ in own}
    return series, places


def _amount(metric: str, ending: str) -> float | None:
    """4 of ``balanced_accuracy@4-shot``."""
    _, _, setting = metric.partition("@")
    amount = setting.removesuffix(ending)
    return float(amount) if amount != setting and amount.replace(".", "", 1).isdigit() else None


def _confusion(board: Leaderboard, name: str, task: Task) -> tuple[Integers | None, list[str]]:
    """Counts ``(truth, answer)`` of the student, None where the task does not choose one of several classes."""
    described = board.results / "tasks" / f"{name}.json"
    if board.metric(name, board.student) is None or not described.is_file():
        return None, []
    description = read_json(described)
    targets, classes = description.get("targets"), description.get("classes")
    if not isinstance(targets, list) or not isinstance(classes, list) or not 2 <= len(classes) <= MOST_CLASSES:
        return None, []
    scores = stored_array(board.results, board.student, name, "outputs.image.scores")
    if scores is None or len(scores) != len(targets) or not all(isinstance(target, int) for target in targets):
        return None, []
    answers = scores.argmax(axis=1)
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(counts, (np.array(targets, dtype=np.int64), answers), 1)
    return counts, [str(own) for own in classes]


def _gallery(charts: Sequence[Chart], rest: str, shown: int = OPEN_CHARTS) -> list[Block]:
    """The first charts, the others behind a click."""
    hidden = charts[shown:]
    blocks: list[Block] = [Grid(charts[:shown])] if charts else []
    return [*blocks, *([Fold(f"{rest} ({len(hidden)})", [Grid(hidden)])] if hidden else [])]
