import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

from mmkd.evaluation import metrics


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
