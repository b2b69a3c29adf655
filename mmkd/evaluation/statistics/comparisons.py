"""Comparisons of one encoder with several others: adjusted p-values, average ranks, scores relative to chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmkd.evaluation.statistics.bootstrap import difference, plain_values
from mmkd.evaluation.statistics.metrics import Floats

FEWEST_FOR_SIGNED_RANKS = 6  # with five datasets the smallest two-sided p of the signed-rank test is 2 / 2**5 = .06


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
