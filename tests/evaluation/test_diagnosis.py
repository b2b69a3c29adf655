from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("h5py", reason="bags are HDF5 files")
pytest.importorskip("sklearn", reason="logistic regression")

from fake_encoder import FakeEncoder
from simulated_slides import SlideDataset, slide_manifest, slide_pairs, write_bag
from sklearn.metrics import cohen_kappa_score
from torch.nn import functional

from mmkd.evaluation.datasets.dataset import Samples
from mmkd.evaluation.embeddings.embed import Embedded, UndefinedMetricError, embed, read_embedded
from mmkd.evaluation.run import inputs_of
from mmkd.evaluation.slides import diagnosis
from mmkd.evaluation.slides.attention import train_attention
from mmkd.evaluation.statistics import metrics
from mmkd.evaluation.statistics.bootstrap import interval, replicate
from mmkd.evaluation.tasks.task import TaskOptions

CLASSES = {"luad": ["lung adenocarcinoma"], "lusc": ["squamous cell carcinoma of the lung"]}
WIDTH = 12


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """64 slides, 2 a case: a third of an oracle's tiles show the tumour, others stroma; random bags show nothing."""
    root, generator = tmp_path_factory.mktemp("bags"), np.random.default_rng(0)
    manifest = slide_manifest("diagnosis", CLASSES)
    labels = [("luad", "lusc")[k // 2 % 2] for k in range(64)]
    names = [f"s{k}" for k in range(64)]
    splits = ["train" if k < 24 else "test" for k in range(64)]
    pairs = slide_pairs(names, [f"case{k // 2}" for k in range(64)], labels, splits)
    axes = np.eye(WIDTH)
    for name, label in zip(names, labels, strict=True):
        tiles = 0.15 * generator.normal(size=(100, WIDTH)) + axes[2]
        tiles[:30] += axes[list(CLASSES).index(label)] - axes[2]
        write_bag(root / "oracle" / f"{name}.h5", tiles @ generator_mix(), proj=tiles)
        write_bag(root / "random" / f"{name}.h5", generator.normal(size=(20, WIDTH)))
    digests = {p.id: p.id for p in pairs}
    return Samples(manifest, pairs[24:], pairs[:24], [], digests, SlideDataset(manifest, pairs, root))


def generator_mix():
    return np.random.default_rng(5).normal(size=(WIDTH, 8))


def encoder(name, slides):
    texts = {}
    for axis, sentences in enumerate(slides.manifest.prompts().values()):
        texts |= dict.fromkeys(sentences, np.eye(WIDTH, dtype=np.float32)[axis])
    return Embedded(name, "f", texts=texts)


def test_oracles_stand_near_one_and_random_bags_near_chance(slides, monkeypatch):
    monkeypatch.setattr(diagnosis, "SEEDS", 2)
    found, skipped = diagnosis.tasks(slides, TaskOptions())
    names = ["diagnosis-slides", "diagnosis-slides-ratio", "diagnosis-slides-mil", "diagnosis-slides-mean"]
    assert [task.name for task in found] == names and not skipped
    assert [task.variant for task in found] == ["", "ratio", "mil", "mean"]
    for task in found:
        outputs = task.outputs(encoder("oracle", slides))
        points, _ = replicate(lambda w, t=task, o=outputs: t.metrics(o, w), task.units, 100, 0)
        assert points["macro_auroc"] > 0.95, task.name
        assert points["balanced_accuracy"] > 0.9, task.name
        outputs = task.outputs(encoder("random", slides))
        _, values = replicate(lambda w, t=task, o=outputs: t.metrics(o, w), task.units, 300, 0)
        low, high = interval(values["macro_auroc"])
        assert low <= 0.5 <= high, task.name
        assert task.primary_metric_values(outputs, {"image": np.ones((1, 40))}).keys() == {"balanced_accuracy"}


def test_the_manifest_chooses_the_primary_metric_of_all_ways_to_answer(slides):
    chosen = replace(slides, manifest=replace(slides.manifest, primary_metric="macro_auroc"))
    assert [task.primary_metric for task in diagnosis.tasks(chosen, TaskOptions())[0]] == ["macro_auroc"] * 4
    wrong = replace(slides, manifest=replace(slides.manifest, primary_metric="auroc"))
    with pytest.raises(ValueError, match=r"primary_metric is 'auroc'.*allowed: accuracy, balanced_accuracy"):
        diagnosis.tasks(wrong, TaskOptions())


def test_a_tumour_of_few_tiles_orders_slides_better_than_it_answers(slides, tmp_path):
    generator, axes = np.random.default_rng(0), np.eye(WIDTH)
    for pair in slides.held_out:
        tiles = 0.1 * generator.normal(size=(100, WIDTH)) + axes[0]
        if pair.label == "lusc":
            tiles[:10] += axes[1] - axes[0]
        write_bag(tmp_path / "few" / f"{pair.id.removeprefix('slides:')}.h5", tiles, proj=tiles)
    few = replace(slides, dataset=SlideDataset(slides.manifest, slides.held_out, tmp_path))
    for task in diagnosis.tasks(few, TaskOptions())[0][:2]:
        points, _ = replicate(partial(task.metrics, task.outputs(encoder("few", few))), task.units, 2, 0)
        assert points["macro_auroc"] > 0.95 and points["balanced_accuracy"] == 0.5


def test_top_tiles_are_means_of_the_highest():
    scores = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    pooled = diagnosis.top_means(scores, (1, 5, 100))
    assert pooled[0] == pytest.approx(scores.max(axis=0))
    assert pooled[1] == pytest.approx(np.sort(scores, axis=0)[-5:].mean(axis=0))
    assert pooled[2] == pytest.approx(scores.mean(axis=0), abs=1e-6)
    assert diagnosis.shares(scores).sum() == pytest.approx(1)


def test_a_trained_head_answers_the_same_twice_and_in_any_units():
    generator = np.random.default_rng(0)
    bags = [generator.normal(size=(6, 4)).astype(np.float32) for _ in range(8)]
    targets = torch.tensor([0, 1] * 4)
    answers = []
    for tiles in (bags, [100 * bag + 7 for bag in bags]):
        answer = train_attention(tiles.__getitem__, range(8), targets, 2, functional.cross_entropy, 0, epochs=2)
        answers += [answer(range(8)), answer(range(8))]
    assert np.array_equal(answers[0], answers[1])
    np.testing.assert_allclose(answers[2], answers[0], atol=1e-3)


def test_kappa_is_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    targets, answers = generator.integers(0, 4, 60), generator.integers(0, 4, 60)
    weights = np.stack([np.ones(60), generator.multinomial(60, [1 / 60] * 60).astype(float)])
    ours = metrics.kappa(targets, answers, weights)
    for value, weight in zip(ours, weights, strict=True):
        theirs = cohen_kappa_score(targets, answers, sample_weight=weight, labels=range(4))
        assert value == pytest.approx(theirs, abs=1e-12)
    assert np.isnan(metrics.kappa(np.zeros(3, int), np.zeros(3, int), np.ones((1, 3)))[0])


def test_what_cannot_be_asked_says_why(slides):
    one_class = replace(slides, held_out=[p for p in slides.held_out if p.label == "luad"])
    assert "1 class (luad)" in diagnosis.tasks(one_class, TaskOptions())[1]["diagnosis-slides"]
    found, skipped = diagnosis.tasks(
        replace(slides, train=[p for p in slides.train if p.label == "luad"]), TaskOptions()
    )
    assert len(found) == 2 and skipped["diagnosis-slides-mil"] == "no training slide of lusc"
    with pytest.raises(UndefinedMetricError, match="no bags of clip in"):
        diagnosis.tasks(slides, TaskOptions())[0][2].outputs(encoder("clip", slides))


def test_of_slides_only_sentences_are_embedded(slides, tmp_path):
    texts = sorted({text for own in slides.manifest.prompts().values() for text in own})
    inputs = inputs_of(slides.dataset, lambda: slides.dataset, ["diagnosis"], "test", TaskOptions())
    embed({"fake": FakeEncoder("fake")}, 32, inputs.lacking({"fake": inputs.files(tmp_path, "f")}))
    found = read_embedded("fake", "f", {}, inputs, tmp_path)
    assert found.text_matrix(texts).shape == (len(texts), 41) and not found.unreadable
