from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_dataset import make_samples
from sklearn.metrics import roc_auc_score

from mmkd.data.features.store import VectorStore
from mmkd.data.prompts import class_vector
from mmkd.data.table import Pair
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.embeddings.embed import Embedded, StoredVectors, UndefinedMetricError, write_vectors
from mmkd.evaluation.results.store import ResultStore
from mmkd.evaluation.run import tasks_for
from mmkd.evaluation.statistics.bootstrap import interval, replicate
from mmkd.evaluation.tasks import linear_probe, retrieval, zeroshot
from mmkd.evaluation.tasks.task import TaskOptions

OPTIONS = TaskOptions()
CLASSES = {"benign": ["benign lesion"], "malignant": ["malignant tumour", "cancer"], "normal": []}


def manifest(task="classification", classes=CLASSES, **others):
    return Manifest("busi", task, "ultrasound", {"imagefolder": "x"}, "CC-BY-4.0", classes=classes, **others)


def dataset(asked, counts=(90, 60, 150), seed=0, label=None):
    """Train, validation and test pairs with labels dealt in turn, two images a patient."""
    names, pairs, start = list(asked.classes), [], 0
    for split, count in zip(("train", "validation", "test"), counts, strict=True):
        for k in range(start, start + count):
            own = label(k) if label else names[k % len(names)]
            caption = f"caption {k}"
            pairs.append(Pair(f"p{k}", f"{k}.png", caption, "ultrasound", own, f"g{k // 2}", split))
        start += count
    by_split = {split: [p for p in pairs if p.split == split] for split in ("train", "validation", "test")}
    samples = make_samples(asked, by_split["test"], by_split["train"], by_split["validation"])
    return samples, np.random.default_rng(seed)


def unit(matrix):
    return (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32)


def everything(data):
    return [*data.train, *data.validation, *data.held_out]


def encoder(data, generator, knows, dim=24, width=40):
    """An encoder whose vectors are noise plus ``knows`` times what is true of image and sentence."""
    asked, pairs = data.manifest, everything(data)
    directions = unit(generator.normal(size=(len(asked.classes), dim)))
    wide = unit(generator.normal(size=(len(asked.classes), width)))
    shows = np.array([[name in pair.label.split("|") for name in asked.classes] for pair in pairs], dtype=float)
    images = unit(unit(generator.normal(size=(len(pairs), dim))) + knows * shows @ directions)
    pooled = unit(generator.normal(size=(len(pairs), width))) + knows * shows @ wide
    texts = {}
    for sign, prompts in ((1, asked.prompts()), (-1, asked.negative_prompts())):
        for direction, sentences in zip(directions, prompts.values(), strict=True):
            texts |= dict.fromkeys(sentences, unit(generator.normal(size=(1, dim)) * 0.05 + sign * direction)[0])
    captions = unit(generator.normal(size=(len(pairs), dim)) + knows * 100 * images)
    texts |= {pair.caption: vector for pair, vector in zip(pairs, captions, strict=True)}
    ids = [pair.id for pair in pairs]
    return Embedded("e", "f", {}, dict(zip(ids, images, strict=True)), dict(zip(ids, pooled, strict=True)), texts)


def judged(task, embedded, replicates=200):
    outputs = task.outputs(embedded)
    points, drawn = replicate(lambda weights: task.metrics(outputs, weights), task.units, replicates, 42)
    return points, {name: interval(values) for name, values in drawn.items()}


def binary(k):
    return "|".join(name for bit, name in enumerate(CLASSES) if k * 7919 >> bit & 1)


KINDS = {
    "classification": (zeroshot.tasks, linear_probe.tasks),
    "ordinal": (zeroshot.tasks, linear_probe.tasks),
    "multilabel": (zeroshot.tasks, linear_probe.tasks),
    "retrieval": (retrieval.tasks,),
}


@pytest.mark.parametrize("asked", list(KINDS))
def test_random_vectors_are_at_chance_within_the_interval_and_an_oracle_is_near_one(asked):
    label = binary if asked == "multilabel" else None
    data, generator = dataset(manifest(asked), counts=(90, 60, 300), label=label)
    noise, oracle = encoder(data, generator, 0.0), encoder(data, generator, 3.0)
    for build in KINDS[asked]:
        found, skipped = build(data, OPTIONS)
        assert found and not skipped
        for task in found:
            points, intervals = judged(task, noise)
            low, high = intervals[task.primary_metric]
            assert low - 0.02 <= task.description["chance"][task.primary_metric] <= high + 0.02
            points, _ = judged(task, oracle)
            assert points[task.primary_metric] > 0.97
            assert set(task.description["chance"]) <= set(points)
            both = task.ensemble([oracle, oracle], [task.outputs(oracle)] * 2)
            assert points[task.primary_metric] == pytest.approx(
                task.metrics(both, {name: np.ones((1, len(f.units))) for name, f in task.units.items()})[
                    task.primary_metric
                ][0],
                abs=1e-6,
            )


def test_tasks_are_named_after_the_dataset_and_fit_what_it_asks():
    data, _ = dataset(manifest(title="BUSI"))
    names = {build: [task.name for task in build(data, OPTIONS)[0]] for build in (zeroshot.tasks, linear_probe.tasks)}
    assert list(names.values()) == [["zeroshot-busi"], ["probe-busi", "probe-busi-shots"]]
    task = linear_probe.tasks(data, OPTIONS)[0][1]
    assert (task.manifest.dataset, task.manifest.modality, task.variant) == ("busi", "ultrasound", "shots")
    for asked in ("vqa", "survival", "diagnosis", "retrieval"):
        other, _ = dataset(manifest(asked))
        assert tasks_for(other, ["zeroshot", "probe"], OPTIONS) == ([], {})
    assert tasks_for(data, ["retrieval"], OPTIONS) == ([], {})


def test_the_manifest_chooses_the_primary_metric_and_a_wrong_one_is_refused():
    data, _ = dataset(manifest(primary_metric="macro_auroc"))
    assert zeroshot.tasks(data, OPTIONS)[0][0].primary_metric == "macro_auroc"
    data, _ = dataset(manifest("ordinal"))
    assert zeroshot.tasks(data, OPTIONS)[0][0].primary_metric == "quadratic_kappa"
    data, _ = dataset(manifest(primary_metric="acuracy"))
    with pytest.raises(ValueError, match=r"busi: primary_metric is 'acuracy'.*accuracy"):
        zeroshot.tasks(data, OPTIONS)


def test_classes_that_no_test_image_has_may_be_answered_and_are_named():
    data, generator = dataset(manifest(), label=lambda k: list(CLASSES)[k % 2])
    task = zeroshot.tasks(data, OPTIONS)[0][0]
    points, _ = judged(task, encoder(data, generator, 3.0))
    assert task.classes == list(CLASSES) and task.description["absent"] == ["normal"]
    assert points["macro_auroc"] > 0.95 and points["balanced_accuracy"] > 0.95
    assert linear_probe.tasks(data, OPTIONS)[0][0].description["left_out"] == []


def test_a_test_set_of_one_class_has_undefined_metrics_with_their_reason(tmp_path):
    data, generator = dataset(manifest("ordinal"), label=lambda k: list(CLASSES)[k % 3] if k < 150 else "benign")
    embedded = encoder(data, generator, 1.0)
    for task in [*zeroshot.tasks(data, OPTIONS)[0], *linear_probe.tasks(data, OPTIONS)[0]]:
        folder = ResultStore(tmp_path, data.held_out, 100, 42)
        cell, _ = folder.result(task, "e", [], lambda task=task: (task.outputs(embedded), {}))
        reasons = cell["extras"]["undefined_metrics"]
        undefined = {name for name, own in cell["metrics"].items() if own["value"] is None}
        assert task.primary_metric in undefined == set(reasons)
        assert all("one class, 'benign'" in reason for reason in reasons.values())
        assert undefined >= {name for name in cell["metrics"] if "auroc" in name or "balanced" in name}


def test_vectors_that_are_not_finite_give_no_numbers(tmp_path):
    for asked in ("classification", "multilabel"):
        data, generator = dataset(manifest(asked))
        embedded = encoder(data, generator, 1.0)
        for vectors in (embedded.images, embedded.pooled):
            vectors["p160"] = vectors["p160"] * np.nan
        folder = ResultStore(tmp_path, data.held_out, 100, 42)
        for task in [*zeroshot.tasks(data, OPTIONS)[0], *linear_probe.tasks(data, OPTIONS)[0]]:
            cell, _ = folder.result(task, "e", [asked], lambda task=task, e=embedded: (task.outputs(e), {}))
            assert "not finite" in cell["undefined"] and cell["metrics"] == {}


def test_areas_are_those_of_margins_and_of_probabilities_alike():
    data, generator = dataset(manifest())
    embedded = encoder(data, generator, 0.5)
    margin = zeroshot.tasks(data, OPTIONS)[0][0]
    scores = margin.outputs(embedded)["image.scores"]
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    expected = np.mean([roc_auc_score(margin.targets == k, shares[:, k]) for k in range(3)])
    assert judged(margin, embedded)[0]["macro_auroc"] == pytest.approx(expected, abs=1e-9)
    others = [np.log(np.mean(np.exp(np.delete(scores, k, 1)), axis=1)) for k in range(3)]
    expected = np.mean([roc_auc_score(margin.targets == k, scores[:, k] - others[k]) for k in range(3)])
    assert judged(margin, embedded)[0]["macro_auroc"] == pytest.approx(expected, abs=1e-9)


def medmnist_acc_auc(true, probability, task):
    """ACC and AUC as MedMNIST's evaluator defines them."""
    if task == "multi-label":
        accuracy = np.mean([np.mean((probability[:, k] > 0.5) == true[:, k]) for k in range(true.shape[1])])
        return accuracy, np.mean([roc_auc_score(true[:, k], probability[:, k]) for k in range(true.shape[1])])
    if task == "binary":
        return np.mean((probability[:, -1] > 0.5) == true), roc_auc_score(true, probability[:, -1])
    areas = [roc_auc_score(true == k, probability[:, k]) for k in range(probability.shape[1])]
    return np.mean(probability.argmax(axis=1) == true), np.mean(areas)


@pytest.mark.parametrize("kind", ["multi-class", "binary", "multi-label"])
def test_acc_and_auc_of_medmnist_are_its_own(kind):
    classes = dict(list(CLASSES.items())[:2]) if kind == "binary" else CLASSES
    asked = Manifest(
        "m",
        "multilabel" if kind == "multi-label" else "classification",
        "ultrasound",
        {"medmnist": "x"},
        "CC-BY-4.0",
        classes=classes,
    )
    names = list(classes)  # most images are of the first class: accuracy is not balanced accuracy
    data, generator = dataset(asked, label=binary if kind == "multi-label" else lambda k: names[k % 7 % len(names)])
    embedded = encoder(data, generator, 0.3)
    for task in (zeroshot.tasks(data, OPTIONS)[0][0], linear_probe.tasks(data, OPTIONS)[0][0]):
        scores = task.outputs(embedded)["image.scores"]
        if kind == "multi-label":
            true, probability = task.positive, 1 / (1 + np.exp(-scores))
        else:
            true, probability = task.targets, np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        points, _ = judged(task, embedded)
        assert kind == "multi-label" or abs(points["medmnist_acc"] - points["balanced_accuracy"]) > 1e-3
        assert (points["medmnist_acc"], points["medmnist_auc"]) == pytest.approx(
            medmnist_acc_auc(true, probability, kind), abs=1e-9
        )


def test_findings_are_told_by_a_pair_of_prompt_sets():
    asked = manifest("multilabel")
    data, generator = dataset(asked, label=binary)
    assert "an ultrasound image showing no cancer" in data.dataset.prompts()
    assert not any(" no " in text for text in dataset(manifest())[0].dataset.prompts())
    embedded = encoder(data, generator, 0.6)
    task = zeroshot.tasks(data, OPTIONS)[0][0]
    images = embedded.image_matrix(task.pairs)
    points, _ = judged(task, embedded)
    for column, label in enumerate(asked.classes):
        there, absent = (
            images @ class_vector(embedded.text_matrix(prompts[label]))
            for prompts in (asked.prompts(), asked.negative_prompts())
        )
        expected = roc_auc_score(task.positive[:, column], there - absent)
        assert points[f"auroc: {label}"] == pytest.approx(expected, abs=1e-3)


def test_a_finding_that_no_image_shows_is_undefined_with_its_reason():
    data, generator = dataset(manifest("multilabel"), label=lambda k: ("benign", "", "benign|malignant")[k % 3])
    embedded = encoder(data, generator, 1.0)
    task = zeroshot.tasks(data, OPTIONS)[0][0]
    points, _ = judged(task, embedded)
    assert np.isnan(points["auroc: normal"]) and points["macro_auroc"] > 0.5
    assert "0 of 150 images" in task.extras(task.outputs(embedded))["undefined_metrics"]["auroc: normal"]
    probe = linear_probe.tasks(data, OPTIONS)[0][0]
    assert probe.labels == ["benign", "malignant"] and probe.description["left_out"] == ["normal"]


def test_probes_learn_from_pooled_or_joint_vectors():
    data, generator = dataset(manifest())
    embedded = encoder(data, generator, 0.0)
    embedded.pooled = encoder(data, generator, 3.0).pooled
    values = {}
    for kind in ("pooled", "joint"):
        task = linear_probe.tasks(data, TaskOptions(probe_on=kind))[0][0]
        values[kind] = judged(task, embedded)[0]["balanced_accuracy"]
        assert task.description["probe_on"] == kind
    assert values["pooled"] > 0.95 > 0.6 > values["joint"]
    with pytest.raises(UndefinedMetricError, match="150 of 300 images"):
        for pair in data.held_out:
            embedded.pooled[pair.id] = embedded.pooled[pair.id] * np.nan
        linear_probe.tasks(data, OPTIONS)[0][0].outputs(embedded)


def test_retrieval_of_a_dataset_is_that_of_open_clip_where_positives_are_unique():
    data, generator = dataset(manifest("retrieval"), counts=(0, 0, 300))
    embedded = encoder(data, generator, 0.002)
    (task,), _ = retrieval.tasks(data, OPTIONS)
    points, _ = judged(task, embedded)
    images = embedded.image_matrix(task.pairs)
    texts = embedded.text_matrix([pair.caption for pair in task.pairs])
    # open_clip's get_clip_metrics: place of the pair's own partner in the sorted row of logits.
    for direction, logits in (("image_to_text", images @ texts.T), ("text_to_image", texts @ images.T)):
        ranking = np.argsort(-logits, axis=1)
        places = np.where(ranking == np.arange(300)[:, None])[1]
        for k in (1, 5, 10, 50, 200):
            assert points[f"{direction}_recall@{k}"] == np.mean(places < k)
        assert points[f"{direction}_median_rank"] == np.median(places + 1)
        # CLIP-benchmark's recall_at_k: positives among the first k, over the number of positives.
        for k in (1, 5, 10):
            hits = np.zeros_like(logits, dtype=bool)
            np.put_along_axis(hits, ranking[:, :k], True, axis=1)
            assert points[f"{direction}_recall@{k}"] == np.mean(hits[np.arange(300), np.arange(300)])
    assert task.description["pool"] == {"images": 300, "captions": 300}
    assert task.description["chance"]["image_to_text_recall@50"] == pytest.approx(50 / 300)
    assert points["mean_recall"] == pytest.approx(
        np.mean([points[f"{d}_recall@{k}"] for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)])
    )
    lonely, _ = dataset(manifest("retrieval"), counts=(0, 0, 1))
    assert "2 are needed" in retrieval.tasks(lonely, OPTIONS)[1]["retrieval-busi"]


def test_retrieval_with_several_captions_of_an_image_is_that_of_clip_benchmark():
    data, generator = dataset(manifest("retrieval"), counts=(0, 0, 60))
    counts = generator.integers(1, 6, 60)
    images = generator.normal(size=(60, 16)).astype(np.float32)
    owner = np.repeat(np.arange(60), counts)
    texts = (images[owner] + 3 * generator.normal(size=(len(owner), 16))).astype(np.float32)
    pairs, embedded = [], Embedded("e", "f", images={}, texts={})
    for number, k in enumerate(owner.tolist()):
        pairs.append(replace(data.held_out[k], id=f"pair{number}", caption=f"caption {number}"))
        embedded.images[f"pair{number}"], embedded.texts[f"caption {number}"] = images[k], texts[number]
    digests = {pair.id: f"image{k}" for pair, k in zip(pairs, owner.tolist(), strict=True)}
    (task,), _ = retrieval.tasks(replace(data, held_out=pairs, digests=digests), OPTIONS)
    assert task.description["pool"] == {"images": 60, "captions": len(owner)}
    points, _ = judged(task, embedded)
    # CLIP-benchmark's recall_at_k: whether any positive is among the first k of all distinct texts or images.
    positive, scores = owner[:, None] == np.arange(60), texts @ images.T
    for direction, own, right in (("text_to_image", scores, positive), ("image_to_text", scores.T, positive.T)):
        for k in (1, 5, 10):
            first = np.argsort(-own, axis=1)[:, :k]
            expected = np.mean(np.take_along_axis(right, first, axis=1).any(axis=1))
            assert points[f"{direction}_recall@{k}"] == pytest.approx(expected, abs=1e-12)


def test_zero_shot_of_a_dataset_is_that_of_clip_benchmark():
    data, generator = dataset(manifest())
    embedded = encoder(data, generator, 0.3)
    task = zeroshot.tasks(data, OPTIONS)[0][0]
    for text, vector in embedded.texts.items():  # the sentences of a class do not say the same
        embedded.texts[text] = unit(vector[None] + 0.3 * generator.normal(size=(1, 24)))[0]
    weights = []
    for sentences in data.manifest.prompts().values():
        mean = embedded.text_matrix(sentences).mean(axis=0)
        weights.append(mean / np.linalg.norm(mean))
    logits = 100.0 * embedded.image_matrix(task.pairs) @ np.stack(weights, axis=1)
    points, _ = judged(task, embedded)
    assert points["accuracy"] == np.mean(logits.argmax(axis=1) == task.targets)
    recalls = [np.mean(logits.argmax(axis=1)[task.targets == k] == k) for k in range(3)]
    assert points["balanced_accuracy"] == pytest.approx(np.mean(recalls), abs=1e-12)


def test_retrieval_is_the_same_whether_vectors_are_read_at_once_or_in_parts(monkeypatch, tmp_path):
    data, _ = dataset(manifest("retrieval"), counts=(0, 0, 60))
    (task,), _ = retrieval.tasks(data, OPTIONS)
    members = [stored(task, seed, tmp_path) for seed in range(2)]
    whole = [task.outputs(members[0]), task.ensemble(members, [])]
    monkeypatch.setattr(retrieval, "WHOLE", 7)
    for expected, found in zip(whole, [task.outputs(members[0]), task.ensemble(members, [])], strict=True):
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-5, err_msg=name)


def stored(task, seed, folder):
    """An encoder whose vectors lie in several shards, in half precision, and in another order than the task's."""
    generator = np.random.default_rng(seed)
    ids, captions = [pair.id for pair in task.pairs], list(task.captions)
    found = []
    for name, keys in (("images", ids), ("texts", captions)):
        files = [folder / f"{seed}-{name}-{part}" for part in range(2)]
        for file, count in zip(files, (13, len(keys) - 13), strict=True):
            vectors = torch.from_numpy(generator.normal(size=(count, 24)))
            write_vectors(file, [str(k) for k in range(count)], {"vectors": vectors}, {}, [])
        found.append(StoredVectors(generator.permutation(keys).tolist(), VectorStore(files), "vectors"))
    return Embedded(f"e{seed}", "f", {}, found[0], {}, found[1])
