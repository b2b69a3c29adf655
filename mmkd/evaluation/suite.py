"""The task types, and all encoders on one task side by side.

Three kinds of rows: encoders as they are; the teachers' ensemble, with equal weights; and the oracle, the teacher that
does best on each modality. The oracle is optimistic: it is selected on the test set, and serves as the bound for a
single student that has to answer without a choice among specialists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmkd.evaluation.datasets.dataset import Dataset, Samples
from mmkd.evaluation.embeddings.cache import UndefinedMetricError
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


def texts_of(dataset: Dataset, split: str, options: TaskOptions) -> list[str]:
    """All sentences that the tasks of a dataset need: held-out captions, questions, and those about its classes."""
    captions = {pair.caption for pair in dataset.pairs if pair.split == split and pair.caption.strip()}
    return sorted(captions | dataset.prompts() | vqa.texts(dataset.questions, options))


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
        results[name], outputs[name] = store.result(task, name, made_of, _single(task, embedded))
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


def _extra_fingerprint(task: Task, embedded: Embedded) -> list[Any]:
    try:
        return task.extra_fingerprint(embedded)
    except UndefinedMetricError as reason:
        return [str(reason)]


def _single(task: Task, embedded: Embedded) -> Callable[[], tuple[Outputs, Result]]:
    return lambda: (task.outputs(embedded), {})
