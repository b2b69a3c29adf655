"""The classes of a dataset as its manifest names them: what zero-shot classification and probing of it share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmkd.command.settings import nearest
from mmkd.data.table import Pair
from mmkd.evaluation.datasets.manifest import HEADLINES, Manifest
from mmkd.evaluation.statistics import metrics
from mmkd.evaluation.statistics.bootstrap import Metrics, frame
from mmkd.evaluation.statistics.metrics import Floats
from mmkd.evaluation.tasks.task import Classification, Outputs, Task

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


class MultiLabel(Task):
    """Which findings an image shows; ``image.scores`` is ``(n, labels)``, zero the threshold."""

    headline = "macro_auroc"

    def __init__(self, manifest: Manifest, title: str, pairs: Sequence[Pair], labels: Sequence[str]):
        """Fix images, labels and what is resampled: groups, within images with and without any finding.

        Args:
            manifest: of the dataset.
            title: for people.
            pairs: the images.
            labels: those of the manifest that are asked about.
        """
        self.title, self.pairs, self.labels = title, list(pairs), list(labels)
        columns = [list(manifest.classes).index(label) for label in labels]
        self.positive: NDArray[np.bool_] = label_sets(manifest, pairs)[:, columns]
        any_finding = np.any(self.positive, axis=1).tolist()
        self.frames = {
            "image": frame(["finding" if own else "none" for own in any_finding], [pair.group for pair in pairs])
        }
        self.holders = {"image": self.pairs}
        counts = self.positive.sum(axis=0)
        prevalence = {
            f"average_precision: {label}": float(share)
            for label, share in zip(labels, counts / len(pairs), strict=True)
        }
        present = [share for share in prevalence.values() if share > 0]
        self.description = {
            "ids": [pair.id for pair in pairs],
            "labels": self.labels,
            "class_counts": counts.tolist(),
            "undefined_labels": {
                label: f"{count} of {len(pairs)} images show it; AUROC needs some that do and some that do not"
                for label, count in zip(labels, counts.tolist(), strict=True)
                if count in (0, len(pairs))
            },
            "chance": {
                "macro_auroc": 0.5,
                **({"mean_average_precision": float(np.mean(present))} if present else {}),
                "label_accuracy": 0.5,
                **{f"auroc: {label}": 0.5 for label in labels},
                **prevalence,
            },
        }
        self.medmnist = "medmnist" in manifest.source
        name_after(self, manifest)

    def metrics(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """Macro AUROC, mean average precision, share of labels answered rightly, and both areas of every label.

        MedMNIST's ACC is the share of labels answered rightly at a threshold of one half of the probability, which is
        zero of the score, and its AUC the mean over labels; for its sets they stand under these names, too.
        """
        scores, image = outputs["image.scores"].astype(np.float64), weights["image"]
        areas = metrics.label_aurocs(self.positive, scores, image)
        precisions = metrics.label_precisions(self.positive, scores, image)
        found = {
            "macro_auroc": metrics.label_mean(areas),
            "mean_average_precision": metrics.label_mean(precisions),
            "label_accuracy": metrics.weighted_mean(self.sample_scores(outputs)["image"], image),
        }
        if self.medmnist:
            found |= {"medmnist_acc": found["label_accuracy"], "medmnist_auc": found["macro_auroc"]}
        for position, label in enumerate(self.labels):
            found[f"auroc: {label}"] = areas[:, position]
            found[f"average_precision: {label}"] = precisions[:, position]
        return found

    def headline_metric(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """The headline alone, without precisions where it is the mean area."""
        if self.headline != "macro_auroc":
            return super().headline_metric(outputs, weights)
        scores = outputs["image.scores"].astype(np.float64)
        return {self.headline: metrics.label_mean(metrics.label_aurocs(self.positive, scores, weights["image"]))}

    def extras(self, outputs: Outputs) -> dict[str, Any]:
        """Why metrics of a label are undefined, if they are."""
        reasons = self.description["undefined_labels"]
        found = {f"auroc: {label}": reason for label, reason in reasons.items()}
        if len(reasons) == len(self.labels):
            found["macro_auroc"] = "no label has images that show it and images that do not"
        return {"undefined_metrics": found} if found else {}

    def sample_scores(self, outputs: Outputs) -> dict[str, Floats]:
        """Share of an image's labels that are answered rightly."""
        return {"image": ((outputs["image.scores"] > 0) == self.positive).mean(axis=1)}

    def sample_answers(self, outputs: Outputs) -> dict[str, tuple[list[str], list[str]]]:
        """The findings that are there and those that were answered, joined by ``|``."""
        both = (self.positive, outputs["image.scores"] > 0)
        true, answered = ([self._joined(row) for row in rows] for rows in both)
        return {"image": (true, answered)}

    def _joined(self, row: NDArray[np.bool_]) -> str:
        return "|".join(label for label, is_there in zip(self.labels, row.tolist(), strict=True) if is_there)
