"""Linear probing: how much of the class a linear classifier reads from frozen image vectors.

Features are standardised on the training images; scikit-learn's L-BFGS logistic regression; C is chosen by the
log-loss on the validation images; then one more fit on training and validation together. Without validation images of
every class C is ``dim * classes / 100``. Classes with too few training images are left out and named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmkd.evaluation.datasets.dataset import Samples
from mmkd.evaluation.embeddings.embed import Embedded
from mmkd.evaluation.tasks.classification import Classification, MultiLabel, class_names, label_sets
from mmkd.evaluation.tasks.learning_curve import ProbeCurve
from mmkd.evaluation.tasks.logistic_regression import log_mean, probe, probed_features
from mmkd.evaluation.tasks.task import Outputs, TaskOptions, task_name

TITLE = "Linear probe"


class LinearProbe(Classification):
    """One of several classes, learned from the training images' vectors."""

    kind = "probe"

    def __init__(self, samples: Samples, classes: list[str], options: TaskOptions) -> None:
        """Fix the images of the three splits.

        Args:
            samples: of the dataset; pairs of other classes are left out.
            classes: those with enough training images.
            options: vectors, and how C is found: without search where a class has no validation image.
        """
        own = samples.where(lambda pair: pair.label in classes)
        super().__init__(samples.manifest, TITLE, own.held_out, classes)
        self.train, self.validation = own.train, own.validation
        self.train_targets, self.validation_targets = self.targets_of(self.train), self.targets_of(self.validation)
        self.probe_on = options.probe_on
        all_validated = len(set(self.validation_targets.tolist())) == len(classes)
        self.search = options.probe_search if all_validated else "fast"
        known = {pair.label for pair in samples.held_out} - {""}
        self.description |= {
            "train": len(self.train),
            "validation": len(self.validation),
            "left_out": sorted(known - set(classes)),
            "probe_on": self.probe_on,
            "search": self.search,
        }

    def outputs(self, embedded: Embedded) -> Outputs:
        """See `probe`."""
        parts = probed_features(embedded, self.probe_on, [self.train, self.validation, self.pairs])
        return probe(parts, self.train_targets, self.validation_targets, self.search)

    def ensemble(self, members: Sequence[Embedded], outputs: Sequence[Outputs]) -> Outputs:
        """Logarithm of the mean of the members' probabilities."""
        return {"image.scores": log_mean([own["image.scores"] for own in outputs])}


class MultiLabelProbe(MultiLabel):
    """A probe of its own for each finding, all with one C."""

    kind = "probe"

    def __init__(self, samples: Samples, labels: list[str], options: TaskOptions) -> None:
        """Fix the images of the three splits.

        Args:
            samples: of the dataset.
            labels: those that some training images show and some do not.
            options: vectors, and how C is found.
        """
        super().__init__(samples.manifest, TITLE, samples.held_out, labels)
        self.train, self.validation = samples.train, samples.validation
        self.train_targets, self.validation_targets = self.findings(self.train), self.findings(self.validation)
        self.probe_on, self.search = options.probe_on, options.probe_search if self.validation else "fast"
        self.description |= {
            "train": len(self.train),
            "validation": len(self.validation),
            "left_out": [label for label in samples.manifest.classes if label not in labels],
            "probe_on": self.probe_on,
            "search": self.search,
        }

    def outputs(self, embedded: Embedded) -> Outputs:
        """See `probe`."""
        parts = probed_features(embedded, self.probe_on, [self.train, self.validation, self.pairs])
        return probe(parts, self.train_targets, self.validation_targets, self.search)

    def ensemble(self, members: Sequence[Embedded], outputs: Sequence[Outputs]) -> Outputs:
        """Mean of the members' logits."""
        return {"image.scores": np.mean([own["image.scores"] for own in outputs], axis=0)}


def tasks(samples: Samples, options: TaskOptions) -> tuple[list[Any], dict[str, str]]:
    """The probe of a dataset of classes, grades or findings, and its learning curve.

    Returns:
        ``probe-ID`` and, for classes and grades, ``probe-ID-shots``; and why they are left out.

    Raises:
        ValueError: a label or the primary metric is unknown to the manifest.
    """
    manifest, name = samples.manifest, task_name("probe", samples.manifest)
    if not samples.train or not samples.held_out:
        return [], {name: f"no readable image {'to learn from' if samples.held_out else 'held out'}"}
    if manifest.task == "multilabel":
        shown, _, _ = (label_sets(manifest, own) for own in (samples.train, samples.validation, samples.held_out))
        counts = shown.sum(axis=0).tolist()
        labels = [own for own, count in zip(manifest.classes, counts, strict=True) if 0 < count < len(samples.train)]
        if not labels:
            return [], {name: "no finding that some training images show and others do not"}
        return [MultiLabelProbe(samples, labels, options)], {}
    for pairs in (samples.train, samples.validation, samples.held_out):
        class_names(manifest, pairs)
    seen = Counter(pair.label for pair in samples.train)
    classes = [known for known in manifest.classes if seen[known] >= options.probe_images]
    if len(classes) < 2:
        return [], {name: f"{len(classes)} class among the training images; 2 are needed"}
    if not any(pair.label in classes for pair in samples.held_out):
        return [], {name: "no held-out image is of a class with training images"}
    found: list[Any] = [LinearProbe(samples, classes, options)]
    if options.probe_curve:
        found.append(ProbeCurve(samples, classes, options.probe_on))
    return found, {}
