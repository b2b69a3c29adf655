"""The contract of every task type.

A task type is a module with a function ``tasks(samples, options)``: from the images of one dataset to its tasks, and
the reasons why others are left out. A task turns an encoder's embeddings into per-sample outputs, and outputs plus
bootstrap weights into metrics. Outputs are arrays named ``UNIT.NAME`` whose first axis is the unit's samples; hence
rows of different encoders can be combined (the best teacher of each modality) without knowledge of the task. An array
whose name has no dot is not an output of samples but a result of the fit, such as a probe's C.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmkd.command.settings import nearest
from mmkd.data.table import Pair
from mmkd.evaluation.datasets.manifest import PRIMARY_METRICS, Manifest
from mmkd.evaluation.embeddings.embed import Embedded
from mmkd.evaluation.statistics.bootstrap import Metrics, ResamplingUnits
from mmkd.evaluation.statistics.metrics import Floats

Outputs = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class TaskOptions:
    """How the tasks of an evaluation are made, whatever their dataset.

    Attributes:
        probe_on: image vectors of the probes: before the projection, or in the joint space.
        probe_search: a probe's C is chosen on the validation images, or set by the number of dimensions.
        probe_curve: also fit probes to few images and to parts of the training set.
        probe_images: training images that a class needs to be probed.
        question_splits: ``official`` and ``disjoint`` splits of the questions, or those of their ``images``.
        question_heads: ``vectors``, ``meter`` and ``zeroshot``.
    """

    probe_on: Literal["pooled", "joint"] = "pooled"
    probe_search: Literal["sweep", "fast"] = "sweep"
    probe_curve: bool = True
    probe_images: int = 1
    question_splits: tuple[str, ...] = ("official", "disjoint")
    question_heads: tuple[str, ...] = ("vectors", "meter", "zeroshot")


class Task(ABC):
    """One column of the results.

    Attributes:
        kind: the task type, a key of `suite.SUITE`.
        primary_metric: the metric that represents the task.
        manifest: of its dataset.
        variant: which of several tasks of this kind on the dataset; empty for the main one.
        name: file name of its results, ``KIND-ID`` or ``KIND-ID-VARIANT``.
        title: for people.
        units: what is resampled, by kind of sample; ``image`` always exists.
        sample_pairs: the pair behind each sample of each unit.
        description: everything a reader needs to reproduce or evaluate it; plain JSON values.
    """

    kind: str
    primary_metric: str
    units: dict[str, ResamplingUnits]
    sample_pairs: dict[str, list[Pair]]
    description: dict[str, Any]

    def __init__(self, manifest: Manifest, title: str, variant: str = "") -> None:
        """Name the task after its dataset."""
        self.manifest, self.variant, self.primary_metric = manifest, variant, PRIMARY_METRICS[manifest.task]
        self.name = task_name(self.kind, manifest, variant)
        self.title = f"{title}: {manifest.title or manifest.id}" if manifest.title or manifest.id else title

    def describe(self, description: dict[str, Any]) -> None:
        """Set the description, and the primary metric that the manifest names.

        A variant without that metric keeps its own.

        Args:
            description: holds ``chance``, the value of every metric that may be primary for random answers.

        Raises:
            ValueError: the manifest's metric is not one of the main task.
        """
        self.description = description
        named, known = self.manifest.primary_metric, description["chance"]
        if named in known:
            self.primary_metric = named
        elif named and not self.variant:
            raise ValueError(
                f"{self.manifest.id}: primary_metric is {named!r}{nearest(named, known)}; allowed: {', '.join(known)}"
            )

    @property
    def modalities(self) -> dict[str, list[str]]:
        """Modality of each sample of each unit."""
        return {name: [pair.modality for pair in pairs] for name, pairs in self.sample_pairs.items()}

    @abstractmethod
    def outputs(self, embedded: Embedded) -> Outputs:
        """Per-sample outputs of one encoder.

        Raises:
            UndefinedMetricError: the encoder cannot answer.
        """

    def extra_fingerprint(self, embedded: Embedded) -> list[Any]:
        """Further inputs of an encoder's answers beside its weights and the pairs; plain JSON values."""
        return []

    def extras(self, outputs: Outputs) -> dict[str, Any]:
        """Further entries of a result: curves and tables that do not belong to single samples; plain JSON values."""
        return {}

    def ensemble(self, members: Sequence[Embedded], outputs: Sequence[Outputs]) -> Outputs:
        """Per-sample outputs of several encoders together, with equal weights: by default the mean of theirs."""
        return {key: np.mean([own[key] for own in outputs], axis=0) for key in outputs[0] if "." in key}

    @abstractmethod
    def metrics(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """Metric values ``(replicates,)`` under weights ``(replicates, n)`` of each unit."""

    def primary_metric_values(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """The primary metric alone."""
        return {self.primary_metric: self.metrics(outputs, weights)[self.primary_metric]}

    @abstractmethod
    def sample_scores(self, outputs: Outputs) -> dict[str, Floats]:
        """How well each sample of each unit was answered, 0 to 1, ``(n,)``."""

    def sample_answers(self, outputs: Outputs) -> dict[str, tuple[list[str], list[str]]]:
        """The target and the prediction of each sample, by unit, where answers have names."""
        return {}

    def sample_columns(self, outputs: Outputs) -> dict[str, dict[str, NDArray[Any]]]:
        """Further columns ``(n,)`` of the table of scores, by unit: what the task's metrics are computed from."""
        return {}


def task_name(kind: str, manifest: Manifest, variant: str = "") -> str:
    """``KIND-ID`` or ``KIND-ID-VARIANT``; the captions and the questions of a folder of pairs have no id."""
    return "-".join(part for part in (kind, manifest.id, variant) if part)


def best_by_modality(task: Task, outputs: dict[str, Outputs]) -> tuple[Outputs, dict[str, str]]:
    """For each modality the outputs of the encoder that does best on it: an oracle, selected on the test set.

    Args:
        task: of these outputs.
        outputs: by encoder.

    Returns:
        The composed outputs, and the encoder chosen for each ``UNIT:MODALITY``.
    """
    composed: Outputs = {key: array.copy() for key, array in next(iter(outputs.values())).items() if "." in key}
    chosen: dict[str, str] = {}
    scores = {name: task.sample_scores(own) for name, own in outputs.items()}
    for unit, modalities in task.modalities.items():
        for modality in sorted(set(modalities)):
            rows = np.array([m == modality for m in modalities])
            best = max(outputs, key=lambda name: scores[name][unit][rows].mean())
            chosen[f"{unit}:{modality}"] = best
            for key in composed:
                if key.startswith(f"{unit}."):
                    composed[key][rows] = outputs[best][key][rows]
    return composed, chosen
