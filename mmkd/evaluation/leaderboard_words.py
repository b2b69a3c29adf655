"""What a suite's report claims, computed from the intervals, also when the student loses."""

from __future__ import annotations

from mmkd.evaluation.encoders import ENSEMBLE
from mmkd.evaluation.leaderboard_board import Board
from mmkd.evaluation.markup import number, signed, text


def verdict(board: Board) -> str:
    """The headline: ahead of all teachers, ahead of the best, level with it, or behind it."""
    mean = board.mean()
    best = mean.best(board.teachers)
    over = counted(len({board.tasks[name].get("dataset") for name in mean.tasks}), "dataset")
    student = "The student" if board.student == "student" else board.student
    if not board.tasks:
        return "There is nothing to show: no task could be evaluated."
    if board.student not in mean.rows:
        return f"{student} has no common results with the others."
    if best is None or mean.differences[best]["low"] is None or mean.differences[best]["high"] is None:
        return f"{student} on {over}."
    low = [mean.differences.get(row, {}).get("low") for row in board.teachers]
    if len(low) > 1 and all(own is not None and own > 0 for own in low):
        return f"{student} is ahead of each of its teachers on {over}."
    if (mean.differences[best]["low"] or 0) > 0:
        return f"{student} is ahead of its best teacher, {best}, on {over}."
    if (mean.differences[best]["high"] or 0) < 0:
        return f"{student} stays behind its best teacher, {best}, on {over}."
    return f"{student} and its best teacher, {best}, cannot be told apart on {over}."


def claim(board: Board) -> str:
    """The numbers behind the headline, as HTML."""
    mean = board.mean()
    own = mean.rows.get(board.student)
    if not board.tasks:
        return "The reasons stand below."
    if own is None:
        return "There is no task that every encoder answered, so there is nothing to compare over all of them."
    inside = "" if own["low"] is None else f" (95 % interval {number(own['low'])} to {number(own['high'])})"
    sentences = [
        f"Mean over {counted(len(mean.tasks), 'task')}: <strong>{number(own['value'])}</strong>{inside}.",
        _against(board, mean.best(board.teachers)),
        _against(board, ENSEMBLE, "all teachers together"),
        _clean(board),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _clean(board: Board) -> str:
    """The difference to the best teacher on what neither of both was trained on, where that is less than all."""
    best = board.mean().best(board.teachers)
    tasks = board.clean_against(best) if best else []
    found = board.mean_of(tasks).differences.get(best or "")
    if not tasks or found is None or len(tasks) == len(board.tasks):
        return ""
    inside = "no interval" if found["low"] is None else f"{signed(found['low'])} to {signed(found['high'])}"
    return f"On what neither was trained on, it is <strong>{signed(found['difference'])}</strong> ({inside})."


def caveat(board: Board) -> str:
    """What the numbers are not, as HTML."""
    marked = sum(bool(board.marks(task)) for task in board.tasks)
    known = (
        f"On {marked} of {counted(len(board.tasks), 'task')} some encoder is known to have trained on the same source, "
        "marked †; clean means leave these out. "
        if marked
        else ""
    )
    return (
        f"<strong>How to read this.</strong> It is no medical result. {known}Intervals cover the choice of held-out "
        "samples, not the chance of training, and not the choice of datasets. The best teacher is chosen on these same "
        "test sets, which flatters it."
    )


def counted(count: int, noun: str) -> str:
    """A number with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _against(board: Board, rival: str | None, name: str = "") -> str:
    found = board.mean().differences.get(rival or "")
    if rival is None or found is None:
        return ""
    inside = "no interval" if found["low"] is None else f"{signed(found['low'])} to {signed(found['high'])}"
    return f"Difference to {text(name or rival)}: <strong>{signed(found['difference'])}</strong> ({inside})."
