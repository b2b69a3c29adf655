"""Metrics over weighted samples: one call gives the point value or a thousand bootstrap replicates of it.

A resample with replacement is the same samples with integer weights, so every metric takes weights ``(replicates, n)``
and returns one value for each row; row of ones = the metric itself. No copies are made and scores are sorted once for
all replicates. Undefined values are NaN, never a guess.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def accuracy(targets: Integers, predictions: Integers, weights: Floats) -> Floats:
    """Share of right answers, ``sum_i w_i [p_i = t_i] / sum_i w_i``.

    Args:
        targets: true class, ``(n,)``.
        predictions: answered class, ``(n,)``.
        weights: ``(replicates, n)``, not negative.

    Returns:
        ``(replicates,)``.
    """
    return weighted_mean((targets == predictions).astype(np.float64), weights)


def balanced_accuracy(targets: Integers, predictions: Integers, weights: Floats) -> Floats:
    """Mean over the classes present of each one's recall; arguments and result as in `accuracy`."""
    true_positive, support, _ = _counts(targets, predictions, weights)
    return _mean_where(_divide(true_positive, support), support > 0)


def macro_f1(targets: Integers, predictions: Integers, weights: Floats) -> Floats:
    """Mean of ``2 tp / (2 tp + fp + fn)`` over the classes that occur as target or as answer; see `accuracy`."""
    true_positive, support, answered = _counts(targets, predictions, weights)
    return _mean_where(_divide(2 * true_positive, support + answered), support + answered > 0)


def auroc(positive: NDArray[np.bool_], scores: Floats, weights: Floats) -> Floats:
    """Area under the ROC curve by ranks: P(score of a positive > score of a negative), a tie counting one half.

    ``sum_t pos_t (sum_{s<t} neg_s + neg_t / 2) / (sum pos * sum neg)`` over the distinct scores ``t`` (Mann-Whitney).

    Args:
        positive: ``(n,)``.
        scores: ``(n,)``, higher = more likely positive.
        weights: ``(replicates, n)``.

    Returns:
        ``(replicates,)``; NaN where a replicate has no positive or no negative.
    """
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sorted_weights = weights[:, order]
    positives = np.add.reduceat(sorted_weights * positive[order], starts, axis=1)
    negatives = np.add.reduceat(sorted_weights * ~positive[order], starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives / 2
    return _divide((positives * below).sum(axis=1), positives.sum(axis=1) * negatives.sum(axis=1))


def macro_auroc(targets: Integers, scores: Floats, weights: Floats) -> Floats:
    """Mean over the classes present of the one-versus-rest `auroc`.

    Args:
        targets: ``(n,)``.
        scores: ``(n, classes)``.
        weights: ``(replicates, n)``.
    """
    areas = [auroc(targets == k, scores[:, k], weights) for k in range(scores.shape[1])]
    stacked = np.stack(areas, axis=1)
    return _mean_where(stacked, ~np.isnan(stacked))


def recall_at(k: int, ranks: Floats, weights: Floats) -> Floats:
    """Share of queries whose best positive stands among the first ``k``.

    Args:
        k: how many answers count.
        ranks: rank of each query's best positive, from 1, ``(n,)``.
        weights: ``(replicates, n)``.
    """
    return weighted_mean((ranks <= k).astype(np.float64), weights)


def median_rank(ranks: Floats, weights: Floats) -> Floats:
    """Median of ``ranks`` ``(n,)`` in each replicate; the mean of the two middle ones where their number is even."""
    order = np.argsort(ranks, kind="stable")
    cumulative = np.cumsum(weights[:, order], axis=1)
    half = cumulative[:, -1:] / 2
    last = len(ranks) - 1
    lower = np.minimum((cumulative < half).sum(axis=1), last)
    upper = np.minimum((cumulative <= half).sum(axis=1), last)
    return (ranks[order][lower] + ranks[order][upper]) / 2


def weighted_mean(values: Floats, weights: Floats) -> Floats:
    """``(replicates,)`` means of ``values`` ``(n,)``; NaN where a replicate is empty."""
    return _divide(weights @ values, weights.sum(axis=1))


def margins(scores: Floats) -> Floats:
    """Each class' score minus the log-mean-exp of the others: comparable across samples, unlike the raw score.

    Two classes give the score difference. Source of the need: a one-versus-rest AUROC over raw cosines rewards images
    that are close to every text.

    Args:
        scores: ``(n, classes)`` with at least two classes.

    Returns:
        ``(n, classes)``.
    """
    others = [np.logaddexp.reduce(np.delete(scores, k, axis=1), axis=1) for k in range(scores.shape[1])]
    return scores - (np.stack(others, axis=1) - np.log(scores.shape[1] - 1))


def _counts(targets: Integers, predictions: Integers, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """Weighted true positives, targets and answers of each class, each ``(replicates, classes)``."""
    classes = np.arange(max(targets.max(), predictions.max()) + 1)
    target_is = (targets[:, None] == classes).astype(np.float64)
    answer_is = (predictions[:, None] == classes).astype(np.float64)
    return weights @ (target_is * answer_is), weights @ target_is, weights @ answer_is


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    """NaN where the denominator is zero."""
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def _mean_where(values: Floats, kept: NDArray[np.bool_]) -> Floats:
    """Row means over the entries kept."""
    return _divide(np.where(kept, values, 0.0).sum(axis=1), kept.sum(axis=1).astype(np.float64))
