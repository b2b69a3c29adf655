"""The task types, and all encoders on one task side by side.

Three kinds of rows: encoders as they are; the teachers' ensemble, with equal weights; and the oracle, the teacher that
does best on each modality. The oracle is optimistic: it is selected on the test set, and serves as the bound for a
single student that has to answer without a choice among specialists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mmkd.evaluation.datasets.dataset import Dataset, Samples
from mmkd.evaluation.embeddings.cache import DatasetInputs, UndefinedMetricError
from mmkd.evaluation.embeddings.embed import Embedded
from mmkd.evaluation.embeddings.encoders import ENSEMBLE, ORACLE
from mmkd.evaluation.results.store import Result, ResultStore, fingerprint_of
from mmkd.evaluation.slides import diagnosis, survival
from mmkd.evaluation.tasks import linear_probe, retrieval, zeroshot
from mmkd.evaluation.tasks.task import Outputs, Task, TaskOptions, best_by_modality
from mmkd.evaluation.vqa import tasks as vqa

SUITE: dict[str, Callable[[Samples, TaskOptions], tuple[list[Any], dict[str, str]]]] = {
    "zeroshot": zeroshot.tasks,
    "retrieval": retrieval.tasks,
    "probe": linear_probe.tasks,
    "vqa": vqa.tasks,
    "diagnosis": diagnosis.tasks,
    "survival": survival.tasks,
}

LEARNING = ("probe", "vqa")  # kinds of task that learn from the images of other splits


def tasks_for(samples: Samples, kinds: Sequence[str], options: TaskOptions) -> tuple[list[Task], dict[str, str]]:
    """All tasks of these kinds that a dataset allows, and the reasons why others are left out."""
    found: list[Task] = []
    views, skipped = samples.dataset.views(samples, kinds)
    for kind in kinds:
        for view in views:
            if kind in view.manifest.kinds:
                tasks, reasons = SUITE[kind](view, options)
                found += tasks
                skipped |= reasons
    return found, skipped


def inputs_of(
    opened: Dataset,
    reopen: Callable[[], Dataset],
    kinds: Sequence[str],
    split: str,
    options: TaskOptions,
    quiet: bool = True,
) -> DatasetInputs:
    """What tasks of these kinds need of a dataset, and no more.

    Args:
        opened: the dataset.
        reopen: opens it again.
        kinds: of task.
        split: held out; the images of the others are embedded where tasks learn from them.
        options: of the tasks.
        quiet: no progress bar.
    """
    held_out = [pair for pair in opened.image_pairs if pair.split == split]
    others = [pair for pair in opened.image_pairs if pair.split != split]
    texts: list[set[str]] = []
    if "retrieval" in kinds:
        texts.append({pair.caption for pair in held_out if pair.caption.strip()})
    if {"zeroshot", "diagnosis"} & set(kinds):
        texts.append(opened.prompts())
    if "vqa" in kinds:
        texts.append(vqa.texts(opened.questions, options))
    images = [held_out, others] if set(LEARNING) & set(kinds) else [held_out]
    return DatasetInputs.of(opened, reopen, images, [sorted(own) for own in texts], quiet)


def run_task(
    task: Task, samples: Samples, encoders: list[Embedded], teachers: list[str], store: ResultStore
) -> dict[str, Result]:
    """All results of a task: each encoder, the teachers' ensemble and the best teacher of each modality.

    Args:
        task: that is evaluated.
        samples: the pairs behind it.
        encoders: all of them, embedded.
        teachers: names of those that make up ensemble and oracle; both need two with finite vectors.
        store: of the results.

    Returns:
        Results by row.
    """
    pairs = [*samples.train, *samples.validation, *samples.held_out]
    question = fingerprint_of([store.describe(task), [[pair.id, samples.digests[pair.id]] for pair in pairs]])
    results: dict[str, Result] = {}
    outputs: dict[str, Outputs] = {}
    for embedded in encoders:
        name = embedded.name
        made_of = [question, embedded.fingerprint, *_extra_fingerprint(task, embedded)]
        results[name], outputs[name] = store.result(task, name, made_of, partial(_computed, task, embedded))
    members = [e for e in encoders if e.name in teachers and results[e.name]["undefined"] is None]
    if len(members) < 2:
        return results
    made_from = [question, [[member.name, member.fingerprint, *_extra_fingerprint(task, member)] for member in members]]
    theirs = {member.name: outputs[member.name] for member in members}

    def ensemble() -> tuple[Outputs, Result]:
        return task.ensemble(members, list(theirs.values())), {"members": list(theirs)}

    def oracle() -> tuple[Outputs, Result]:
        composed, chosen = best_by_modality(task, theirs)
        return composed, {"chosen": chosen}

    results[ENSEMBLE], _ = store.result(task, ENSEMBLE, made_from, ensemble)
    if not task.manifest.target_is_modality:  # a choice by modality would reveal the answer
        results[ORACLE], _ = store.result(task, ORACLE, made_from, oracle)
    return results


def _computed(task: Task, embedded: Embedded) -> tuple[Outputs, Result]:
    return task.outputs(embedded), {}


def _extra_fingerprint(task: Task, embedded: Embedded) -> list[Any]:
    try:
        return task.extra_fingerprint(embedded)
    except UndefinedMetricError as reason:
        return [str(reason)]
