"""Stratified, grouped, paired bootstrap: intervals for one encoder, differences between two.

Patients (groups) are drawn with replacement inside each class, and the same draws serve every encoder, so that the
difference of two encoders is taken replicate by replicate. A class with a single group would never vary and would make
the interval too narrow; such classes are pooled into one stratum and named in the result. A replicate may then lack one
of them. Where there is only one group in all, images are drawn instead, which the result states.

Comparisons of one encoder with several others follow: adjusted p-values, average ranks, scores relative to chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.evaluation.statistics.metrics import Floats, Integers

REPLICATES = 1000
SEED = 42
CHUNK = 100
CHUNK_ELEMENTS = 1 << 24  # weights held at once; fewer replicates a chunk with more than 167,772 units
KEPT_ELEMENTS = 1 << 25  # draws of units that stay in memory for the next encoder, 64 MB
LEVELS = (2.5, 97.5)
BY_GROUP, BY_IMAGE = "groups within class", "images within class: fewer than two groups, so intervals are too narrow"
Metrics = dict[str, Floats]
FEWEST_FOR_SIGNED_RANKS = 6  # with five datasets the smallest two-sided p of the signed-rank test is 2 / 2**5 = .06


@dataclass(frozen=True)
class ResamplingUnits:
    """What is resampled: the groups of the samples, and their strata.

    Attributes:
        units: number of the group that each sample belongs to, ``(n,)``.
        strata: the stratum of each group, ``(groups,)``.
        groups: how many independent groups there are; as many as units unless images are drawn instead.
        resampling: a description of what is drawn.
        pooled: classes that share a stratum because one of them has a single group.
    """

    units: Integers
    strata: Integers
    groups: int
    resampling: str
    pooled: tuple[str, ...] = ()

    def same_draws(self, other: ResamplingUnits) -> bool:
        """Whether every replicate weighs samples as the other units do."""
        return np.array_equal(self.units, other.units) and np.array_equal(self.strata, other.strata)


def resampling_units(classes: Sequence[str], groups: Sequence[str]) -> ResamplingUnits:
    """Strata from classes, units from groups.

    Args:
        classes: class of each sample.
        groups: patient, case or specimen of each sample; an empty one is a group of its own.
    """
    names = [f"g:{group}" if group else f"i:{position}" for position, group in enumerate(groups)]
    independent = len(set(names))
    if independent < 2:
        names, resampling = [str(position) for position in range(len(names))], BY_IMAGE
    else:
        resampling = BY_GROUP
    _, first, units = np.unique(names, return_index=True, return_inverse=True)
    labels, class_index = np.unique(list(classes), return_inverse=True)
    # A group that holds several classes counts where most of its samples are.
    counts = np.zeros((len(first), class_index.max() + 1), dtype=np.int64)
    np.add.at(counts, (units, class_index), 1)
    own = counts.argmax(axis=1)
    strata = _pool_singles(own)
    holds = {stratum: np.unique(own[strata == stratum]) for stratum in np.unique(strata).tolist()}
    pooled = tuple(str(labels[k]) for members in holds.values() if len(members) > 1 for k in members)
    return ResamplingUnits(units.astype(np.int64), strata, independent, resampling, pooled)


def subset_units(whole: ResamplingUnits, samples: Sequence[int]) -> ResamplingUnits:
    """The same units and draws as ``whole``, for some of its samples, given by position."""
    return replace(whole, units=whole.units[np.asarray(samples, dtype=np.int64)])


def replicate_weights(
    sampling: ResamplingUnits,
    replicates: int = REPLICATES,
    seed: int = SEED,
    chunk: int | None = None,
    at_once: int = CHUNK,
) -> Iterator[Floats]:
    """Weights of every sample, in chunks of up to 100 replicates ``(chunk, n)``.

    In each stratum as many units are drawn as it has; a sample weighs as often as its unit was drawn.

    Args:
        sampling: what is resampled.
        replicates: how many.
        seed: of the draws.
        chunk: replicates drawn at a time, by default `chunk_size`; draws depend on it.
        at_once: most replicates that are given at a time; draws do not depend on it.
    """
    chunk = chunk or chunk_size([sampling])
    strata = np.ascontiguousarray(sampling.strata)
    kept = len(strata) * replicates <= KEPT_ELEMENTS
    for drawn in (_kept_draws if kept else draws)(strata.tobytes(), replicates, seed, chunk):
        for start in range(0, drawn.shape[1], at_once):
            yield drawn[:, start : start + at_once][sampling.units].astype(np.float64).T


def draws(strata: bytes, replicates: int, seed: int, chunk: int) -> Iterator[NDArray[np.uint16]]:
    """How often each unit is drawn, in chunks of replicates ``(units, chunk)``; strata are 64-bit whole numbers."""
    strata_of = np.frombuffer(strata, dtype=np.int64)
    members_of = [np.flatnonzero(strata_of == stratum) for stratum in np.unique(strata_of)]
    sizes = [min(chunk, replicates - start) for start in range(0, replicates, chunk)]
    for size, source in zip(sizes, np.random.SeedSequence(seed).spawn(len(sizes)), strict=True):
        generator = np.random.default_rng(source)
        drawn = np.zeros((len(strata_of), size), dtype=np.uint16)
        for members in members_of:
            drawn[members] = _counts(generator, size, len(members)).T
        yield drawn


def _counts(generator: np.random.Generator, size: int, units: int) -> Integers:
    """How often each of some units is drawn when as many are drawn, ``(size, units)``."""
    picks = generator.integers(0, units, (size, units))
    picks += np.arange(size)[:, None] * units
    return np.bincount(picks.ravel(), minlength=size * units).reshape(size, units)


@lru_cache(maxsize=4)  # those of a task and those that the tasks of its dataset share, for two units
def _kept_draws(strata: bytes, replicates: int, seed: int, chunk: int) -> list[NDArray[np.uint16]]:
    """`draws` of a dataset, which are the same for every encoder."""
    return list(draws(strata, replicates, seed, chunk))


def chunk_size(units: Iterable[ResamplingUnits]) -> int:
    """Replicates drawn at a time for units that go together: 100, fewer where one has very many groups."""
    return _held(len(sampling.strata) for sampling in units)


def _held(counts: Iterable[int]) -> int:
    return max(1, min(CHUNK, CHUNK_ELEMENTS // max(counts)))


def replicate(
    metrics: Callable[[dict[str, Floats]], Metrics], units: dict[str, ResamplingUnits], replicates: int, seed: int
) -> tuple[dict[str, float], Metrics]:
    """Point values on the full set, and replicates.

    Args:
        metrics: from weights ``(r, n)`` of each unit to values ``(r,)`` of each metric.
        units: what is resampled, by name.
        replicates: how many.
        seed: the same seed gives the same draws for every encoder.

    Returns:
        ``{metric: value}`` and ``{metric: (replicates,)}``; the latter NaN where one has a single group.
    """
    ones = {name: np.ones((1, len(sampling.units))) for name, sampling in units.items()}
    points = {name: float(values[0]) for name, values in metrics(ones).items()}
    if min(len(sampling.strata) for sampling in units.values()) < 2:
        return points, {name: np.full(replicates, np.nan) for name in points}
    chunk = chunk_size(units.values())
    at_once = _held(len(sampling.units) for sampling in units.values())
    streams = [replicate_weights(sampling, replicates, seed, chunk, at_once) for sampling in units.values()]
    chunks = [metrics(dict(zip(units, weights, strict=True))) for weights in zip(*streams, strict=True)]
    return points, {name: np.concatenate([chunk[name] for chunk in chunks]) for name in points}


def interval(values: Floats) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of replicates ``(r,)``; NaN when more than half of them are undefined."""
    defined = values[~np.isnan(values)]
    if 2 * len(defined) < len(values) or len(defined) == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(defined, LEVELS)
    return float(low), float(high)


def with_interval(value: float, values: Floats) -> dict[str, float | None]:
    """A value with the `interval` of its replicates ``(r,)``, for JSON."""
    low, high = interval(values)
    return plain_values({"value": value, "low": low, "high": high})


def difference(value: float, other: float, replicates: Floats, other_replicates: Floats) -> dict[str, Any]:
    """Paired difference ``value - other`` with its interval and two-sided p.

    ``p = 2 min(P(d <= 0), P(d >= 0))`` over the replicates, each count plus one, at most 1.
    """
    differences = replicates - other_replicates
    low, high = interval(differences)
    defined = differences[~np.isnan(differences)]
    tails = [(defined <= 0).sum() + 1, (defined >= 0).sum() + 1]
    p = min(1.0, 2 * min(tails) / (len(defined) + 1)) if not np.isnan(low) else float("nan")
    return {"difference": value - other, "low": low, "high": high, "p": p}


def _pool_singles(strata: Integers) -> Integers:
    """Strata of one unit put together; if that leaves one unit, it joins the smallest other stratum."""
    labels, inverse, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    pooled = np.where(sizes[inverse] < 2, -1, inverse)
    if (pooled == -1).sum() == 1 and len(labels) > 1:
        others = np.where(sizes < 2, sizes.max() + 1, sizes)
        pooled = np.where(pooled == -1, others.argmin(), pooled)
    return pooled.astype(np.int64)


def as_text(found: Mapping[str, float | None], key: str = "value", digits: int = 3, sign: str = "") -> str:
    """A value with its interval for people: ``0.713 [0.655, 0.768]``, or the value alone where it has no interval.

    Args:
        found: ``low``, ``high`` and the value, None where one is undefined.
        key: name of the value.
        digits: behind the point.
        sign: ``+`` for differences.
    """
    value, low, high = (
        None if found[name] is None else f"{found[name]:{sign}.{digits}f}" for name in (key, "low", "high")
    )
    if value is None:
        return "undefined"
    return value if low is None or high is None else f"{value} [{low}, {high}]"


def plain(value: float) -> float | None:
    """A number for JSON: NaN becomes null."""
    return None if np.isnan(value) else float(value)


def plain_values(values: dict[str, float]) -> dict[str, float | None]:
    """Numbers for JSON; see `plain`."""
    return {name: plain(value) for name, value in values.items()}


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values of one family of comparisons (Holm, 1979, doi:10.2307/4615733).

    With the m p-values in rising order, ``p'_(k) = max_{j <= k} min(1, (m - j + 1) p_(j))``: rejecting where
    ``p' <= alpha`` bounds the chance of any false rejection in the family by alpha, whatever their dependence.

    Args:
        p_values: of each comparison; an undefined one (NaN) stays undefined and is not counted in m.
    """
    defined = sorted((p, name) for name, p in p_values.items() if not np.isnan(p))
    adjusted = dict.fromkeys(p_values, float("nan"))
    largest = 0.0
    for place, (p, name) in enumerate(defined):
        largest = max(largest, min(1.0, (len(defined) - place) * p))
        adjusted[name] = largest
    return adjusted


def paired_differences(
    reference: str, points: Mapping[str, float], replicates: Mapping[str, Floats]
) -> dict[str, dict[str, float | None]]:
    """Reference minus each other encoder, with Holm-adjusted p over these comparisons.

    Args:
        reference: the encoder that the others are compared with.
        points: value of every encoder.
        replicates: bootstrap replicates ``(replicates,)`` of every encoder, under the same draws.

    Returns:
        ``difference``, ``low``, ``high``, ``p`` and ``p_holm`` of each other encoder, None where undefined.
    """
    found: dict[str, dict[str, Any]] = {
        name: difference(points[reference], points[name], replicates[reference], replicates[name])
        for name in points
        if name != reference
    }
    adjusted = holm({name: own["p"] for name, own in found.items()})
    return {name: plain_values(own | {"p_holm": adjusted[name]}) for name, own in found.items()}


def average_ranks(reference: str, scores: Mapping[str, Floats]) -> dict[str, dict[str, float | None]]:
    """Average ranks of encoders over datasets, and Wilcoxon signed-rank tests of the reference against each other one.

    After Demsar (2006, JMLR 7): rank 1 is the best encoder on a dataset, equal scores share their mean rank. Datasets,
    not images, are the sample of the test, which therefore includes how datasets differ.

    Args:
        reference: the encoder that the others are compared with.
        scores: of every encoder on each dataset, ``(datasets,)``, all defined.

    Returns:
        By encoder ``rank``; of the others also ``median_difference`` (reference minus encoder), ``p`` (two-sided; None
        with fewer than six datasets on which the two differ, which cannot reach .05) and ``p_holm``.
    """
    from scipy.stats import rankdata, wilcoxon

    ranks = rankdata(-np.stack(list(scores.values())), axis=0).mean(axis=1)
    found: dict[str, dict[str, float]] = {}
    for (name, own), rank in zip(scores.items(), ranks, strict=True):
        found[name] = {"rank": float(rank)}
        if name != reference:
            apart = scores[reference] - own
            enough = np.count_nonzero(apart) >= FEWEST_FOR_SIGNED_RANKS
            p = float(wilcoxon(apart[apart != 0]).pvalue) if enough else float("nan")
            found[name] |= {"median_difference": float(np.median(apart)), "p": p}
    adjusted = holm({name: own["p"] for name, own in found.items() if "p" in own})
    return {name: plain_values(own | ({"p_holm": adjusted[name]} if "p" in own else {})) for name, own in found.items()}


def above_chance(scores: Floats, chance: float) -> Floats:
    """``(score - chance) / (1 - chance)``: 0 for random answers, 1 for all correct, negative below chance."""
    return (scores - chance) / (1 - chance)
