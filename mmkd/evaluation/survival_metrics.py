"""Metrics of survival: concordance of risks with the order of deaths, Kaplan-Meier curves, the log-rank test.

Times and events are those of cases: ``event`` says that the case died at ``time``; otherwise it was censored then. The
concordances are sums over pairs of cases, so that a thousand bootstrap replicates are two matrix products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmkd.evaluation.metrics import Floats, Integers

TIED = 1e-8
Booleans = NDArray[np.bool_]


@dataclass(frozen=True)
class Outcomes:
    """What happened to each case.

    Attributes:
        time: until death or the last that is known, ``(n,)``.
        event: whether it is death, ``(n,)``.
    """

    time: Floats
    event: Booleans

    def __getitem__(self, rows: Booleans | Integers) -> Outcomes:
        return Outcomes(self.time[rows], self.event[rows])

    def __len__(self) -> int:
        return len(self.time)


def concordance(outcomes: Outcomes, risks: Floats, weights: Floats, importance: Floats | None = None) -> Floats:
    """Share of comparable pairs in which the case that died first has the higher risk; tied risks count one half.

    A pair is comparable if one case died and the other lived longer, or was censored at that very time (Harrell). With
    ``importance = 1 / G(t)^2`` for each death it no longer depends on the censoring (Uno et al., 2011).

    Args:
        outcomes: of n cases.
        risks: ``(n,)``, higher = sooner.
        weights: of the cases, ``(replicates, n)``.
        importance: of each case as the one that died, ``(n,)``; ones if absent.

    Returns:
        ``(replicates,)``; NaN where no pair is comparable.
    """
    comparable, right = pairs_of(outcomes, risks)
    if importance is not None:
        comparable, right = comparable * importance[:, None], right * importance[:, None]
    above = ((weights @ right) * weights).sum(axis=1)
    below = ((weights @ comparable) * weights).sum(axis=1)
    return np.divide(above, below, out=np.full(len(weights), np.nan), where=below > 0)


def pairs_of(outcomes: Outcomes, risks: Floats) -> tuple[Floats, Floats]:
    """Which pairs can be compared, ``(n, n)`` who died first in rows; and how far risks agree, 0 to 1."""
    time, event = outcomes.time, outcomes.event
    later = (time[None, :] > time[:, None]) | ((time[None, :] == time[:, None]) & ~event[None, :])
    comparable = (event[:, None] & later).astype(np.float64)
    lead = risks[:, None] - risks[None, :]
    return comparable, comparable * np.where(np.abs(lead) <= TIED, 0.5, lead > 0)


def censoring_weights(reference: Outcomes, outcomes: Outcomes, horizon: float) -> Floats:
    """``1 / G(t)^2`` for every death before ``horizon``, else 0, ``(n,)``.

    ``G`` is the Kaplan-Meier curve of censoring among the ``reference`` cases; deaths come before censorings of the
    same time.
    """
    times, survival = kaplan_meier(Outcomes(reference.time, ~reference.event), deaths_first=reference.event)
    position = np.searchsorted(times, outcomes.time, side="right") - 1
    free = np.where(position >= 0, survival[np.maximum(position, 0)], 1.0)
    counted = outcomes.event & (outcomes.time < horizon) & (free > 0)
    return np.where(counted, 1 / np.square(np.where(free > 0, free, 1.0)), 0.0)


def kaplan_meier(outcomes: Outcomes, deaths_first: Booleans | None = None) -> tuple[Floats, Floats]:
    """Product-limit estimate of survival.

    Args:
        outcomes: of the cases.
        deaths_first: cases that leave before the events of the same time happen, ``(n,)``.

    Returns:
        Distinct times in order, and the share that survives each.
    """
    times, position = np.unique(outcomes.time, return_inverse=True)
    gone = np.bincount(position, minlength=len(times))
    at_risk = len(outcomes) - np.cumsum(gone) + gone
    if deaths_first is not None:
        at_risk = at_risk - np.bincount(position, weights=deaths_first, minlength=len(times))
    died = np.bincount(position, weights=outcomes.event, minlength=len(times))
    return times, np.cumprod(1 - died / np.maximum(at_risk, 1))


def log_rank(outcomes: Outcomes, high: Booleans) -> tuple[float, float]:
    """Log-rank test between two groups: chi-square with one degree of freedom, and p; NaN where one group is empty."""
    observed = expected = variance = 0.0
    for time in np.unique(outcomes.time[outcomes.event]):
        there = outcomes.time >= time
        n, own = int(there.sum()), int((there & high).sum())
        died = (outcomes.time == time) & outcomes.event
        d = int(died.sum())
        observed += int((died & high).sum())
        expected += d * own / n
        if n > 1:
            variance += d * (own / n) * (1 - own / n) * (n - d) / (n - 1)
    if variance <= 0:
        return math.nan, math.nan
    chi_square = (observed - expected) ** 2 / variance
    return chi_square, math.erfc(math.sqrt(chi_square / 2))
