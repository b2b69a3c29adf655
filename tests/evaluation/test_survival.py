import numpy as np
import pytest

pytest.importorskip("h5py", reason="bags are HDF5 files")

from simulated_slides import (
    WIDTH,
    SlideDataset,
    exponential_cohort,
    risk_tiles,
    slide_manifest,
    slide_pairs,
    write_bag,
)

from mmkd.evaluation.datasets.dataset import Samples
from mmkd.evaluation.embeddings.embed import Embedded, UndefinedMetricError
from mmkd.evaluation.slides import attention as attention_mil
from mmkd.evaluation.slides import survival
from mmkd.evaluation.slides.survival import read_cohort, stratified_folds
from mmkd.evaluation.statistics.bootstrap import interval, replicate
from mmkd.evaluation.statistics.survival import Outcomes, concordance
from mmkd.evaluation.tasks.task import TaskOptions

CASES, SLIDES = 100, 134


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Cases with a known hazard; every third has two slides; oracle, random and unsound bags."""
    root, generator = tmp_path_factory.mktemp("bags"), np.random.default_rng(1)
    risk, time, event = exponential_cohort(CASES)
    slides = [f"case{k:03}-{part}" for k in range(CASES) for part in range(2 if k % 3 == 0 else 1)]
    facts = {}
    for slide in slides:
        k = int(slide[4:7])
        write_bag(root / "oracle" / f"{slide}.h5", risk_tiles(generator, risk[k]))
        write_bag(root / "random" / f"{slide}.h5", generator.normal(size=(8, WIDTH)))
        write_bag(root / "nan" / f"{slide}.h5", np.full((2, WIDTH), np.nan))
        if k:
            write_bag(root / "partial" / f"{slide}.h5", generator.normal(size=(8, WIDTH)))
        age = f"{60 + 10 * risk[k]:.1f}" if k % 10 else ""
        facts[slide] = {"time": str(time[k]), "event": str(int(event[k])), "age": age, "sex": "mf"[k % 2]}
    pairs = slide_pairs(slides, [slide[:7] for slide in slides])
    collection = SlideDataset(slide_manifest("survival"), pairs, root, facts)
    samples = Samples(collection.manifest, pairs, [], [], {}, collection)
    ceiling = concordance(Outcomes(time, event), risk, np.ones((1, CASES)))[0]
    return samples, ceiling


@pytest.fixture(scope="module")
def tasks(cohort):
    found, skipped = survival.tasks(cohort[0], TaskOptions())
    assert not skipped
    return {task.variant: task for task in found}


def value(task, outputs, metric="c_index"):
    return task.metrics(outputs, {"image": np.ones((1, CASES))})[metric][0]


@pytest.mark.parametrize("variant", ["", "mil-cox", "mil-nll", "clinical"])
def test_a_known_hazard_is_found_and_noise_is_not(cohort, tasks, variant, monkeypatch):
    if variant == "mil-nll":  # a sixteenth of the steps, and larger ones: as near to the ceiling, in less time
        monkeypatch.setattr(survival, "NLL_TOGETHER", 16)
        monkeypatch.setattr(attention_mil, "LEARNING_RATE", 3e-3)
    slack = 0.06
    task, ceiling = tasks[variant], cohort[1]
    outputs = task.outputs(Embedded("oracle", "f"))
    assert ceiling - slack < value(task, outputs) < ceiling + 0.03, variant
    assert value(task, outputs, "c_index_uno") > ceiling - slack - 0.06
    curves = task.extras(outputs)["kaplan_meier"]
    assert curves["logrank_p"] < 1e-6 and curves["n_high"] + curves["n_low"] == CASES
    middle = np.median(task.outcomes.time)
    high, low = (min(share for time, share in curves[name] if time <= middle) for name in ("high", "low"))
    assert high < low - 0.2
    if variant != "clinical":
        noise = task.outputs(Embedded("random", "f"))
        points, values = replicate(lambda weights: task.metrics(noise, weights), task.units, 200, 0)
        low, high = interval(values["c_index"])
        assert low <= 0.5 <= high and abs(points["c_index"] - 0.5) < 0.1, variant
        both = task.ensemble([], [outputs, noise])
        assert 0.5 < value(task, both) <= 1


def test_the_same_twice_and_scores_between_0_and_1(tasks):
    first, second = (tasks[""].outputs(Embedded("oracle", "f")) for _ in range(2))
    assert first["image.risk"].tobytes() == second["image.risk"].tobytes()
    assert first["penalty"].shape == (survival.FOLDS,) and (first["penalty"] > 0).all()
    scores = tasks[""].sample_scores(first)["image"]
    assert scores.shape == (CASES,) and scores.min() >= 0 and scores.max() <= 1 and scores.mean() > 0.7


@pytest.mark.parametrize("variant", ["", "clinical"])
def test_a_cases_risk_does_not_depend_on_who_else_is_tested(tasks, variant):
    task = tasks[variant]
    prepared = task.prepare(Embedded("oracle", "f"))
    train, test = np.flatnonzero(task.folds != 0), np.flatnonzero(task.folds == 0)
    together, _ = task.fold_risks(prepared, train, test)
    alone, _ = task.fold_risks(prepared, train, test[:3])
    assert alone == pytest.approx(together[:3])


def test_folds_are_of_cases_and_hold_deaths(tasks):
    task = tasks[""]
    assert len(task.cohort.cases) == CASES == len(task.folds) and task.description["slides"] == SLIDES
    deaths = np.bincount(task.folds, weights=task.outcomes.event)
    assert np.ptp(deaths) <= 1 and np.ptp(np.bincount(task.folds)) <= 1
    assert stratified_folds(task.outcomes.event, 5, 0).tolist() == task.folds.tolist()


def test_what_cannot_be_answered_says_why(cohort, tasks):
    with pytest.raises(UndefinedMetricError, match="2 of 2 tiles of slide case000-0 are not finite"):
        tasks[""].outputs(Embedded("nan", "f"))
    with pytest.raises(
        UndefinedMetricError, match=f"2 of {SLIDES} slides have no bag of partial: case000-0, case000-1"
    ):
        tasks["mil-cox"].outputs(Embedded("partial", "f"))
    with pytest.raises(UndefinedMetricError, match="no bags of clip"):
        tasks["mil-nll"].outputs(Embedded("clip", "f"))
    assert tasks[""].extra_fingerprint(Embedded("oracle", "f")) != tasks[""].extra_fingerprint(Embedded("random", "f"))


def changed(cohort, **facts):
    """The cohort with other facts of all slides, or with those of the first slide alone if ``first`` is given."""
    samples, _ = cohort
    own = samples.dataset
    first = facts.pop("first", {})
    changed_facts = {slide: {**known, **facts} for slide, known in own.metadata.items()}
    changed_facts[own.pairs[0].id].update(first)
    collection = SlideDataset(own.manifest, own.pairs, own.root, changed_facts)
    return Samples(own.manifest, samples.held_out, [], [], {}, collection)


def test_cohorts_that_tell_nothing_are_undefined_or_refused(cohort):
    censored = survival.tasks(changed(cohort, event="0"), TaskOptions())[0]
    for task in censored:
        with pytest.raises(UndefinedMetricError, match=f"all {CASES} cases are censored"):
            task.outputs(Embedded("oracle", "f"))
    with pytest.raises(ValueError, match="slides of case case000 disagree"):
        survival.tasks(changed(cohort, first={"time": "123"}), TaskOptions())
    with pytest.raises(ValueError, match=r"event 'perhaps' is none of 1, 1.0, true"):
        survival.tasks(changed(cohort, event="perhaps"), TaskOptions())
    with pytest.raises(ValueError, match="time '-1' is no number from 0 on"):
        survival.tasks(changed(cohort, time="-1"), TaskOptions())
    at_once = survival.tasks(changed(cohort, time="0"), TaskOptions())[0][0]
    extras = at_once.extras(at_once.outputs(Embedded("oracle", "f")))
    assert list(extras["undefined_metrics"]) == ["c_index_uno"]
    assert survival.tasks(changed(cohort, time=""), TaskOptions())[1]["survival-slides"].startswith("no case has both")
    found, skipped = survival.tasks(changed(cohort, age="", sex=""), TaskOptions())
    assert len(found) == 3 and "no covariates" in skipped["survival-slides-clinical"]


def test_the_real_tables_covariates_give_what_scikit_survival_gives(shared_data):
    import csv
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = pytest.importorskip("sksurv.linear_model", reason="the reference is scikit-survival")
    with (shared_data / "tcga_survival" / "tcga_blca_clinical.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pairs = slide_pairs([row["slide_id"] for row in rows], [row["case_id"] for row in rows])
    facts = {
        row["slide_id"]: row | {"time": row["survival_months"], "event": str(int(float(row["censorship"]) == 0))}
        for row in rows
    }
    collection = SlideDataset(slide_manifest("survival"), pairs, None, facts)
    own = read_cohort(collection, None)
    assert "age" in own.names and "is_female" in own.names
    x = np.nan_to_num(survival.standardised(own.covariates, np.arange(len(own.cases))))
    answers = np.array(list(zip(own.outcomes.event, own.outcomes.time, strict=True)), dtype=[("e", bool), ("t", float)])
    theirs = models.CoxPHSurvivalAnalysis(alpha=0.0, ties="breslow").fit(x, answers)
    ours = survival.plain_cox(x, own.outcomes)
    assert ours == pytest.approx(theirs.coef_, abs=2e-3)
    c = concordance(own.outcomes, x @ ours, np.ones((1, len(x))))[0]
    assert c == pytest.approx(theirs.score(x, answers), abs=1e-3) and c > 0.58
