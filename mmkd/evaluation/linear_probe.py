"""Linear probing: how much of the class a straight cut through the frozen image vectors can tell.

Features are standardised on the training images; scikit-learn's L-BFGS logistic regression; C by the log-loss on the
validation images, coarse to fine over 1e-6 ... 1e6 in 13 fits; then one more fit on training and validation together.
Without validation images of every class C is ``dim * classes / 100``. The vectors are the joint ones, of which student
and teachers all have some; classes with fewer than five training images are left out and named.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mmkd.data.records import Pair
from mmkd.evaluation.embedding import Embedded
from mmkd.evaluation.metrics import Floats, Integers
from mmkd.evaluation.task import Classification, Outputs, Samples
from mmkd.evaluation.zeroshot import known_modality, slug

FEWEST = 5
COARSE = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
FINER = (1.0, 0.5, 0.25)
SMALL = 4_000_000  # numbers in a matrix
ITERATIONS = 200


class LinearProbe(Classification):
    """Classes learnt from the training images' vectors."""

    kind = "probe"

    def __init__(self, name: str, title: str, samples: Samples, class_of: Callable[[Pair], str], classes: list[str]):
        """Fix the images of the three splits.

        Args:
            name: of the task.
            title: for people.
            samples: the pairs.
            class_of: the class of a pair.
            classes: those with enough training images.
        """
        held_out, self.train, self.validation = (
            [pair for pair in pairs if class_of(pair) in classes]
            for pairs in (samples.held_out, samples.train, samples.validation)
        )
        super().__init__(name, title, held_out, [class_of(pair) for pair in held_out], classes)
        self.train_targets = np.array([classes.index(class_of(pair)) for pair in self.train])
        self.validation_targets = np.array([classes.index(class_of(pair)) for pair in self.validation], dtype=np.int64)
        known = {class_of(pair) for pair in samples.held_out} - {""}
        self.description |= {
            "train": len(self.train),
            "validation": len(self.validation),
            "left_out": sorted(known - set(classes)),
        }

    def outputs(self, embedded: Embedded) -> Outputs:
        """``image.scores``: log-probabilities, ``(n, classes)``; NaN where a vector of any split is not finite."""
        train, test = embedded.image_matrix(self.train), embedded.image_matrix(self.pairs)
        validation = embedded.image_matrix(self.validation) if self.validation else train[:0]
        if not all(np.isfinite(part).all() for part in (train, validation, test)):
            return {"image.scores": np.full((len(test), len(self.classes)), np.nan)}
        exponent = self._choose(train, validation)
        every = np.concatenate([train, validation])
        targets = np.concatenate([self.train_targets, self.validation_targets])
        return {"image.scores": fit(every, targets, 10.0**exponent)(test)}

    def ensemble(self, members: Sequence[Embedded], outputs: Sequence[Outputs]) -> Outputs:
        """Logarithm of the mean of the members' probabilities."""
        stacked = np.stack([own["image.scores"] for own in outputs])
        return {"image.scores": np.logaddexp.reduce(stacked, axis=0) - np.log(len(outputs))}

    def _choose(self, train: Any, validation: Any) -> float:
        """The exponent of C."""
        if len(set(self.validation_targets.tolist())) < len(self.classes):
            return float(np.log10(train.shape[1] * len(self.classes) / 100))

        def loss(exponent: float) -> float:
            predicted = fit(train, self.train_targets, 10.0**exponent)(validation)
            return float(-predicted[np.arange(len(validation)), self.validation_targets].mean())

        return search_exponent(loss)


def tasks(samples: Samples) -> tuple[list[Any], dict[str, str]]:
    """Probes for the modality and for the label, or for the label in each collection, where images allow.

    Where tasks follow a manifest they are those of its dataset.

    Returns:
        The tasks, and why the others are not there.
    """
    if samples.manifest is not None:
        from mmkd.evaluation import probe_dataset  # it builds on this module

        return probe_dataset.tasks(samples, samples.manifest)
    found: list[LinearProbe] = []
    skipped: dict[str, str] = {}
    if samples.within == "source":
        return _by_source(samples), skipped
    fields: tuple[tuple[str, Callable[[Pair], str]], ...] = (
        ("modality", known_modality),
        ("label", lambda pair: pair.label),
    )
    for field, class_of in fields:
        counts = Counter(class_of(pair) for pair in samples.train)
        classes = sorted(name for name, count in counts.items() if name and count >= FEWEST)
        tested = {class_of(pair) for pair in samples.held_out} & set(classes)
        if len(tested) < 2:
            skipped[f"probe-{field}"] = (
                f"{len(tested)} {field} with at least {FEWEST} training images among the held-out ones; 2 are needed"
            )
        elif field == "label" and all(pair.label in ("", pair.modality) for pair in samples.held_out):
            skipped["probe-label"] = "labels are the modalities"
        else:
            title = f"Can a linear probe tell the {field}?"
            found.append(LinearProbe(f"probe-{field}", title, samples, class_of, classes))
            found[-1].asks_modality = field == "modality"
    return found, skipped


def _by_source(samples: Samples) -> list[LinearProbe]:
    """A probe for the labels of each collection that has several with enough training images."""
    found = []
    for source in sorted({pair.source for pair in samples.held_out}):
        splits = (samples.held_out, samples.train, samples.validation)
        held_out, train, validation = ([pair for pair in own if pair.source == source] for own in splits)
        own = replace(samples, held_out=held_out, train=train, validation=validation)
        counts = Counter(pair.label for pair in train)
        classes = sorted(label for label, count in counts.items() if label and count >= FEWEST)
        if len({pair.label for pair in held_out} & set(classes)) >= 2:
            title = f"Can a linear probe tell the label, within {source}?"
            found.append(LinearProbe(f"probe-{slug(source)}", title, own, lambda pair: pair.label, classes))
    return found


def fit(features: Any, targets: Integers, c: float) -> Callable[[Any], Floats]:
    """Standardise and fit.

    Args:
        features: ``(n, dim)``.
        targets: ``(n,)``, every class from 0 on at least once.
        c: inverse strength of the L2 penalty.

    Returns:
        A function from features ``(m, dim)`` to log-probabilities ``(m, classes)``.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    mean, spread = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    spread = np.where(spread > 0, spread, 1.0)
    model = LogisticRegression(C=c, max_iter=ITERATIONS)
    threads = 1 if features.size < SMALL else None  # more threads only wait for each other on small matrices
    with warnings.catch_warnings(), threadpool_limits(threads, user_api="blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)  # a nearly unpenalised fit may stop at the limit
        model.fit((features - mean) / spread, targets)

    def log_probabilities(others: Any) -> Floats:
        decision = model.decision_function((others - mean) / spread)
        logits = np.stack([np.zeros_like(decision), decision], axis=1) if decision.ndim == 1 else decision
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

    return log_probabilities


def search_exponent(loss: Callable[[float], float]) -> float:
    """The exponent of least loss: seven coarse steps, then three times both neighbours at half the distance."""
    losses = {exponent: loss(exponent) for exponent in COARSE}
    for distance in FINER:
        best = min(losses, key=lambda exponent: (losses[exponent], exponent))
        for neighbour in (best - distance, best + distance):
            if COARSE[0] <= neighbour <= COARSE[-1]:
                losses[neighbour] = loss(neighbour)
    return min(losses, key=lambda exponent: (losses[exponent], exponent))
