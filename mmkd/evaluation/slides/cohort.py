"""The cases of a survival dataset: outcomes and covariates from the rows of its slides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.dataset import Dataset
from mmkd.evaluation.slides.bags import listed, slide_of
from mmkd.evaluation.statistics.metrics import Floats, Integers
from mmkd.evaluation.statistics.survival import Booleans, Outcomes

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
        slides = [slide for pair in pairs[case] if (slide := slide_of(pair)) and _counts(slide, available)]
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


def _counts(slide: str, available: set[str] | None) -> bool:
    return available is None or slide in available


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
