"""Linear probing: how much of the class a linear classifier reads from frozen image vectors.

Features are standardised on the training images; scikit-learn's L-BFGS logistic regression; C is chosen by the
log-loss on the validation images; then one more fit on training and validation together. Without validation images of
every class C is ``dim * classes / 100``. Classes with too few training images are left out and named.

The learning curve shows few images of each class, and parts of the training set. For each of five seeds the training
images of a class are put in an order; every setting takes a first part of it, so that the training sets are nested. C
is ``dim * classes / 100``. Each setting is a metric of its own, the mean over seeds, under the same bootstrap draws as
all others; the orders are kept in the task's description.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.dataset import Samples
from mmkd.evaluation.embeddings.embed import Embedded
from mmkd.evaluation.statistics import metrics
from mmkd.evaluation.statistics.bootstrap import Metrics
from mmkd.evaluation.statistics.metrics import Floats, Integers
from mmkd.evaluation.tasks.classification import Classification, MultiLabel, label_sets
from mmkd.evaluation.tasks.logistic_regression import Sweep, fast_exponent, log_mean, probe, probed_features
from mmkd.evaluation.tasks.task import Outputs, Task, TaskOptions, task_name

SHOTS = (1, 2, 4, 8, 16, 32)
FRACTIONS = (0.01, 0.1)
SEEDS = 5
TITLE = "Linear probe"


class ProbeCurve(Classification):
    """``image.answers`` is ``(n, settings * seeds + 1)``: predicted classes after training on each index set."""

    kind = "probe"

    def __init__(self, samples: Samples, classes: list[str], probe_on: str) -> None:
        """Fix images, settings and index sets.

        Args:
            samples: of the dataset; pairs of other classes are left out.
            classes: those with training images.
            probe_on: vectors that are trained on, ``joint`` or ``pooled``.
        """
        own = samples.where(lambda pair: pair.label in classes)
        super().__init__(samples.manifest, "Learning curve of a linear probe", own.held_out, classes, "shots")
        self.train, self.probe_on = own.train, probe_on
        self.train_targets = self.targets_of(self.train)
        self.takes = settings_of([Counter(self.train_targets.tolist())[k] for k in range(len(classes))])
        self.primary_metric = _metric(list(self.takes)[-1])
        self.description["chance"] = {_metric(setting): 1 / len(classes) for setting in [*self.takes, "100%"]}
        self.description |= {
            "train": len(self.train),
            "probe_on": self.probe_on,
            "takes": self.takes,
            "orders": [
                {name: [self.train[row].id for row in self._order(seed, k)] for k, name in enumerate(classes)}
                for seed in range(SEEDS)
            ],
        }

    def index_sets(self) -> list[tuple[str, int, Integers]]:
        """Setting, seed and rows of the training images, in the order of the columns of ``image.answers``."""
        found = []
        for setting, takes in self.takes.items():
            for seed in range(SEEDS):
                rows = [self._order(seed, k)[:count] for k, count in enumerate(takes)]
                found.append((setting, seed, np.concatenate(rows)))
        return [*found, ("100%", 0, np.arange(len(self.train)))]

    def outputs(self, embedded: Embedded) -> Outputs:
        """Answers after training on every index set."""
        train, test = probed_features(embedded, self.probe_on, [self.train, self.pairs])
        exponent, answers = fast_exponent(train.shape[1], self.train_targets), []
        for _, _, rows in self.index_sets():
            sweep = Sweep(train[rows], self.train_targets[rows])
            sweep.solve(exponent)
            answers.append(sweep.scores(test, exponent).argmax(axis=1))
        return {"image.answers": np.stack(answers, axis=1).astype(np.int16)}

    def ensemble(self, members: Sequence[Embedded], outputs: Sequence[Outputs]) -> Outputs:
        """What most members answer; the first class in order where several have as many."""
        votes = [sum((own["image.answers"] == k).astype(np.int16) for own in outputs) for k in range(len(self.classes))]
        return {"image.answers": np.stack(votes).argmax(axis=0).astype(np.int16)}

    def metrics(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """Balanced accuracy and accuracy of each setting, means over its seeds."""
        values: dict[str, list[Floats]] = {}
        for (setting, _, _), answers in zip(self.index_sets(), outputs["image.answers"].T, strict=True):
            own = self._measured(answers, weights["image"])
            values.setdefault(_metric(setting), []).append(own["balanced_accuracy"])
            values.setdefault(f"accuracy@{setting}", []).append(own["accuracy"])
        return {name: np.mean(own, axis=0) for name, own in values.items()}

    def primary_metric_values(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """The setting with most images, the whole training set aside."""
        columns = [k for k, (setting, _, _) in enumerate(self.index_sets()) if _metric(setting) == self.primary_metric]
        each = [self._measured(outputs["image.answers"][:, k], weights["image"]) for k in columns]
        return {self.primary_metric: np.mean([own["balanced_accuracy"] for own in each], axis=0)}

    def extras(self, outputs: Outputs) -> dict[str, Any]:
        """The curve: training images and balanced accuracy of each seed, by setting."""
        curve: dict[str, dict[str, Any]] = {}
        ones = np.ones((1, len(self.targets)))
        for (setting, _, rows), answers in zip(self.index_sets(), outputs["image.answers"].T, strict=True):
            own = curve.setdefault(setting, {"images": len(rows), "seeds": []})
            own["seeds"].append(float(metrics.balanced_accuracy(self.targets, answers.astype(np.int64), ones)[0]))
        return {"curve": curve, **super().extras(outputs)}

    def sample_scores(self, outputs: Outputs) -> dict[str, Floats]:
        """Share of index sets after which an image is answered correctly."""
        return {"image": (outputs["image.answers"] == self.targets[:, None]).mean(axis=1)}

    def sample_answers(self, outputs: Outputs) -> dict[str, tuple[list[str], list[str]]]:
        """The true class and the answer after training on all training images."""
        return {"image": self._named(self.targets, outputs["image.answers"][:, -1])}

    def _measured(self, answers: Integers, weights: Floats) -> Metrics:
        measures = {"balanced_accuracy": metrics.balanced_accuracy, "accuracy": metrics.accuracy}
        found = {name: own(self.targets, answers.astype(np.int64), weights) for name, own in measures.items()}
        return self._where_defined(found)

    def _order(self, seed: int, k: int) -> Integers:
        """Rows of the training images of a class in the order of a seed, as many as any setting takes."""
        rows = np.flatnonzero(self.train_targets == k)
        most = max(takes[k] for takes in self.takes.values())
        return np.random.default_rng([seed, k]).permutation(rows)[:most]


def settings_of(counts: Sequence[int]) -> dict[str, list[int]]:
    """How many training images of each class every setting takes.

    Args:
        counts: of the training images of each class.

    Returns:
        ``{"1-shot": [1, ...], ..., "10%": [...]}`` by rising total; shots that some class does not have are left out,
        as are fractions that are less than one image of every class.
    """
    found = {f"{shots}-shot": [shots] * len(counts) for shots in SHOTS if shots <= min(counts)}
    for fraction in FRACTIONS:
        if fraction * min(counts) >= 1:
            found[f"{fraction:.0%}"] = [round(fraction * count) for count in counts]
    return dict(sorted(found.items(), key=lambda item: sum(item[1])))


def _metric(setting: str) -> str:
    return f"balanced_accuracy@{setting}"


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
        return label_sets(self.labels, pairs)


def tasks(samples: Samples, options: TaskOptions) -> tuple[list[Any], dict[str, str]]:
    """The probe of a dataset of classes, grades or findings, and its learning curve.

    Returns:
        ``probe-ID`` and, for classes and grades, ``probe-ID-shots``; and why they are left out.

    Raises:
        ValueError: the manifest's primary metric is not one of these tasks.
    """
    manifest, name = samples.manifest, task_name("probe", samples.manifest)
    if not samples.train or not samples.held_out:
        return [], {name: f"no readable image {'to learn from' if samples.held_out else 'held out'}"}
    if manifest.task == "multilabel":
        counts = label_sets(list(manifest.classes), samples.train).sum(axis=0).tolist()
        labels = [own for own, count in zip(manifest.classes, counts, strict=True) if 0 < count < len(samples.train)]
        if not labels:
            return [], {name: "no finding that some training images show and others do not"}
        return [MultiLabelProbe(samples, labels, options)], {}
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
