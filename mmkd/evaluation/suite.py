"""The task types, and all encoders on one task side by side.

Three kinds of rows: encoders as they are; the teachers' ensemble, in which each has the same say; and the oracle, the
teacher that does best on each modality. The oracle is chosen on the test set and so flatters: it is the mark a single
student is measured against when nobody tells it which specialist to ask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.dataset import Collection
from mmkd.evaluation.embeddings.cache import Undefined
from mmkd.evaluation.embeddings.embed import Embedded
from mmkd.evaluation.embeddings.encoders import ENSEMBLE, ORACLE
from mmkd.evaluation.results.store import Cell, CellFolder, fingerprint_of
from mmkd.evaluation.slides import diagnosis, survival
from mmkd.evaluation.tasks import linear_probe, retrieval, zeroshot
from mmkd.evaluation.tasks.task import Outputs, Samples, Task, best_by_modality
from mmkd.evaluation.vqa import tasks as vqa_tasks

SUITE: dict[str, Callable[[Samples], tuple[list[Any], dict[str, str]]]] = {
    "zeroshot": zeroshot.tasks,
    "retrieval": retrieval.tasks,
    "probe": linear_probe.tasks,
    "vqa": vqa_tasks.tasks,
    "diagnosis": diagnosis.tasks,
    "survival": survival.tasks,
}


def tasks_for(samples: Samples, kinds: list[str]) -> tuple[list[Task], dict[str, str]]:
    """All tasks of these kinds that the pairs allow, and the reasons why others are not there."""
    found: list[Task] = []
    skipped: dict[str, str] = {}
    for kind in kinds:
        tasks, reasons = SUITE[kind](samples)
        found += tasks
        skipped |= reasons
    return found, skipped


def texts_for(pairs: list[Pair]) -> list[str]:
    """All captions and prompts that any task may ask an encoder to embed."""
    captions = {pair.caption for pair in pairs if pair.caption.strip()}
    return sorted(captions | set(zeroshot.prompt_texts(pairs)))


def dataset_texts(collection: Collection, split: str) -> list[str]:
    """All sentences that a task may ask of a dataset: held-out captions, questions, and those about its classes."""
    captions = {pair.caption for pair in collection.pairs if pair.split == split and pair.caption.strip()}
    prompts = {text for own in collection.manifest.prompts().values() for text in own}
    beyond = {*zeroshot.manifest_texts(collection.manifest), *vqa_tasks.texts(collection.questions)}
    return sorted(captions | prompts | beyond)


def collect_samples(pairs: Sequence[Pair], split: str, digests: dict[str, str], unreadable: dict[str, str]) -> Samples:
    """The readable pairs by use; the held-out split is never trained on, whichever it is."""
    by_split: dict[str, list[Pair]] = {"train": [], "validation": [], "test": []}
    for pair in pairs:
        if pair.id not in unreadable:
            by_split[pair.split].append(pair)
    held_out, by_split[split] = by_split[split], []
    return Samples(held_out, by_split["train"], by_split["validation"], digests)


def run_task(
    task: Task, samples: Samples, encoders: list[Embedded], teachers: list[str], folder: CellFolder
) -> dict[str, Cell]:
    """Every cell of a task: each encoder, the teachers' ensemble and the best teacher of each modality.

    Args:
        task: what is asked.
        samples: the pairs behind it.
        encoders: all of them, embedded.
        teachers: names of those that make up ensemble and oracle; both need two with sound vectors.
        folder: where cells are kept.

    Returns:
        Cells by row.
    """
    pairs = [*samples.train, *samples.validation, *samples.held_out]
    question = fingerprint_of([folder.describe(task), [[pair.id, samples.digests[pair.id]] for pair in pairs]])
    cells: dict[str, Cell] = {}
    outputs: dict[str, Outputs] = {}
    for embedded in encoders:
        name = embedded.name
        made_of = [question, embedded.fingerprint, *_evidence(task, embedded)]
        cells[name], outputs[name] = folder.cell(task, name, made_of, _single(task, embedded))
    members = [e for e in encoders if e.name in teachers and cells[e.name]["undefined"] is None]
    if len(members) < 2:
        return cells
    made_from = [question, [[member.name, member.fingerprint, *_evidence(task, member)] for member in members]]
    theirs = {member.name: outputs[member.name] for member in members}

    def ensemble() -> tuple[Outputs, Cell]:
        return task.ensemble(members, list(theirs.values())), {"members": list(theirs)}

    def oracle() -> tuple[Outputs, Cell]:
        composed, chosen = best_by_modality(task, theirs)
        return composed, {"chosen": chosen}

    cells[ENSEMBLE], _ = folder.cell(task, ENSEMBLE, made_from, ensemble)
    if not task.asks_modality:
        cells[ORACLE], _ = folder.cell(task, ORACLE, made_from, oracle)
    return cells


def _evidence(task: Task, embedded: Embedded) -> list[Any]:
    try:
        return task.evidence(embedded)
    except Undefined as reason:
        return [str(reason)]


def _single(task: Task, embedded: Embedded) -> Callable[[], tuple[Outputs, Cell]]:
    return lambda: (task.outputs(embedded), {})
