"""What every task type has in common, and the metrics that zero-shot classification and linear probing share.

A task turns an encoder's embeddings into per-sample outputs, and outputs plus bootstrap weights into metrics. Outputs
are arrays named ``FRAME.NAME`` whose first axis is that frame's samples; hence rows of different encoders can be put
together (the best teacher of each modality) without knowing what the task is. An array whose name has no dot is no
output of samples but what was found in the fit, such as a probe's C.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.dataset import Collection
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.datasets.questions import Question
from mmkd.evaluation.embeddings.embed import Embedded
from mmkd.evaluation.statistics import metrics
from mmkd.evaluation.statistics.bootstrap import Frame, Metrics, frame
from mmkd.evaluation.statistics.metrics import Floats, Integers

Outputs = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Samples:
    """The pairs of an evaluation, readable ones only.

    Attributes:
        held_out: what is evaluated on.
        train: for probing.
        validation: for the choice of the probe's regularisation.
        digests: pair id -> hash of the image file; equal images are positives of each other's captions.
        questions: about any of the images, for visual question answering.
        within: whether labels are told apart within a modality (and over all) or within a collection.
        captioned: collections whose captions are retrieved, all together if none is named.
        manifest: of the one dataset these are, where tasks follow a manifest.
        collection: that dataset, opened.
        probe_on: which image vectors are learnt from, where tasks follow a manifest.
        probe_search: whether a probe's C is chosen by the validation images or set by the number of dimensions.
        probe_curve: whether probes are also fitted to few images and to parts of the training set.
        auroc_on: whether AUROC ranks by margins over the other classes or by softmax probabilities.
    """

    held_out: list[Pair]
    train: list[Pair]
    validation: list[Pair]
    digests: dict[str, str]
    questions: list[Question] = field(default_factory=list)
    within: Literal["modality", "source"] = "modality"
    captioned: list[str] = field(default_factory=list)
    manifest: Manifest | None = None
    collection: Collection | None = None
    probe_on: Literal["pooled", "joint"] = "pooled"
    probe_search: Literal["sweep", "fast"] = "sweep"
    probe_curve: bool = True
    auroc_on: Literal["margin", "softmax"] = "margin"


class Task(ABC):
    """One column of the results.

    Attributes:
        name: file name of its cells.
        title: for people.
        kind: a row of `suite.SUITE`.
        headline: the metric that stands for the task.
        frames: what is resampled, by name; ``image`` is always there.
        holders: the pair behind each sample of each frame.
        description: everything a reader needs to redo or judge it; plain JSON values.
        asks_modality: the answer is the modality, so that choosing an encoder by modality would give it away.
        dataset: id of the manifest it follows; empty where it follows the pairs.
        modality: of that dataset.
        variant: which of several tasks of one kind on that dataset; empty for the main one.
    """

    name: str
    title: str
    kind: str
    headline: str
    frames: dict[str, Frame]
    holders: dict[str, list[Pair]]
    description: dict[str, Any]
    asks_modality: bool = False
    dataset: str = ""
    modality: str = ""
    variant: str = ""

    @property
    def modalities(self) -> dict[str, list[str]]:
        """Modality of each sample of each frame."""
        return {name: [pair.modality for pair in pairs] for name, pairs in self.holders.items()}

    @abstractmethod
    def outputs(self, embedded: Embedded) -> Outputs:
        """Per-sample outputs of one encoder.

        Raises:
            Undefined: it cannot answer.
        """

    def evidence(self, embedded: Embedded) -> list[Any]:
        """What else an encoder's answers rest on, beside its weights and the pairs; plain JSON values."""
        return []

    def extras(self, outputs: Outputs) -> dict[str, Any]:
        """What else a cell shall keep: curves and tables that are not of single samples; plain JSON values."""
        return {}

    @abstractmethod
    def ensemble(self, members: Sequence[Embedded], outputs: Sequence[Outputs]) -> Outputs:
        """Per-sample outputs of several encoders together, each with the same say."""

    @abstractmethod
    def metrics(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """Metric values ``(replicates,)`` under weights ``(replicates, n)`` of each frame."""

    def headline_metric(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """The metric that stands for the task, alone."""
        return {self.headline: self.metrics(outputs, weights)[self.headline]}

    @abstractmethod
    def sample_scores(self, outputs: Outputs) -> dict[str, Floats]:
        """How well each sample of each frame was answered, 0 to 1, ``(n,)``."""

    def sample_answers(self, outputs: Outputs) -> dict[str, tuple[list[str], list[str]]]:
        """What was right and what was answered for each sample, by frame, where answers have names."""
        return {}


class Classification(Task):
    """Assign one of several classes to each image; ``image.scores`` is ``(n, classes)``."""

    headline = "balanced_accuracy"

    def __init__(self, name: str, title: str, pairs: Sequence[Pair], names: Sequence[str], classes: Sequence[str]):
        """Fix images, classes and what is resampled.

        Args:
            name: of the task.
            title: for people.
            pairs: the images.
            names: true class of each.
            classes: the possible answers.
        """
        self.name, self.title = name, title
        self.pairs = list(pairs)
        self.classes = list(classes)
        self.targets: Integers = np.array([self.classes.index(name) for name in names], dtype=np.int64)
        self.frames = {"image": frame(names, [pair.group for pair in pairs])}
        self.holders = {"image": self.pairs}
        counts, guess = np.bincount(self.targets, minlength=len(self.classes)), 1 / len(classes)
        share = counts[counts > 0] / len(pairs)
        self.description = {
            "ids": [pair.id for pair in pairs],
            "classes": self.classes,
            "targets": self.targets.tolist(),
            "class_counts": counts.tolist(),
            "chance": {
                "accuracy": guess,
                "balanced_accuracy": guess,
                "macro_f1": float((2 * share * guess / (share + guess)).mean()),
                "macro_auroc": 0.5,
            },
        }

    def metrics(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """Balanced accuracy, accuracy, macro-F1 and macro one-versus-rest AUROC."""
        scores, image = outputs["image.scores"].astype(np.float64), weights["image"]
        answers = scores.argmax(axis=1)
        return {
            "balanced_accuracy": metrics.balanced_accuracy(self.targets, answers, image),
            "accuracy": metrics.accuracy(self.targets, answers, image),
            "macro_f1": metrics.macro_f1(self.targets, answers, image),
            "macro_auroc": metrics.macro_auroc(self.targets, metrics.margins(scores), image),
        }

    def headline_metric(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """Balanced accuracy alone, without the sorting that AUROC needs."""
        answers = outputs["image.scores"].argmax(axis=1)
        return {self.headline: metrics.balanced_accuracy(self.targets, answers, weights["image"])}

    def sample_scores(self, outputs: Outputs) -> dict[str, Floats]:
        """1 where the answer is right."""
        return {"image": (outputs["image.scores"].argmax(axis=1) == self.targets).astype(np.float64)}

    def sample_answers(self, outputs: Outputs) -> dict[str, tuple[list[str], list[str]]]:
        """The true class and the one with the highest score."""
        answers = outputs["image.scores"].argmax(axis=1)
        return {"image": tuple([self.classes[k] for k in own.tolist()] for own in (self.targets, answers))}  # type: ignore[dict-item]


def best_by_modality(task: Task, outputs: dict[str, Outputs]) -> tuple[Outputs, dict[str, str]]:
    """For each modality the outputs of the encoder that does best on it: an oracle, chosen on the test set itself.

    Args:
        task: of these outputs.
        outputs: by encoder.

    Returns:
        The composed outputs, and the encoder chosen for each ``FRAME:MODALITY``.
    """
    composed: Outputs = {key: array.copy() for key, array in next(iter(outputs.values())).items() if "." in key}
    chosen: dict[str, str] = {}
    scores = {name: task.sample_scores(own) for name, own in outputs.items()}
    for frame_name, modalities in task.modalities.items():
        for modality in sorted(set(modalities)):
            rows = np.array([m == modality for m in modalities])
            best = max(outputs, key=lambda name: scores[name][frame_name][rows].mean())
            chosen[f"{frame_name}:{modality}"] = best
            for key in composed:
                if key.startswith(frame_name + "."):
                    composed[key][rows] = outputs[best][key][rows]
    return composed, chosen
