"""Classification of images, by one class each or by several findings: what zero-shot and probing share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.statistics import metrics
from mmkd.evaluation.statistics.bootstrap import Metrics, resampling_units
from mmkd.evaluation.statistics.metrics import Floats, Integers
from mmkd.evaluation.tasks.task import Outputs, Task

SEPARATOR = "|"
DEFINED_FOR_ONE_CLASS = {"accuracy", "medmnist_acc"}


class Classification(Task):
    """Assign one of several classes, or grades, to each image; ``image.scores`` is ``(n, classes)``."""

    def __init__(
        self,
        manifest: Manifest,
        title: str,
        pairs: Sequence[Pair],
        classes: Sequence[str],
        variant: str = "",
        chance: dict[str, float] | None = None,
    ) -> None:
        """Fix images, classes and what is resampled.

        Args:
            manifest: of the dataset.
            title: for people.
            pairs: the images; the label of each is its class.
            classes: the possible answers.
            variant: which of several tasks of this kind.
            chance: of further metrics.

        Raises:
            ValueError: the manifest's primary metric is not one of this task.
        """
        super().__init__(manifest, title, variant)
        self.pairs, self.classes = list(pairs), list(classes)
        self.targets = self.targets_of(self.pairs)
        names, groups = [pair.label for pair in self.pairs], [pair.group for pair in self.pairs]
        self.units = {"image": resampling_units(names, groups)}
        self.sample_pairs = {"image": self.pairs}
        self.ordinal, self.medmnist = manifest.task == "ordinal", "medmnist" in manifest.source
        counts, guess = np.bincount(self.targets, minlength=len(self.classes)), 1 / len(self.classes)
        share = counts[counts > 0] / len(self.pairs)
        self.describe(
            {
                "ids": [pair.id for pair in self.pairs],
                "classes": self.classes,
                "targets": self.targets.tolist(),
                "class_counts": counts.tolist(),
                "chance": {
                    "accuracy": guess,
                    "balanced_accuracy": guess,
                    "macro_f1": float((2 * share * guess / (share + guess)).mean()),
                    "macro_auroc": 0.5,
                    **({"weighted_auroc": 0.5} if len(self.classes) > 2 else {}),
                    **({"quadratic_kappa": 0.0} if self.ordinal else {}),
                    **({"medmnist_acc": guess, "medmnist_auc": 0.5} if self.medmnist else {}),
                    **(chance or {}),
                },
                "absent": [name for name, count in zip(self.classes, counts, strict=True) if not count],
            }
        )

    def metrics(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """Balanced accuracy, accuracy, macro-F1 and macro one-versus-rest AUROC.

        AUROC ranks by margins, which order images as the softmax of the scores does. With three classes or more there
        is also the AUROC weighted by class frequency; with two both are equal. Grades have quadratic kappa, and
        MedMNIST's sets its own ACC and AUC. If all images are of one class, nothing but accuracy is defined; `extras`
        gives the reason.
        """
        scores, image = outputs["image.scores"].astype(np.float64), weights["image"]
        answers = scores.argmax(axis=1)
        rest = self.targets[:, None] == np.arange(len(self.classes))
        areas = metrics.label_aurocs(rest, metrics.margins(scores), image)
        found = {
            "balanced_accuracy": metrics.balanced_accuracy(self.targets, answers, image),
            "accuracy": metrics.accuracy(self.targets, answers, image),
            "macro_f1": metrics.macro_f1(self.targets, answers, image),
            "macro_auroc": metrics.defined_mean(areas),
        }
        if len(self.classes) > 2:
            found["weighted_auroc"] = metrics.frequency_mean(areas, self.targets, image)
        if self.ordinal:
            found["quadratic_kappa"] = metrics.quadratic_kappa(self.targets, answers, image)
        if self.medmnist:
            found |= {"medmnist_acc": found["accuracy"], "medmnist_auc": found["macro_auroc"]}
        return self._where_defined(found)

    def primary_metric_values(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """The primary metric alone, without the sorting that AUROC needs."""
        measures = {"balanced_accuracy": metrics.balanced_accuracy, "quadratic_kappa": metrics.quadratic_kappa}
        if self.primary_metric not in measures:
            return super().primary_metric_values(outputs, weights)
        answers = outputs["image.scores"].argmax(axis=1)
        return self._where_defined(
            {self.primary_metric: measures[self.primary_metric](self.targets, answers, weights["image"])}
        )

    def extras(self, outputs: Outputs) -> dict[str, Any]:
        """Why metrics are undefined, if they are."""
        if not self._one_class:
            return {}
        only = self.classes[int(self.targets[0])]
        names = self.metrics(outputs, {"image": np.ones((1, len(self.targets)))})
        undefined = sorted(name for name in names if name.partition("@")[0] not in DEFINED_FOR_ONE_CLASS)
        reason = f"all {len(self.targets)} images are of one class, {only!r}; at least two are needed"
        return {"undefined_metrics": dict.fromkeys(undefined, reason)}

    def sample_scores(self, outputs: Outputs) -> dict[str, Floats]:
        """1 where the answer is right."""
        return {"image": (outputs["image.scores"].argmax(axis=1) == self.targets).astype(np.float64)}

    def sample_answers(self, outputs: Outputs) -> dict[str, tuple[list[str], list[str]]]:
        """The true class and the one with the highest score."""
        return {"image": self._named(self.targets, outputs["image.scores"].argmax(axis=1))}

    def sample_columns(self, outputs: Outputs) -> dict[str, dict[str, Floats]]:
        """``score: CLASS``, what AUROC ranks by."""
        if "image.scores" not in outputs:
            return {}
        margins = metrics.margins(outputs["image.scores"].astype(np.float64))
        return {"image": score_columns(self.classes, margins)}

    def targets_of(self, pairs: Sequence[Pair]) -> Integers:
        """Number of the class of each pair, ``(n,)``."""
        return np.array([self.classes.index(pair.label) for pair in pairs], dtype=np.int64)

    def _named(self, targets: Integers, answers: Integers) -> tuple[list[str], list[str]]:
        return [self.classes[k] for k in targets.tolist()], [self.classes[k] for k in answers.tolist()]

    @property
    def _one_class(self) -> bool:
        return len(set(self.targets.tolist())) < 2

    def _where_defined(self, found: Metrics) -> Metrics:
        if not self._one_class:
            return found
        return {
            name: values if name in DEFINED_FOR_ONE_CLASS else np.full_like(values, np.nan)
            for name, values in found.items()
        }


class MultiLabel(Task):
    """Which findings an image shows; ``image.scores`` is ``(n, labels)``, with a threshold of zero."""

    def __init__(self, manifest: Manifest, title: str, pairs: Sequence[Pair], labels: Sequence[str]) -> None:
        """Fix images, labels and what is resampled: groups, within images with and without any finding.

        Args:
            manifest: of the dataset.
            title: for people.
            pairs: the images.
            labels: those of the manifest that are predicted.
        """
        super().__init__(manifest, title)
        self.pairs, self.labels = list(pairs), list(labels)
        self.positive = label_sets(self.labels, pairs)
        any_finding = np.any(self.positive, axis=1).tolist()
        strata = ["finding" if own else "none" for own in any_finding]
        self.units = {"image": resampling_units(strata, [pair.group for pair in pairs])}
        self.sample_pairs = {"image": self.pairs}
        self.medmnist = "medmnist" in manifest.source
        counts = self.positive.sum(axis=0)
        prevalence = {
            f"average_precision: {label}": float(share)
            for label, share in zip(labels, counts / len(pairs), strict=True)
        }
        present = [share for share in prevalence.values() if share > 0]
        self.describe(
            {
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
        )

    def metrics(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """Macro AUROC, mean average precision, share of correct labels, and both areas of every label.

        MedMNIST's ACC is the share of correct labels at a probability of one half, which is a score of zero, and its
        AUC the mean over labels; its sets have these names, too.
        """
        scores, image = outputs["image.scores"].astype(np.float64), weights["image"]
        areas = metrics.label_aurocs(self.positive, scores, image)
        precisions = metrics.label_precisions(self.positive, scores, image)
        found = {
            "macro_auroc": metrics.defined_mean(areas),
            "mean_average_precision": metrics.defined_mean(precisions),
            "label_accuracy": metrics.weighted_mean(self.sample_scores(outputs)["image"], image),
        }
        if self.medmnist:
            found |= {"medmnist_acc": found["label_accuracy"], "medmnist_auc": found["macro_auroc"]}
        for position, label in enumerate(self.labels):
            found[f"auroc: {label}"] = areas[:, position]
            found[f"average_precision: {label}"] = precisions[:, position]
        return found

    def primary_metric_values(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """The primary metric alone, without precisions where it is the mean area."""
        if self.primary_metric != "macro_auroc":
            return super().primary_metric_values(outputs, weights)
        scores = outputs["image.scores"].astype(np.float64)
        return {
            self.primary_metric: metrics.defined_mean(metrics.label_aurocs(self.positive, scores, weights["image"]))
        }

    def extras(self, outputs: Outputs) -> dict[str, Any]:
        """Why metrics of a label are undefined, if they are."""
        reasons = self.description["undefined_labels"]
        found = {f"auroc: {label}": reason for label, reason in reasons.items()}
        if len(reasons) == len(self.labels):
            found["macro_auroc"] = "no label has images that show it and images that do not"
        return {"undefined_metrics": found} if found else {}

    def sample_scores(self, outputs: Outputs) -> dict[str, Floats]:
        """Share of an image's labels that are correct."""
        return {"image": ((outputs["image.scores"] > 0) == self.positive).mean(axis=1)}

    def sample_answers(self, outputs: Outputs) -> dict[str, tuple[list[str], list[str]]]:
        """The true and the predicted findings, joined by ``|``."""
        true, answered = (
            [SEPARATOR.join(label for label, shown in zip(self.labels, row, strict=True) if shown) for row in rows]
            for rows in (self.positive.tolist(), (outputs["image.scores"] > 0).tolist())
        )
        return {"image": (true, answered)}

    def sample_columns(self, outputs: Outputs) -> dict[str, dict[str, Floats]]:
        """``score: LABEL``, what AUROC ranks by."""
        return {"image": score_columns(self.labels, outputs["image.scores"].astype(np.float64))}


def score_columns(names: Sequence[str], scores: Floats) -> dict[str, Floats]:
    """A column ``score: NAME`` for each class or label of ``scores`` ``(n, names)``."""
    return {f"score: {name}": scores[:, k] for k, name in enumerate(names)}


def label_sets(labels: Sequence[str], pairs: Sequence[Pair]) -> NDArray[np.bool_]:
    """Which of some labels every pair has, ``(n, labels)``; an empty label means none."""
    found = [pair.label.split(SEPARATOR) for pair in pairs]
    return np.array([[label in own for label in labels] for own in found], dtype=bool).reshape(-1, len(labels))
