"""A probe's logistic regressions: standardised once, C chosen by the log-loss on validation images, then fitted again.

C is searched coarse to fine over 1e-6 ... 1e6 in 13 fits, each begun from the nearest one solved. With fewer samples
than dimensions the same problem is solved in the space that the samples span: the L2 penalty keeps the weights there,
so that the answer is the same and the cost is that of the samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.data.table import Pair
from mmkd.evaluation.embeddings.embed import Embedded, UndefinedMetricError
from mmkd.evaluation.statistics.metrics import Floats, Integers
from mmkd.evaluation.tasks.task import Outputs

COARSE = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
FINER = (1.0, 0.5, 0.25)
ITERATIONS = 300
SMALL = 4_000_000  # numbers in a matrix


@dataclass(frozen=True)
class Solution:
    """Weights ``(outputs, dim)`` and intercepts ``(outputs,)`` on standardised features; one output for two classes."""

    weights: Floats
    intercepts: Floats


class Sweep:
    """Fits of one set of features; several strengths of the penalty share all that can be shared."""

    def __init__(self, features: NDArray[Any], targets: Integers) -> None:
        """Standardise.

        Args:
            features: ``(n, dim)``.
            targets: classes ``(n,)``, every one from 0 on at least once; or findings, bool ``(n, labels)``, each both
                there and not.
        """
        self.mean, spread = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
        self.spread = np.where(spread > 0, spread, 1.0)
        self.targets = targets
        self.solved: dict[float, list[Solution]] = {}
        scaled = self._scaled(features)
        self.basis: NDArray[Any] | None = None
        if scaled.shape[0] < scaled.shape[1]:
            self.basis, triangle = np.linalg.qr(scaled.T)
            scaled = np.ascontiguousarray(triangle.T)
        self.scaled = scaled

    def solve(self, exponent: float, start: list[Solution] | None = None) -> list[Solution]:
        """Fit with ``C = 10 ** exponent``.

        Args:
            exponent: of the inverse strength of the L2 penalty.
            start: what to begin from where nothing is solved yet; of features with as many dimensions.

        Returns:
            One solution for classes, one for each label.
        """
        if self.solved:
            start = self.solved[min(self.solved, key=lambda known: abs(known - exponent))]
        elif self.basis is not None:
            start = None
        columns = [self.targets] if self.targets.ndim == 1 else list(self.targets.T.astype(np.int64))
        begins: list[Solution | None] = list(start) if start else [None] * len(columns)
        pairs = zip(columns, begins, strict=True)
        self.solved[exponent] = [_fit(self.scaled, own, 10.0**exponent, begin) for own, begin in pairs]
        return self.solved[exponent]

    def scores(self, features: NDArray[Any], exponent: float) -> Floats:
        """Scores of features ``(m, dim)``: log-probabilities ``(m, classes)``, or logits ``(m, labels)``."""
        scaled = self._scaled(features)
        if self.basis is not None:
            scaled = scaled @ self.basis
        solutions = self.solved[exponent]
        decisions = [scaled @ own.weights.T + own.intercepts for own in solutions]
        if self.targets.ndim == 2:
            return np.concatenate(decisions, axis=1).astype(np.float64)
        logits = decisions[0].astype(np.float64)
        if logits.shape[1] == 1:
            logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

    def _scaled(self, features: NDArray[Any]) -> NDArray[np.float32]:
        return ((features - self.mean) / self.spread).astype(np.float32)


def probed_features(embedded: Embedded, probe_on: str, splits: Sequence[Sequence[Pair]]) -> list[NDArray[Any]]:
    """Vectors ``(n, dim)`` of the pairs of each split; none of an empty one.

    Raises:
        UndefinedMetricError: some are not finite.
    """
    read = embedded.pooled_matrix if probe_on == "pooled" else embedded.image_matrix
    found = [read(pairs) if pairs else None for pairs in splits]
    width = next(part.shape[1] for part in found if part is not None)
    parts = [np.zeros((0, width), dtype=np.float32) if part is None else part for part in found]
    unsound = sum(int((~np.isfinite(part)).any(axis=1).sum()) for part in parts)
    if unsound:
        raise UndefinedMetricError(
            f"the encoder gave vectors that are not finite, of {unsound} of {sum(map(len, parts))} images"
        )
    return parts


def probe(
    parts: Sequence[NDArray[Any]], train_targets: NDArray[Any], validation_targets: NDArray[Any], search: str
) -> Outputs:
    """Scores of the test images after learning from all others.

    Args:
        parts: vectors of training, validation and test images, ``(n, dim)`` each.
        train_targets: classes ``(n,)`` or findings ``(n, labels)``.
        validation_targets: as those.
        search: ``sweep`` chooses C by the validation images, ``fast`` sets it.

    Returns:
        ``image.scores``, log-probabilities ``(n, classes)`` or logits ``(n, labels)``; ``c``, the C taken, ``(1,)``.
    """
    train, validation, test = parts
    whole = Sweep(np.concatenate([train, validation]), np.concatenate([train_targets, validation_targets]))
    exponent, start = fast_exponent(train.shape[1], train_targets), None
    if search == "sweep":
        sweep = Sweep(train, train_targets)

        def loss(exponent: float) -> float:
            sweep.solve(exponent)
            return log_loss(sweep.scores(validation, exponent), validation_targets)

        exponent = search_exponent(loss)
        start = sweep.solved[exponent] if sweep.basis is None else None
    whole.solve(exponent, start)
    return {"image.scores": whole.scores(test, exponent), "c": np.array([10.0**exponent])}


def fast_exponent(dim: int, targets: Integers) -> float:
    """``C = dim * classes / 100`` as a power of ten; a finding has two classes."""
    classes = 2 if targets.ndim == 2 else int(targets.max()) + 1
    return float(np.log10(dim * classes / 100))


def search_exponent(loss: Callable[[float], float]) -> float:
    """The exponent of least loss: seven coarse steps, then three times both neighbours at half the distance."""
    losses = {exponent: loss(exponent) for exponent in COARSE}
    for distance in FINER:
        best = min(losses, key=lambda exponent: (losses[exponent], exponent))
        for neighbour in (best - distance, best + distance):
            if COARSE[0] <= neighbour <= COARSE[-1]:
                losses[neighbour] = loss(neighbour)
    return min(losses, key=lambda exponent: (losses[exponent], exponent))


def log_loss(scores: Floats, targets: Integers) -> float:
    """Mean negative log-likelihood of scores as `Sweep.scores` gives them."""
    if targets.ndim == 2:
        return float(np.logaddexp(0, np.where(targets, -scores, scores)).mean())
    return float(-scores[np.arange(len(targets)), targets].mean())


def log_mean(scores: Sequence[Floats]) -> Floats:
    """Logarithm of the mean of probabilities given as logarithms."""
    return np.logaddexp.reduce(np.stack(scores), axis=0) - np.log(len(scores))


def _fit(scaled: NDArray[Any], targets: Integers, c: float, begin: Solution | None) -> Solution:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    model = LogisticRegression(C=c, max_iter=ITERATIONS, warm_start=begin is not None)
    if begin is not None:
        model.coef_, model.intercept_ = begin.weights, begin.intercepts
    threads = 1 if scaled.size < SMALL else None  # more threads only wait for each other on small matrices
    with warnings.catch_warnings(), threadpool_limits(threads, user_api="blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)  # a nearly unpenalised fit may stop at the limit
        model.fit(scaled, targets)
    return Solution(model.coef_, model.intercept_)
