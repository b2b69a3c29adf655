"""An evaluation on datasets: all encoders embed all of them, then one dataset after another is judged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmkd.data.records import Pair
from mmkd.distributed import rank, wait_for_everyone
from mmkd.evaluation.cells import CellFolder, fingerprint_of
from mmkd.evaluation.collection import Collection
from mmkd.evaluation.collections import Absent, open_collection
from mmkd.evaluation.encoders import Inputs, Known, embed_everything
from mmkd.evaluation.eval_settings import EvalSettings
from mmkd.evaluation.manifest import Manifest
from mmkd.evaluation.means import overall, suite_means
from mmkd.evaluation.pairs_run import Load, encoder_row, roles, run_tasks
from mmkd.evaluation.registry import contaminated, find_manifests, load_suite
from mmkd.evaluation.shards import Content
from mmkd.evaluation.suite import collect_samples, dataset_texts, tasks_for
from mmkd.evaluation.summary import split_summary, task_summary
from mmkd.evaluation.task import Samples
from mmkd.provenance import read_provenance

OF_BAGS = ("survival", "diagnosis")


class SuiteRun:
    """Datasets judged one by one, and what is known of all of them in the end."""

    def __init__(self, settings: EvalSettings, known: Sequence[Known]) -> None:
        """Begin with no dataset."""
        self.settings, self.known = settings, list(known)
        self.student, self.teachers, self.baselines = roles(settings, known)
        self.tasks: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}
        self.datasets: dict[str, dict[str, Any]] = {}
        self.encoders = {each.name: encoder_row(each, []) for each in known}

    def judge(self, inputs: Inputs) -> None:
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


def survey(manifests: Sequence[Manifest], settings: EvalSettings) -> tuple[list[Inputs], dict[str, str]]:
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


def marks(known: Sequence[Known], manifest: Manifest) -> dict[str, str]:
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


def inputs_of(opened: Collection, reopen: Any, split: str) -> Inputs:
    """What is embedded of a dataset; slides lie in bags of features already, only sentences are left to embed."""
    digests = {pair.id: opened.digest(pair) for pair in opened.pairs}
    texts = dataset_texts(opened, split)
    content = Content.of(image_pairs(opened), digests, texts)
    return Inputs(opened.manifest.id, reopen, digests, texts, content)


def image_pairs(collection: Collection) -> Sequence[Pair]:
    """The pairs whose images are embedded: none of a dataset of slides."""
    return [] if collection.manifest.task in OF_BAGS else collection.pairs


def dataset_row(manifest: Manifest, inputs: Inputs, collection: Collection, split: str) -> dict[str, Any]:
    """What the summary says of a dataset: its manifest's facts, its counts, what its splits share, its contents."""
    facts = {key: getattr(manifest, key) for key in ("title", "task", "modality", "license", "tier", "citation")}
    return {
        **facts,
        "manifest_sha256": fingerprint_of(asdict(manifest)),
        "content": [*inputs.content.images, *inputs.content.texts],
        "notes": collection.notes,
        "splits": split_summary(collection.pairs, inputs.digests, split),
    }
