from itertools import pairwise

import numpy as np
import pytest
from fake_dataset import make_samples
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.embeddings.embed import Embedded
from mmkd.evaluation.tasks import linear_probe
from mmkd.evaluation.tasks.linear_probe import settings_of
from mmkd.evaluation.tasks.logistic_regression import Sweep, log_loss, probe, search_exponent
from mmkd.evaluation.tasks.task import TaskOptions


def made_up(counts, classes=4, dim=16, seed=0, apart=0.9):
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(classes, dim)) * apart
    targets = [generator.permutation(np.arange(count) % classes) for count in counts]
    scale = np.exp(generator.normal(size=dim))
    return [((generator.normal(size=(len(t), dim)) + centres[t]) * scale).astype(np.float32) for t in targets], targets


def test_accuracy_is_that_of_a_plain_scikit_learn_sweep():
    parts, (train, validation, test) = made_up((200, 100, 4000))
    answered = probe(parts, train, validation, "sweep")
    found = answered["image.scores"].argmax(axis=1)
    scaler = StandardScaler().fit(parts[0])
    losses = {}
    for exponent in range(-6, 7):
        model = LogisticRegression(C=10.0**exponent, max_iter=5000).fit(scaler.transform(parts[0]), train)
        predicted = model.predict_log_proba(scaler.transform(parts[1]))
        losses[exponent] = -predicted[np.arange(len(validation)), validation].mean()
    both, targets = np.concatenate(parts[:2]), np.concatenate([train, validation])
    scaler = StandardScaler().fit(both)
    plain = LogisticRegression(C=10.0 ** min(losses, key=losses.get), max_iter=5000).fit(
        scaler.transform(both), targets
    )
    accuracy = plain.score(scaler.transform(parts[2]), test)
    assert 0.5 < accuracy < 0.98
    assert abs(np.mean(found == test) - accuracy) <= 0.005
    assert abs(np.log10(answered["c"].item()) - min(losses, key=losses.get)) <= 0.75
    assert probe(parts, train, validation, "fast")["c"].item() == pytest.approx(16 * 4 / 100)


def test_search_finds_the_least_loss_in_thirteen_fits():
    asked = []

    def loss(exponent):
        asked.append(exponent)
        return (exponent - 1.3) ** 2

    assert search_exponent(loss) == 1.25
    assert len(asked) == len(set(asked)) == 13


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("count", [24, 200])
def test_warm_fits_are_those_of_scikit_learn_also_with_fewer_samples_than_dimensions(classes, count):
    (features, others), (targets, _) = made_up((count, 60), classes, dim=40)
    sweep = Sweep(features, targets)
    scaler = StandardScaler().fit(features)
    for exponent in (-2.0, 0.0, -1.0):
        sweep.solve(exponent)
        plain = LogisticRegression(C=10.0**exponent, max_iter=5000, tol=1e-8)
        expected = plain.fit(scaler.transform(features), targets).predict_proba(scaler.transform(others))
        np.testing.assert_allclose(np.exp(sweep.scores(others, exponent)), expected, atol=0.005)
    assert log_loss(sweep.scores(features, 0.0), targets) < np.log(classes)


def test_findings_have_regressions_of_their_own():
    (features, others), (targets, _) = made_up((200, 60))
    findings = np.stack([targets == 0, targets > 1], axis=1)
    sweep = Sweep(features, findings)
    sweep.solve(-1.0)
    scaler = StandardScaler().fit(features)
    for label in range(2):
        plain = LogisticRegression(C=0.1, max_iter=5000, tol=1e-8).fit(scaler.transform(features), findings[:, label])
        expected = plain.decision_function(scaler.transform(others))
        np.testing.assert_allclose(sweep.scores(others, -1.0)[:, label], expected, atol=0.03)
    from sklearn.metrics import log_loss as plain_loss

    scores = sweep.scores(features, -1.0)
    expected = np.mean([plain_loss(findings[:, k], 1 / (1 + np.exp(-scores[:, k]))) for k in range(2)])
    assert log_loss(scores, findings) == pytest.approx(expected, abs=1e-6)


def test_settings_take_as_many_images_as_there_are():
    assert list(settings_of([40, 200])) == ["1-shot", "2-shot", "4-shot", "8-shot", "10%", "16-shot", "32-shot"]
    assert settings_of([40, 200])["10%"] == [4, 20]
    assert list(settings_of([3, 9])) == ["1-shot", "2-shot"]
    assert settings_of([1000, 3000])["1%"] == [10, 30]


def test_the_curve_learns_from_nested_sets_and_rises():
    (train, test), targets = made_up((400, 400), dim=30, apart=0.5)
    names = ["a", "b", "c", "d"]
    asked = Manifest("set", "classification", "CT", {"csv": "x"}, "CC0", classes={name: [] for name in names})
    pairs = [
        [Pair(f"{split}{k}", "x", "", "CT", names[t], "", split) for k, t in enumerate(own)]
        for split, own in zip(("train", "test"), targets, strict=True)
    ]
    fast, task = linear_probe.tasks(make_samples(asked, pairs[1], pairs[0]), TaskOptions(probe_search="fast"))[0]
    assert fast.description["search"] == "fast" and task.name == "probe-set-shots"
    sets = {(setting, seed): set(rows.tolist()) for setting, seed, rows in task.index_sets()}
    for seed in range(5):
        own = [rows for (_, known), rows in sets.items() if known == seed]
        assert all(small <= large for small, large in pairwise(own))
        assert {pair.id for pair in pairs[0]} >= set(task.description["orders"][seed]["a"])
    assert sets["8-shot", 0] != sets["8-shot", 1]
    assert np.bincount(task.train_targets[list(sets["8-shot", 3])]).tolist() == [8] * 4
    ids = [pair.id for pair in pairs[0] + pairs[1]]
    embedded = Embedded("e", "f", images=dict(zip(ids, np.concatenate([train, test]), strict=True)))
    outputs = task.outputs(embedded)
    curve = task.extras(outputs)["curve"]
    assert [len(own["seeds"]) for own in curve.values()] == [5] * 8 + [1]
    values = [np.mean(own["seeds"]) for own in curve.values()]
    assert values[-1] > values[3] > values[0] > 0.25
    ones = {"image": np.ones((1, 400))}
    found = task.metrics(outputs, ones)
    assert found["balanced_accuracy@8-shot"][0] == pytest.approx(np.mean(curve["8-shot"]["seeds"]))
    assert found[task.primary_metric][0] == task.primary_metric_values(outputs, ones)[task.primary_metric][0]
    # With every image and one C it is the fast probe.
    answers = fast.outputs(embedded)["image.scores"].argmax(axis=1)
    assert np.mean(answers == outputs["image.answers"][:, -1]) > 0.99
