"""The report's sections on results: what the page claims, and the numbers the claim is computed from."""

from __future__ import annotations

from typing import Any

from mmkd.evaluation.embeddings.encoders import ENSEMBLE, ORACLE
from mmkd.evaluation.report.charts import Row, differences, forest, shade
from mmkd.evaluation.report.markup import details, number, p_value, section, signed, table, text
from mmkd.evaluation.statistics.bootstrap import BY_IMAGE

METRICS = {
    "balanced_accuracy": "balanced accuracy",
    "mean_recall": "mean of recall at 1, 5 and 10, both ways",
    "accuracy": "accuracy",
    "macro_auroc": "macro AUROC",
    "macro_f1": "macro F1",
    "quadratic_kappa": "quadratic kappa",
    "c_index": "concordance index",
}
KINDS = {
    "zeroshot": "zero-shot",
    "retrieval": "retrieval",
    "probe": "linear probe",
    "vqa": "visual question answering",
    "survival": "survival",
    "diagnosis": "diagnosis",
}
MADE_HERE = {ENSEMBLE: "all teachers together", ORACLE: "best teacher of each modality"}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FEW_GROUPS, TOO_FEW_GROUPS = 200, 5

Summary = dict[str, Any]


def verdict(summary: Summary) -> str:
    """The headline, computed: ahead of all teachers, ahead of the best, level with it, or behind it."""
    found, best = summary["overall"]["differences"], summary["overall"]["best_teacher"]
    if best not in found or found[best]["low"] is None:  # there is no teacher, or the student has no numbers
        return "One student, measured on images it has not seen."
    teachers = [row for row in summary["teachers"] if row in found]
    many = f"each of its {_spelled(len(teachers))} teachers" if len(teachers) > 1 else "its teacher"
    if all((found[row]["low"] or 0) > 0 for row in teachers):
        return f"One student, ahead of {many}."
    if found[best]["low"] > 0:
        return f"The student is ahead of its best teacher, {best}."
    if found[best]["high"] < 0:
        return f"The student stays behind its best teacher, {best}."
    return f"The student and its best teacher, {best}, cannot be told apart on these images."


def claim(summary: Summary) -> str:
    """The numbers behind the headline, as HTML."""
    overall, best = summary["overall"], summary["overall"]["best_teacher"]
    student = overall["rows"].get(summary["student"])
    if student is None:
        return "The student's vectors are not finite, so there is nothing to compare."
    tasks = _counted(len(overall["tasks"]), "task")
    sentence = f"Mean score over {tasks}: <strong>{number(student['value'])}</strong>{_between(student)}."
    if best is not None:
        sentence += (
            f" Its best single teacher, {text(best)}, reaches {number(overall['rows'][best]['value'])}; "
            f"the difference is {_difference(overall['differences'][best])}."
        )
    if ENSEMBLE in overall["differences"]:
        sentence += f" Against all teachers together it is {_difference(overall['differences'][ENSEMBLE])}."
    return sentence


def caveat(summary: Summary) -> str:
    """What the numbers are not, as HTML."""
    frame = max((task["frames"]["image"] for task in summary["tasks"].values()), key=lambda own: own["n"])
    few = "A handful of source images shows that the pipeline works and what it measures. "
    return (
        f"<strong>How to read this.</strong> {few if frame['groups'] < FEW_GROUPS else ''}It is no medical result: "
        f"{_counted(frame['n'], 'held-out image')} from {_counted(frame['groups'], 'source')} (patients, cases, "
        "specimens or volumes), and the best teacher is chosen on these same images, which flatters the teacher. "
        "Intervals cover the choice of held-out images, not the chance of training."
    )


def overall_section(summary: Summary) -> str:
    """The overall score of every row, and the student's difference to each."""
    overall, student = summary["overall"], summary["student"]
    if not overall["rows"]:
        return ""
    ordered = sorted(overall["rows"], key=lambda row: -overall["rows"][row]["value"])
    scores = [Row(label(row, student), role(summary, row), **overall["rows"][row]) for row in ordered]
    rivals = [row for row in ordered if row in overall["differences"]]
    found = [overall["differences"][row] for row in rivals]
    against = [
        Row(label(row, student), role(summary, row), own["difference"], own["low"], own["high"])
        for row, own in zip(rivals, found, strict=True)
    ]
    charts = [forest("Overall score", scores)]
    if against:
        charts.append(differences("Student minus rival", against, [p_value(own["p"]) for own in found]))
    kinds = ", ".join(name for kind, name in KINDS.items() if any(t["kind"] == kind for t in summary["tasks"].values()))
    lead = (
        f"Each kind of task ({kinds}) counts the same. The same {summary['settings']['replicates']} draws of held-out "
        "sources serve every encoder and every task, so differences are paired."
    )
    return section("overall", "All tasks together", lead, f'<div class="pair">{"".join(charts)}</div>')


def tasks_section(summary: Summary) -> str:
    """A forest plot of the headline metric for every task; those within one modality open on a click."""
    broad = [_task_card(summary, name, task) for name, task in task_order(summary) if not _is_within(name)]
    within = [_task_card(summary, name, task) for name, task in task_order(summary) if _is_within(name)]
    opened = (
        details(f"Within one modality ({len(within)})", f'<div class="tasks">{"".join(within)}</div>') if within else ""
    )
    skipped = "".join(f"<li>{text(name)}: {text(reason)}</li>" for name, reason in summary["skipped"].items())
    left = f'<p class="quiet">Not asked here:</p><ul class="quiet">{skipped}</ul>' if skipped else ""
    lead = "Dots are values on all held-out images, bars their 95 % intervals, the dashed line is chance."
    return section("tasks", "Task by task", lead, f'<div class="tasks">{"".join(broad)}</div>', opened, left)


def differences_section(summary: Summary) -> str:
    """The table of paired differences, one row for each task and one column for each rival."""
    rivals = [row for row in row_order(summary, _all_rows(summary)) if row != summary["student"]]
    if not rivals:
        return ""
    rows = []
    if summary["overall"]["differences"]:
        cells = [_cell(summary["overall"]["differences"].get(rival)) for rival in rivals]
        rows.append(["<strong>All tasks</strong>", *cells])
    for _, task in task_order(summary):
        own = task["differences"]
        cells = [_cell(own[rival][task["headline"]] if rival in own else None) for rival in rivals]
        rows.append([f"{text(task['title'])} <small>{KINDS[task['kind']]}</small>", *cells])
    columns = ["Task", *(label(rival, summary["student"]) for rival in rivals)]
    lead = (
        "Student minus rival, with the 95 % interval of the paired difference and its two-sided p, not corrected for "
        "the number of comparisons. Colored where the interval leaves zero out. The oracle asks for each modality the "
        "teacher that did best on it in this very test; it is not asked for the modality itself and has no mean."
    )
    return section(
        "differences", "Paired differences", lead, table("Student minus rival", columns, rows, "differences")
    )


def modalities_section(summary: Summary) -> str:
    """Who knows what: the mean score of every row on every modality."""
    tables: list[str] = []
    for name in ("retrieval", "zeroshot-label", "zeroshot-modality"):
        task = summary["tasks"].get(name)
        known = {
            row: cell["by_modality"] for row, cell in (task["rows"] if task else {}).items() if cell["by_modality"]
        }
        columns = sorted({modality for own in known.values() for modality in own})
        if task is None or len(columns) < 2 or len(tables) == 2:
            continue
        best = {m: max(own[m]["score"] for row, own in known.items() if row not in MADE_HERE) for m in columns}
        rows = []
        for row in row_order(summary, known):
            cells = [shade(s, row not in MADE_HERE and s == best[m]) for m in columns for s in [known[row][m]["score"]]]
            rows.append([f'<span class="{role(summary, row)}">{text(label(row, summary["student"]))}</span>', *cells])
        counts = next(iter(known.values()))
        heads = ["Encoder", *(f"{modality} ({counts[modality]['n']})" for modality in columns)]
        measure = "Recall of the caption" if task["kind"] == "retrieval" else "Share of right answers"
        tables.append(table(f"{task['title']} {measure}, by modality", heads, rows, "heat"))
    lead = (
        "A specialist is strong where it was trained; a student of many should be weak nowhere. A dot marks the best."
    )
    return section("modalities", "Who knows what", lead, *tables)


def label(row: str, student: str) -> str:
    """What a row is called for people."""
    if row in MADE_HERE:
        return f"{row} · {MADE_HERE[row]}"
    return f"{row} (student)" if row == student and row != "student" else row


def role(summary: Summary, row: str) -> str:
    """The style of a row."""
    if row == summary["student"]:
        return "student"
    if row in MADE_HERE:
        return row
    return "baseline" if row in summary["baselines"] else "teacher"


def task_order(summary: Summary) -> list[tuple[str, dict[str, Any]]]:
    """Broad tasks by kind first, then those within one modality."""
    kinds = list(KINDS)

    def place(item: tuple[str, dict[str, Any]]) -> tuple[bool, int, bool, str]:
        name, task = item
        return _is_within(name), kinds.index(task["kind"]), not name.endswith("-modality"), name

    return sorted(summary["tasks"].items(), key=place)


def row_order(summary: Summary, rows: Any) -> list[str]:
    """Student, teachers, ensemble, oracle, baselines; those that ``rows`` has."""
    every = [summary["student"], *summary["teachers"], ENSEMBLE, ORACLE, *summary["baselines"]]
    return [row for row in every if row in rows]


def _all_rows(summary: Summary) -> set[str]:
    return {row for task in summary["tasks"].values() for row in task["rows"]}


def _task_row(summary: Summary, row: str, task: dict[str, Any]) -> Row:
    cell = task["rows"][row]
    metric = cell["metrics"].get(task["headline"], {"value": None, "low": None, "high": None})
    note = "undefined: vectors are not finite" if cell["undefined"] else ""
    return Row(label(row, summary["student"]), role(summary, row), note=note, **metric)


def _task_card(summary: Summary, name: str, task: dict[str, Any]) -> str:
    rows = [_task_row(summary, row, task) for row in row_order(summary, task["rows"])]
    frame = task["frames"]["image"]
    notes = [_facts(task)]
    if frame["resampling"] == BY_IMAGE:
        notes.append("All images come from one source: images are drawn instead, and the intervals are too narrow.")
    elif frame["groups"] < TOO_FEW_GROUPS:
        notes.append("With so few sources the intervals say little.")
    if task.get("left_out"):
        notes.append(f"Left out, with too few training images: {', '.join(task['left_out'])}.")
    noted = "".join(f"<p>{text(note)}</p>" for note in notes)
    chart = forest(task["title"], rows, task["chance"][task["headline"]])
    return f'<article class="task" id="{text(name)}">{chart}{noted}</article>'


def _is_within(name: str) -> bool:
    return name.startswith("zeroshot-label-")


def _facts(task: dict[str, Any]) -> str:
    frame = task["frames"]["image"]
    size = f"{_counted(frame['n'], 'image')} from {_counted(frame['groups'], 'source')}"
    if task["kind"] == "retrieval":
        size += f", {task['pool']['captions']} distinct captions"
    elif "classes" in task:
        size += f", {len(task['classes'])} classes"
    measure = METRICS.get(task["headline"], task["headline"])
    return f"{KINDS[task['kind']].capitalize()}; {measure}; {size}; chance {number(task['chance'][task['headline']])}."


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return '<span class="none">–</span>'
    tone = "level"
    if found["low"] is not None:
        tone = "ahead" if found["low"] > 0 else "behind" if found["high"] < 0 else "level"
    inside = "no interval" if found["low"] is None else f"{signed(found['low'])} to {signed(found['high'])}"
    value = f'<span class="{tone}">{signed(found["difference"])}</span>'
    return f"{value}<small>{inside}<br>{text(p_value(found['p']))}</small>"


def _spelled(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _between(metric: dict[str, Any]) -> str:
    return "" if metric["low"] is None else f" (95 % interval {number(metric['low'])} to {number(metric['high'])})"


def _difference(found: dict[str, Any]) -> str:
    if found["low"] is None:
        return f"<strong>{signed(found['difference'])}</strong> (no interval)"
    return f"<strong>{signed(found['difference'])}</strong> ({signed(found['low'])} to {signed(found['high'])})"
