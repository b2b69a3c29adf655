"""From a manifest to the dataset on this machine: read, checked against the manifest, assigned to splits.

Where manifest and data disagree, an error is raised before any encoder runs: absent classes, labels that are not
classes, other counts than those expected, groups in several splits. What merely limits an evaluation (a class without
test images) is noted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from mmkd.command.settings import nearest
from mmkd.data.pixel_rules import DEFAULT_WINDOW, Window
from mmkd.data.splits import assign_splits, meaning_of
from mmkd.data.table import SPLITS, Pair
from mmkd.evaluation.datasets.manifest import (
    ASSIGNED,
    HELD_OUT,
    DatasetNotFoundError,
    Manifest,
    locate,
    source_kind,
    where_to_get,
)
from mmkd.evaluation.datasets.readers import READERS
from mmkd.evaluation.datasets.source import Question, Sample, Store, group_of
from mmkd.files import content_sha256, last_read

OF_BAGS = ("survival", "diagnosis")
ABOUT = ("title", "task", "modality", "license", "tier", "citation")
SHOWN = 5
SEED = 42


class Dataset:
    """A dataset opened for evaluation: pairs, their images, questions about them, bags of slides.

    Attributes:
        manifest: its description.
        pairs: one for each image (or slide); the label is a class of the manifest, several are joined by ``|``.
        listed: all pairs of the source, also those that no task reads.
        questions: about the images, for visual question answering.
        root: the folder that holds bags of features of slides; None where there are none.
        metadata: pair id -> further columns of its row, for slides: ``time``, ``event`` and what else the table has.
        notes: what limits an evaluation without forbidding it, such as a class without test images.
    """

    def __init__(
        self, manifest: Manifest, pairs: Sequence[Pair], questions: Sequence[Question] = (), store: Store | None = None
    ) -> None:
        """Keep what was read; ``store`` holds the images, unless a subclass reads them in its own way."""
        self._store = store
        self.manifest = manifest
        self.pairs = self.listed = pairs
        self.questions = list(questions)
        self.root: Path | None = None
        self.metadata: dict[str, dict[str, str]] = {}
        self.notes: list[str] = []

    @property
    def image_pairs(self) -> Sequence[Pair]:
        """The pairs whose images are embedded: none of slides, whose features lie in bags."""
        return [] if self.manifest.task in OF_BAGS else self.pairs

    def prompts(self) -> set[str]:
        """Every sentence about its classes."""
        found = {text for own in self.manifest.prompts().values() for text in own}
        if self.manifest.task == "multilabel":
            found |= {text for own in self.manifest.negative_prompts().values() for text in own}
        return found

    def views(self, samples: Samples, kinds: Sequence[str]) -> tuple[list[Samples], dict[str, str]]:
        """The samples of each manifest that tasks of these kinds follow, and why there are no others."""
        return ([samples] if set(kinds) & set(self.manifest.kinds) else []), {}

    def summary(self) -> dict[str, Any]:
        """What results state about the dataset; plain JSON values."""
        return {key: getattr(self.manifest, key) for key in ABOUT}

    def image(self, pair: Pair) -> Image.Image:
        """The image of a pair; several threads may read at once.

        Raises:
            UnreadableImageError: it is missing, broken or refused; with the reason.
        """
        assert self._store is not None
        return self._store.image(pair.image)

    def digest(self, pair: Pair) -> str:
        """A hash of the stored image; equal images have equal ones. ``"missing"`` where it cannot be read."""
        assert self._store is not None
        return self._store.digest(pair.image)


@dataclass(frozen=True)
class Samples:
    """The readable pairs of a dataset, or of one view of it, by use.

    Attributes:
        manifest: what the tasks follow.
        held_out: the pairs of the evaluation.
        train: for training heads.
        validation: for choosing their hyperparameters.
        digests: pair id -> hash of the image file; equal images are positives of each other's captions.
        dataset: that the pairs belong to.
    """

    manifest: Manifest
    held_out: list[Pair]
    train: list[Pair]
    validation: list[Pair]
    digests: dict[str, str]
    dataset: Dataset

    def where(self, keep: Callable[[Pair], bool]) -> Samples:
        """The samples that satisfy a condition."""
        parts = (list(filter(keep, part)) for part in (self.held_out, self.train, self.validation))
        held_out, train, validation = parts
        return replace(self, held_out=held_out, train=train, validation=validation)


def split_samples(dataset: Dataset, split: str, digests: dict[str, str], unreadable: Container[str] = ()) -> Samples:
    """The readable pairs by use; the held-out split is never trained on, whichever it is."""
    by_split: dict[str, list[Pair]] = {name: [] for name in SPLITS}
    for pair in dataset.pairs:
        if pair.id not in unreadable:
            by_split[pair.split].append(pair)
    held_out, by_split[split] = by_split[split], []
    return Samples(dataset.manifest, held_out, by_split["train"], by_split["validation"], digests, dataset)


def open_dataset(manifest: Manifest, data: Path | None = None) -> Dataset:
    """Open the dataset a manifest describes.

    Args:
        manifest: what it is.
        data: stands for ``${DATA}`` in its source; by default the variable ``MMKD_DATA`` of the environment.

    Returns:
        Its pairs, each in the split train, validation or test, with ``notes`` of what limits it.

    Raises:
        DatasetNotFoundError: it is not on this machine.
        ValueError: manifest and data disagree, or the data are broken; the message states where and what to do.
    """
    kind = source_kind(manifest)
    try:
        paths = locate(manifest, data)
        if manifest.sha256 and paths[0].is_file() and (found := content_sha256(paths[0])) != manifest.sha256.lower():
            raise ValueError(f"{paths[0]} has the SHA-256 {found}, the manifest states {manifest.sha256}")
        reading = READERS[kind](manifest, paths)
        reading.store.window = Window(manifest.source.get("window", DEFAULT_WINDOW.preset))
        if not reading.samples:
            raise ValueError("its source holds no samples, or `where` leaves none")
        _settle_labels(manifest, reading.samples)
        for sample in reading.samples:
            sample.group = group_of(manifest, sample.name, sample.group)
        _refuse_repeats(manifest, reading.samples)
        splits = _splits(manifest, reading.samples)
    except (FileNotFoundError, PermissionError) as error:
        raise DatasetNotFoundError(f"{error}; {where_to_get(manifest)}") from error
    except (ValueError, OSError) as error:
        path = last_read()  # perhaps the manifest, with which the data disagree
        place = "" if path is None or path.name in str(error) else f"{path.name}: "
        raise ValueError(f"{manifest.id}: {place}{error}") from None
    pairs = _pairs(manifest, reading.samples, splits)
    dataset = Dataset(manifest, pairs, reading.questions, reading.store)
    if kind == "bags":
        dataset.root = paths[0]
        dataset.metadata = {pair.id: own.metadata for pair, own in zip(pairs, reading.samples, strict=True)}
    dataset.notes = [*reading.notes, *_notes(manifest, pairs)]
    _check_counts(manifest, dataset)
    return dataset


def _settle_labels(manifest: Manifest, samples: Sequence[Sample]) -> None:
    """Rename labels to the manifest's classes.

    Raises:
        ValueError: a label is no class, a class occurs nowhere, or an image of a single label has none or several.
    """
    renamed = {str(old): "" if new is None else str(new) for old, new in (manifest.source.get("rename") or {}).items()}
    cased = {name.casefold(): name for name in manifest.classes}
    for sample in samples:
        names = [renamed.get(label, label) for label in sample.labels]
        names = [name if name in manifest.classes else cased.get(name.casefold(), name) for name in names]
        sample.labels = list(dict.fromkeys(name for name in names if name))
    if not manifest.classes:
        return
    found = Counter(label for sample in samples for label in sample.labels)
    unknown = [label for label in found if label not in manifest.classes]
    if unknown:
        near = nearest(unknown[0], manifest.classes)
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(
            f"label {unknown[0]!r}{near}{more} of the data is no class of the manifest: {', '.join(manifest.classes)}"
        )
    absent = [name for name in manifest.classes if name not in found]
    if absent and manifest.task != "survival":
        near = nearest(absent[0], found)
        shown = ", ".join(f"{name} ({count})" for name, count in found.most_common(SHOWN))
        shown += "..." if len(found) > SHOWN else ""
        raise ValueError(f"class {absent[0]!r}{near} of the manifest is not in the data, which have {shown}")
    if manifest.task in ("classification", "ordinal", "diagnosis"):
        odd = next((sample for sample in samples if len(sample.labels) != 1), None)
        if odd is not None:
            count = f"{len(odd.labels)} labels ({', '.join(odd.labels)})" if odd.labels else "no label"
            raise ValueError(f"{odd.name} has {count}; a {manifest.task} needs one for each")


def _refuse_repeats(manifest: Manifest, samples: Sequence[Sample]) -> None:
    """Raise where an image or slide has several rows, which would count it as many times, and perhaps in two splits.

    Images to retrieve may have several captions, all in one split.
    """
    rows: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        rows[sample.name].append(sample)
    for name, own in rows.items():
        labels, splits = {"|".join(sample.labels) for sample in own}, {sample.split for sample in own}
        if len(own) > 1 and (manifest.task != "retrieval" or len(splits) > 1):
            differing = "".join(
                f"; its {what} are {', '.join(map(repr, sorted(found)))}"
                for what, found in (("labels", labels), ("splits", splits))
                if len(found) > 1
            )
            raise ValueError(f"{name} is in {len(own)} rows; keep one for each image or slide{differing}")


def _splits(manifest: Manifest, samples: Sequence[Sample]) -> list[str]:
    """Train, validation or test for each sample; assigned by groups where the data state none, slides by sites.

    Raises:
        ValueError: a split's name is unknown, some samples have none, a group is in several, or no sample is for tests.
    """
    is_cohort = manifest.task == "survival" and not any(sample.split for sample in samples)
    if manifest.split == HELD_OUT or is_cohort:
        return ["test"] * len(samples)
    groups = [f"group {sample.group}" if sample.group else f"image {sample.name}" for sample in samples]
    strata = ["|".join(sample.labels) for sample in samples]
    given = [""] * len(samples) if manifest.split == ASSIGNED else _named_splits(manifest, samples)
    if not any(given):
        sites = [sample.metadata.get("site", "") for sample in samples]
        return assign_splits(sites if all(sites) else groups, given, strata, SEED)[0]
    if not all(given):
        raise ValueError(
            f"{given.count('')} of {len(given)} rows have no split; fill the column, or set `split: assigned`"
        )
    _refuse_overlaps(groups, given)
    if "test" not in given:
        raise ValueError("no sample is in the test split; `splits: {val: test}` in the source maps another split to it")
    if "validation" not in given:
        rows = [row for row, split in enumerate(given) if split == "train"]
        own = assign_splits([groups[r] for r in rows], [""] * len(rows), [strata[r] for r in rows], SEED)[0]
        for row, split in zip(rows, own, strict=True):
            given[row] = "validation" if split == "validation" else "train"
    return given


def _named_splits(manifest: Manifest, samples: Sequence[Sample]) -> list[str]:
    called = {str(name): str(split) for name, split in (manifest.source.get("splits") or {}).items()}
    meanings = {name: meaning_of(called.get(name, name)) for name in {sample.split for sample in samples}}
    unknown = sorted(name for name, split in meanings.items() if name and not split)
    if unknown:
        raise ValueError(
            f"split {unknown[0]!r} is none of {', '.join(SPLITS)}; map it by `splits: {{{unknown[0]}: test}}`"
        )
    return [meanings[sample.split] for sample in samples]


def _refuse_overlaps(groups: Sequence[str], splits: Sequence[str]) -> None:
    sides: dict[str, set[str]] = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        if group.startswith("group "):
            sides[group.removeprefix("group ")].add(split)
    mixed = sorted(group for group, own in sides.items() if len(own) > 1)
    if mixed:
        shown = ", ".join(f"{group} ({' and '.join(sorted(sides[group]))})" for group in mixed[:SHOWN])
        raise ValueError(
            f"{len(mixed)} groups are in several splits: {shown}; a patient, case or slide belongs to one. Fix the "
            "table, or set `split: assigned` to assign whole groups"
        )


def _pairs(manifest: Manifest, samples: Sequence[Sample], splits: Sequence[str]) -> list[Pair]:
    """Pairs; a second caption of an image has a number behind its id."""
    seen: Counter[str] = Counter()
    pairs = []
    for sample, split in zip(samples, splits, strict=True):
        again = seen[sample.name]
        seen[sample.name] += 1
        pairs.append(
            Pair(
                f"{manifest.id}:{sample.name}" + (f"#{again}" if again else ""),
                sample.name,
                sample.caption,
                modality=manifest.modality,
                label="|".join(sample.labels),
                group=sample.group,
                split=split,
                source=manifest.id,
                license=manifest.license,
            )
        )
    return pairs


def _notes(manifest: Manifest, pairs: Sequence[Pair]) -> list[str]:
    """What limits an evaluation without forbidding it."""
    notes = []
    if manifest.classes and manifest.task != "survival":
        for split in SPLITS:
            found = {label for pair in pairs if pair.split == split for label in pair.label.split("|") if label}
            lacking = [name for name in manifest.classes if name not in found]
            if split == "test" and len(found) == 1:
                notes.append(f"all test images are of one class, {next(iter(found))}")
            elif lacking and any(pair.split == split for pair in pairs):
                notes.append(f"without {split} images: {', '.join(lacking)}")
    if manifest.task == "retrieval":
        empty = sum(not pair.caption for pair in pairs)
        notes += [f"{empty} images have no caption"] if empty else []
    return notes


def _check_counts(manifest: Manifest, collection: Dataset) -> None:
    """Counts as the manifest expects them.

    Raises:
        ValueError: one differs.
    """
    splits = Counter(pair.split for pair in collection.pairs)
    counts = {"n": len(collection.pairs), "n_questions": len(collection.questions)}
    counts["n_test_questions"] = sum(question.split == "test" for question in collection.questions)
    counts |= {f"n_{split}": splits[split] for split in SPLITS}
    counts["n_cases"] = len({pair.group or pair.id for pair in collection.pairs})
    for key, expected in manifest.expects.items():
        if counts[key] != expected:
            raise ValueError(
                f"{manifest.id}: {key} is {counts[key]}, the manifest expects {expected}; is this another version or "
                "a part of the data? see `expects`"
            )
