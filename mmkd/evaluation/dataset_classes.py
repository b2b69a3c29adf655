"""The classes of a dataset as its manifest names them: what zero-shot classification and probing of it share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from mmkd.data.records import Pair
from mmkd.evaluation import metrics
from mmkd.evaluation.bootstrap import Metrics
from mmkd.evaluation.manifest import HEADLINES, Manifest
from mmkd.evaluation.metrics import Floats
from mmkd.evaluation.task import Classification, Outputs, Task
from mmkd.settings import nearest

Areas = Literal["margin", "softmax"]
SEPARATOR = "|"


class DatasetClasses(Classification):
    """Classification of a dataset; the manifest says which classes there are and whether they are grades."""

    ordinal = False
    medmnist = False
    areas: Areas = "margin"

    def follow(self, manifest: Manifest, areas: Areas = "margin", variant: str = "") -> None:
        """Take headline, order and notes from the manifest.

        Args:
            manifest: of the dataset.
            variant: which of several tasks of this kind on it.
            areas: what AUROC ranks by: the margin over the other classes, or softmax probabilities of the scores.

        Raises:
            ValueError: the manifest's headline is no metric of this task.
        """
        self.ordinal, self.medmnist, self.areas = manifest.task == "ordinal", "medmnist" in manifest.source, areas
        if self.ordinal:
            self.headline = HEADLINES["ordinal"]
            self.description["chance"]["quadratic_kappa"] = 0.0
        if self.medmnist:
            self.description["chance"] |= {"medmnist_acc": 1 / len(self.classes), "medmnist_auc": 0.5}
        name_after(self, manifest, variant)
        present = set(self.targets.tolist())
        self.description |= {
            "auroc_on": areas,
            "absent": [name for k, name in enumerate(self.classes) if k not in present],
        }

    def metrics(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """Those of every classification, quadratic kappa of grades, and MedMNIST's own ACC and AUC for its sets.

        With one class alone among the images, nothing but accuracy is defined; `extras` says so.
        """
        found = super().metrics(outputs, weights)
        scores, image = outputs["image.scores"].astype(np.float64), weights["image"]
        if self.areas == "softmax":
            found["macro_auroc"] = metrics.macro_auroc(self.targets, softmax(scores), image)
        if self.ordinal:
            found["quadratic_kappa"] = metrics.quadratic_kappa(self.targets, scores.argmax(axis=1), image)
        if self.medmnist:
            found["medmnist_acc"] = found["accuracy"]
            found["medmnist_auc"] = metrics.macro_auroc(self.targets, softmax(scores), image)
        return {name: self._where_defined(name, values) for name, values in found.items()}

    def headline_metric(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """The headline alone, without the sorting that AUROC needs where it is another."""
        if self.headline == "balanced_accuracy":
            found = super().headline_metric(outputs, weights)
            return {name: self._where_defined(name, values) for name, values in found.items()}
        if self.headline == "quadratic_kappa":
            answers = outputs["image.scores"].argmax(axis=1)
            found = {self.headline: metrics.quadratic_kappa(self.targets, answers, weights["image"])}
            return {name: self._where_defined(name, values) for name, values in found.items()}
        return Task.headline_metric(self, outputs, weights)

    def extras(self, outputs: Outputs) -> dict[str, Any]:
        """Why metrics are undefined, if they are."""
        if not self._one_class:
            return {}
        only = self.classes[int(self.targets[0])]
        undefined = sorted(set(self.metrics(outputs, {"image": np.ones((1, len(self.targets)))})) - DEFINED)
        reason = f"all {len(self.targets)} images are of one class, {only!r}; at least two are needed"
        return {"undefined_metrics": dict.fromkeys(undefined, reason)}

    @property
    def _one_class(self) -> bool:
        return len(set(self.targets.tolist())) < 2

    def _where_defined(self, name: str, values: Floats) -> Floats:
        return np.full_like(values, np.nan) if self._one_class and name not in DEFINED else values


DEFINED = {"accuracy", "medmnist_acc"}


def name_after(task: Task, manifest: Manifest, variant: str = "") -> None:
    """Call a task ``KIND-ID`` or ``KIND-ID-VARIANT``, and give it the dataset's id, modality and headline.

    A variant that does not know the headline keeps its own.

    Raises:
        ValueError: the manifest's headline is no metric of the main task.
    """
    task.name = "-".join(part for part in (task.kind, manifest.id, variant) if part)
    task.dataset, task.modality, task.variant = manifest.id, manifest.modality, variant
    chances = task.description["chance"]
    if manifest.headline in chances:
        task.headline = manifest.headline
    elif manifest.headline and not variant:
        raise ValueError(
            f"{manifest.id}: headline is {manifest.headline!r}{nearest(manifest.headline, chances)}; "
            f"allowed: {', '.join(chances)}"
        )


def softmax(scores: Floats) -> Floats:
    """Probabilities ``(n, classes)`` of scores ``(n, classes)``."""
    return np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))


def class_names(manifest: Manifest, pairs: Sequence[Pair]) -> list[str]:
    """The class of every pair.

    Raises:
        ValueError: a label is empty or no class of the manifest.
    """
    for pair in pairs:
        _known(manifest, pair, pair.label)
    return [pair.label for pair in pairs]


def label_sets(manifest: Manifest, pairs: Sequence[Pair]) -> np.ndarray:
    """Which labels every pair has, bool ``(n, labels)`` in the manifest's order; an empty label means none.

    Raises:
        ValueError: a label is none of the manifest's.
    """
    position = {name: k for k, name in enumerate(manifest.classes)}
    found = np.zeros((len(pairs), len(position)), dtype=bool)
    for row, pair in enumerate(pairs):
        for name in pair.label.split(SEPARATOR) if pair.label else []:
            _known(manifest, pair, name)
            found[row, position[name]] = True
    return found


def _known(manifest: Manifest, pair: Pair, label: str) -> None:
    if label not in manifest.classes:
        raise ValueError(
            f"{manifest.id}: image {pair.id} has the label {label!r}{nearest(label, manifest.classes)}; "
            f"its manifest knows {', '.join(manifest.classes)}"
        )
