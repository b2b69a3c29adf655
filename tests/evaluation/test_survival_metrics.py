import warnings

import numpy as np
import pytest
import torch

from mmkd.evaluation.statistics import survival as cox
from mmkd.evaluation.statistics.survival import Outcomes, censoring_weights, concordance, kaplan_meier, log_rank


def cohort(count=120, seed=0, distinct=25):
    """Outcomes with many ties in time, risks with some."""
    generator = np.random.default_rng(seed)
    time = generator.integers(1, distinct, count).astype(float)
    return Outcomes(time, generator.random(count) < 0.6), np.round(generator.normal(size=count) - 0.05 * time, 1)


def scikit_survival(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(f"sksurv.{module}", reason="the reference is scikit-survival")


def structured(outcomes):
    return np.array(list(zip(outcomes.event, outcomes.time, strict=True)), dtype=[("event", bool), ("time", float)])


def test_concordances_are_those_of_scikit_survival_also_for_resampled_cases():
    theirs = scikit_survival("metrics")
    outcomes, risks = cohort()
    reference, _ = cohort(seed=1)
    draws = [np.arange(120), *np.random.default_rng(2).integers(0, 120, (5, 120))]
    weights = np.stack([np.bincount(rows, minlength=120).astype(float) for rows in draws])
    harrell = concordance(outcomes, risks, weights)
    uno = concordance(outcomes, risks, weights, censoring_weights(reference, outcomes, 18.0))
    for k, rows in enumerate(draws):
        own = outcomes[rows]
        assert harrell[k] == pytest.approx(
            theirs.concordance_index_censored(own.event, own.time, risks[rows])[0], abs=1e-9
        )
        theirs_uno = theirs.concordance_index_ipcw(structured(reference), structured(own), risks[rows], tau=18.0)[0]
        assert uno[k] == pytest.approx(theirs_uno, abs=1e-9)


def test_curves_and_log_rank_are_those_of_scikit_survival():
    nonparametric, compare = scikit_survival("nonparametric"), scikit_survival("compare")
    outcomes, risks = cohort()
    times, survival = kaplan_meier(outcomes)
    their_times, their_survival = nonparametric.kaplan_meier_estimator(outcomes.event, outcomes.time)
    assert times.tolist() == their_times.tolist() and survival == pytest.approx(their_survival, abs=1e-12)
    high = risks > np.median(risks)
    chi_square, p = log_rank(outcomes, high)
    assert (chi_square, p) == pytest.approx(compare.compare_survival(structured(outcomes), high), rel=1e-9)
    assert np.isnan(log_rank(outcomes, np.ones(120, dtype=bool))[1])


def test_no_comparable_pair_is_no_number():
    outcomes, risks = cohort()
    nobody = Outcomes(outcomes.time, np.zeros(120, dtype=bool))
    assert np.isnan(concordance(nobody, risks, np.ones((2, 120)))).all()


def test_coefficients_are_those_of_scikit_survival():
    models = scikit_survival("linear_model")
    outcomes, _ = cohort(200, seed=3)
    generator = np.random.default_rng(4)
    x = generator.normal(size=(200, 6))
    x[:, 0] += 0.1 * outcomes.time
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    theirs = models.CoxPHSurvivalAnalysis(alpha=0.0, ties="breslow").fit(x, structured(outcomes)).coef_
    assert cox.plain_cox(x, outcomes) == pytest.approx(theirs, abs=1e-3)
    path = cox.CoxPath(x, outcomes, np.ones((200, 1)))
    for alpha in (0.02, 0.1):
        model = models.CoxnetSurvivalAnalysis(alphas=[alpha], l1_ratio=0.5, tol=1e-9, max_iter=100000)
        penalty = np.array([alpha * 200 / outcomes.event.sum()])  # ours is per death, theirs per case
        ours = path.fit(penalty, np.zeros((6, 1)))[:, 0]
        assert ours == pytest.approx(model.fit(x, structured(outcomes)).coef_[:, 0], abs=1e-3)


def test_the_gradient_is_that_of_the_likelihood_and_choices_do_not_mix():
    outcomes, _ = cohort(40, seed=5)
    generator = np.random.default_rng(6)
    x, b = generator.normal(size=(40, 3)), generator.normal(size=(3, 2))
    kept = np.stack([np.ones(40), generator.random(40) < 0.7], axis=1).astype(float)
    value, slope = cox.CoxPath(x, outcomes, kept).likelihood(b)
    for choice in range(2):
        rows = kept[:, choice] > 0
        alone = cox.CoxPath(x[rows], outcomes[rows], np.ones((rows.sum(), 1)))
        assert alone.likelihood(b[:, [choice]])[0][0] == pytest.approx(value[choice])
        for axis in range(3):
            moved = b[:, [choice]].copy()
            moved[axis] += 1e-6
            rise = (alone.likelihood(moved)[0][0] - value[choice]) / 1e-6
            assert rise == pytest.approx(slope[axis, choice], abs=1e-4)
    risks = torch.from_numpy(x @ b[:, [0]])
    targets = torch.from_numpy(np.stack([outcomes.time, outcomes.event], axis=1).astype(float))
    assert float(cox.cox_loss(risks, targets)) == pytest.approx(value[0])


def test_discrete_hazards():
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5]])
    hazard = torch.sigmoid(logits)[0]
    died = cox.discrete_loss(logits, torch.tensor([[2.0, 1.0]]))
    assert float(died) == pytest.approx(-float(torch.log((1 - hazard[0]) * (1 - hazard[1]) * hazard[2])))
    censored = cox.discrete_loss(logits, torch.tensor([[1.0, 0.0]]))
    assert float(censored) == pytest.approx(-float(torch.log((1 - hazard[0]) * (1 - hazard[1]))))
    assert cox.discrete_risk(np.array([[3.0, 3.0], [-3.0, -3.0]])).tolist() == sorted(
        cox.discrete_risk(np.array([[3.0, 3.0], [-3.0, -3.0]])).tolist(), reverse=True
    )
    outcomes, _ = cohort()
    bins = np.searchsorted(cox.time_bins(outcomes, 4), outcomes.time[outcomes.event], side="right")
    assert set(bins.tolist()) == {0, 1, 2, 3}
