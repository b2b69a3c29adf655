"""The learning curve of a probe: few images of each class, and parts of the training set.

For each of five seeds the training images of a class are put in an order; every setting takes a first part of it, so
that the training sets are nested. C is ``dim * classes / 100``. Each setting is a metric of its own, the mean over
seeds, under the same bootstrap draws as all others; the orders are kept in the task's description.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmkd.evaluation.datasets.dataset import Samples
from mmkd.evaluation.embeddings.embed import Embedded
from mmkd.evaluation.statistics import metrics
from mmkd.evaluation.statistics.bootstrap import Metrics
from mmkd.evaluation.statistics.metrics import Floats, Integers
from mmkd.evaluation.tasks.classification import Classification
from mmkd.evaluation.tasks.logistic_regression import Sweep, fast_exponent, probed_features
from mmkd.evaluation.tasks.task import Outputs

SHOTS = (1, 2, 4, 8, 16, 32)
FRACTIONS = (0.01, 0.1)
SEEDS = 5


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
