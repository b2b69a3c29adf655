"""Linear probing: how much of the class a linear classifier reads from frozen image vectors.

Features are standardised on the training images; scikit-learn's L-BFGS logistic regression; C is chosen by the
log-loss on the validation images; then one more fit on training and validation together. Without validation images of
every class C is ``dim * classes / 100``. Classes with too few training images are left out and named.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.dataset import Samples
from mmkd.evaluation.embeddings.embed import Embedded
from mmkd.evaluation.statistics.metrics import Integers
from mmkd.evaluation.tasks.classification import Classification, MultiLabel, class_names, label_sets
from mmkd.evaluation.tasks.learning_curve import ProbeCurve
from mmkd.evaluation.tasks.logistic_regression import log_mean, probe, probed_features
from mmkd.evaluation.tasks.task import Outputs, Task, TaskOptions, task_name

TITLE = "Linear probe"


class Probe(Task):
    """What probes of classes and of findings share: training images, their vectors, and how C is found."""

    kind = "probe"

    def learn_from(self, samples: Samples, options: TaskOptions, validated: bool, left_out: list[str]) -> None:
        """Fix what is learned from.

        Args:
            samples: training and validation images.
            options: vectors, and how C is found.
            validated: whether validation images allow a search for C.
            left_out: classes or findings that cannot be probed.
        """
        self.train, self.validation = samples.train, samples.validation
        self.probe_on, self.search = options.probe_on, options.probe_search if validated else "fast"
        self.description |= {
            "train": len(self.train),
            "validation": len(self.validation),
            "left_out": left_out,
            "probe_on": self.probe_on,
            "search": self.search,
        }

    @abstractmethod
    def targets_of(self, pairs: Sequence[Pair]) -> Integers:
        """What each pair shows: its class ``(n,)``, or its findings ``(n, labels)``."""

    def outputs(self, embedded: Embedded) -> Outputs:
        """See `probe`."""
        parts = probed_features(embedded, self.probe_on, [self.train, self.validation, self.sample_pairs["image"]])
        return probe(parts, self.targets_of(self.train), self.targets_of(self.validation), self.search)


class LinearProbe(Classification, Probe):
    """One of several classes, learned from the training images' vectors."""

    def __init__(self, samples: Samples, classes: list[str], options: TaskOptions) -> None:
        """Fix the images of the three splits.

        Args:
            samples: of the dataset; pairs of other classes are left out.
            classes: those with enough training images.
            options: vectors, and how C is found: without search where a class has no validation image.
        """
        own = samples.where(lambda pair: pair.label in classes)
        super().__init__(samples.manifest, TITLE, own.held_out, classes)
        known = {pair.label for pair in samples.held_out} - {""}
        validated = {pair.label for pair in own.validation} == set(classes)
        self.learn_from(own, options, validated, sorted(known - set(classes)))

    def ensemble(self, members: Sequence[Embedded], outputs: Sequence[Outputs]) -> Outputs:
        """Logarithm of the mean of the members' probabilities."""
        return {"image.scores": log_mean([own["image.scores"] for own in outputs])}


class MultiLabelProbe(MultiLabel, Probe):
    """A probe of its own for each finding, all with one C."""

    def __init__(self, samples: Samples, labels: list[str], options: TaskOptions) -> None:
        """Fix the images of the three splits.

        Args:
            samples: of the dataset.
            labels: those that some training images show and some do not.
            options: vectors, and how C is found.
        """
        super().__init__(samples.manifest, TITLE, samples.held_out, labels)
        left_out = [label for label in samples.manifest.classes if label not in labels]
        self.learn_from(samples, options, bool(samples.validation), left_out)

    def targets_of(self, pairs: Sequence[Pair]) -> Any:
        """See `Probe`."""
        return self.findings(pairs)


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
