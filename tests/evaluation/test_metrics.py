import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    f1_score,
    roc_auc_score,
)

from mmkd.evaluation.statistics import metrics


@pytest.fixture
def answers():
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 5, 300)
    scores = np.round(generator.normal(size=(300, 5)) + np.eye(5)[targets], 1)  # rounding makes ties
    return targets, scores


def ones(n):
    return np.ones((1, n))


def test_point_values_are_those_of_scikit_learn(answers):
    targets, scores = answers
    answered, weights = scores.argmax(1), ones(300)
    assert metrics.accuracy(targets, answered, weights)[0] == pytest.approx(
        accuracy_score(targets, answered), abs=1e-12
    )
    expected = balanced_accuracy_score(targets, answered)
    assert metrics.balanced_accuracy(targets, answered, weights)[0] == pytest.approx(expected, abs=1e-12)
    expected = f1_score(targets, answered, average="macro")
    assert metrics.macro_f1(targets, answered, weights)[0] == pytest.approx(expected, abs=1e-12)
    expected = np.mean([roc_auc_score(targets == k, scores[:, k]) for k in range(5)])
    assert metrics.macro_auroc(targets, scores, weights)[0] == pytest.approx(expected, abs=1e-12)


def test_integer_weights_are_repeated_samples(answers):
    targets, scores = answers
    counts = np.random.default_rng(1).integers(0, 4, 300)
    copies = np.repeat(np.arange(300), counts)
    weights, answered = counts[None].astype(float), scores.argmax(1)
    expected = f1_score(targets[copies], answered[copies], average="macro")
    assert metrics.macro_f1(targets, answered, weights)[0] == pytest.approx(expected, abs=1e-12)
    expected = np.mean([roc_auc_score(targets[copies] == k, scores[copies, k]) for k in range(5)])
    assert metrics.macro_auroc(targets, scores, weights)[0] == pytest.approx(expected, abs=1e-12)
    ranks = scores[:, 0].round() + 10
    assert metrics.median_rank(ranks, weights)[0] == np.median(ranks[copies])
    assert metrics.recall_at(9, ranks, weights)[0] == pytest.approx(np.mean(ranks[copies] <= 9), abs=1e-12)


@pytest.mark.parametrize("ranks", [[3.0], [1.0, 2.0], [5.0, 1.0, 1.5]])
def test_median_of_few(ranks):
    assert metrics.median_rank(np.array(ranks), ones(len(ranks)))[0] == np.median(ranks)


def test_a_class_that_is_absent_is_no_zero():
    targets, answered = np.array([0, 0, 2]), np.array([0, 2, 2])
    assert metrics.balanced_accuracy(targets, answered, ones(3))[0] == pytest.approx(0.75)
    assert metrics.macro_f1(targets, answered, ones(3))[0] == pytest.approx(
        f1_score(targets, answered, average="macro")
    )
    strange = np.array([0, 1, 2])  # an answer that no target has
    expected = f1_score(targets, strange, average="macro")
    assert metrics.macro_f1(targets, strange, ones(3))[0] == pytest.approx(expected, abs=1e-12)
    scores = np.array([[1.0, 0, 0], [0, 0, 1], [0, 0, 2]])
    assert not np.isnan(metrics.macro_auroc(targets, scores, ones(3))[0])


def test_undefined_is_nan():
    assert np.isnan(metrics.auroc(np.array([True, True]), np.array([0.1, 0.2]), ones(2))[0])
    assert np.isnan(metrics.accuracy(np.array([0]), np.array([0]), np.zeros((1, 1)))[0])


def test_margins_of_two_classes_are_the_difference():
    scores = np.array([[0.3, 0.1], [0.2, 0.9]])
    assert metrics.margins(scores) == pytest.approx(np.array([[0.2, -0.2], [-0.7, 0.7]]))
    three = np.array([[0.5, 0.1, -0.2]])
    assert metrics.margins(three)[0, 0] == pytest.approx(0.5 - np.log(np.mean(np.exp([0.1, -0.2]))))


def resampled(n, replicates, seed=3):
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=replicates)
    return counts.astype(float), [np.repeat(np.arange(n), row) for row in counts]


def test_kappa_of_resamples_is_that_of_scikit_learn(answers):
    targets, scores = answers
    answered = scores.argmax(1)
    weights, copies = resampled(300, 8)
    found = metrics.quadratic_kappa(targets, answered, weights)
    for row, rows in enumerate(copies):
        expected = cohen_kappa_score(targets[rows], answered[rows], weights="quadratic", labels=range(5))
        assert found[row] == pytest.approx(expected, abs=1e-9)
    assert np.isnan(metrics.quadratic_kappa(np.ones(4, int), np.ones(4, int), ones(4))[0])


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_label_metrics_of_resamples_are_those_of_scikit_learn(scale):
    generator = np.random.default_rng(5)
    positive = generator.random((200, 4)) < [0.5, 0.1, 0.9, 0.3]
    scores = np.round(generator.normal(size=(200, 4)) + positive, 1)
    weights, copies = resampled(200, 8)
    # Whole weights go through single precision, a quarter of them through double: both are exact.
    areas = metrics.label_aurocs(positive, scores, weights * scale)
    precisions = metrics.label_precisions(positive, scores, weights * scale)
    for row, rows in enumerate(copies):
        for label in range(4):
            true, drawn = positive[rows, label], scores[rows, label]
            assert areas[row, label] == pytest.approx(roc_auc_score(true, drawn), abs=1e-9)
            assert precisions[row, label] == pytest.approx(average_precision_score(true, drawn), abs=1e-9)
    assert metrics.defined_mean(areas) == pytest.approx(areas.mean(axis=1), abs=1e-12)


def test_a_label_without_positives_is_undefined_and_left_out_of_the_mean():
    positive = np.array([[True, False], [False, False], [True, False]])
    scores = np.array([[0.9, 0.2], [0.1, 0.3], [0.8, 0.1]])
    for measure in (metrics.label_aurocs, metrics.label_precisions):
        found = measure(positive, scores, ones(3))
        assert found[0, 0] == 1.0 and np.isnan(found[0, 1]) and metrics.defined_mean(found)[0] == 1.0


def test_fractional_weights_are_weighted_samples():
    generator = np.random.default_rng(6)
    positive, scores = generator.random(100) < 0.4, np.round(generator.normal(size=100), 1)
    weights = generator.random((3, 100))
    found = metrics.auroc(positive, scores, weights)
    expected = [roc_auc_score(positive, scores, sample_weight=own) for own in weights]
    assert found == pytest.approx(np.array(expected), abs=1e-9)


def test_macro_f1_counts_a_class_that_is_answered_though_no_sample_has_it():
    targets, answers = np.array([0, 0, 1, 1]), np.array([0, 2, 1, 1])
    assert metrics.macro_f1(targets, answers, np.ones((1, 4)))[0] == pytest.approx((2 / 3 + 1 + 0) / 3)
    without = np.array([[1.0, 0.0, 1.0, 1.0]])
    assert metrics.macro_f1(targets, answers, without)[0] == 1
