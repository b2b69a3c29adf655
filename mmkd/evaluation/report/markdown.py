"""The numbers of a suite's report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mmkd.evaluation.report.board import (
    Board,
    Metric,
    counted,
    kind_name,
    metric_name,
    modality_of,
    sample_count,
    skipped_sets,
    verdict,
)
from mmkd.evaluation.report.board import task_name as named
from mmkd.evaluation.report.markup import number, p_value, signed
from mmkd.evaluation.report.pairs_results import label
from mmkd.evaluation.report.tables import best_teachers, outcomes, undefined_reason

SPECIAL = "\\`*_{}[]<>()#+!|~&"


def markdown(board: Board, lock: str) -> str:
    """The whole document; strings of users cannot start markup in it."""
    blocks = [f"# {plain(verdict(board))}"]
    if board.tasks:
        blocks += [
            "Values are headline metrics with their 95 % intervals; † = trained on that data's source.",
            _leaderboard(board),
            _best(board),
            _wins(board),
            _datasets(board),
        ]
    blocks += [_marks(board), _skipped(board)]
    blocks.append(
        f"Weights, data, settings and versions: [repro.lock](repro.lock), {len(lock.splitlines())} lines."
        if lock
        else ""
    )
    return "\n\n".join(block for block in blocks if block) + "\n"


def plain(value: object) -> str:
    """A string as Markdown text within one line."""
    flat = " ".join(str(value).split())
    return "".join(f"\\{character}" if character in SPECIAL else character for character in flat)


def _leaderboard(board: Board) -> str:
    means = {"all kinds": board.mean()}
    if any(map(board.marks, board.tasks)):
        means["clean"] = board.mean(clean=True)
    means |= {kind_name(kind): board.mean(kind=kind) for kind in board.kinds} if len(board.kinds) > 1 else {}
    means |= {modality: board.mean(modality) for modality in board.modalities} if len(board.modalities) > 1 else {}
    order = sorted(board.rows, key=lambda row: -(means["all kinds"].rows.get(row, {}).get("value") or 0))
    rows = [
        [plain(label(row, board.student)), *(_scored(mean.rows.get(row)) for mean in means.values())] for row in order
    ]
    heads = ["Encoder", *(f"{plain(name)} ({len(mean.tasks)})" for name, mean in means.items())]
    return "## Leaderboard\n\nMeans over the tasks that all answered; their number in brackets.\n\n" + _table(
        heads, rows
    )


def _best(board: Board) -> str:
    rows = [
        [plain(modality), plain(best), _scored(mean.rows[best]), _scored(mean.rows.get(board.student)),
         _compared(mean.differences.get(best))]
        for modality, best, mean in best_teachers(board)
    ]  # fmt: skip
    heads = ["Modality", "Best teacher", "its mean", "student", "student minus teacher"]
    return "## Best teacher of each modality\n\n" + _table(heads, rows) if rows else ""


def _wins(board: Board) -> str:
    rows = []
    for rival in board.rivals:
        clean = board.clean_against(rival)
        wins, ties, losses, unknown = outcomes(board, rival, list(board.tasks))
        rows.append([
            plain(label(rival, board.student)), f"{wins} / {ties} / {losses}", str(unknown),
            _compared(board.mean().differences.get(rival)),
            "{} / {} / {}".format(*outcomes(board, rival, clean)[:3]),
            _compared(board.mean_of(clean).differences.get(rival)),
        ])  # fmt: skip
    heads = ["Rival", "win / tie / loss", "unknown", "mean difference", "clean: w / t / l", "clean: difference"]
    title = f"## Win, tie, loss over {counted(len(board.tasks), 'task')}"
    return f"{title}\n\n{_table(heads, rows)}" if rows else ""


def _datasets(board: Board) -> str:
    rows = []
    for name, task in board.all_tasks.items():
        marks = board.marks(name)
        cells = []
        for row in board.rows:
            cell = task["rows"].get(row)
            metric = cell["metrics"].get(task["headline"]) if cell and not cell["undefined"] else None
            undefined = plain(undefined_reason(cell, task["headline"])) if cell else "–"
            shown = _scored(metric) if metric and metric["value"] is not None else undefined
            cells.append(f"†{shown}" if row in marks else shown)
        facts = [
            plain(named(task, name)),
            kind_name(task["kind"]),
            plain(modality_of(task)),
            metric_name(task["headline"]),
        ]
        rows.append([*facts, str(sample_count(task)), *cells])
    heads = ["Dataset", "Task", "Modality", "Metric", "n", *(plain(label(row, board.student)) for row in board.rows)]
    return "## Dataset by dataset\n\n" + _table(heads, rows)


def _marks(board: Board) -> str:
    lines = [
        f"- {plain(label(row, board.student))}, {plain(dataset)}: {plain(reason)}"
        for row, dataset, reason in board.marked_datasets()
    ]
    return "## Trained on the test's source\n\n" + "\n".join(lines) if lines else ""


def _skipped(board: Board) -> str:
    lines = [f"- {plain(name)}: {plain(reason)}" for name, reason in skipped_sets(board.summary).items()]
    return "## Not evaluated\n\n" + "\n".join(lines) if lines else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _scored(metric: Metric | None) -> str:
    if metric is None or metric["value"] is None:
        return "–"
    if metric["low"] is None:
        return f"{number(metric['value'])} (no interval)"
    return f"{number(metric['value'])} ({number(metric['low'])} to {number(metric['high'])})"


def _compared(found: Metric | None) -> str:
    if found is None:
        return "–"
    if found["low"] is None:
        return f"{signed(found['difference'])} (no interval)"
    return f"{signed(found['difference'])} ({signed(found['low'])} to {signed(found['high'])}, {p_value(found['p'])})"
