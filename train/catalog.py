"""Datasets of an evaluation: list them, show their manifests, and check the data on this machine against them.

``mmkd eval --datasets NAME`` evaluates on those that are listed, checked or added here.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any, Literal

from mmkd.command.settings import check_arguments, run, setting
from mmkd.evaluation.datasets.manifest import catalog


@dataclass
class ListSettings:
    """List datasets, a line each: tier A is open, B needs registration, C credentials and an agreement.

    Example:
        mmkd datasets ls --suite paper58 --modality OCT
    """

    suite: str | None = setting(None, "keep only datasets of a suite: offline, medmnist or paper58")
    task: Literal["classification", "multilabel", "ordinal", "retrieval", "vqa", "survival", "diagnosis"] | None = (
        setting(None, "keep only datasets of a task")
    )
    modality: str | None = setting(None, "keep only datasets of a modality")
    data: Path | None = setting(None, "folder of data, ${DATA} of manifests; by default the variable MMKD_DATA")
    catalog: Path | None = setting(None, "folder of your own manifests, by default ~/.config/mmkd/datasets")
    markdown: bool = setting(False, "print a Markdown table")


@dataclass
class ShowSettings:
    """Show a manifest, where to get its data, and the prompts of its classes.

    Example:
        mmkd datasets show busi
    """

    dataset: str = setting(help="id of a dataset, or a YAML file", positional=True)
    data: Path | None = setting(None, "folder of data, ${DATA} of manifests; by default the variable MMKD_DATA")
    catalog: Path | None = setting(None, "folder of your own manifests, by default ~/.config/mmkd/datasets")


@dataclass
class CheckSettings:
    """Open datasets, count them, and find images that cannot be read or occur in several splits.

    Example:
        mmkd datasets check offline --data /data --all
    """

    datasets: list[str] = setting(help="ids, suites or YAML files, joined by commas", positional=True)
    data: Path | None = setting(None, "folder of data, ${DATA} of manifests; by default the variable MMKD_DATA")
    catalog: Path | None = setting(None, "folder of your own manifests, by default ~/.config/mmkd/datasets")
    images: int = setting(200, "number of images to read of each dataset, chosen by hash")
    all: bool = setting(False, "read every image, and compare those of different splits")
    quiet: bool = setting(False, "no progress bar")


@dataclass
class AddSettings:
    """Check a manifest and add it to your own catalog.

    Example:
        mmkd datasets add clinic.yaml
    """

    manifest: Path = setting(help="a YAML file", positional=True)
    catalog: Path | None = setting(None, "folder of your own manifests, by default ~/.config/mmkd/datasets")


ACTIONS = {
    "ls": ListSettings,
    "show": ShowSettings,
    "check": CheckSettings,
    "add": AddSettings,
}


if __name__ == "__main__":
    check_arguments(ACTIONS)  # before the imports that take seconds

from tqdm import tqdm

from mmkd.command.settings import nearest
from mmkd.data.images import UnreadableImageError
from mmkd.data.readers import DATA_VARIABLE
from mmkd.data.splits import hashed
from mmkd.data.table import SPLITS, Pair
from mmkd.evaluation.datasets.dataset import Dataset, open_dataset
from mmkd.evaluation.datasets.manifest import (
    CATALOG,
    TASKS,
    DatasetNotFoundError,
    Manifest,
    compared_with,
    find_manifests,
    load_suite,
    locate,
    own_catalog,
    read_manifest,
)
from mmkd.evaluation.slides.survival import read_cohort
from mmkd.files import atomic_write_text

COLUMNS = ("id", "task", "modality", "tier", "license", "data")
SHOWN = 10
SEED = 42


@singledispatch
def main(settings: Any) -> None:
    """Run the action to which these settings belong."""
    raise TypeError(f"no action has {type(settings).__name__}")


@main.register
def list_datasets(settings: ListSettings) -> None:
    """Print a table of datasets.

    Raises:
        ValueError: no dataset is left, or there is no such suite.
    """
    known = load_suite(settings.suite) if settings.suite else list(catalog(settings.catalog).values())
    modalities = sorted({manifest.modality for manifest in known})
    chosen = [
        manifest
        for manifest in known
        if settings.task in (None, manifest.task)
        and (settings.modality is None or settings.modality.casefold() == manifest.modality.casefold())
    ]
    if not chosen:
        near = nearest(settings.modality or "", modalities)
        raise ValueError(f"no dataset of {len(known)} fits{near}; modalities: {', '.join(modalities)}")
    if settings.markdown:
        print("\n".join(_markdown(chosen)))
        return
    named = [[getattr(manifest, column) for column in COLUMNS[:-1]] for manifest in chosen]
    rows = [COLUMNS, *([*own, _presence(m, settings.data)] for own, m in zip(named, chosen, strict=True))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    present = sum(row[-1] == "present" for row in rows)
    is_given = settings.data or os.environ.get(DATA_VARIABLE)
    where = "" if is_given else f" (--data DIR or {DATA_VARIABLE} sets the folder of data)"
    print(f"\n{len(chosen)} datasets, {present} on this machine{where}; see `mmkd datasets show ID`")


@main.register
def show(settings: ShowSettings) -> None:
    """Print everything known of a dataset."""
    for manifest in find_manifests(settings.dataset, settings.catalog):
        path = Path(settings.dataset) if settings.dataset.endswith((".yaml", ".yml")) else None
        path = path or next((p for p in _files(settings.catalog) if p.stem == manifest.id), None)
        print(path.read_text(encoding="utf-8").rstrip() if path else f"id: {manifest.id}")
        print(f"\nprimary metric: {manifest.measure}\npublished in: {manifest.citation or 'not stated'}")
        for name, sentences in manifest.prompts().items():
            print(f"\n{name}")
            print("\n".join(f"  {sentence}" for sentence in sentences))
        print(f"\n{_whereabouts(manifest, settings.data)}\n")


@main.register
def check(settings: CheckSettings) -> None:
    """Print what is found of each dataset.

    Raises:
        ValueError: one disagrees with its manifest, or an image cannot be read.
    """
    faults: list[str] = []
    more = 0
    for manifest in find_manifests(settings.datasets, settings.catalog):
        try:
            dataset = open_dataset(manifest, settings.data)
            if manifest.task == "survival":
                read_cohort(dataset, None)
        except DatasetNotFoundError as error:
            print(f"{manifest.id}: SKIPPED, {error}")
            continue
        except ValueError as error:
            faults.append(str(error))
            continue
        print("\n  ".join([f"{manifest.id}: {_counts(dataset)}", *_classes(dataset), *dataset.notes]))
        if dataset.root is None:
            found = _image_faults(dataset, settings)
            faults += [f"{manifest.id}: {fault}" for fault in found[:SHOWN]]
            more += len(found[SHOWN:])
    if faults:
        count = len(faults) + more
        listed = [*faults, *([f"and {more:,} more"] if more else [])]
        raise ValueError("\n       ".join([f"{count:,} fault{'s' if count > 1 else ''}:", *listed]))


@main.register
def add(settings: AddSettings) -> None:
    """Keep a manifest.

    Raises:
        ValueError: it is broken, or its id is taken.
    """
    manifest = read_manifest(settings.manifest)
    folder = settings.catalog or own_catalog()
    path = folder / f"{manifest.id}.yaml"
    if manifest.id in catalog(folder):
        removal = f", or remove {path}" if path.is_file() else ""
        raise ValueError(f"{settings.manifest}: id {manifest.id!r} is taken; choose another{removal}")
    atomic_write_text(path, settings.manifest.read_text(encoding="utf-8"))
    print(f"{path}: `mmkd eval --datasets {manifest.id}` finds it now")


def _files(own: Path | None) -> list[Path]:
    return [*CATALOG.glob("*.yaml"), *(own or own_catalog()).glob("*.yaml")]


def _whereabouts(manifest: Manifest, data: Path | None) -> str:
    """Where a dataset is on this machine, or where to get it."""
    try:
        return f"present: {', '.join(map(str, locate(manifest, data)))}"
    except DatasetNotFoundError as error:
        return f"absent: {error}"


def _presence(manifest: Manifest, data: Path | None) -> str:
    try:
        paths = locate(manifest, data)
    except DatasetNotFoundError:
        return "absent"
    return "present" if paths[0].exists() else "Hub"


def _markdown(manifests: list[Manifest]) -> list[str]:
    """A table with a link to the source of each dataset."""
    heads = (
        "dataset",
        "task",
        "modality",
        "classes",
        "all",
        "test",
        "compared with",
        "primary metric",
        "tier",
        "license",
    )
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---:|---:|---:|---|---|---|---|"]
    for manifest in sorted(manifests, key=lambda own: TASKS.index(own.task) if own.task in TASKS[3:] else 0):
        name = f"[{manifest.id}]({manifest.register})" if manifest.register else manifest.id
        counts = (_stated(manifest, "n", "n_questions"), _stated(manifest, "n_test", "n_test_questions"))
        source = compared_with(manifest.id)
        cells = (name, manifest.task, manifest.modality, len(manifest.classes) or "", *counts, source)
        lines.append(f"| {' | '.join(map(str, (*cells, manifest.measure, manifest.tier, manifest.license)))} |")
    return lines


def _stated(manifest: Manifest, *keys: str) -> str:
    """The first of these counts that is stated; all of the data are also the sum of the three splits."""
    counts = manifest.expects
    if "n_train" in counts and "n" not in counts:
        counts = counts | {"n": sum(counts.get(f"n_{split}", 0) for split in SPLITS)}
    return next((f"{counts[key]:,}" for key in keys if key in counts), "")


def _counts(dataset: Dataset) -> str:
    splits = Counter(pair.split for pair in dataset.pairs)
    parts = [f"{splits[split]:,} {split}" for split in SPLITS if splits[split]]
    groups = len({pair.group for pair in dataset.pairs if pair.group})
    parts += [f"{groups:,} groups"] if groups else []
    parts += [f"{len(dataset.questions):,} questions"] if dataset.questions else []
    return ", ".join(parts)


def _classes(dataset: Dataset) -> list[str]:
    """Images of each class in each split."""
    found = {split: Counter[str]() for split in SPLITS}
    for pair in dataset.pairs:
        found[pair.split].update(label for label in pair.label.split("|") if label)
    return [
        f"{name}: {' / '.join(str(found[split][name]) for split in SPLITS)} ({', '.join(SPLITS)})"
        for name in dataset.manifest.classes
    ]


def _image_faults(dataset: Dataset, settings: CheckSettings) -> list[str]:
    """Images that cannot be read; where all are read, also equal images in different splits."""
    pairs = list({pair.image: pair for pair in dataset.pairs}.values())
    if not settings.all:
        pairs = sorted(pairs, key=lambda pair: hashed(SEED, pair.id))[: settings.images]
    faults: list[str] = []
    homes: dict[str, Pair] = {}
    shared: list[str] = []
    for pair in tqdm(pairs, desc=dataset.manifest.id, unit="image", disable=settings.quiet):
        try:
            dataset.image(pair)
        except UnreadableImageError as error:
            faults.append(str(error))
            continue
        first = homes.setdefault(dataset.digest(pair), pair)
        if first.split != pair.split:
            shared.append(f"{first.image} ({first.split}) = {pair.image} ({pair.split})")
    if shared:
        print("\n  ".join([f"  {len(shared)} images are in several splits:", *shared[:SHOWN]]))
    return faults


if __name__ == "__main__":
    run(ACTIONS, main)
