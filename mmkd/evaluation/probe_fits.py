"""Logistic regressions of a probe: standardised once, each strength of penalty begun from the nearest one solved.

With fewer samples than dimensions the same problem is solved in the space that the samples span: the L2 penalty keeps
the weights there, so that the answer is the same and the cost is that of the samples.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.evaluation.metrics import Floats, Integers

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


def log_loss(scores: Floats, targets: Integers) -> float:
    """Mean negative log-likelihood of scores as `Sweep.scores` gives them."""
    if targets.ndim == 2:
        return float(np.logaddexp(0, np.where(targets, -scores, scores)).mean())
    return float(-scores[np.arange(len(targets)), targets].mean())


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
