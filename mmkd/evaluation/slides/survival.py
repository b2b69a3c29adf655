"""Survival prediction: a case is all tiles of all its slides, the prediction a risk, in five folds.

Folds keep the cases of a hospital together where the table states the ``site`` of each; else they keep cases together.

- ``survival-ID``: mean tile, standardised, elastic-net Cox whose penalty inner cross-validation chooses.
- ``survival-ID-mil-cox``: gated attention over tiles, trained by the partial likelihood among the cases of a step.
- ``survival-ID-mil-nll``: the same by the likelihood of discrete hazards in four intervals of time.
- ``survival-ID-clinical``: Cox on the table's own covariates, without any image: the baseline of images.

Every case is predicted by the model of the other folds, after a fixed number of epochs; neither sign nor epoch nor
cut-off is chosen on it. Risks are in units of the training cases of their fold (median 0, spread 1), so that above 0 is
the half of higher risk. Concordance compares cases of one fold only, and is the mean over folds.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.dataset import Dataset, Samples
from mmkd.evaluation.embeddings.embed import Embedded, UndefinedMetricError, Vectors
from mmkd.evaluation.slides.attention import train_attention
from mmkd.evaluation.slides.bags import BagFolder, BagTask, EncoderBags, bags_of, listed, slide_of
from mmkd.evaluation.statistics.bootstrap import Metrics, plain, resampling_units
from mmkd.evaluation.statistics.metrics import Floats, Integers, defined_mean
from mmkd.evaluation.statistics.survival import (
    Booleans,
    Outcomes,
    censoring_weights,
    concordance,
    cox_loss,
    discrete_loss,
    discrete_risk,
    elastic_net,
    kaplan_meier,
    log_rank,
    pairs_of,
    plain_cox,
    time_bins,
)
from mmkd.evaluation.tasks.task import Outputs, Task, TaskOptions

COVARIATES = (
    "age",
    "sex",
    "gender",
    "is_female",
    "stage",
    "tumor_stage",
    "ajcc_stage",
    "pathologic_stage",
    "grade",
    "tumor_grade",
    "oncotree_code",
    "histology",
)
MOST_LEVELS, FEWEST_OF_LEVEL = 10, 10
YES, NO = ("1", "1.0", "true", "yes", "dead", "deceased", "died"), ("0", "0.0", "false", "no", "alive", "living")
FOLDS, INNER, FEWEST_DEATHS = 5, 5, 10
SEED = 0
BINS, COX_TOGETHER, NLL_TOGETHER = 4, 16, 1
HORIZON = 90  # percentile of the training cases' times up to which Uno's concordance counts: G is sound until there
RIDGE = 1e-3
REASONS = {
    "c_index": "no fold holds two cases that can be compared: one that died, and one that lived longer",
    "c_index_uno": f"no fold holds a death before percentile {HORIZON} of the training cases' times",
}
Chosen = dict[str, float]


@dataclass(frozen=True)
class Cohort:
    """Cases in the order of their names.

    Attributes:
        cases: their names.
        slides: those of each case.
        sample_pairs: a pair of each case.
        outcomes: what happened to them.
        names: of the covariates.
        covariates: ``(n, covariates)``, NaN where not known.
        sites: hospital that each case comes from; empty where the table does not state all of them.
        left_out: reason -> how many cases are left out for it.
    """

    cases: list[str]
    slides: list[list[str]]
    sample_pairs: list[Pair]
    outcomes: Outcomes
    names: list[str]
    covariates: Floats
    sites: list[str]
    left_out: dict[str, int]


def read_cohort(dataset: Dataset, available: set[str] | None) -> Cohort:
    """The cases of a dataset.

    Args:
        dataset: its metadata hold ``time`` and ``event`` of every slide.
        available: slides that count; all if None.

    Raises:
        ValueError: a time or event cannot be understood, or slides of one case disagree.
    """
    pairs: dict[str, list[Pair]] = {}
    for pair in dataset.pairs:
        pairs.setdefault(pair.group or pair.id, []).append(pair)
    left_out = {"no time or event": 0, "no bag": 0}
    kept: dict[str, tuple[list[str], Pair, tuple[float, bool]]] = {}
    for case in sorted(pairs):
        known = {outcome for pair in pairs[case] if (outcome := _outcome(pair, dataset.metadata.get(pair.id, {})))}
        if len(known) > 1:
            differing = "; ".join(f"time {time:g}, event {event:d}" for time, event in sorted(known))
            raise ValueError(f"{dataset.manifest.id}: slides of case {case} disagree: {differing}")
        slides = [slide for slide in map(slide_of, pairs[case]) if available is None or slide in available]
        if not known or not slides:
            left_out["no bag" if known else "no time or event"] += 1
        else:
            kept[case] = (sorted(slides), pairs[case][0], next(iter(known)))
    outcomes = Outcomes(
        np.array([outcome[0] for _, _, outcome in kept.values()], dtype=np.float64),
        np.array([outcome[1] for _, _, outcome in kept.values()], dtype=np.bool_),
    )
    firsts = [pair for _, pair, _ in kept.values()]
    rows = [dataset.metadata.get(pair.id, {}) for pair in firsts]
    names, covariates = _covariates(rows)
    sites = [str(row.get("site", "")).strip() for row in rows]
    own = [slides for slides, _, _ in kept.values()]
    return Cohort(list(kept), own, firsts, outcomes, names, covariates, sites if all(sites) else [], left_out)


def site_folds(event: Booleans, sites: Sequence[str], count: int, seed: int) -> Integers | None:
    """A fold for each case, ``(n,)`` from 0 on, all cases of a site in one, deaths spread as evenly as sites allow.

    Stain and scanner differ by hospital, and with them survival: a model tested on cases of the hospitals it was
    trained on can read the site instead of the disease (Howard et al., 2021, doi:10.1038/s41467-021-24698-1).

    Returns:
        None where there are fewer sites, deaths or censored cases than folds, or the sites are not known.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    if len(set(sites)) < count or np.unique(event, return_counts=True)[1].min() < count:
        return None
    folds = np.zeros(len(event), dtype=np.int64)
    split = StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(event, event, sites)
    for fold, (_, test) in enumerate(split):
        folds[test] = fold
    return folds


def stratified_folds(event: Booleans, count: int, seed: int) -> Integers:
    """A fold for each case, ``(n,)`` from 0 on: deaths and censored cases are spread evenly."""
    generator = np.random.default_rng(seed)
    folds = np.zeros(len(event), dtype=np.int64)
    start = 0
    for stratum in (True, False):
        rows = generator.permutation(np.flatnonzero(event == stratum))
        folds[rows] = (start + np.arange(len(rows))) % count
        start += len(rows)
    return folds


def _outcome(pair: Pair, metadata: dict[str, str]) -> tuple[float, bool] | None:
    """Time and event; None where the table leaves either empty."""
    time, event = (str(metadata.get(name, "")).strip() for name in ("time", "event"))
    if not time or not event or time.lower() == "nan" or event.lower() == "nan":
        return None
    number = _number(time)
    if math.isnan(number) or math.isinf(number) or number < 0:
        raise ValueError(f"slide {pair.id}: time {time!r} is no number from 0 on")
    if event.lower() not in (*YES, *NO):
        raise ValueError(f"slide {pair.id}: event {event!r} is none of {listed([*YES, *NO])}")
    return number, event.lower() in YES


def _covariates(rows: list[dict[str, str]]) -> tuple[list[str], Floats]:
    """Known clinical columns: numbers as they are, words as one column for each frequent level but the first."""
    names: list[str] = []
    columns: list[list[float]] = []
    for column in COVARIATES:
        values = [str(row.get(column, "")).strip() for row in rows]
        numbers = [_number(value) for value in values]
        if all(math.isnan(number) for number, value in zip(numbers, values, strict=True) if value):
            levels = [level for level in sorted(set(values) - {""}) if values.count(level) >= FEWEST_OF_LEVEL]
            for level in levels[1:MOST_LEVELS]:
                names.append(f"{column}={level}")
                columns.append([float(value == level) if value else math.nan for value in values])
        elif len({number for number in numbers if not math.isnan(number)}) > 1:
            names.append(column)
            columns.append(numbers)
    return names, np.array(columns, dtype=np.float64).reshape(len(names), len(rows)).T


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


class Survival(Task):
    """Order cases by risk; the unit ``image`` is a case."""

    kind = "survival"

    def __init__(self, samples: Samples, cohort: Cohort, variant: str, title: str) -> None:
        """Fix cases and folds.

        Args:
            samples: of one dataset.
            cohort: its cases.
            variant: which of the ways to answer.
            title: for people.
        """
        super().__init__(samples.manifest, f"Survival prediction (C-index), {title}", variant)
        self.cohort, self.outcomes = cohort, cohort.outcomes
        by_site = site_folds(self.outcomes.event, cohort.sites, FOLDS, SEED)
        self.folds = stratified_folds(self.outcomes.event, FOLDS, SEED) if by_site is None else by_site
        self.units = {
            "image": resampling_units(["died" if e else "censored" for e in self.outcomes.event], cohort.cases)
        }
        self.sample_pairs = {"image": cohort.sample_pairs}
        self.describe(
            {
                "ids": cohort.cases,
                "slides": sum(map(len, cohort.slides)),
                "time": self.outcomes.time.tolist(),
                "event": self.outcomes.event.tolist(),
                "folds": self.folds.tolist(),
                "folds_by": "case" if by_site is None else "site",
                "sites": len(set(cohort.sites)),
                "left_out": cohort.left_out,
                "chance": {"c_index": 0.5, "c_index_uno": 0.5},
            }
        )

    def outputs(self, embedded: Embedded) -> Outputs:
        """``image.risk`` ``(n,)`` by the model of the other folds, and what the fit of each fold chose."""
        deaths = int(self.outcomes.event.sum())
        if deaths == 0:
            raise UndefinedMetricError(f"all {len(self.outcomes)} cases are censored, so that no two can be compared")
        if deaths < FEWEST_DEATHS:
            raise UndefinedMetricError(
                f"{deaths} of {len(self.outcomes)} cases died; at least {FEWEST_DEATHS} are needed"
            )
        risk = np.zeros(len(self.outcomes))
        prepared, chosen = self.prepare(embedded), []
        for fold in range(FOLDS):
            train, test = np.flatnonzero(self.folds != fold), np.flatnonzero(self.folds == fold)
            risk[test], own = self.fold_risks(prepared, train, test)
            chosen.append(own)
        return {"image.risk": risk, **{name: np.array([own[name] for own in chosen]) for name in chosen[0]}}

    @abstractmethod
    def prepare(self, embedded: Embedded) -> Any:
        """What all folds read."""

    @abstractmethod
    def fold_risks(self, prepared: Any, train: Integers, test: Integers) -> tuple[Floats, Chosen]:
        """Risks of ``test`` in units of ``train``, so that ensembles can average them, and what the fit has chosen."""

    def metrics(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """Concordance of Harrell and of Uno: means over the folds in which any two cases can be compared."""
        found: dict[str, list[Floats]] = {"c_index": [], "c_index_uno": []}
        for fold in range(FOLDS):
            test, train = self.folds == fold, self.folds != fold
            own, risks, part = self.outcomes[test], outputs["image.risk"][test], weights["image"][:, test]
            horizon = float(np.percentile(self.outcomes.time[train], HORIZON))
            importance = censoring_weights(self.outcomes[train], own, horizon)
            found["c_index"].append(concordance(own, risks, part))
            found["c_index_uno"].append(concordance(own, risks, part, importance))
        return {name: defined_mean(np.stack(values, axis=-1)) for name, values in found.items()}

    def sample_scores(self, outputs: Outputs) -> dict[str, Floats]:
        """Share of the pairs with a case that are in the right order; one half where it has none."""
        scores = np.full(len(self.outcomes), 0.5)
        for fold in range(FOLDS):
            test = np.flatnonzero(self.folds == fold)
            comparable, right = pairs_of(self.outcomes[test], outputs["image.risk"][test])
            count, won = comparable.sum(axis=0) + comparable.sum(axis=1), right.sum(axis=0) + right.sum(axis=1)
            scores[test] = np.divide(won, count, out=scores[test], where=count > 0)
        return {"image": scores}

    def sample_columns(self, outputs: Outputs) -> dict[str, dict[str, Any]]:
        """Risk, fold and outcome of each case, from which both concordances are computed."""
        own = self.outcomes
        return {
            "image": {"risk": outputs["image.risk"], "fold": self.folds, "time": own.time, "event": own.event},
        }

    def extras(self, outputs: Outputs) -> dict[str, Any]:
        """Kaplan-Meier curves of the halves of higher and lower risk, their log-rank test, and what is undefined."""
        high = outputs["image.risk"] > 0
        chi_square, p = log_rank(self.outcomes, high)
        curves: dict[str, Any] = {"logrank_chi2": plain(chi_square), "logrank_p": plain(p)}
        for name, rows in (("high", high), ("low", ~high)):
            times, survival = kaplan_meier(self.outcomes[rows])
            curves[name] = [[0.0, 1.0], *([float(t), float(s)] for t, s in zip(times, survival, strict=True))]
            curves[f"n_{name}"] = int(rows.sum())
        points = self.metrics(outputs, {"image": np.ones((1, len(high)))})
        undefined = {name: REASONS[name] for name, values in points.items() if np.isnan(values[0])}
        return {"kaplan_meier": curves} | ({"undefined_metrics": undefined} if undefined else {})


class BagSurvival(Survival, BagTask):
    """Risks from the bags of an encoder."""

    def __init__(self, samples: Samples, cohort: Cohort, bags: BagFolder, variant: str, title: str) -> None:
        """Fix cases and bags."""
        super().__init__(samples, cohort, variant, title)
        self.bags = bags
        self.slides = [slide for own in cohort.slides for slide in own]


class MeanCox(BagSurvival):
    """Elastic-net Cox on the mean tile."""

    def prepare(self, embedded: Embedded) -> Floats:
        """Mean of all tiles of each case, ``(n, D)``."""
        bags = self.opened(embedded)
        means = []
        for own in self.cohort.slides:
            parts = [bags.features(slide) for slide in own]
            total = np.sum([part.sum(axis=0, dtype=np.float64) for part in parts], axis=0)
            means.append(total / sum(map(len, parts)))
        return np.stack(means)

    def fold_risks(self, prepared: Floats, train: Integers, test: Integers) -> tuple[Floats, Chosen]:
        """Risks of the elastic net; the penalty is chosen inside ``train``."""
        features = standardised(prepared, train)
        inner = stratified_folds(self.outcomes.event[train], INNER, SEED + 1)
        b, penalty = elastic_net(features[train], self.outcomes[train], inner)
        return in_units_of(features[train] @ b, features[test] @ b), {"penalty": penalty}


class AttentionSurvival(BagSurvival):
    """Gated attention over tiles; variant ``mil-cox`` or ``mil-nll``."""

    def prepare(self, embedded: Embedded) -> EncoderBags:
        """The bags."""
        return self.opened(embedded)

    def fold_risks(self, prepared: EncoderBags, train: Integers, test: Integers) -> tuple[Floats, Chosen]:
        """Risks of a head that is trained on ``train``."""

        def read(case: int) -> Vectors:
            return np.concatenate([prepared.features(slide) for slide in self.cohort.slides[case]])

        bags, others = train.tolist(), test.tolist()
        event = torch.from_numpy(self.outcomes.event[train].astype(np.float32))
        if self.variant == "mil-cox":
            targets = torch.stack([torch.from_numpy(self.outcomes.time[train]).float(), event], dim=1)
            answer = train_attention(read, bags, targets, 1, cox_loss, SEED, COX_TOGETHER)
            risks = [answer(cases)[:, 0].astype(np.float64) for cases in (bags, others)]
        else:
            edges = time_bins(self.outcomes[train], BINS)
            bins = np.searchsorted(edges, self.outcomes.time[train], side="right")
            targets = torch.stack([torch.from_numpy(bins).float(), event], dim=1)
            answer = train_attention(read, bags, targets, BINS, discrete_loss, SEED, NLL_TOGETHER)
            risks = [discrete_risk(answer(cases).astype(np.float64)) for cases in (bags, others)]
        return in_units_of(*risks), {}


class ClinicalCox(Survival):
    """Cox on the table's covariates: the same for every encoder."""

    def prepare(self, embedded: Embedded) -> Floats:
        """Covariates ``(n, D)``, NaN where the table has none."""
        return self.cohort.covariates

    def fold_risks(self, prepared: Floats, train: Integers, test: Integers) -> tuple[Floats, Chosen]:
        """Risks; what is missing becomes the training cases' mean."""
        features = np.nan_to_num(standardised(prepared, train))
        b = plain_cox(features[train], self.outcomes[train], RIDGE)
        return in_units_of(features[train] @ b, features[test] @ b), {}


def tasks(samples: Samples, options: TaskOptions) -> tuple[list[Survival], dict[str, str]]:
    """The methods that the dataset allows, and why others are left out.

    Raises:
        ValueError: slides of one case disagree about its time or event, or these are no numbers.
    """
    dataset, name, bags = samples.dataset, f"survival-{samples.manifest.id}", bags_of(samples.dataset)
    if bags is None:
        return [], {name: "its source holds no bags of slides"}
    found: list[Survival] = []
    skipped = {}
    cohort = read_cohort(dataset, bags.slides())
    if cohort.cases:
        found += [
            MeanCox(samples, cohort, bags, "", "Cox on the mean tile"),
            AttentionSurvival(samples, cohort, bags, "mil-cox", "attention and partial likelihood"),
            AttentionSurvival(samples, cohort, bags, "mil-nll", "attention and discrete hazards"),
        ]
    else:
        skipped[name] = f"no case has both an outcome and a bag of any encoder in {bags.root}"
    everyone = read_cohort(dataset, None)
    if everyone.cases and everyone.names:
        found.append(ClinicalCox(samples, everyone, "clinical", "clinical covariates alone"))
        found[-1].description["covariates"] = everyone.names
    else:
        skipped[f"{name}-clinical"] = "its table holds no covariates such as age or sex"
    return found, skipped


def standardised(features: Floats, train: Integers) -> Floats:
    """Every column less its mean over ``train``, in units of its spread there; NaN stays."""
    mean, spread = np.nanmean(features[train], axis=0), np.nanstd(features[train], axis=0)
    return (features - mean) / np.where(spread > 0, spread, 1.0)


def in_units_of(train: Floats, test: Floats) -> Floats:
    """Risks of ``test`` less the median of those of ``train``, in units of their spread; 0 where they have none."""
    spread = train.std()
    return (test - np.median(train)) / spread if spread > 0 else np.zeros(len(test))
