import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mmkd.evaluation.statistics import bootstrap, metrics
from mmkd.evaluation.statistics.bootstrap import (
    BY_GROUP,
    BY_IMAGE,
    difference,
    interval,
    replicate,
    replicate_weights,
    resampling_units,
)


def data(n=120, seed=0):
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, 3, n)
    groups = [f"g{t}-{k % 7}" for k, t in enumerate(targets)]
    return targets, generator.normal(size=(n, 3)) + np.eye(3)[targets], groups


def test_replicates_are_a_naive_loop_over_the_same_draws():
    targets, scores, groups = data()
    sampling = resampling_units(list(map(str, targets)), groups)
    _, found = replicate(
        lambda weights: {"auroc": metrics.macro_auroc(targets, scores, weights["image"])}, {"image": sampling}, 250, 42
    )
    weights = np.concatenate(list(replicate_weights(sampling, 250, 42)))
    for row in range(0, 250, 25):
        copies = np.repeat(np.arange(len(targets)), weights[row].astype(int))
        naive = np.mean([_auroc(targets[copies] == k, scores[copies, k]) for k in range(3)])
        assert found["auroc"][row] == pytest.approx(naive, abs=1e-9)


def _auroc(positive, scores):
    above = scores[positive][:, None] - scores[~positive][None]
    return (above > 0).mean() + (above == 0).mean() / 2


def test_groups_stay_whole_and_strata_keep_their_size():
    targets, _, groups = data()
    sampling = resampling_units(list(map(str, targets)), groups)
    assert sampling.resampling == BY_GROUP and sampling.groups == 21
    for weights in replicate_weights(sampling, 150, 1):
        for group in set(groups):
            rows = [k for k, name in enumerate(groups) if name == group]
            assert np.ptp(weights[:, rows], axis=1).max() == 0
        drawn = np.stack([weights[:, np.flatnonzero(sampling.units == u)[0]] for u in range(21)], axis=1)
        for stratum in range(3):
            assert (drawn[:, sampling.strata == stratum].sum(axis=1) == 7).all()


def test_the_same_seed_gives_the_same_draws():
    sampling = resampling_units(["a"] * 10 + ["b"] * 10, [""] * 20)
    one, two = (np.concatenate(list(replicate_weights(sampling, 130, 42))) for _ in range(2))
    assert one.shape == (130, 20) and (one == two).all()
    assert (one != np.concatenate(list(replicate_weights(sampling, 130, 43)))).any()


def test_classes_of_one_group_are_pooled_so_that_they_vary():
    sampling = resampling_units(["a", "a", "b", "c", "c", "c"], ["1", "1", "2", "3", "4", "5"])
    weights = np.concatenate(list(replicate_weights(sampling, 200, 0)))
    assert (weights.std(axis=0) > 0).all()
    lonely = resampling_units(["a", "b", "b", "b"], ["1", "2", "3", "4"])
    assert len(set(lonely.strata.tolist())) == 1


def test_one_group_alone_falls_back_to_images_and_says_so():
    sampling = resampling_units(["a", "a", "b", "b"], ["1"] * 4)
    assert sampling.resampling == BY_IMAGE and sampling.groups == 1 and len(sampling.strata) == 4
    single = resampling_units(["a"], ["1"])
    points, found = replicate(lambda w: {"n": w["image"].sum(axis=1)}, {"image": single}, 100, 0)
    assert points["n"] == 1 and np.isnan(found["n"]).all()


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        right = (generator.random(80) < 0.7).astype(float)
        sampling = resampling_units(["a"] * 80, [""] * 80)
        _, found = replicate(
            lambda w, r=right: {"m": metrics.weighted_mean(r, w["image"])}, {"image": sampling}, 200, trial
        )
        low, high = interval(found["m"])
        covered += low <= 0.7 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_pairing_is_tighter_than_two_intervals():
    generator = np.random.default_rng(0)
    hard = generator.normal(size=200)
    ours, theirs = ((hard + generator.normal(size=200) * 0.1 < shift).astype(float) for shift in (0.3, 0.0))
    sampling = resampling_units(["a"] * 200, [""] * 200)

    def metric(weights):
        return {k: metrics.weighted_mean(v, weights["image"]) for k, v in (("ours", ours), ("theirs", theirs))}

    points, found = replicate(metric, {"image": sampling}, 1000, 42)
    paired = difference(points["ours"], points["theirs"], found["ours"], found["theirs"])
    unpaired = difference(
        points["ours"], points["theirs"], found["ours"], np.random.default_rng(1).permutation(found["theirs"])
    )
    assert paired["high"] - paired["low"] < 0.8 * (unpaired["high"] - unpaired["low"])
    assert paired["difference"] == pytest.approx(ours.mean() - theirs.mean())
    assert paired["p"] < 0.05 and paired["low"] > 0


def test_difference_with_oneself_is_nothing():
    values = np.random.default_rng(0).random(1000)
    same = difference(0.5, 0.5, values, values)
    assert same == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}


@pytest.mark.parametrize(("below", "at_zero", "p"), [(0, 0, 0.02), (2, 0, 0.06), (1, 1, 0.06), (49, 1, 1.0)])
def test_p_is_twice_the_smaller_share_with_one_more_on_each_side(below, at_zero, p):
    differences = np.concatenate([np.full(below, -0.1), np.zeros(at_zero), np.full(99 - below - at_zero, 0.1)])
    assert difference(0.6, 0.5, differences, np.zeros(99))["p"] == pytest.approx(p)


def test_undefined_replicates_have_no_interval():
    mostly = np.array([np.nan] * 4 + [0.2] * 5)
    assert interval(mostly) == (0.2, 0.2) and np.isnan(interval(mostly[:-2])).all()
    assert np.isnan(interval(np.full(100, np.nan))).all()
    assert np.isnan(difference(1.0, 0.5, np.full(9, np.nan), np.ones(9))["p"])


def test_five_metrics_are_those_of_scikit_learn_on_the_same_draws():
    path = Path(__file__).parents[1] / "benchmarks" / "bootstrap.py"
    specification = importlib.util.spec_from_file_location("bootstrap_benchmark", path)
    benchmark = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(benchmark)
    targets, scores = benchmark.made_up(600, 9)
    sampling = resampling_units(list(map(str, targets)), [f"patient {k // 2}" for k in range(600)])
    assert benchmark.disagreement(targets, scores, sampling, 25) < 1e-9


def test_draws_are_the_same_whether_kept_or_made_anew_or_given_a_few_at_a_time(monkeypatch):
    sampling = resampling_units(["a"] * 10 + ["b"] * 30, [str(k // 2) for k in range(40)])
    kept = list(replicate_weights(sampling, 130, 42))
    few = list(replicate_weights(sampling, 130, 42, at_once=7))
    assert [len(part) for part in kept] == [100, 30] and max(map(len, few)) == 7
    monkeypatch.setattr(bootstrap, "KEPT_ELEMENTS", 0)
    for others in (few, list(replicate_weights(sampling, 130, 42))):
        np.testing.assert_array_equal(np.concatenate(others), np.concatenate(kept))


def test_very_many_units_are_drawn_a_few_replicates_at_a_time(monkeypatch):
    large, small = resampling_units(["a"] * 60, [""] * 60), resampling_units(["a"] * 6, [""] * 6)
    monkeypatch.setattr(bootstrap, "CHUNK_ELEMENTS", 1000)
    assert [len(part) for part in replicate_weights(large, 40, 42)] == [16, 16, 8]
    seen = []

    def metric(weights):
        seen.append({name: own.shape for name, own in weights.items()})
        return {"mean": metrics.weighted_mean(np.arange(60.0), weights["large"])}

    _, found = replicate(metric, {"large": large, "small": small}, 40, 42)
    assert seen[1:] == [{"large": (size, 60), "small": (size, 6)} for size in (16, 16, 8)]
    assert found["mean"].shape == (40,) and found["mean"].std() > 0
