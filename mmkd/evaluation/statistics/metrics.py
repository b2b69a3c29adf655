"""Metrics over weighted samples: one call gives the point value or a thousand bootstrap replicates of it.

A resample with replacement is the same samples with integer weights, so every metric takes weights ``(replicates, n)``
and returns one value for each row; row of ones = the metric itself. No copies are made and scores are sorted once for
all replicates. Undefined values are NaN.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Columns = NDArray[Any]
Found = TypeVar("Found")
KEPT, KEPT_BYTES = 32, 1 << 22  # results of `kept`, and most bytes of the arrays behind one
EXACT = 1 << 24  # whole numbers below it are exact in single precision


def kept(function: Callable[..., Found]) -> Callable[..., Found]:
    """Cache a function's results for its last arrays, which every chunk of replicates of one encoder repeats."""
    found: OrderedDict[tuple[Any, ...], Found] = OrderedDict()

    @wraps(function)
    def call(*arrays: NDArray[Any]) -> Found:
        if sum(array.nbytes for array in arrays) > KEPT_BYTES:
            return function(*arrays)
        key = tuple((array.shape, array.dtype.str, array.tobytes()) for array in arrays)
        if key not in found:
            found[key] = function(*arrays)
        found.move_to_end(key)
        if len(found) > KEPT:
            found.popitem(last=False)
        return found[key]

    return call


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


def quadratic_kappa(targets: Integers, predictions: Integers, weights: Floats) -> Floats:
    """Cohen's kappa of grades with quadratic weights, over all grades, also those that a replicate lacks.

    ``1 - sum_ij (i-j)^2 O_ij / sum_ij (i-j)^2 E_ij``; both sums need the first and second moments of the grades alone.
    Arguments and result as in `accuracy`; NaN where all targets and answers are one grade.
    """
    t, p = targets.astype(np.float64), predictions.astype(np.float64)
    total = weights.sum(axis=1)
    observed = weights @ (t - p) ** 2
    expected = weights @ (t**2 + p**2) - 2 * _divide((weights @ t) * (weights @ p), total)
    return 1 - _divide(observed, expected)


def kappa(targets: Integers, predictions: Integers, weights: Floats) -> Floats:
    """Cohen's kappa, ``(agreement - chance) / (1 - chance)``, however far an answer is off; see `accuracy`.

    NaN where chance alone would agree fully.
    """
    right, support, answered = _counts(targets, predictions, weights)
    total = weights.sum(axis=1)
    by_chance = (support * answered).sum(axis=1)
    return 1 - _divide((total - right.sum(axis=1)) * total, np.square(total) - by_chance)


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
    columns = _columns(weights)
    return _auroc(positive, scores, columns, _totals(columns))


def macro_auroc(targets: Integers, scores: Floats, weights: Floats) -> Floats:
    """Mean over the classes present of the one-versus-rest `auroc`.

    Args:
        targets: ``(n,)``.
        scores: ``(n, classes)``.
        weights: ``(replicates, n)``.
    """
    return defined_mean(label_aurocs(targets[:, None] == np.arange(scores.shape[1]), scores, weights))


def frequency_mean(values: Floats, targets: Integers, weights: Floats) -> Floats:
    """Mean ``(replicates,)`` of ``values`` ``(replicates, classes)``, each class weighted by its samples.

    Of one-versus-rest areas this is scikit-learn's ``roc_auc_score(average="weighted", multi_class="ovr")``. Classes
    that a replicate lacks do not count.
    """
    counts = np.where(np.isnan(values), 0.0, weights @ (targets[:, None] == np.arange(values.shape[1])))
    return _divide((np.nan_to_num(values) * counts).sum(axis=1), counts.sum(axis=1))


def label_aurocs(positive: NDArray[np.bool_], scores: Floats, weights: Floats) -> Floats:
    """`auroc` of each label, ``(replicates, labels)``, from ``positive`` and ``scores`` ``(n, labels)``."""
    columns = _columns(weights)
    totals, labels = _totals(columns), zip(positive.T, scores.T, strict=True)
    return np.stack([_auroc(own, label, columns, totals) for own, label in labels], axis=1)


def label_precisions(positive: NDArray[np.bool_], scores: Floats, weights: Floats) -> Floats:
    """Average precision of each label, ``sum_t (R_t - R_before) P_t`` over distinct scores; see `label_aurocs`."""
    columns = _columns(weights)
    found = [_average_precision(own, label, columns) for own, label in zip(positive.T, scores.T, strict=True)]
    return np.stack(found, axis=1)


def defined_mean(values: Floats) -> Floats:
    """Mean over the last axis of what is defined, such as labels of ``(replicates, labels)``; NaN where nothing is."""
    return _mean_where(values, ~np.isnan(values))


def recall_at(k: int, ranks: Floats, weights: Floats) -> Floats:
    """Share of queries whose best positive is among the first ``k``.

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


def calibration_error(confidence: Floats, right: NDArray[np.bool_], weights: Floats, bins: int = 15) -> Floats:
    """Expected calibration error, ``sum_b |sum_{i in b} w_i ([right] - c_i)| / sum_i w_i`` (Guo et al. 2017).

    It is never below zero, so that noise adds to it: that of a resample is higher on average.

    Args:
        confidence: stated probabilities of each sample, ``(n, statements)``.
        right: whether what they were stated of holds, ``(n, statements)``.
        weights: ``(replicates, n)``.
        bins: of equal width; a confidence on a border belongs to the lower one.

    Returns:
        ``(replicates,)``.
    """
    own = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.zeros((len(confidence), bins))
    np.add.at(gaps, (np.arange(len(own))[:, None], own), right - confidence)
    return _divide(np.abs(weights @ gaps).sum(axis=1), weights.sum(axis=1) * confidence.shape[1])


def share_of(chosen: NDArray[np.bool_], among: NDArray[np.bool_], weights: Floats) -> Floats:
    """The share of the statements ``among`` that are ``chosen``, both ``(n, statements)``; ``(replicates,)``."""
    return _divide(weights @ (chosen & among).sum(axis=1), weights @ among.sum(axis=1).astype(np.float64))


@kept
def margins(scores: Floats) -> Floats:
    """Each class' score minus the log-mean-exp of the others: comparable across samples, unlike the raw score.

    Two classes give the score difference. The softmax of the scores is a rising function of the margin of its class, so
    that both rank alike; margins do not saturate. Reason: a one-versus-rest AUROC over raw cosines rewards images that
    are close to every text.

    Args:
        scores: ``(n, classes)`` with at least two classes.

    Returns:
        ``(n, classes)``.
    """
    others = [np.logaddexp.reduce(np.delete(scores, k, axis=1), axis=1) for k in range(scores.shape[1])]
    return scores - (np.stack(others, axis=1) - np.log(scores.shape[1] - 1))


@kept
def _auroc(positive: NDArray[np.bool_], scores: Floats, columns: Columns, totals: Floats) -> Floats:
    """`auroc` from weights ``(n, replicates)`` and their sums ``(replicates,)``.

    Over all samples instead of the negatives, the sum is larger by half the squared weight of the positives; hence
    cumulative weights are needed at the scores of positives alone.
    """
    ranking = _ranking(positive, scores)
    cumulative = _running(ranking.segments @ columns)
    below, through = cumulative[ranking.below], cumulative[ranking.through]
    own = (ranking.positives @ columns).astype(np.float64)
    positives = own.sum(axis=0)
    negatives = totals - positives
    area = (own * (below.astype(np.float64) + through)).sum(axis=0) / 2 - positives**2 / 2
    return _divide(area, positives * negatives)


def _average_precision(positive: NDArray[np.bool_], scores: Floats, columns: Columns) -> Floats:
    """Average precision from weights ``(n, replicates)``; NaN where a replicate has no positive."""
    ranking = _ranking(positive, -scores)
    through = _running(ranking.segments @ columns)[ranking.through].astype(np.float64)
    own = (ranking.positives @ columns).astype(np.float64)
    precision = np.divide(_running(own), through, out=np.zeros_like(through), where=through > 0)
    return _divide((own * precision).sum(axis=0), own.sum(axis=0))


@dataclass(frozen=True)
class Ranking:
    """Samples by rising score, and the runs of equal scores that hold a positive.

    Attributes:
        segments: sums weights ``(n, ...)`` from each start or end of such a run to the next; the first is of none.
        below: how many of these sums lie before each run.
        through: the same with the run itself.
        positives: sums the weights of the positives of each run.
    """

    segments: Any
    below: Integers
    through: Integers
    positives: Any


@kept
def _ranking(positive: NDArray[np.bool_], scores: Floats) -> Ranking:
    order = np.argsort(scores, kind="stable")
    ordered, there = scores[order], positive[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    ends = np.append(starts[1:], len(order))
    holds = np.add.reduceat(there.astype(np.int64), starts) > 0
    starts, ends = starts[holds], ends[holds]
    bounds = np.unique(np.concatenate([[0], starts, ends]))
    run = np.searchsorted(ends, np.flatnonzero(there), side="right")
    return Ranking(
        _chooser(order[: bounds[-1]], np.concatenate([[0], bounds]), len(order)),
        np.searchsorted(bounds, starts),
        np.searchsorted(bounds, ends),
        _chooser(order[there], np.searchsorted(run, np.arange(len(starts) + 1)), len(order)),
    )


def _chooser(samples: Integers, bounds: Integers, n: int) -> Any:
    """A sparse matrix that sums the weights of ``samples`` from each bound to the next."""
    from scipy.sparse import csr_array

    return csr_array((np.ones(len(samples), np.float32), samples, bounds), shape=(len(bounds) - 1, n))


def _running(values: Columns) -> Columns:
    """Running sums over the first axis: those inside of blocks and those of blocks, faster than numpy's."""
    side = max(1, int(np.sqrt(len(values))))
    blocks = np.zeros((-(-len(values) // side), side, values.shape[1]), values.dtype)
    flat = blocks.reshape(-1, values.shape[1])
    flat[: len(values)] = values
    for place in range(1, side):
        blocks[:, place] += blocks[:, place - 1]
    for number in range(1, len(blocks)):
        blocks[number] += blocks[number - 1, -1]
    return flat[: len(values)]


def _totals(columns: Columns) -> Floats:
    return columns.sum(axis=0, dtype=np.float64)


def _columns(weights: Floats) -> Columns:
    """Weights as ``(n, replicates)``; in single precision where they are whole numbers whose sums it holds exactly."""
    columns = np.ascontiguousarray(weights.T, dtype=np.float32)
    exact = weights.sum(axis=1).max(initial=0.0) < EXACT and bool((np.rint(columns) == weights.T).all())
    return columns if exact else np.ascontiguousarray(weights.T)


def _counts(targets: Integers, predictions: Integers, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """Weighted true positives, targets and answers of each class, each ``(replicates, classes)``."""
    from scipy.sparse import csr_array

    classes, n = int(max(targets.max(), predictions.max())) + 1, len(targets)
    right = np.flatnonzero(targets == predictions)
    rows = np.concatenate([targets[right], targets + classes, predictions + 2 * classes])
    samples = np.concatenate([right, np.arange(n), np.arange(n)])
    chooser = csr_array((np.ones(len(rows)), (rows, samples)), shape=(3 * classes, n))
    counted = (chooser @ np.ascontiguousarray(weights.T)).T
    return counted[:, :classes], counted[:, classes : 2 * classes], counted[:, 2 * classes :]


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    """NaN where the denominator is zero."""
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def _mean_where(values: Floats, kept: NDArray[np.bool_]) -> Floats:
    """Means over the last axis of the entries kept."""
    return _divide(np.where(kept, values, 0.0).sum(axis=-1), kept.sum(axis=-1).astype(np.float64))
