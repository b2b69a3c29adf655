"""Tables of a suite's report: the leaderboard, all results, the best teacher of each modality, wins and losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmkd.evaluation.embeddings.encoders import ENSEMBLE, ORACLE
from mmkd.evaluation.report.board import (
    Board,
    Mean,
    Metric,
    Task,
    kind_name,
    metric_name,
    modality_of,
    sample_count,
    task_name,
    value_of,
)
from mmkd.evaluation.report.charts import shade
from mmkd.evaluation.report.markup import details, number, p_value, section, signed, table, text
from mmkd.evaluation.report.pairs_results import MADE_HERE, label, role

MARK = '<abbr class="mark" title="{reason}" aria-label="trained on this data: {reason}">†</abbr>'


@dataclass(frozen=True)
class Column:
    """A column of the leaderboard: a mean over one kind of task, or over all kinds, or over clean tasks of these."""

    kind: str
    clean: bool
    name: str

    def attributes(self) -> str:
        """For the script: which choice of kind shows it; a clean column of one kind waits for that choice."""
        return f' data-kind="{text(self.kind)}"' + (" data-alone hidden" if self.kind and self.clean else "")


def leaderboard_section(board: Board) -> str:
    """Mean of every encoder over all datasets, clean ones and each kind; one body for each modality."""
    several, marked = len(board.kinds) > 1, any(map(board.marks, board.tasks))
    columns = [Column("", False, "All kinds" if several else kind_name(board.kinds[0]).capitalize())]
    columns += [Column("", True, "Clean †")] if marked else []
    for clean in (False, True) if marked else (False,):
        columns += [
            Column(kind, clean, f"{kind_name(kind).capitalize()}{', clean †' if clean else ''}")
            for kind in (board.kinds if several else [])
        ]
    head = "".join(f'<th scope="col"{own.attributes()}>{text(own.name)}</th>' for own in columns)
    head = f'<th scope="col">Encoder</th>{head}'
    bodies = [_body(board, modality, columns) for modality in ("", *board.modalities)]
    caption = "Leaderboard: mean of the headline metrics"
    content = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table class="sortable board" '
        'id="board">'
        f"<caption>{caption}</caption><thead><tr>{head}</tr></thead>{''.join(bodies)}</table></div>"
    )
    lead = (
        "Mean over kinds of task of the mean over datasets, with its 95 % interval, each over the datasets that every "
        "encoder of the column answered; their number stands in the first row. A dot marks the best encoder of a "
        "column. Ensemble and oracle are made of the teachers; the oracle is chosen on these test sets and flatters."
    )
    return section("leaderboard", "Leaderboard", lead, _filters(board), content, _missing(board))


def results_section(board: Board) -> str:
    """Every dataset: the headline metric of every encoder with its interval."""
    columns = ["Dataset", "Task", "Modality", "n", *board.rows]
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in columns)
    rows = []
    for name, task in board.all_tasks.items():
        chance = task["chance"].get(task["headline"]) if task.get("chance") else None
        small = metric_name(task["headline"]) + (f", chance {number(chance)}" if chance is not None else "")
        shown = f"{text(kind_name(task['kind']))}<small>{text(small)}</small>"
        values = [value_of(board.summary, name, row) for row in board.rows if row not in MADE_HERE]
        best = max((value for value in values if value is not None), default=None)
        cells = "".join(_result(board, name, row, best) for row in board.rows)
        rows.append(
            f'<tr data-modality="{text(modality_of(task))}" data-kind="{text(task["kind"])}">'
            f'<th scope="row">{text(task_name(task, name))}'
            f"<small>{text(task['title'])}</small></th><td>{shown}</td><td>{text(modality_of(task))}</td>"
            f'<td data-value="{sample_count(task)}">{sample_count(task)}</td>{cells}</tr>'
        )
    caption = "Headline metric of every encoder on every dataset"
    content = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table class="sortable board" '
        f'id="results"><caption>{caption}</caption><thead><tr>{head}</tr></thead>\n<tbody>{"".join(rows)}</tbody></table></div>'
    )
    lead = "Value on all held-out samples and 95 % interval. † = the encoder was trained on this data; a dot = best."
    return section("results", "Dataset by dataset", lead, content)


def modalities_table(board: Board) -> str:
    """A heat table: mean of every encoder on every modality."""
    means = {modality: board.mean(modality) for modality in board.modalities}
    columns = [modality for modality, mean in means.items() if mean.rows]
    if not columns:
        return ""
    rows = []
    for row in board.rows:
        cells = []
        for modality in columns:
            mean = means[modality]
            best = mean.best(other for other in board.rows if other not in MADE_HERE)
            cells.append(shade(mean.rows[row]["value"] if row in mean.rows else None, row == best))
        name = text(label(row, board.student))
        rows.append([f'<span class="{role(board.summary, row)}">{name}</span>', *cells])
    heads = ["Encoder", *(f"{modality} ({len(means[modality].tasks)})" for modality in columns)]
    return table("Mean by modality (number of tasks)", heads, rows, "heat")


def best_teachers_section(board: Board) -> str:
    """The teacher one would ask for each modality, if one knew, against the student."""
    rows = []
    for modality, best, mean in best_teachers(board):
        ours = mean.rows.get(board.student)
        rows.append(
            [
                text(modality),
                text(best),
                scored(mean.rows[best]),
                scored(ours) if ours else '<span class="none">–</span>',
                compared(mean.differences.get(best)),
                str(len(mean.tasks)),
            ]
        )
    if not rows:
        return ""
    lead = (
        "The single best teacher of each modality, chosen on these same test sets, which flatters it. "
        "A student that keeps up with it needs nobody to choose."
    )
    columns = ["Modality", "Best teacher", "its mean", "student", "student minus teacher", "tasks"]
    return section("best", "Best teacher of each modality", lead, table("Best teacher", columns, rows, "differences"))


def best_teachers(board: Board) -> list[tuple[str, str, Mean]]:
    """Modality, best teacher and the means there, where there is a teacher at all."""
    found = []
    for modality in board.modalities:
        mean = board.mean(modality)
        best = mean.best(board.teachers)
        if best is not None:
            found.append((modality, best, mean))
    return found


def wins_section(board: Board) -> str:
    """How often the student is ahead of, level with and behind each rival, beyond its interval."""
    rows = []
    for rival in board.rivals:
        clean = board.clean_against(rival)
        dirty = len(clean) < len(board.tasks)
        wins = outcomes(board, rival, list(board.tasks))
        rows.append(
            [
                text(label(rival, board.student)),
                *(str(count) for count in wins),
                compared(board.mean().differences.get(rival)),
                " / ".join(map(str, outcomes(board, rival, clean)[:3])) if dirty else '<span class="none">same</span>',
                compared(board.mean_of(clean).differences.get(rival)) if dirty else '<span class="none">same</span>',
            ]
        )
    if not rows:
        return ""
    count = len(board.tasks)
    lead = (
        f"Over {count} tasks: a win where the whole 95 % interval of the paired difference lies above zero, a loss "
        "where it lies below, else a tie. About one in forty would be a win, and as many a loss, by chance alone. "
        "Clean = without datasets that the student or this rival was trained on."
    )
    columns = ["Rival", "wins", "ties", "losses", "unknown", "mean difference", "clean: w / t / l", "clean: difference"]
    return section("wins", "Win, tie, loss", lead, table("Student against each rival", columns, rows, "differences"))


def outcomes(board: Board, rival: str, tasks: Sequence[str]) -> tuple[int, int, int, int]:
    """Wins, ties, losses, and tasks without an interval."""
    tones = [tone(difference_of(board.summary, task, rival)) for task in tasks]
    return tones.count("ahead"), tones.count("level"), tones.count("behind"), tones.count("unknown")


def difference_of(summary: dict[str, Any], task: str, rival: str) -> Metric | None:
    """Student minus rival in the headline metric of a task."""
    found = summary["tasks"][task]["differences"].get(rival)
    return found.get(summary["tasks"][task]["headline"]) if found else None


def tone(found: Metric | None) -> str:
    """Where the interval of a difference lies."""
    if found is None or found["low"] is None or found["high"] is None:
        return "unknown"
    return "ahead" if found["low"] > 0 else "behind" if found["high"] < 0 else "level"


def scored(metric: Metric, best: bool = False) -> str:
    """A value with its interval as HTML."""
    dot = ' <b aria-label="best">●</b>' if best else ""
    inside = "no interval" if metric["low"] is None else f"{number(metric['low'])} to {number(metric['high'])}"
    return f"{number(metric['value'])}{dot}<small>{inside}</small>"


def compared(found: Metric | None) -> str:
    """A difference with interval and p as HTML."""
    if found is None or found["difference"] is None:
        return '<span class="none">–</span>'
    inside = "no interval" if found["low"] is None else f"{signed(found['low'])} to {signed(found['high'])}"
    own = f'<span class="{tone(found)}">{signed(found["difference"])}</span>'
    return f"{own}<small>{inside}, {text(p_value(found['p']))}</small>"


def _body(board: Board, modality: str, columns: Sequence[Column]) -> str:
    means = [board.mean(modality, own.kind, own.clean) for own in columns]
    order = sorted(
        (row for row in board.rows if any(row in mean.rows for mean in means)),
        key=lambda row: -(means[0].rows.get(row, {}).get("value") or 0),
    )
    several = list(zip(columns, means, strict=True))
    counts = "".join(f"<td{own.attributes()}>{len(mean.tasks)}</td>" for own, mean in several)
    lines = [f'<tr class="counts"><th scope="row">{text(modality or "Datasets")}, number of tasks</th>{counts}</tr>']
    for row in order:
        cells = ""
        for own, mean in several:
            best = mean.best(other for other in board.rows if other not in MADE_HERE)
            metric = mean.rows.get(row)
            shown = scored(metric, row == best) if metric else '<span class="none">–</span>'
            cells += f'<td{own.attributes()} data-value="{metric["value"] if metric else ""}">{shown}</td>'
        name = text(label(row, board.student))
        lines.append(f'<tr class="{role(board.summary, row)}"><th scope="row">{name}</th>{cells}</tr>')
    hidden = " hidden" if modality else ""
    return f'\n<tbody data-scope="{text(modality)}"{hidden}>{"".join(lines)}</tbody>'


def _result(board: Board, name: str, row: str, best: float | None) -> str:
    cell = board.summary["tasks"][name]["rows"].get(row)
    reason = board.marks(name).get(row)
    mark = MARK.format(reason=text(reason)) if reason else ""
    if cell is None:
        return '<td data-value=""><span class="none">–</span></td>'
    metric = cell["metrics"].get(board.summary["tasks"][name]["headline"])
    if cell["undefined"] or metric is None or metric["value"] is None:
        reason = undefined_reason(cell, board.summary["tasks"][name]["headline"])
        return f'<td data-value=""><small>{text(reason)}</small>{mark}</td>'
    shown = scored(metric, row not in (ENSEMBLE, ORACLE) and metric["value"] == best)
    return f'<td class="{role(board.summary, row)}" data-value="{metric["value"]}">{mark}{shown}</td>'


def undefined_reason(cell: dict[str, Any], metric: str) -> str:
    """Why a cell has no number for a metric."""
    reason = cell["undefined"] or cell.get("extras", {}).get("undefined_metrics", {}).get(metric)
    return f"undefined: {reason}" if reason else "undefined on these samples"


def _filters(board: Board) -> str:
    """Choices of modality and kind; shown by the script, since they do nothing without it."""
    chosen = ""
    for name, title, values in (
        ("modality", "Modality", {modality: modality for modality in board.modalities}),
        ("kind", "Kind of task", {kind: kind_name(kind) for kind in board.kinds}),
    ):
        options = "".join(f'<option value="{text(value)}">{text(shown)}</option>' for value, shown in values.items())
        chosen += f'<label>{title} <select name="{name}"><option value="">all</option>{options}</select></label>'
    return f'<div class="filters" id="filters" hidden>{chosen}<span role="status" id="shown"></span></div>'


def _missing(board: Board) -> str:
    """Which encoders keep which tasks out of the common subset."""
    lines = [
        f"<li>{text(label(row, board.student))} did not answer {text(', '.join(own))}</li>"
        for row, own in board.mean().missing.items()
        if own
    ]
    left = '<p class="quiet">Left out of the means over all kinds, since not every encoder answered:</p>'
    return f'{left}<ul class="quiet">{"".join(lines)}</ul>' if lines else ""


# Section: Every metric of every encoder on every task, folded away: other recalls, areas, controls of questions,
# labels.


def metrics_section(board: Board) -> str:
    """A table for each task that has more than its headline metric, to be opened."""
    opened = [
        details(f"{task_name(task, name)} · {kind_name(task['kind'])}", _table(board, name, task))
        for name, task in board.all_tasks.items()
        if len(_metrics(board, task)) > 1
    ]
    lead = "What else was measured on each dataset, with 95 % intervals, and what chance gives where that is known."
    return section("metrics", "All metrics", lead, *opened)


def _table(board: Board, name: str, task: Task) -> str:
    metrics = _metrics(board, task)
    rows = []
    for row in board.rows:
        cell = task["rows"].get(row)
        if cell is None:
            continue
        found = [cell["metrics"].get(metric) for metric in metrics]
        shown = [
            scored(own)
            if own and own["value"] is not None
            else f"<small>{text(undefined_reason(cell, metric))}</small>"
            for own, metric in zip(found, metrics, strict=True)
        ]
        rows.append([text(label(row, board.student)), *shown])
    chances = [task.get("chance", {}).get(metric) for metric in metrics]
    if any(chance is not None for chance in chances):
        rows.append(["chance", *(number(chance) for chance in chances)])
    return table(f"{task_name(task, name)}: {task['title']}", ["Encoder", *map(metric_name, metrics)], rows)


def _metrics(board: Board, task: Task) -> list[str]:
    """Headline first, the others in their own order; all that any row has."""
    found = [metric for row in board.rows for metric in (task["rows"].get(row) or {}).get("metrics", {})]
    return list(dict.fromkeys([task["headline"], *found]))
