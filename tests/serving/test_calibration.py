"""Calibration against formulas by hand, brute force and simulated coverage."""

import math

import numpy as np
import pytest

from mmkd.evaluation.statistics.bootstrap import resampling_units
from mmkd.evaluation.statistics.metrics import calibration_error, share_of
from mmkd.serving.calibration import (
    CALIBRATION_FILE,
    Calibration,
    conformal_scores,
    fit_abstention,
    fit_quantile,
    fit_scale,
    fit_threshold,
    prediction_metrics,
    read_calibration,
    with_intervals,
    write_calibration,
)


def softmax(values):
    values = np.exp(values - values.max(axis=1, keepdims=True))
    return values / values.sum(axis=1, keepdims=True)


def drawn(random, n, classes, scale=6.0):
    """Similarities, and true labels drawn from their softmax at a scale."""
    similarities = random.uniform(-1, 1, (n, classes))
    probabilities = softmax(scale * similarities)
    targets = (random.random(n)[:, None] > probabilities.cumsum(axis=1)).sum(axis=1)
    return similarities, np.eye(classes, dtype=bool)[np.minimum(targets, classes - 1)]


def test_the_scale_that_made_the_labels_is_found():
    random = np.random.default_rng(0)
    similarities, positive = drawn(random, 20000, 5)
    assert fit_scale(similarities, positive, False) == pytest.approx(6.0, rel=0.05)
    margins = random.uniform(-1, 1, (5000, 3))
    shown = random.random(margins.shape) < 1 / (1 + np.exp(-4 * margins))
    assert fit_scale(margins, shown, True) == pytest.approx(4.0, rel=0.1)
    separable = np.eye(3)[[0, 1, 2]]
    assert 100 < fit_scale(separable, separable.astype(bool), False) <= 1e4 * 1.001


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_by_brute_force(seed):
    random = np.random.default_rng(seed)
    values = random.integers(0, 20, 60) / 20
    shown = random.random(60) < values
    found = fit_threshold(values, shown, None)

    def f1(limit):
        above = values >= limit
        return 2 * (above & shown).sum() / (above.sum() + shown.sum())

    assert f1(found) == max(f1(limit) for limit in values)
    limit = fit_threshold(values, shown, 0.9)
    assert (values[shown] >= limit).mean() >= 0.9
    assert all((values[shown] >= other).mean() < 0.9 for other in values if other > limit)


def test_conformal_scores_by_hand():
    row = np.array([[0.2, 0.5, 0.3]])
    assert conformal_scores(row, "lac") == pytest.approx(np.array([[0.8, 0.5, 0.7]]))
    assert conformal_scores(row, "aps") == pytest.approx(np.array([[1.0, 0.5, 0.8]]))
    scores = np.arange(1, 20) / 20
    assert fit_quantile(scores, 0.1) == 18 / 20  # the 18th of 19: ceil(20 * 0.9)
    assert fit_quantile(scores[:8], 0.1) == math.inf
    assert fit_quantile(scores[:9], 0.1) == 9 / 20


@pytest.mark.parametrize("method", ["lac", "aps"])
def test_sets_cover_at_the_stated_rate_also_where_the_model_is_wrong(method):
    """Mean coverage over draws, within three standard errors of at least 80 %, with probabilities far too confident."""
    random, covered, sizes = np.random.default_rng(1), [], []
    for _ in range(200):
        similarities, positive = drawn(random, 150, 4)
        scores = conformal_scores(softmax(20 * similarities), method)
        chosen = scores[50:] <= fit_quantile(scores[:50][positive[:50]], 0.2)
        covered.append((chosen & positive[50:]).any(axis=1).mean())
        sizes.append(chosen.sum(axis=1).mean())
    error = np.std(covered) / math.sqrt(len(covered))
    assert np.mean(covered) > 0.8 - 3 * error
    assert np.mean(sizes) < 4
    if method == "lac":  # scores that do not tie are covered at most 1/(n+1) more often
        assert np.mean(covered) < 0.8 + 1 / 51 + 3 * error


def test_abstention_refuses_at_most_its_share():
    random, refused = np.random.default_rng(2), []
    for _ in range(300):
        best = random.normal(size=119)
        limit = fit_abstention(best[:19], 0.1)
        refused.append((best[19:] < limit).mean())
    assert np.mean(refused) == pytest.approx(0.1, abs=3 * np.std(refused) / math.sqrt(300))
    assert fit_abstention(np.zeros(5), 0.1) is None and fit_abstention(np.zeros(50), 0.0) is None


def test_calibration_error_by_a_loop_and_weights_are_resamples():
    random = np.random.default_rng(3)
    confidence, right = random.random((40, 2)), random.random((40, 2)) < 0.5
    picks = random.integers(0, 40, 40)
    weights = np.stack([np.ones(40), np.bincount(picks, minlength=40)])

    def by_hand(values, hits):
        total = 0.0
        for k in range(15):
            inside = (values > k / 15) & (values <= (k + 1) / 15)
            total += abs((hits[inside] - values[inside]).sum())
        return total / values.size

    expected = [by_hand(confidence, right), by_hand(confidence[picks], right[picks])]
    assert calibration_error(confidence, right, weights) == pytest.approx(expected)
    exact = np.array([[0.0], [1.0], [1.0]])
    assert calibration_error(exact, exact > 0.5, np.ones((1, 3)))[0] == 0
    assert share_of(right, right | ~right, weights) == pytest.approx([right.mean(), right[picks].mean()])


def test_metrics_by_hand():
    probabilities = np.array([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]])
    positive = np.array([[True, False], [True, False], [False, True]])
    own = Calibration("w", "k", "single", ["a", "b"], 1.0, quantile=0.6, abstain_below=0.5)
    found = prediction_metrics(probabilities, np.array([0.4, 0.6, 0.7]), positive, own, np.ones((1, 3)))
    assert {name: value[0] for name, value in found.items()} == pytest.approx(
        {
            "ece": (0.3 + 0.6 + 0.9) / 3,
            "brier": (0.18 + 0.72 + 1.62) / 3,
            "accuracy": 1 / 3,
            "coverage": 2 / 3,
            "set_size": 4 / 3,
            "abstained": 1 / 3,
        }
    )
    own = Calibration("w", "k", "multilabel", ["a", "b"], 1.0, {"a": 0.5, "b": 0.2})
    found = prediction_metrics(probabilities, np.zeros(3), positive, own, np.ones((1, 3)))
    assert found["sensitivity"][0] == pytest.approx(1 / 3) and found["specificity"][0] == pytest.approx(0)
    assert found["brier"][0] == pytest.approx((0.18 + 0.72 + 1.62) / 6)


def test_intervals_are_over_groups():
    values = np.array([0.0, 0.0, 1.0, 1.0])
    units = resampling_units(["a"] * 4, ["p", "p", "q", "q"])
    found = with_intervals(lambda weights: {"mean": weights @ values / weights.sum(axis=1)}, units, 200, 0)
    assert found["mean"] == {"value": 0.5, "low": 0.0, "high": 1.0}


def test_what_is_written_is_read_back_for_the_same_weights_and_labels(tmp_path):
    first = Calibration("w", "one", "single", ["a", "b"], 3.0, quantile=math.inf, abstain_below=0.1)
    second = Calibration("w", "two", "multilabel", ["a"], 2.0, {"a": 0.3}, report={"test": {}})
    write_calibration(tmp_path, first)
    write_calibration(tmp_path, second)
    assert read_calibration(tmp_path, "w", "one") == first and read_calibration(tmp_path, "w", "two") == second
    assert read_calibration(tmp_path, "w", "three") is None and read_calibration(tmp_path / "no", "w", "one") is None
    with pytest.raises(ValueError, match=r"calibration.json is of other weights; run `mmkd calibrate` again"):
        read_calibration(tmp_path, "others", "one")
    write_calibration(tmp_path, Calibration("others", "one", "single", ["a", "b"], 3.0))
    assert read_calibration(tmp_path, "others", "two") is None
    written = (tmp_path / CALIBRATION_FILE).read_text().replace("others", "w")
    for content, text in (
        ("{", "not valid JSON"),
        ("[]", "not a calibration of this version"),
        ('{"version": 1, "fingerprint": "w", "sets": {"one": {"quantile": 1}}}', "is damaged"),
        (written.replace('"scale": 3.0', '"scale": "wide"'), "is damaged"),
        (written.replace('"scale": 3.0', '"scale": -3.0'), "numbers are impossible"),
        (written.replace('"conformal": "lac"', '"conformal": "x"'), "unknown method"),
    ):
        (tmp_path / CALIBRATION_FILE).write_text(content)
        with pytest.raises(ValueError, match=text):
            read_calibration(tmp_path, "w", "one")
