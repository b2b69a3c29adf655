"""One evaluation: all encoders embed all datasets, then the tasks of one dataset after another are evaluated.

A dataset is described by a manifest, or is a folder of pairs, whose manifests are derived. Only the vectors of one
dataset are in memory while its tasks are evaluated, and no encoder.

Three kinds of rows: encoders as they are; the teachers' ensemble, with equal weights; and the oracle, the teacher that
does best on each modality. The oracle is optimistic: it is selected on the test set, and serves as the bound for a
single student that has to answer without a choice among specialists.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmkd.data.table import Pair
from mmkd.encoders.zoo import load_with_precision
from mmkd.evaluation.datasets.dataset import Dataset, Samples, open_dataset, split_samples
from mmkd.evaluation.datasets.manifest import DatasetNotFoundError, Manifest, contaminated, find_manifests, load_suite
from mmkd.evaluation.datasets.pairs import PROBED, PairsDataset, open_pairs_dataset
from mmkd.evaluation.datasets.source import read_vqa_rad
from mmkd.evaluation.embeddings.embed import DatasetInputs, Embedded, UndefinedMetricError
from mmkd.evaluation.embeddings.encoders import ENSEMBLE, ORACLE, EncoderRecord, embed_everything
from mmkd.evaluation.results.store import Result, ResultStore, fingerprint_of
from mmkd.evaluation.results.summary import overall, split_summary, suite_means, task_summary
from mmkd.evaluation.settings import EvalSettings
from mmkd.evaluation.slides import diagnosis, survival
from mmkd.evaluation.slides.survival import read_cohort
from mmkd.evaluation.tasks import linear_probe, retrieval, zeroshot
from mmkd.evaluation.tasks.task import Outputs, Task, TaskOptions, best_by_modality
from mmkd.evaluation.vqa import tasks as vqa
from mmkd.student.folder import read_provenance

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
        results[name], outputs[name] = store.result(task, name, made_of, partial(_outputs_of, task, embedded))
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


def _outputs_of(task: Task, embedded: Embedded) -> tuple[Outputs, Result]:
    return task.outputs(embedded), {}


def _extra_fingerprint(task: Task, embedded: Embedded) -> list[Any]:
    try:
        return task.extra_fingerprint(embedded)
    except UndefinedMetricError as reason:
        return [str(reason)]


class SuiteRun:
    """Datasets evaluated one by one, and the summary of all of them."""

    def __init__(self, settings: EvalSettings, known: Sequence[EncoderRecord]) -> None:
        """Begin with no dataset."""
        self.settings, self.known, self.options = settings, list(known), task_options(settings)
        self.student, *others = [each.name for each in known]
        self.teachers = [name for name in others if name not in settings.baselines]
        self.baselines = [name for name in others if name in settings.baselines]
        self.tasks: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}
        self.datasets: dict[str, dict[str, Any]] = {}
        self.encoders: dict[str, dict[str, Any]] = {
            each.name: {
                "source": each.source,
                "fingerprint": each.fingerprint,
                "failures": [],
                "provenance": each.provenance,
            }
            for each in known
        }

    def evaluate(self, inputs: DatasetInputs) -> None:
        """Evaluate every task on one dataset; its vectors leave memory afterwards."""
        dataset = inputs.open()
        name, settings = dataset.manifest.dataset, self.settings
        encoders = [each.embedded(inputs, dataset) for each in self.known]
        unreadable = {key: reason for each in encoders for key, reason in each.unreadable.items()}
        samples = split_samples(dataset, settings.split, inputs.digests, unreadable)
        tasks, skipped = tasks_for(samples, settings.task_kinds, self.options) if samples.held_out else ([], {})
        if not tasks:
            kinds, count = ", ".join(settings.task_kinds), len(samples.held_out)
            skipped = skipped or {name: f"no task of {kinds} on its {count} readable {settings.split} samples"}
        by_question = samples.manifest.task == "vqa"  # questions have splits of their own
        resampled = [*samples.train, *samples.validation, *samples.held_out] if by_question else samples.held_out
        results = self._results(name, resampled)
        hidden = settings.quiet or settings.pairs is None
        table = {
            task.name: run_task(task, samples, encoders, self.teachers, results)
            for task in tqdm(tasks, desc="tasks", unit="task", disable=hidden)
        }
        self.skipped |= skipped
        for task in tasks:
            summary = task_summary(results.describe(task), table[task.name], self.student, results)
            self.tasks[task.name] = summary | {"contaminated": marks(self.known, dataset)}
        self.unreadable |= {f"{name}/{key}": reason for key, reason in unreadable.items()}
        for each in encoders:
            self.encoders[each.name]["failures"] += [f"{name}: {failure}" for failure in each.failures]
        self.datasets[name] = {
            **dataset.summary(),
            "manifest_sha256": fingerprint_of(asdict(dataset.manifest)),
            "content": [*inputs.image_hashes, *inputs.text_hashes],
            "notes": dataset.notes,
            "splits": split_summary(dataset.listed, inputs.digests, settings.split),
        }

    def summary(self) -> dict[str, Any]:
        """The content of `summary.json` for the datasets evaluated so far."""
        replicates = self._results("", []).together
        return {
            "student": self.student,
            "teachers": self.teachers,
            "baselines": self.baselines,
            "tasks": self.tasks,
            "overall": overall(self.tasks, self.student, self.teachers, replicates),
            "encoders": self.encoders,
            "skipped": self.skipped,
            "unreadable": self.unreadable,
            "datasets": self.datasets,
            **suite_means(self.tasks, self.student, self.teachers, replicates),
        }

    def _results(self, dataset: str, resampled: list[Pair]) -> ResultStore:
        """Results of a dataset; different datasets have independent draws."""
        seed = self.settings.seed
        if self.settings.pairs is None:
            seed = int.from_bytes(hashlib.sha256(f"{seed} {dataset}".encode()).digest()[:8], "big")
        return ResultStore(self.settings.output, resampled, self.settings.replicates, seed)


def evaluate(settings: EvalSettings, sources: dict[str, str]) -> dict[str, Any]:
    """Embed every dataset with every encoder, evaluate, compare.

    Args:
        settings: checked.
        sources: encoders by name.

    Returns:
        The content of `summary.json`.

    Raises:
        FileNotFoundError: the pairs, a manifest or an encoder's folder do not exist.
        ValueError: a manifest or its data are wrong, no dataset or nothing can be evaluated.
    """
    inputs, absent = open_inputs(settings)
    load = partial(load_with_precision, device=settings.device, precision=settings.precision)
    here = load if settings.is_here else partial(load, device="cpu")  # the GPUs are those of the tasks
    cache, batch_size = settings.embeddings, settings.batch_size
    known = embed_everything(sources, inputs, here, cache, batch_size, settings.quiet, settings, load)
    run = SuiteRun(settings, known)
    hidden = settings.quiet or settings.pairs is not None
    for own in tqdm(inputs, desc="datasets", unit="dataset", disable=hidden):
        run.evaluate(own)
    if not run.tasks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in run.skipped.items())
        raise ValueError(f"nothing to evaluate. {reasons}")
    return run.summary() | {"skipped_datasets": absent}


def task_options(settings: EvalSettings) -> TaskOptions:
    """How tasks are made; those of pairs are in the joint space and without learning curves by default."""
    chosen = {name: own for name in ("probe_on", "probe_curve") if (own := getattr(settings, name)) is not None}
    of_pairs: dict[str, Any] = {"probe_on": "joint", "probe_curve": False, "probe_images": PROBED}
    of_pairs |= {"question_splits": ("images",), "question_heads": ("vectors",)}
    return TaskOptions(probe_search=settings.probe_search, **(of_pairs if settings.pairs is not None else {}) | chosen)


def survey(manifests: Sequence[Manifest], settings: EvalSettings) -> tuple[list[DatasetInputs], dict[str, str]]:
    """The datasets on this machine and what is embedded of each, and the reasons why others are skipped.

    Raises:
        ValueError: data that do not fit their manifest, groups in several splits, or none can be evaluated.
    """
    found, absent, options, requested = [], {}, task_options(settings), settings.task_kinds
    for manifest in tqdm(manifests, desc="opening", unit="dataset", disable=settings.quiet):
        if not set(manifest.kinds) & set(requested):  # nothing of it would be evaluated, so nothing is embedded
            absent[manifest.id] = f"it is evaluated by {', '.join(manifest.kinds)}, not by {', '.join(requested)}"
            continue
        try:
            opened = open_dataset(manifest, settings.data)
        except DatasetNotFoundError as error:
            absent[manifest.id] = str(error)
            continue
        if manifest.task == "survival":
            read_cohort(opened, None)  # for its errors, before anything is embedded
        reopen = partial(open_dataset, manifest, settings.data)
        kinds = [kind for kind in manifest.kinds if kind in requested]
        found.append(inputs_of(opened, reopen, kinds, settings.split, options))
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
        raise ValueError(f"none of the {len(manifests)} datasets can be evaluated. {reasons}")
    return found, absent


def open_inputs(settings: EvalSettings) -> tuple[list[DatasetInputs], dict[str, str]]:
    """The datasets that are named, by whatever setting; see `survey`."""
    if settings.pairs is None:
        return survey(load_suite(settings.suite) if settings.suite else find_manifests(settings.datasets), settings)
    trains = bool(set(LEARNING) & set(settings.task_kinds))
    questions = read_vqa_rad(settings.questions)[0] if settings.questions else []
    reopen = partial(open_pairs_dataset, settings.pairs, settings.split, trains, questions)
    dataset = reopen()
    opened = (lambda: dataset) if settings.is_here else reopen
    options = task_options(settings)
    return [inputs_of(dataset, opened, settings.task_kinds, settings.split, options, settings.quiet)], {}


def marks(known: Sequence[EncoderRecord], dataset: Dataset) -> dict[str, str]:
    """Encoders that were trained on a dataset, or on data it was made from, with the source of that statement.

    Held-out pairs of the folder that a student was trained on are no contamination.
    """
    if isinstance(dataset, PairsDataset):
        return {}
    manifest, found = dataset.manifest, {}
    for each in known:
        trained = read_provenance(Path(each.source)) if Path(each.source).is_dir() else {}
        seen = {str(source).lower() for source in trained.get("data", {}).get("sources", {})}
        own = {manifest.id.lower(), *(name.lower() for name in manifest.derived_from)}
        if contaminated(str(each.provenance.get("teacher", each.name)), manifest):
            found[each.name] = "its publication names this data among what it was trained on"
        elif seen & own:
            found[each.name] = f"its provenance.json names {', '.join(sorted(seen & own))}"
    return found
