"""Several findings that an image may show at once: each is a question of its own, answered by a score above zero."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.data.records import Pair
from mmkd.evaluation import metrics
from mmkd.evaluation.bootstrap import Metrics, frame
from mmkd.evaluation.dataset_classes import label_sets, name_after
from mmkd.evaluation.embedding import Embedded, Vectors
from mmkd.evaluation.manifest import Manifest
from mmkd.evaluation.metrics import Floats
from mmkd.evaluation.prompts import label_prompts
from mmkd.evaluation.task import Outputs, Task
from mmkd.evaluation.zeroshot import class_vector

ARTICLE = re.compile(r"^(an?|the) ")


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


class MultiLabelZeroShot(MultiLabel):
    """Every finding asked by a pair of prompt sets, with and without it."""

    kind = "zeroshot"

    def __init__(self, manifest: Manifest, pairs: Sequence[Pair]):
        """Fix images and prompts; see `MultiLabel`."""
        title = f"Which findings, in {manifest.title or manifest.id}?"
        super().__init__(manifest, title, pairs, list(manifest.classes))
        self.prompts, self.negatives = manifest.prompts(), negative_prompts(manifest)
        self.description |= {"prompts": self.prompts, "negative_prompts": self.negatives}

    def outputs(self, embedded: Embedded) -> Outputs:
        """``image.scores``: similarity with a finding minus that without it, over the standard deviation of all."""
        images = embedded.image_matrix(self.pairs)
        there, absent = (_similarities(embedded, images, asked) for asked in (self.prompts, self.negatives))
        margins = (there - absent).astype(np.float64)
        spread = margins.std()
        return {"image.scores": margins / (spread if spread > 0 else 1.0)}

    def ensemble(self, members: Sequence[Embedded], outputs: Sequence[Outputs]) -> Outputs:
        """Mean of the members' scores, which are of one scale."""
        return {"image.scores": np.mean([own["image.scores"] for own in outputs], axis=0)}


def negative_prompts(manifest: Manifest) -> dict[str, list[str]]:
    """Sentences that say of each class that it is not there, in the templates of `Manifest.prompts`.

    "radiograph of a lung nodule" becomes "radiograph without lung nodule", elsewhere "a lung nodule" "no lung nodule".
    """
    family = manifest.templates or manifest.modality
    return {
        name: [
            text.replace(" of no ", " without ")
            for phrase in phrases or [name]
            for text in label_prompts(f"no {ARTICLE.sub('', phrase)}", family)
        ]
        for name, phrases in manifest.classes.items()
    }


def _similarities(embedded: Embedded, images: Vectors, prompts: dict[str, list[str]]) -> Vectors:
    return images @ np.stack([class_vector(embedded.text_matrix(texts)) for texts in prompts.values()]).T
