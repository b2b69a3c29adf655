"""Every metric of every encoder on every task, folded away: other recalls, areas, controls of questions, labels."""

from __future__ import annotations

from mmkd.evaluation.leaderboard_board import Board, Task, kind_name, metric_name, task_name
from mmkd.evaluation.leaderboard_tables import scored, undefined_reason
from mmkd.evaluation.markup import details, number, section, table, text
from mmkd.evaluation.report_results import label


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
