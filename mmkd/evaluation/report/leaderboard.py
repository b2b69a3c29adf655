"""The results of an evaluation as a report needs them: rows, tasks, means over any choice of tasks, and statements.

A mean is the mean over kinds of task of the mean over tasks, over the tasks that every encoder of the choice answered.
Its interval comes from the bootstrap replicates of the results. Every statement is computed from the intervals, also
where the student is worse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmkd.evaluation.embeddings.encoders import ENSEMBLE, ORACLE
from mmkd.evaluation.results.store import stored_array
from mmkd.evaluation.results.summary import Replicates, dataset_ranks, mean_block, mean_of_kinds
from mmkd.evaluation.settings import NO_TEACHER, STAGE1
from mmkd.evaluation.statistics.bootstrap import BY_IMAGE
from mmkd.evaluation.statistics.metrics import Floats
from mmkd.pages.page import Block, Code, Fold, Grid, Notes, Section, Table, counted, number, signed

TEXTS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text(encoding="utf-8"))
KINDS: dict[str, str] = TEXTS["kinds"]
COMPOSED = {ENSEMBLE: "all teachers together", ORACLE: "best teacher of each modality"}
FEW_GROUPS, TOO_FEW_GROUPS = 200, 5
NAMED_DATASETS = 4
ACCURACIES = ("balanced_accuracy", "accuracy")
FAR_APART = 0.1  # accuracy and balanced accuracy that differ by more are pointed out
Summary = dict[str, Any]
Task = dict[str, Any]
Metric = dict[str, float | None]
NOT_STORED = np.full(1, np.nan)


@dataclass(frozen=True)
class Mean:
    """A mean over tasks.

    Attributes:
        tasks: the common subset it is taken over.
        missing: encoder -> tasks of the choice that it did not answer.
        rows: encoder -> value and interval.
        differences: encoder -> student minus encoder, with interval, p and Holm-adjusted p.
        above_chance: encoder -> mean of the scores relative to chance, and interval.
    """

    tasks: list[str] = field(default_factory=list)
    missing: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, Metric] = field(default_factory=dict)
    differences: dict[str, Metric] = field(default_factory=dict)
    above_chance: dict[str, Metric] = field(default_factory=dict)

    def best(self, among: Iterable[str]) -> str | None:
        """The best of some encoders, the first of equals."""
        present = [row for row in among if row in self.rows]
        return max(present, key=lambda row: self.rows[row]["value"] or 0, default=None)


class Leaderboard:
    """The results of an evaluation, read once, and the means that several sections show.

    Attributes:
        summary: as in ``summary.json``.
        results: folder it lies in.
        student: the row all others are compared with.
        rows: student, teachers, baselines, ensemble and oracle, as far as they have results.
        others: all rows but the student.
        all_tasks: every task by name, by kind, modality and dataset.
        tasks: those that count in means: no variants.
        kinds: kinds of these tasks in a fixed order.
        modalities: of these tasks, in alphabetical order.
    """

    def __init__(self, summary: Summary, results: Path) -> None:
        """Order the summary; replicates are read once, here."""
        self.summary, self.results = summary, results
        self.student: str = summary["student"]
        named = [self.student, *summary["teachers"], *summary["baselines"], ENSEMBLE, ORACLE]
        present = {row for task in summary["tasks"].values() for row in task["rows"]}
        self.rows = [row for row in named if row in present]
        self.others = [row for row in self.rows if row != self.student]
        self.all_tasks: dict[str, Task] = dict(sorted(summary["tasks"].items(), key=_place))
        self.tasks = {name: task for name, task in self.all_tasks.items() if not task.get("variant")}
        found = Counter(task["kind"] for task in self.tasks.values())
        self.kinds = [kind for kind in KINDS if kind in found] + sorted(set(found) - set(KINDS))
        self.modalities = sorted({modality_of(task) for task in self.tasks.values()} - {""})
        self._shared = Counter(map(_labelled_by, self.all_tasks.values()))
        self._replicates = self._stored_replicates()
        self._means: dict[tuple[str, ...], Mean] = {}

    @property
    def teachers(self) -> list[str]:
        """Teachers that have results."""
        return [row for row in self.rows if row in self.summary["teachers"]]

    @property
    def encoders(self) -> list[str]:
        """Rows that are encoders, not made of several."""
        return [row for row in self.rows if row not in COMPOSED]

    def label(self, row: str) -> str:
        """The name of a row for people."""
        if row in COMPOSED:
            return f"{row} · {COMPOSED[row]}"
        return f"{row} (student)" if row == self.student and row != "student" else row

    def role(self, row: str) -> str:
        """The color of a row."""
        if row == self.student:
            return "student"
        if row in COMPOSED:
            return row
        return "baseline" if row in self.summary["baselines"] else "teacher"

    def task_label(self, name: str) -> str:
        """Dataset and variant of a task; the task's own name too where several share these."""
        task = self.all_tasks[name]
        dataset = str(task.get("dataset") or name)
        if self._shared[_labelled_by(task)] > 1:
            dataset = f"{dataset}: {name.removeprefix(task['kind'] + '-')}"
        return f"{dataset}, {task['variant']}" if task.get("variant") else dataset

    def result(self, name: str, row: str) -> dict[str, Any] | None:
        """A row's result on a task, None where there is none."""
        found: dict[str, Any] | None = self.all_tasks[name]["rows"].get(row)
        return found

    def metric(self, name: str, row: str, metric: str = "") -> Metric | None:
        """A metric of a result, the task's primary one by default; None where it is undefined."""
        result, metric = self.result(name, row), metric or self.all_tasks[name]["primary_metric"]
        found: Metric | None = result["metrics"].get(metric) if result and not result["undefined"] else None
        return found if found and found["value"] is not None else None

    def reason(self, name: str, row: str, metric: str = "") -> str:
        """Why a metric of a result is undefined."""
        result, metric = self.result(name, row), metric or self.all_tasks[name]["primary_metric"]
        if result is None:
            return "not evaluated"
        reason = result["undefined"] or result.get("extras", {}).get("undefined_metrics", {}).get(metric)
        return f"undefined: {reason}" if reason else "undefined on these samples"

    def difference(self, name: str, row: str) -> Metric | None:
        """Student minus a row in the primary metric of a task."""
        task = self.all_tasks[name]
        found: Metric | None = task["differences"].get(row, {}).get(task["primary_metric"])
        return found if found and found["difference"] is not None else None

    def mean(self, modality: str = "", kind: str = "", clean: bool = False) -> Mean:
        """Means over the tasks of a modality and a kind, each empty for all; clean = those marked for no row."""
        return self.mean_of([
            name
            for name, task in self.tasks.items()
            if modality in ("", modality_of(task)) and kind in ("", task["kind"]) and not (clean and self.marks(name))
        ])  # fmt: skip

    def mean_of(self, tasks: Sequence[str]) -> Mean:
        """Means over these tasks."""
        key = tuple(tasks)
        if key not in self._means:
            block = mean_block({task: self.summary["tasks"][task] for task in tasks}, self.student, self._replicates)
            answered = {row: [task for task in tasks if self.metric(task, row)] for row in self.encoders}
            missing = {row: [task for task in tasks if task not in own] for row, own in answered.items() if own}
            common = block["tasks"] if block["rows"] else []
            self._means[key] = Mean(common, missing, block["rows"], block["differences"], block["above_chance"])
        return self._means[key]

    def plain_mean(self, row: str, metric: str, tasks: Sequence[str]) -> float | None:
        """Mean of a metric over the classifications among some tasks, None where the row lacks one of them."""
        chosen = self.classifications(tasks)
        found = {name: self.metric(name, row, metric) for name in chosen}
        if not chosen or not all(found.values()):
            return None
        values = {name: np.array(own["value"]) for name, own in found.items() if own}
        return float(mean_of_kinds(self.summary["tasks"], values))

    def accuracies(self, row: str) -> tuple[float | None, float | None]:
        """Mean balanced accuracy and mean accuracy of a row over the classifications that every encoder has."""
        balanced, accuracy = (self.plain_mean(row, metric, self.mean().tasks) for metric in ACCURACIES)
        return balanced, accuracy

    def classifications(self, tasks: Sequence[str]) -> list[str]:
        """Those of some tasks that choose one of several classes: some row has accuracy and balanced accuracy."""
        measured = {name: [set(own["metrics"]) for own in self.all_tasks[name]["rows"].values()] for name in tasks}
        return [name for name, rows in measured.items() if any(set(ACCURACIES) <= own for own in rows)]

    def ranks(self) -> dict[str, Any]:
        """Average ranks over datasets and signed-rank tests; see `summary.dataset_ranks`."""
        return dataset_ranks({name: self.summary["tasks"][name] for name in self.tasks}, self.student)

    def marks(self, task: str) -> dict[str, str]:
        """Rows that were trained on data of this task's dataset, with reasons; rows made of such teachers, too."""
        marked = self.summary["tasks"][task].get("contaminated") or {}
        found = {row: str(reason) for row, reason in marked.items()}
        members = [row for row in self.summary["teachers"] if row in found]
        if members:
            found |= {row: f"through {', '.join(members)}" for row in COMPOSED if row in self.rows}
        return found

    def clean_against(self, row: str) -> list[str]:
        """Tasks that neither the student nor this row is marked for."""
        return [name for name in self.tasks if not {self.student, row} & set(self.marks(name))]

    def outcomes(self, row: str, tasks: Sequence[str]) -> tuple[int, int, int, int]:
        """Wins, ties and losses of the student against a row, and tasks without an interval."""
        tones = [tone(self.difference(task, row)) for task in tasks]
        return tones.count("ahead"), tones.count("level"), tones.count("behind"), tones.count("unknown")

    def best_teachers(self) -> list[tuple[str, str, Mean]]:
        """Modality, its best teacher and the means there."""
        found = [(modality, self.mean(modality)) for modality in self.modalities]
        best = [(modality, mean.best(self.teachers), mean) for modality, mean in found]
        return [(modality, teacher, mean) for modality, teacher, mean in best if teacher is not None]

    def _stored_replicates(self) -> Replicates:
        """The replicates ``(replicates,)`` of the primary metric of each row on each task.

        Where any that a value has is missing, as in a copy of the summary alone, all are NaN: no interval is better
        than one of some tasks.
        """
        found: dict[tuple[str, str], Floats] = {}
        for task in self.all_tasks:
            for row in self.rows:
                if self.metric(task, row) is None:
                    continue
                metric = self.all_tasks[task]["primary_metric"]
                values = stored_array(self.results, row, task, f"together.{metric}")
                if values is None:
                    return lambda row, task: NOT_STORED
                found[row, task] = values.astype(np.float64)
        return lambda row, task: found[row, task]


def section(anchor: str, blocks: Sequence[Block], template: str = "", content: Any = None, **values: Any) -> Section:
    """A section with its heading and lead from ``texts.yaml``.

    Args:
        anchor: its name there.
        blocks: see `Section`, as ``template`` and ``content``; those that show nothing are left out.
        template: as above.
        content: as above.
        values: what the lead names in braces.
    """
    own = TEXTS["sections"][anchor]
    return Section(anchor, own["heading"], own["lead"].format(**values), filled(blocks), template, content)


def filled(blocks: Sequence[Block]) -> list[Block]:
    """The blocks that show something: rows, items, a text or blocks that do."""
    found: list[Block] = []
    for block in blocks:
        if isinstance(block, (Grid, Fold)):
            block = replace(block, blocks=filled(block.blocks))
        shown = {Table: "rows", Notes: "items", Code: "text", Grid: "blocks", Fold: "blocks"}.get(type(block))
        found += [block] if shown is None or vars(block)[shown] else []
    return found


def tone(found: Metric | None) -> str:
    """Where the interval of a difference lies: ahead of zero, behind it, level with it, or unknown."""
    if found is None or found["low"] is None or found["high"] is None:
        return "unknown"
    return "ahead" if found["low"] > 0 else "behind" if found["high"] < 0 else "level"


def modality_of(task: Task) -> str:
    """Modality of a task's dataset."""
    return str(task.get("modality", ""))


def kind_label(kind: str) -> str:
    """A kind of task for people."""
    return KINDS.get(kind, kind)


def metric_label(metric: str) -> str:
    """A metric for people."""
    return TEXTS["metrics"].get(metric, metric.replace("_", " ").replace("@", " at "))


def sample_counts(task: Task) -> tuple[int, int]:
    """Held-out samples of a task, and groups (patients, slides) they come from."""
    units = task["units"]
    own = units["image"] if "image" in units else next(iter(units.values()))
    return int(own["n"]), int(own["groups"])


def title(board: Leaderboard) -> str:
    """The first sentence: what distillation added over stage 1 where there is one, else how the student compares."""
    return distillation(board) or comparison(board)


def distillation(board: Leaderboard) -> str:
    """What distillation added over stage 1, in points of the mean; empty where stage 1 has no results."""
    found = board.mean().differences.get(STAGE1)
    if found is None or found["difference"] is None:
        return ""
    if found["low"] is None or found["high"] is None:
        points = signed(100 * found["difference"], 1)
        return f"Distillation changed the mean score of stage 1 by {points} points (no interval)."
    return _improvement("Distillation", "stage 1", found)


def over_control(board: Leaderboard) -> str:
    """What teachers added over the same training without one; empty where no such control has results."""
    found = board.mean().differences.get(NO_TEACHER)
    if found is None or found["difference"] is None or found["low"] is None or found["high"] is None:
        return ""
    return _improvement("The teachers", "the same training without a teacher", found)


def _improvement(what: str, over: str, found: dict[str, Any]) -> str:
    """Whether something improved on something else, with the points of the mean and their interval."""
    verb = {"ahead": "improved on", "level": "did not measurably improve on", "behind": "did not improve on"}
    low, high = signed(100 * found["low"], 1), signed(100 * found["high"], 1)
    return f"{what} {verb[tone(found)]} {over}: {signed(100 * found['difference'], 1)} points [{low}, {high}]."


def comparison(board: Leaderboard) -> str:
    """The student against its teachers: better than all, than the best, not different from it, or worse."""
    mean = board.mean()
    best = mean.best(board.teachers)
    datasets = {board.tasks[name].get("dataset") or name for name in mean.tasks}
    over = "the test set" if len(datasets) == 1 else counted(len(datasets), "dataset")
    student = "The student" if board.student == "student" else board.student
    if not board.tasks:
        return "No task could be evaluated."
    if board.student not in mean.rows:
        return f"{student} has no results on the tasks that all encoders have."
    found = mean.differences.get(best or "")
    if best is None or found is None or tone(found) == "unknown":
        return f"{student}, evaluated on {over}."
    tones = {tone(mean.differences.get(row)) for row in board.teachers}
    if len(board.teachers) > 1 and tones == {"ahead"}:
        return f"{student} is better than each of its {len(board.teachers)} teachers on {over}."
    verb = {"ahead": "is better than", "level": "does not differ measurably from", "behind": "is worse than"}
    return f"{student} {verb[tone(found)]} its best teacher, {best}, on {over}."


def claims(board: Leaderboard) -> list[str]:
    """The sentences below the first: what a difference means, and the student against others."""
    mean = board.mean()
    if not board.tasks:
        return ["The reasons are listed below."]
    if board.student not in mean.rows:
        return ["No task has a result of every encoder, so no mean can be compared."]
    best = mean.best(board.teachers)
    sentences = []
    if distillation(board):
        worse = tone(mean.differences[STAGE1]) == "behind"
        sentences += ["The student is worse than the model that distillation started from."] if worse else []
        sentences.append(comparison(board))
    sentences += [_against(board, best, f"its best teacher, {best}"), _against(board, ENSEMBLE, COMPOSED[ENSEMBLE])]
    clean = board.clean_against(best) if best else []
    if clean and len(clean) < len(board.tasks) and best in board.mean_of(clean).differences:
        sentences.append(
            f"On data that neither was trained on, it is {between(board.mean_of(clean).differences[best])}."
        )
    balanced, accuracy = board.accuracies(board.student)
    if balanced is not None and accuracy is not None and abs(balanced - accuracy) > FAR_APART:
        sentences.append(
            f"Accuracy and balanced accuracy of the student differ by {100 * abs(balanced - accuracy):.0f} points: "
            "classes differ in size, and rare and frequent ones are recognised unequally well."
        )
    return [sentence for sentence in sentences if sentence]


def facts(board: Leaderboard) -> list[tuple[str, str]]:
    """What a reader has to know first: the test set, the primary metric with its interval, accuracy."""
    if not board.tasks:
        return []
    mean = board.mean()
    own = mean.rows.get(board.student)
    found = [("Test set", _test_set(board))]
    if own is not None:
        names = dict.fromkeys(metric_label(board.tasks[name]["primary_metric"]) for name in mean.tasks)
        kinds = len({board.tasks[name]["kind"] for name in mean.tasks})
        over = counted(len(mean.tasks), "task") + (
            f" of {kinds} kinds, each kind with equal weight" if kinds > 1 else ""
        )
        value = f"{number(own['value'])} ({interval_text(own)})"
        found.append(("Primary metric", f"{value}, mean of {', '.join(names)} over {over}"))
    if (relative := mean.above_chance.get(board.student)) and relative["value"] is not None:
        value = f"{signed(relative['value'])} ({interval_text(relative, signed)})"
        found.append(("Relative to chance", f"{value}; 0 is chance, 1 is all correct"))
    balanced, accuracy = board.accuracies(board.student)
    if balanced is not None and accuracy is not None:
        over = counted(len(board.classifications(mean.tasks)), "classification task")
        found.append(
            ("Classification", f"balanced accuracy {number(balanced)}, accuracy {number(accuracy)}, over {over}")
        )
    return found


def caveat(board: Leaderboard) -> str:
    """What the numbers are not."""
    if not board.tasks:
        return "Not a clinical result."
    groups = max(sample_counts(task)[1] for task in board.tasks.values())
    few = "So few sources show that the pipeline works and what it measures, no more. " if groups < FEW_GROUPS else ""
    marked = sum(bool(board.marks(task)) for task in board.tasks)
    seen = (
        f"On {marked} of {counted(len(board.tasks), 'task')} some encoder is known to have been trained on the same "
        "source, marked †; clean means exclude these. "
        if marked
        else ""
    )
    control = (
        "The difference from stage 1 includes the effect of training for longer: no model that was trained as long "
        "without a teacher is among the encoders. "
        if distillation(board) and NO_TEACHER not in board.rows
        else ""
    )
    return (
        f"Not a clinical result. {control}{few}{seen}Intervals cover the choice of held-out samples; they do not "
        "include training-seed variance or the choice of datasets. The best teacher is selected on the same test "
        "sets, which is optimistic for the teacher."
    )


def accuracies_beside(board: Leaderboard, name: str, row: str) -> list[str]:
    """Accuracy and balanced accuracy of a row on a classification, as far as neither is the primary metric."""
    if not board.classifications([name]):
        return []
    others = [metric for metric in ACCURACIES if metric != board.all_tasks[name]["primary_metric"]]
    found = {metric: board.metric(name, row, metric) for metric in others}
    return [f"{metric_label(metric)} {number(own['value'])}" for metric, own in found.items() if own]


def task_notes(task: Task) -> list[str]:
    """Kind, metric, size and chance of a task, and what its intervals lack."""
    count, groups = sample_counts(task)
    chance = (task.get("chance") or {}).get(task["primary_metric"])
    sizes = f"{counted(count, 'sample')} from {counted(groups, 'source')}"
    if task.get("pool"):
        sizes += f", {counted(task['pool']['captions'], 'distinct caption')}"
    elif task.get("classes"):
        sizes += f", {len(task['classes'])} classes"
    known = f"; chance {number(chance)}" if chance is not None else ""
    notes = [f"{kind_label(task['kind']).capitalize()}; {metric_label(task['primary_metric'])}; {sizes}{known}."]
    if any(own["resampling"] == BY_IMAGE for own in task["units"].values()):
        notes.append("All samples come from one source: samples are drawn instead, and the intervals are too narrow.")
    elif groups < TOO_FEW_GROUPS:
        notes.append("With so few sources the intervals are not informative.")
    pooled = sorted({name for own in task["units"].values() for name in own.get("pooled", [])})
    if pooled:
        notes.append(
            f"A class with a single source has no variance of its own, so these are resampled together: "
            f"{', '.join(pooled)}. A replicate may lack one of them; more sources would make the interval reliable."
        )
    if task.get("folds_by") == "site":
        notes.append(f"Folds keep the cases of a hospital together ({task['sites']} sites).")
    elif task.get("folds_by"):
        notes.append("Folds are by case: hospitals are on both sides, which is optimistic where stain differs by site.")
    if task.get("left_out"):
        notes.append(f"Left out, with too few training images: {', '.join(task['left_out'])}.")
    return notes


def interval_text(metric: Metric, shown: Callable[[float | None], str] = number) -> str:
    """The 95 % interval of a value or difference."""
    return "no interval" if metric["low"] is None else f"{shown(metric['low'])} to {shown(metric['high'])}"


def between(found: Metric) -> str:
    """A difference with its interval."""
    return f"{signed(found['difference'])} ({interval_text(found, signed)})"


def p_value(value: float | None) -> str:
    """A p-value as it is written."""
    if value is None:
        return "p unknown"
    return "p < 0.01" if value < 0.01 else f"p = {value:.2f}"


def p_values(found: Metric) -> str:
    """The p of a difference and, where it is one of several, the Holm-adjusted p."""
    adjusted = found.get("p_holm")
    return p_value(found["p"]) + ("" if adjusted is None else f", Holm {p_value(adjusted)}")


def _against(board: Leaderboard, row: str | None, name: str) -> str:
    found = board.mean().differences.get(row or "")
    return f"Difference from {name}: {between(found)}." if found else ""


def _test_set(board: Leaderboard) -> str:
    """The datasets, their sizes and the split."""
    split = board.summary["settings"].get("split", "test")
    names = list(dict.fromkeys(str(task.get("dataset") or name) for name, task in board.tasks.items()))
    largest = dict.fromkeys(names, (0, 0))
    for name, task in board.tasks.items():
        dataset = str(task.get("dataset") or name)
        largest[dataset] = max(largest[dataset], sample_counts(task))
    if len(names) > NAMED_DATASETS:
        total = counted(sum(count for count, _ in largest.values()), "sample")
        return f"{split} split of {len(names)} datasets, {total} (see Datasets)"
    sizes = [f"{name} ({counted(n, 'sample')} from {counted(g, 'source')})" for name, (n, g) in largest.items()]
    return f"{split} split of {', '.join(sizes)}"


def _labelled_by(task: Task) -> tuple[str, str, str]:
    """The label of a task has these parts: dataset, kind and variant."""
    return str(task.get("dataset", "")), task["kind"], task.get("variant", "")


def _place(item: tuple[str, Task]) -> tuple[int, str, str, str]:
    name, task = item
    kinds = list(KINDS)
    kind = kinds.index(task["kind"]) if task["kind"] in kinds else len(kinds)
    return kind, modality_of(task), task.get("dataset") or name, task.get("variant", "")
