"""A folder of pairs as a dataset: manifests of its tasks are derived from what the pairs hold.

One dataset, several views of it: the images classified by modality, by label, by label within each modality; their
captions retrieved; questions about them answered. Every view is a manifest with samples of its own, and all share one
embedding of images and texts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from PIL import Image

from mmkd.data.folder import PairFolder, open_pairs
from mmkd.data.images import read_image_bytes
from mmkd.data.pixels import read_pixels, to_image
from mmkd.data.prompts import label_prompts, modality_prompts
from mmkd.data.splits import slug
from mmkd.data.table import UNKNOWN, Pair
from mmkd.evaluation.datasets.dataset import Dataset, Samples
from mmkd.evaluation.datasets.manifest import DatasetTask, Manifest
from mmkd.evaluation.datasets.source import MISSING, Question

NAME = "pairs"
PROBED = 5  # training images of a class that is probed
Reasons = dict[str, str]


@dataclass(frozen=True)
class View(Manifest):
    """A derived manifest; ``id`` is what follows the kind in the name of its task.

    Attributes:
        kind: of the one task that it describes.
        sentences: of every class.
        target_is_modality: the classes are the modalities of the images.
    """

    kind: str = ""
    sentences: dict[str, list[str]] = field(default_factory=dict)
    target_is_modality: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """See `Manifest`."""
        return (self.kind,)

    @property
    def dataset(self) -> str:
        """See `Manifest`."""
        return NAME

    def prompts(self) -> dict[str, list[str]]:
        """See `Manifest`."""
        return self.sentences


class PairsDataset(Dataset):
    """The pairs of a folder, those of one split held out.

    Attributes:
        folder: the pairs that are embedded.
    """

    def __init__(
        self,
        folder: PairFolder,
        split: str,
        questions: Sequence[Question] = (),
        listed: Sequence[Pair] | None = None,
    ) -> None:
        """Keep the pairs; no image is read yet.

        Args:
            folder: the pairs that are embedded.
            split: held out.
            questions: about any of the images.
            listed: all pairs of the folder, if ``folder`` holds a part of them.
        """
        licenses = ", ".join(sorted({pair.license for pair in folder.pairs if pair.license}))
        super().__init__(View(NAME, "classification", "", {NAME: ""}, licenses, "Pairs"), folder.pairs, questions)
        self.folder, self.split = folder, split
        self.listed = folder.pairs if listed is None else listed

    def image(self, pair: Pair) -> Image.Image:
        """See `Dataset`."""
        return to_image(read_pixels(self.folder.image_path(pair)))

    def digest(self, pair: Pair) -> str:
        """See `Dataset`; SHA-256 of the file."""
        try:
            return hashlib.sha256(read_image_bytes(self.folder.image_path(pair))).hexdigest()
        except ValueError:
            return MISSING

    def prompts(self) -> set[str]:
        """Every sentence about the classes of the held-out pairs."""
        pairs = [pair for pair in self.pairs if pair.split == self.split]
        modalities = {known_modality(pair) for pair in pairs} - {""}
        found = {text for modality in modalities for text in modality_prompts(modality)}
        labels = {(pair.label, pair.modality) for pair in pairs if pair.label}
        return found | {text for label, modality in labels for text in label_prompts(label, modality)}

    def views(self, samples: Samples, kinds: Sequence[str]) -> tuple[list[Samples], Reasons]:
        """The views of these kinds that the pairs allow, and why others are left out."""
        makers = {
            "zeroshot": self._zeroshot,
            "retrieval": self._retrieval,
            "probe": self._probe,
            "vqa": self._questions,
        }
        found: list[Samples] = []
        skipped: Reasons = {}
        for kind in kinds:
            views, reasons = makers[kind](samples) if kind in makers else ([], {})
            found += views
            skipped |= reasons
        return found, skipped

    def summary(self) -> dict[str, Any]:
        """See `Dataset`."""
        return super().summary() | {"task": NAME}

    def _zeroshot(self, samples: Samples) -> tuple[list[Samples], Reasons]:
        """By modality, by label, and by label within each modality."""
        found: list[Samples] = []
        skipped: Reasons = {}
        pairs = [pair for pair in samples.held_out if known_modality(pair)]
        modalities = sorted({pair.modality for pair in pairs})
        if len(modalities) >= 2:
            sentences = {modality: modality_prompts(modality) for modality in modalities}
            view = _view("zeroshot", "modality", "modality", modalities, sentences=sentences, target_is_modality=True)
            found.append(replace(samples, manifest=view, held_out=_relabelled(pairs, known_modality)))
        else:
            skipped["zeroshot-modality"] = f"{len(modalities)} modality among the held-out images; 2 are needed"
        labelled = [pair for pair in samples.held_out if pair.label]
        labels = {pair.label for pair in labelled}
        if len(labels) < 2:
            skipped["zeroshot-label"] = f"{len(labels)} label among the held-out images; 2 are needed"
        elif all(pair.label == pair.modality for pair in labelled):
            skipped["zeroshot-label"] = "labels are the modalities"
        else:
            found += _labels(samples, "label", "label", "", labelled)
        if len({pair.modality for pair in labelled}) >= 2:
            for modality in modalities:
                inside = [pair for pair in labelled if pair.modality == modality]
                name = f"label-{slug(modality)}"
                if name in [view.manifest.id for view in found]:  # "MRI" beside "mri"
                    name += f"-{len(found)}"
                found += _labels(samples, name, f"label within {modality}", modality, inside)
        return found, skipped

    def _retrieval(self, samples: Samples) -> tuple[list[Samples], Reasons]:
        """The captions of all pairs."""
        return [replace(samples, manifest=_view("retrieval", "", "captions", task="retrieval"))], {}

    def _probe(self, samples: Samples) -> tuple[list[Samples], Reasons]:
        """By modality and by label, where there are enough training images."""
        found: list[Samples] = []
        skipped: Reasons = {}
        fields: dict[str, Callable[[Pair], str]] = {"modality": known_modality, "label": attrgetter("label")}
        for name, class_of in fields.items():
            counts = Counter(map(class_of, samples.train))
            tested = {own for pair in samples.held_out if (own := class_of(pair)) and counts[own] >= PROBED}
            if len(tested) < 2:
                skipped[f"probe-{name}"] = (
                    f"{len(tested)} {name} with at least {PROBED} training images among the held-out ones; 2 are needed"
                )
            elif name == "label" and all(pair.label in ("", pair.modality) for pair in samples.held_out):
                skipped["probe-label"] = "labels are the modalities"
            else:
                parts = {part: getattr(samples, part) for part in ("held_out", "train", "validation")}
                known: dict[str, Any] = {
                    part: _relabelled(filter(class_of, own), class_of) for part, own in parts.items()
                }
                classes = sorted({pair.label for own in known.values() for pair in own})
                view = _view("probe", name, name, classes, target_is_modality=name == "modality")
                found.append(replace(samples, manifest=view, **known))
        return found, skipped

    def _questions(self, samples: Samples) -> tuple[list[Samples], Reasons]:
        """The questions about the pairs' original images."""
        if not self.questions:
            return [], {"vqa": "no questions were given; name them with --questions FILE"}
        view = _view("vqa", "", "questions", task="vqa")
        pairs = [*samples.train, *samples.validation, *samples.held_out]
        return [replace(samples, manifest=view, digests={pair.id: pair.sha256 for pair in pairs if pair.sha256})], {}


def open_pairs_dataset(path: Path, split: str, trains: bool, questions: Sequence[Question] = ()) -> PairsDataset:
    """Open a folder of pairs; see `PairsDataset`.

    Args:
        path: the folder.
        split: held out.
        trains: a task learns from the training pairs, so that these and validation pairs are embedded, too.
        questions: see `PairsDataset`.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: no pair is in the split.
    """
    folder = open_pairs(path)
    listed = folder.pairs
    held_out = [pair for pair in listed if pair.split == split]
    if not held_out:
        raise ValueError(f"{path} holds {len(listed)} pairs, none of them in split {split!r}")
    if not trains:
        folder.pairs = held_out
    elif split != "test":  # the test pairs are of no use, and are not read
        folder.pairs = [pair for pair in listed if pair.split in (split, "train", "validation")]
    return PairsDataset(folder, split, questions, listed)


def known_modality(pair: Pair) -> str:
    """The modality of a pair, empty where its source does not state it: "unknown" is not a class."""
    return "" if pair.modality == UNKNOWN else pair.modality


def _view(
    kind: str,
    id: str,
    title: str,
    classes: Sequence[str] = (),
    task: DatasetTask = "classification",
    modality: str = "",
    **values: Any,
) -> View:
    phrases: dict[str, list[str]] = {name: [] for name in classes}
    return View(id, task, modality, {NAME: ""}, "", title, phrases, kind=kind, **values)


def _labels(samples: Samples, name: str, title: str, modality: str, pairs: Sequence[Pair]) -> list[Samples]:
    """The view of labelled pairs by label; none where they have one label alone."""
    labels = sorted({pair.label for pair in pairs})
    if len(labels) < 2:
        return []
    seen = sorted({(pair.label, pair.modality) for pair in pairs})
    sentences = {
        label: [text for known, own in seen if known == label for text in label_prompts(label, own)] for label in labels
    }
    view = _view("zeroshot", name, title, labels, modality=modality, sentences=sentences)
    return [replace(samples, manifest=view, held_out=list(pairs))]


def _relabelled(pairs: Iterable[Pair], class_of: Callable[[Pair], str]) -> list[Pair]:
    return [replace(pair, label=class_of(pair)) for pair in pairs]
