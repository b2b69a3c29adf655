"""An evaluation on datasets: all encoders embed all of them, then one dataset after another is judged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmkd.data.folder import PairFolder, open_pairs
from mmkd.data.table import Pair
from mmkd.distributed import rank, wait_for_everyone, world_size
from mmkd.encoders.encoder import DualEncoder
from mmkd.evaluation.datasets.catalog import contaminated, find_manifests, load_suite
from mmkd.evaluation.datasets.dataset import Collection, open_collection
from mmkd.evaluation.datasets.manifest import Absent, Manifest
from mmkd.evaluation.datasets.questions import question_texts, read_questions
from mmkd.evaluation.embeddings.cache import Content
from mmkd.evaluation.embeddings.embed import Embedded, FolderImages
from mmkd.evaluation.embeddings.encoders import DatasetInputs, EncoderRecord, embed_everything
from mmkd.evaluation.results.store import CellFolder, fingerprint_of
from mmkd.evaluation.results.summary import Table, overall, split_summary, suite_means, task_summary
from mmkd.evaluation.settings import EvalSettings
from mmkd.evaluation.suite import collect_samples, dataset_texts, run_task, tasks_for, texts_for
from mmkd.evaluation.tasks.task import Samples, Task
from mmkd.student.folder import read_provenance

OF_BAGS = ("survival", "diagnosis")


class SuiteRun:
    """Datasets judged one by one, and what is known of all of them in the end."""

    def __init__(self, settings: EvalSettings, known: Sequence[EncoderRecord]) -> None:
        """Begin with no dataset."""
        self.settings, self.known = settings, list(known)
        self.student, self.teachers, self.baselines = roles(settings, known)
        self.tasks: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}
        self.datasets: dict[str, dict[str, Any]] = {}
        self.encoders = {each.name: encoder_row(each, []) for each in known}

    def judge(self, inputs: DatasetInputs) -> None:
        """Make the cells of every task on one dataset; its vectors leave memory afterwards."""
        collection = inputs.open()
        assert isinstance(collection, Collection)
        manifest = collection.manifest
        encoders = [each.embedded(inputs, image_pairs(collection), collection) for each in self.known]
        unreadable = {key: reason for each in encoders for key, reason in each.unreadable.items()}
        samples = collect_samples(collection.pairs, self.settings.split, inputs.digests, unreadable)
        samples = replace(
            samples,
            questions=collection.questions,
            manifest=manifest,
            collection=collection,
            probe_on=self.settings.probe_on,
            probe_search=self.settings.probe_search,
            probe_curve=self.settings.probe_curve,
            auroc_on=self.settings.auroc_on,
        )
        tasks, skipped = tasks_for(samples, self.settings.kinds) if samples.held_out else ([], {})
        if not tasks:
            asked, samples_of = ", ".join(self.settings.kinds), f"{len(samples.held_out)} {self.settings.split} samples"
            skipped = skipped or {manifest.id: f"none of {asked} can be asked of its {samples_of}"}
        cells = self._cells(manifest.id, drawn_pairs(samples))
        table = run_tasks(tasks, samples, encoders, self.teachers, cells, quiet=True)
        self.skipped |= skipped
        if rank() > 0:
            return
        for task in tasks:
            summary = task_summary(cells.describe(task), table[task.name], self.student, cells)
            self.tasks[task.name] = summary | {"contaminated": marks(self.known, manifest)}
        self.unreadable |= {f"{manifest.id}/{key}": reason for key, reason in unreadable.items()}
        for each in encoders:
            self.encoders[each.name]["failures"] += [f"{manifest.id}: {failure}" for failure in each.failures]
        self.datasets[manifest.id] = dataset_row(manifest, inputs, collection, self.settings.split)

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says of the datasets judged so far."""
        replicates = self._cells("", []).together
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

    def _cells(self, dataset: str, held_out: Any) -> CellFolder:
        return CellFolder(
            self.settings.output, held_out, self.settings.replicates, seed_of(self.settings.seed, dataset)
        )


def drawn_pairs(samples: Samples) -> list[Pair]:
    """What resamples together: the held-out pairs, or all where questions have splits that are not those of images."""
    asked = samples.manifest is not None and samples.manifest.task == "vqa"
    return [*samples.train, *samples.validation, *samples.held_out] if asked else samples.held_out


def evaluate_datasets(settings: EvalSettings, sources: dict[str, str], load: Load) -> dict[str, Any]:
    """Embed every dataset that is there with every encoder, judge, compare.

    Args:
        settings: checked.
        sources: encoders by name.
        load: loads a dual encoder.

    Returns:
        What `summary.json` says; on the first process only, nothing on the others.

    Raises:
        FileNotFoundError: a manifest or an encoder's folder does not exist.
        ValueError: a manifest or its data are wrong, or no dataset is there.
    """
    manifests = chosen_manifests(settings)
    inputs, absent = survey(manifests, settings)
    if not inputs:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
        raise ValueError(f"none of the {len(manifests)} datasets is there. {reasons}")
    known = embed_everything(sources, inputs, load, settings.embeddings, settings.batch_size, settings.quiet)
    wait_for_everyone()
    run = SuiteRun(settings, known)
    for own in tqdm(inputs, desc="datasets", unit="dataset", disable=settings.quiet or rank() > 0):
        run.judge(own)
    return run.summary() | {"skipped_datasets": absent} if rank() == 0 else {}


def survey(manifests: Sequence[Manifest], settings: EvalSettings) -> tuple[list[DatasetInputs], dict[str, str]]:
    """What of the datasets is there and what will be embedded of it, and the reasons why others are not.

    Raises:
        ValueError: data that do not fit their manifest, or groups that lie in several splits.
    """
    found, absent = [], {}
    for manifest in tqdm(manifests, desc="opening", unit="dataset", disable=settings.quiet or rank() > 0):
        try:
            opened = open_collection(manifest, settings.data)
        except Absent as error:
            absent[manifest.id] = str(error)
            continue
        found.append(inputs_of(opened, partial(open_collection, manifest, settings.data), settings.split))
    return found, absent


def marks(known: Sequence[EncoderRecord], manifest: Manifest) -> dict[str, str]:
    """Encoders that are known to have trained on a dataset or on what it was made from, and what says so."""
    found = {}
    for each in known:
        trained = read_provenance(Path(each.source)) if Path(each.source).is_dir() else {}
        seen = {str(source).lower() for source in trained.get("data", {}).get("sources", {})}
        own = {manifest.id.lower(), *(name.lower() for name in manifest.derived_from)}
        if contaminated(str(each.provenance.get("teacher", each.name)), manifest):
            found[each.name] = "its publication names this data among what it was trained on"
        elif seen & own:
            found[each.name] = f"its provenance.json names {', '.join(sorted(seen & own))}"
    return found


def chosen_manifests(settings: EvalSettings) -> list[Manifest]:
    """The manifests of the suite, or those that are named."""
    return load_suite(settings.suite) if settings.suite else find_manifests(settings.datasets)


def seed_of(seed: int, dataset: str) -> int:
    """The seed of a dataset's draws, so that those of different datasets are independent."""
    return int.from_bytes(hashlib.sha256(f"{seed} {dataset}".encode()).digest()[:8], "big")


def inputs_of(opened: Collection, reopen: Any, split: str) -> DatasetInputs:
    """What is embedded of a dataset; slides lie in bags of features already, only sentences are left to embed."""
    digests = {pair.id: opened.digest(pair) for pair in opened.pairs}
    texts = dataset_texts(opened, split)
    content = Content.of(image_pairs(opened), digests, texts)
    return DatasetInputs(opened.manifest.id, reopen, digests, texts, content)


def image_pairs(collection: Collection) -> Sequence[Pair]:
    """The pairs whose images are embedded: none of a dataset of slides."""
    return [] if collection.manifest.task in OF_BAGS else collection.pairs


def dataset_row(manifest: Manifest, inputs: DatasetInputs, collection: Collection, split: str) -> dict[str, Any]:
    """What the summary says of a dataset: its manifest's facts, its counts, what its splits share, its contents."""
    facts = {key: getattr(manifest, key) for key in ("title", "task", "modality", "license", "tier", "citation")}
    return {
        **facts,
        "manifest_sha256": fingerprint_of(asdict(manifest)),
        "content": [*inputs.content.images, *inputs.content.texts],
        "notes": collection.notes,
        "splits": split_summary(collection.pairs, inputs.digests, split),
    }


# Section: An evaluation on the held-out pairs of one folder, and the comparison that all evaluations share.


Load = Callable[[str], DualEncoder]


def evaluate_pairs(settings: EvalSettings, sources: dict[str, str], load: Load) -> dict[str, Any]:
    """Embed the pairs with every encoder, evaluate, compare.

    Args:
        settings: checked.
        sources: encoders by name.
        load: loads a dual encoder.

    Returns:
        What `summary.json` says; on the first process only, nothing on the others.

    Raises:
        FileNotFoundError: the pairs or an encoder's folder do not exist.
        ValueError: there is nothing to evaluate on.
    """
    folder = evaluated_pairs(settings)
    source = FolderImages(folder)
    questions = read_questions(settings.questions) if settings.questions else []
    held_out = [pair for pair in folder.pairs if pair.split == settings.split]
    texts = sorted({*texts_for(held_out), *question_texts(questions)})
    inputs = DatasetInputs.of("", source, lambda: source, texts, settings.quiet or rank() > 0)
    known = embed_everything(sources, [inputs], load, settings.embeddings, settings.batch_size, settings.quiet)
    wait_for_everyone()
    encoders = [each.embedded(inputs, folder.pairs, source) for each in known]
    unreadable = {key: reason for each in encoders for key, reason in each.unreadable.items()}
    samples = collect_samples(folder.pairs, settings.split, inputs.digests, unreadable)
    samples = replace(samples, questions=questions, within=settings.within, captioned=settings.captioned)
    tasks, skipped = tasks_for(samples, settings.kinds) if samples.held_out else ([], {})
    if not tasks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            f"nothing to evaluate on the {len(samples.held_out)} readable {settings.split} pairs. {reasons}"
        )
    student, teachers, baselines = roles(settings, known)
    cells = CellFolder(settings.output, samples.held_out, settings.replicates, settings.seed)
    table = run_tasks(tasks, samples, encoders, teachers, cells, settings.quiet)
    if rank() > 0:
        return {}
    summaries = {task.name: task_summary(cells.describe(task), table[task.name], student, cells) for task in tasks}
    assert settings.pairs is not None
    return {
        "student": student,
        "teachers": teachers,
        "baselines": baselines,
        "tasks": summaries,
        "overall": overall(summaries, student, teachers, cells.together),
        "encoders": {each.name: encoder_row(each, own.failures) for each, own in zip(known, encoders, strict=True)},
        "skipped": skipped,
        "unreadable": unreadable,
        "splits": split_summary(open_pairs(settings.pairs).pairs, inputs.digests, settings.split),
        "datasets": {"pairs": {"content": [*inputs.content.images, *inputs.content.texts]}},
    }


def run_tasks(
    tasks: Sequence[Task],
    samples: Samples,
    encoders: list[Embedded],
    teachers: list[str],
    cells: CellFolder,
    quiet: bool,
) -> Table:
    """Every cell of these tasks; processes share the tasks, and the first one then has all cells.

    Returns:
        Cells by task and row on the first process, nothing on the others.
    """
    hidden = quiet or rank() > 0
    own = tasks[rank() :: world_size()]
    table = {
        task.name: run_task(task, samples, encoders, teachers, cells)
        for task in tqdm(own, desc="tasks", unit="task", disable=hidden)
    }
    if world_size() > 1:
        wait_for_everyone()
        table = {} if rank() else {task.name: run_task(task, samples, encoders, teachers, cells) for task in tasks}
    return table


def roles(settings: EvalSettings, known: Sequence[EncoderRecord]) -> tuple[str, list[str], list[str]]:
    """Names of the student, of its teachers and of the baselines."""
    student, *others = [each.name for each in known]
    teachers = [name for name in others if name not in settings.baselines]
    return student, teachers, [name for name in others if name in settings.baselines]


def evaluated_pairs(settings: EvalSettings) -> PairFolder:
    """The held-out pairs, and those of the other splits if a task learns from them."""
    assert settings.pairs is not None
    folder = open_pairs(settings.pairs)
    if not any(pair.split == settings.split for pair in folder.pairs):
        raise ValueError(f"{settings.pairs} holds {len(folder.pairs)} pairs, none of them in split {settings.split!r}")
    if "probe" not in settings.kinds and "vqa" not in settings.kinds:
        folder.pairs = [pair for pair in folder.pairs if pair.split == settings.split]
    return folder


def encoder_row(known: EncoderRecord, failures: list[str]) -> dict[str, Any]:
    """What the summary says of an encoder."""
    return {
        "source": known.source,
        "fingerprint": known.fingerprint,
        "failures": failures,
        "provenance": known.provenance,
    }
