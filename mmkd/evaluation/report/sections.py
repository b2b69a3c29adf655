"""Sections of a report from a leaderboard: tables, charts of each task, differences, curves and confusion matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mmkd.data.table import SPLITS
from mmkd.evaluation.embeddings.encoders import ENSEMBLE, ORACLE
from mmkd.evaluation.report.leaderboard import (
    ACCURACIES,
    COMPOSED,
    Leaderboard,
    Metric,
    Task,
    accuracies_beside,
    between,
    interval_text,
    kind_label,
    metric_label,
    modality_of,
    p_value,
    p_values,
    sample_counts,
    section,
    task_notes,
    tone,
)
from mmkd.evaluation.results.store import stored_array
from mmkd.evaluation.settings import STAGE1
from mmkd.evaluation.statistics.metrics import Integers
from mmkd.files import read_json
from mmkd.pages.charts import SERIES_COLORS, Chart, Interval, Series, intervals, lines, radar
from mmkd.pages.page import Block, Cell, Code, Column, Filters, Fold, Grid, Notes, Row, Section, Table, number, signed

LOCK = "repro.lock"
NONE = Cell("–")
FEWEST_AXES, MOST_CLASSES, OPEN_CHARTS, TASK_CHARTS = 3, 40, 4, 24


def leaderboard_section(board: Leaderboard) -> Section:
    """Mean of every encoder over all tasks, clean ones and each kind; for each modality, shown on choice."""
    several, marked = len(board.kinds) > 1, any(map(board.marks, board.tasks))
    choices = [("", False, "All kinds" if several else kind_label(board.kinds[0]).capitalize())]
    choices += [("", True, "Clean †")] if marked else []
    for clean in (False, True) if marked else (False,):
        choices += [
            (kind, clean, f"{kind_label(kind).capitalize()}{', clean †' if clean else ''}")
            for kind in (board.kinds if several else [])
        ]
    first = 1 + marked  # columns of all kinds; accuracy and balanced accuracy are behind them
    plain = ACCURACIES if board.classifications(list(board.tasks)) else ()
    columns = []
    for kind, clean, name in choices:
        alone = bool(kind and clean)
        columns.append(Column(name, {"kind": kind} | ({"alone": ""} if alone else {}), alone))
    beside = ["Relative to chance", *(f"{metric_label(metric).capitalize()}, classification" for metric in plain)]
    columns[first:first] = [Column(name, {"kind": ""}) for name in beside]
    rows = []
    for modality in ("", *board.modalities):
        means = [board.mean(modality, kind, clean) for kind, clean, _ in choices]
        data, hidden = {"scope": modality}, bool(modality)
        classified = board.classifications(means[0].tasks)
        counts = [len(mean.tasks) for mean in means]
        counts[first:first] = [counts[0], *(len(classified) for _ in plain)]
        rows.append(Row([f"{modality or 'Datasets'}, number of tasks", *counts], "counts", data, hidden))
        order = [row for row in board.rows if any(row in mean.rows for mean in means)]
        for row in sorted(order, key=lambda row: -(means[0].rows.get(row, {}).get("value") or 0)):
            cells = [scored(mean.rows.get(row), row == mean.best(board.encoders)) for mean in means]
            values = [board.plain_mean(row, metric, classified) for metric in plain]
            relative = scored(means[0].above_chance.get(row))
            cells[first:first] = [relative, *(Cell(number(value), value=value) for value in values)]
            rows.append(Row([board.label(row), *cells], board.role(row), data, hidden))
    choice = Filters({
        "modality": ("Modality", {modality: modality for modality in board.modalities}),
        "kind": ("Kind of task", {kind: kind_label(kind) for kind in board.kinds}),
    })  # fmt: skip
    missing = [
        f"{board.label(row)} has no result on {', '.join(own)}" for row, own in board.mean().missing.items() if own
    ]
    table = Table("Leaderboard: mean of the primary metrics", ["Encoder", *columns], rows, anchor="board")
    excluded = Notes("Excluded from the means over all kinds, since an encoder lacks them:", missing)
    return section("leaderboard", [choice, table, excluded])


def results_section(board: Leaderboard) -> Section:
    """Every task: the primary metric of every encoder with its interval, and accuracy beside balanced accuracy."""
    rows = []
    for name, task in board.all_tasks.items():
        chance = (task.get("chance") or {}).get(task["primary_metric"])
        metric = metric_label(task["primary_metric"]) + (f", chance {number(chance)}" if chance is not None else "")
        values = [found["value"] or 0 for row in board.encoders if (found := board.metric(name, row))]
        cells = [_result(board, name, row, max(values, default=None)) for row in board.rows]
        rows.append(Row(
            [Cell(board.task_label(name), task["title"]), Cell(kind_label(task["kind"]), metric), modality_of(task),
             sample_counts(task)[0], *cells],
            data={"modality": modality_of(task), "kind": task["kind"]},
        ))  # fmt: skip
    columns = ["Dataset", "Task", "Modality", "n", *map(board.label, board.rows)]
    table = Table("Primary metric of every encoder on every task", columns, rows, anchor="results")
    return section("results", [table])


def best_teachers_section(board: Leaderboard) -> Section:
    """The best teacher of each modality against the student."""
    rows = [
        Row([modality, best, scored(mean.rows[best]), scored(mean.rows.get(board.student)),
             compared(mean.differences.get(best)), len(mean.tasks)])
        for modality, best, mean in board.best_teachers()
    ]  # fmt: skip
    columns = ["Modality", "Best teacher", "its mean", "student", "student minus teacher", "tasks"]
    return section("best", [Table("Best teacher", columns, rows)])


def wins_section(board: Leaderboard) -> Section:
    """On how many tasks the interval of the paired difference lies above, around and below zero."""
    rows, tasks = [], list(board.tasks)
    for row in board.others:
        clean = board.clean_against(row)
        wins, ties, losses, unknown = board.outcomes(row, tasks)
        of_clean: list[Cell | str | int] = ["same", "same"]
        if len(clean) < len(tasks):
            outcomes = " / ".join(map(str, board.outcomes(row, clean)[:3]))
            of_clean = [outcomes, compared(board.mean_of(clean).differences.get(row))]
        mean = compared(board.mean().differences.get(row))
        rows.append(Row([board.label(row), wins, ties, losses, unknown, mean, *of_clean], board.role(row)))
    columns = ["Encoder", "wins", "ties", "losses", "unknown", "mean difference", "clean: w / t / l", "clean: mean"]
    return section("wins", [Table("Student against each encoder", columns, rows)], tasks=len(tasks))


def ranks_section(board: Leaderboard) -> Section:
    """Average rank of every row over datasets, and whether the student differs consistently from each."""
    ranks = board.ranks()
    rows = []
    for row, own in sorted(ranks["rows"].items(), key=lambda item: item[1]["rank"]):
        apart = own.get("median_difference")
        tests = [NONE, NONE, NONE]
        if apart is not None:
            tests = [
                Cell(signed(apart), value=apart),
                *(Cell(p_value(own[key]), value=own[key]) for key in ("p", "p_holm")),
            ]
        rows.append(Row([board.label(row), Cell(number(own["rank"]), value=own["rank"]), *tests], board.role(row)))
    columns = ["Encoder", "average rank", "median difference", "signed-rank p", "Holm-adjusted p"]
    return section("ranks", [Table("Average rank over datasets", columns, rows)], datasets=len(ranks["datasets"]))


def differences_table(board: Leaderboard) -> Table:
    """Student minus every other row, on the mean and on each task."""
    columns = ["Task", *map(board.label, board.others)]
    mean = [compared(board.mean().differences.get(row)) for row in board.others]
    rows = [Row([Cell("All tasks", f"mean of {len(board.mean().tasks)}"), *mean])]
    for name, task in board.tasks.items():
        cells = [compared(board.difference(name, row)) for row in board.others]
        rows.append(Row([Cell(board.task_label(name), kind_label(task["kind"])), *cells]))
    return Table("Student minus each encoder", columns, rows)


def modalities_tables(board: Leaderboard) -> list[Table]:
    """Heat tables: the mean of every encoder on every modality, and its score on each modality within a task."""
    tables = []
    means = {modality: board.mean(modality) for modality in board.modalities if board.mean(modality).rows}
    if len(means) > 1:
        rows = [
            Row([board.label(row), *(heat(mean.rows.get(row), row == mean.best(board.encoders))
                                     for mean in means.values())], board.role(row))
            for row in board.rows
        ]  # fmt: skip
        columns = ["Encoder", *(f"{name} ({len(mean.tasks)})" for name, mean in means.items())]
        tables.append(Table("Mean by modality (number of tasks)", columns, rows, "heat"))
    for name, task in board.tasks.items():
        found = {row: own["by_modality"] for row, own in task["rows"].items() if own.get("by_modality")}
        places = sorted({modality for own in found.values() for modality in own})
        if len(places) < 2:
            continue
        scores = {row: [own.get(place, {}).get("score") for place in places] for row, own in found.items()}
        best = [
            max((scores[row][k] or 0 for row in found if row not in COMPOSED), default=0) for k in range(len(places))
        ]
        rows = [
            Row([board.label(row), *(heat({"value": score, "low": None}, score == best[k] and row not in COMPOSED)
                                     for k, score in enumerate(scores[row]))], board.role(row))
            for row in board.rows if row in found
        ]  # fmt: skip
        counts = next(iter(found.values()))
        heads = ["Encoder", *(f"{place} ({counts.get(place, {}).get('n', 0)})" for place in places)]
        measure = "recall of the caption" if task["kind"] == "retrieval" else "share of correct answers"
        tables.append(Table(f"{board.task_label(name)}, {kind_label(task['kind'])}: {measure} by modality", heads, rows,
                            "heat"))  # fmt: skip
    return tables


def metrics_section(board: Leaderboard) -> Section:
    """A table for each task that has more than its primary metric, to be opened."""
    folds = []
    for name, task in board.all_tasks.items():
        found = [metric for row in board.rows for metric in (board.result(name, row) or {}).get("metrics", {})]
        metrics = list(dict.fromkeys([task["primary_metric"], *found]))
        if len(metrics) < 2:
            continue
        rows = [
            Row([board.label(row), *(scored(board.metric(name, row, own)) if board.metric(name, row, own)
                                     else Cell("–", board.reason(name, row, own)) for own in metrics)], board.role(row))
            for row in board.rows if board.result(name, row)
        ]  # fmt: skip
        chances = [(task.get("chance") or {}).get(metric) for metric in metrics]
        if any(chance is not None for chance in chances):
            rows.append(Row(["chance", *(Cell(number(chance), value=chance) for chance in chances)]))
        label = f"{board.task_label(name)} · {kind_label(task['kind'])}"
        columns = ["Encoder", *map(metric_label, metrics)]
        folds.append(Fold(label, [Table(f"{label}: {task['title']}", columns, rows)]))
    return section("metrics", folds)


def contamination_section(board: Leaderboard) -> Section:
    """Which encoder was trained on data of which dataset, as far as is known."""
    marked = {
        (row, str(task.get("dataset", "")), reason)
        for name, task in board.all_tasks.items()
        for row, reason in board.marks(name).items()
        if row not in COMPOSED
    }
    rows = [[board.label(row), dataset, reason] for row, dataset, reason in sorted(marked)]
    return section("contamination", [Table("Marks of contamination", ["Encoder", "Dataset", "Reason"], rows)])


def skipped_section(board: Leaderboard) -> Section:
    """Datasets and tasks without results, and unreadable images."""
    left_out = {**board.summary.get("skipped_datasets", {}), **board.summary.get("skipped", {})}
    rows = [[name, reason] for name, reason in left_out.items()]
    unreadable = [f"{name}: {reason}" for name, reason in board.summary.get("unreadable", {}).items()]
    images = Fold(f"Images that could not be read ({len(unreadable)})", [Notes("", unreadable)])
    return section("skipped", [Table("Skipped datasets and tasks", ["Left out", "Reason"], rows), images])


def datasets_section(board: Leaderboard, datasheet: str) -> Section:
    """What each dataset is, who may use it, its splits and what they share."""
    split = board.summary["settings"].get("split", "test")
    rows: list[list[Cell | str | int]] = []
    counts: list[list[Cell | str | int]] = []
    notes: list[str] = []
    for name, own in board.summary.get("datasets", {}).items():
        splits = own.get("splits")
        if not splits:
            continue
        held_out = splits["counts"].get(split, {"pairs": 0, "groups": 0})
        shared = [f"{splits['shared_groups']} groups"] if splits["shared_groups"] else []
        shared += [f"{splits['shared_images']} identical images"] if splits["shared_images"] else []
        unchecked = "not checked for identical images" if splits["shared_images"] is None else ""
        rows.append([
            Cell(name, str(own.get("title", ""))),
            *(str(own.get(key, "")) for key in ("modality", "task", "license", "tier")),
            Cell(str(held_out["pairs"]), f"from {held_out['groups']} sources", held_out["pairs"]),
            Cell(", ".join(shared) or "nothing", unchecked, role="behind" if shared else ""),
        ])  # fmt: skip
        counts += [
            [name, part, own["pairs"], own["groups"],
             ", ".join(f"{modality or 'none'} {n}" for modality, n in own.get("modalities", {}).items())]
            for part, own in ((part, splits["counts"][part]) for part in SPLITS if part in splits["counts"])
        ]  # fmt: skip
        notes += [f"{name}: {note}" for note in own.get("notes") or []]
    columns = ["Dataset", "modality", "task", "licence", "tier", "held out", "shared with training"]
    by_split = Table("Samples by split", ["Dataset", "split", "samples", "sources", "modalities"], counts)
    more: list[Block] = [Notes("Notes:", notes), Fold("Datasheet of the pairs", [Code(datasheet)])]
    return section("data", [Table("Datasets evaluated on", columns, rows), Fold("Samples by split", [by_split]), *more])


def provenance_section(board: Leaderboard, settings: dict[str, str], stages: Any) -> Section:
    """Encoders, versions, durations, the lock file and the settings of each command."""
    summary = board.summary
    encoders = [
        [name, str(own.get("source", "")), str(own.get("fingerprint", ""))[:12]]
        for name, own in summary.get("encoders", {}).items()
    ]
    versions = [[name, str(version)] for name, version in summary.get("versions", {}).items()]
    timed = {name: own for name, own in stages.items() if isinstance(own, dict)} if isinstance(stages, dict) else {}
    seconds = [
        [name, f"{own['seconds']:g} s" if own.get("seconds") is not None else "–"] for name, own in timed.items()
    ]
    tables = [
        Table("Encoders", ["Name", "loaded from", "weights"], encoders),
        Table("Versions", ["Package", "version"], versions),
        Table("Time of each stage", ["Stage", "time"], seconds),
    ]
    failures = [
        f"{name}: {line}" for name, own in summary.get("encoders", {}).items() for line in own.get("failures", [])
    ]
    file = board.results / LOCK
    lock = file.read_text(encoding="utf-8") if file.is_file() else ""
    where = "Weights and versions behind every number; the settings of each command, seeds included, are below."
    if lock:
        where = f"Weights, data, settings and versions behind every number are in {LOCK} beside the results."
    blocks: list[Block] = [
        Grid(tables),
        Notes("Failures:", failures),
        Fold(LOCK, [Code(lock)]),
        *(Fold(f"mmkd {name} --config settings.yaml", [Code(own)]) for name, own in settings.items()),
    ]
    return section("provenance", blocks, where=where)


def scored(metric: Metric | None, best: bool = False) -> Cell:
    """A value with its interval."""
    if metric is None or metric["value"] is None:
        return NONE
    return Cell(number(metric["value"]), interval_text(metric), metric["value"], best=best)


def compared(found: Metric | None) -> Cell:
    """A difference with interval, p and Holm-adjusted p, colored where the interval excludes zero."""
    if found is None or found["difference"] is None:
        return NONE
    note = f"{interval_text(found, signed)}, {p_values(found)}"
    return Cell(signed(found["difference"]), note, found["difference"], tone(found))


def heat(metric: Metric | None, best: bool) -> Cell:
    """A value on a tint that grows with it."""
    if metric is None or metric["value"] is None:
        return NONE
    note = "" if metric["low"] is None else interval_text(metric)
    return Cell(number(metric["value"]), note, metric["value"], best=best, tint=metric["value"])


def _result(board: Leaderboard, name: str, row: str, best: float | None) -> Cell:
    """The primary metric of a row on a task, or why there is none."""
    metric, warning = board.metric(name, row), board.marks(name).get(row, "")
    if metric is None:
        return Cell("–", board.reason(name, row) if board.result(name, row) else "", warning=warning)
    cell = scored(metric, row not in COMPOSED and metric["value"] == best)
    note = "; ".join([cell.note, *accuracies_beside(board, name, row)])
    return Cell(cell.text, note, cell.value, board.role(row), cell.best, warning)


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
    return section("overall", [Grid(charts)], kinds=kinds)


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
    return section("survival", [Grid(own), Fold(f"Other encoders ({len(others)})", [Grid(others)])])


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
    more = Fold(f"More matrices ({len(tables) - 1})", tables[1:])
    return section("confusions", [*tables[:1], more], student=board.label(board.student))


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
    return [Grid(charts[:shown]), Fold(f"{rest} ({len(hidden)})", [Grid(hidden)])]
