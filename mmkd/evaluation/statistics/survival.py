"""Metrics of survival: concordance of risks with the order of deaths, Kaplan-Meier curves, the log-rank test.

Times and events are those of cases: ``event`` is true where the case died at ``time`` and false where it was censored.
The concordances are sums over pairs of cases, so that a thousand bootstrap replicates are two matrix products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmkd.evaluation.statistics.metrics import Floats, Integers

TIED = 1e-8
Booleans = NDArray[np.bool_]
MIXING, PENALTIES, SMALLEST = 0.5, 10, 0.05
STEPS, TOLERANCE = 300, 1e-5


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
    """Share of comparable pairs in which the case that died earlier has the higher risk; tied risks count one half.

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
    """Which pairs are comparable, ``(n, n)``, the earlier death in rows; and whether risks agree, 0, 0.5 or 1."""
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
    time = np.where(reference.event, np.nextafter(reference.time, -np.inf), reference.time)
    free = _survival_function(Outcomes(time, ~reference.event)).evaluate(outcomes.time)
    counted = outcomes.event & (outcomes.time < horizon) & (free > 0)
    return np.where(counted, 1 / np.square(np.where(free > 0, free, 1.0)), 0.0)


def kaplan_meier(outcomes: Outcomes) -> tuple[Floats, Floats]:
    """Distinct times in order, and the product-limit estimate of the share that survives each."""
    if not len(outcomes):
        return np.zeros(0), np.zeros(0)
    curve = _survival_function(outcomes)
    return curve.quantiles, curve.probabilities


def log_rank(outcomes: Outcomes, high: Booleans) -> tuple[float, float]:
    """Log-rank test between two groups: chi-square with one degree of freedom, and p; NaN where one group is empty."""
    from scipy.stats import CensoredData, logrank

    if high.all() or not high.any() or not outcomes.event.any():
        return math.nan, math.nan
    groups = [CensoredData.right_censored(outcomes.time[own], ~outcomes.event[own]) for own in (high, ~high)]
    with np.errstate(invalid="ignore", divide="ignore"):  # no variance where all deaths come when one case is left
        found = logrank(*groups)
    return float(found.statistic) ** 2, float(found.pvalue)


def _survival_function(outcomes: Outcomes) -> Any:
    from scipy.stats import CensoredData, ecdf

    return ecdf(CensoredData.right_censored(outcomes.time, ~outcomes.event)).sf


class CoxPath:
    """Cox's model, hazard ``h(t) exp(x b)``: partial likelihoods (Breslow's ties) under several choices of the cases.

    The elastic net is fitted by accelerated proximal gradient for several training sets at once: the matrix is
    multiplied once, and each column of the coefficients belongs to one choice. The penalty is chosen by the
    cross-validated partial likelihood (Verweij and van Houwelingen, 1993), which needs no cut-off and no concordance.
    """

    def __init__(self, features: Floats, outcomes: Outcomes, kept: Floats) -> None:
        """Sort by time once.

        Args:
            features: ``(n, D)``.
            outcomes: of the cases.
            kept: 1 where a case belongs to a choice, ``(n, choices)``.
        """
        order = np.argsort(-outcomes.time, kind="stable")
        self.x, self.kept = features[order], kept[order]
        self.died = outcomes.event[order][:, None] * self.kept
        self.deaths = np.maximum(self.died.sum(axis=0), 1.0)
        ordered = outcomes.time[order]
        # Cases of one time share a risk set: it ends with the last of them, in order of falling time.
        self.last = np.searchsorted(-ordered, -ordered, side="right") - 1
        self.first = np.searchsorted(-ordered, -ordered, side="left")

    def likelihood(self, b: Floats) -> tuple[Floats, Floats]:
        """Negative log partial likelihood per death ``(choices,)``, and its gradient ``(D, choices)``.

        ``-sum_i died_i (x_i b - log sum_{j: t_j >= t_i} exp(x_j b))``
        """
        eta = self.x @ b
        shift = np.where(self.kept > 0, eta, -np.inf).max(axis=0)
        raised = np.exp(np.minimum(eta - shift, 50.0)) * self.kept
        at_risk = np.maximum(np.cumsum(raised, axis=0)[self.last], 1e-300)
        value = -(self.died * (eta - shift - np.log(at_risk))).sum(axis=0)
        share = self.died / at_risk
        total = share.sum(axis=0)
        # every case counts in the risk sets of deaths that came no later than it left: those from its time's first on
        later = total - (np.cumsum(share, axis=0) - share)[self.first]
        slope = self.x.T @ (raised * later - self.died)
        return value / self.deaths, slope / self.deaths

    def fit(self, penalty: Floats, start: Floats, mixing: float = MIXING) -> Floats:
        """Coefficients ``(D, choices)`` that minimise likelihood + ``penalty (mixing |b|_1 + (1 - mixing) |b|^2 / 2)``.

        Args:
            penalty: of each choice, ``(choices,)``.
            start: ``(D, choices)``.
            mixing: share of the absolute values.
        """

        def smooth(at: Floats) -> tuple[Floats, Floats]:
            value, slope = self.likelihood(at)
            ridge = penalty * (1 - mixing)
            return value + ridge * np.square(at).sum(axis=0) / 2, slope + ridge * at

        b, ahead, momentum, bound = start, start, 1.0, 1.0
        for _ in range(STEPS):
            value, slope = smooth(ahead)
            while True:
                raw = ahead - slope / bound
                new = np.sign(raw) * np.maximum(np.abs(raw) - penalty * mixing / bound, 0)
                step = new - ahead
                model = value + (slope * step).sum(axis=0) + bound / 2 * np.square(step).sum(axis=0)
                if (smooth(new)[0] <= model + 1e-12 + 1e-9 * np.abs(model)).all() or bound > 1e12:
                    break
                bound *= 2
            if ((ahead - new) * (new - b)).sum() > 0:
                momentum = 1.0  # the step increased the loss: restart the momentum
            following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
            ahead = new + (momentum - 1) / following * (new - b)
            change = np.abs(new - b).max()
            b, momentum = new, following
            if change < TOLERANCE:
                break
        return b


def elastic_net(features: Floats, outcomes: Outcomes, folds: Integers) -> tuple[Floats, float]:
    """Coefficients ``(D,)`` of the elastic net whose penalty does best in cross-validation, and that penalty.

    The path goes from just below the penalty that leaves nothing to a twentieth of it: the model is never empty.

    Args:
        features: standardised, ``(n, D)``.
        outcomes: of the cases, at least one death outside each fold.
        folds: the inner fold of each case, from 0 on.
    """
    count = folds.max() + 1
    kept = np.concatenate([np.ones((len(folds), 1)), folds[:, None] != np.arange(count)], axis=1).astype(np.float64)
    path = CoxPath(features, outcomes, kept)
    whole = CoxPath(features, outcomes, np.ones((len(folds), count)))
    b = np.zeros((features.shape[1], count + 1))
    most = np.abs(path.likelihood(b)[1]).max(axis=0) / MIXING
    best, chosen, strength = np.inf, b[:, 0], float(most[0])
    for factor in np.geomspace(0.95, SMALLEST, PENALTIES):
        b = path.fit(most * factor, b)
        inside = path.likelihood(b)[0][1:] * path.deaths[1:]
        loss = float((whole.likelihood(b[:, 1:])[0] * whole.deaths - inside).sum())
        if loss < best:
            best, chosen, strength = loss, b[:, 0], float(most[0] * factor)
    return chosen, strength


def plain_cox(features: Floats, outcomes: Outcomes, ridge: float = 0.0) -> Floats:
    """Coefficients ``(D,)`` without choice of variables: few covariates, all of them kept."""
    path = CoxPath(features, outcomes, np.ones((len(outcomes), 1)))
    return path.fit(np.array([ridge]), np.zeros((features.shape[1], 1)), mixing=0.0)[:, 0]


def cox_loss(risks: Tensor, targets: Tensor) -> Tensor:
    """Negative log partial likelihood per death among the cases of one step.

    Args:
        risks: ``(b, 1)``.
        targets: time and event, ``(b, 2)``.
    """
    time, event = targets[:, 0], targets[:, 1]
    eta = risks[:, 0]
    there = time[None, :] >= time[:, None]
    at_risk = torch.where(there, eta[None, :], eta.new_tensor(-torch.inf)).logsumexp(dim=1)
    return ((at_risk - eta) * event).sum() / event.sum().clamp_min(1)


def discrete_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of discrete hazards ``sigmoid(logits)`` (Zadeh and Schmid, 2020), a mean over cases.

    Args:
        logits: ``(b, bins)``.
        targets: number of the bin, and event, ``(b, 2)``: a death survives the bins before its own, a censored case
            its own, too.
    """
    bins, event = targets[:, 0].long(), targets[:, 1]
    dies, lives = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    before = (torch.arange(logits.shape[1], device=logits.device) < bins[:, None]).float()
    own_dies, own_lives = (part.gather(1, bins[:, None])[:, 0] for part in (dies, lives))
    return -((lives * before).sum(dim=1) + event * own_dies + (1 - event) * own_lives).mean()


def discrete_risk(logits: Floats) -> Floats:
    """Minus the expected number of bins survived, ``-sum_k prod_{j <= k} (1 - h_j)``: ``(n, bins)`` to ``(n,)``."""
    survival = np.cumprod(1 / (1 + np.exp(logits.astype(np.float64))), axis=1)
    return -survival.sum(axis=1)


def time_bins(outcomes: Outcomes, count: int) -> Floats:
    """Edges between bins that hold equally many deaths, ``(count - 1,)``."""
    return np.quantile(outcomes.time[outcomes.event], np.linspace(0, 1, count + 1)[1:-1])
