"""Numbers move the right way: random features stand at chance within the interval, an oracle stands near one."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from fake_dataset import make_samples

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.datasets.source import Question
from mmkd.evaluation.embeddings.embed import Embedded
from mmkd.evaluation.run import tasks_for
from mmkd.evaluation.statistics.bootstrap import interval, replicate
from mmkd.evaluation.tasks.task import TaskOptions
from mmkd.evaluation.vqa import heads

pytest.importorskip("sklearn", reason="the probe is scikit-learn's")

DIM, COUNT, REPLICATES = 24, 360, 200
GRADES = {"none": ["no retinopathy"], "mild": ["mild retinopathy"], "severe": ["severe retinopathy"]}
KINDS = ["zeroshot", "probe", "retrieval"]


class Told(dict):
    """Vectors of whatever text is asked for, made by a function."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __missing__(self, text):
        return self.setdefault(text, self.make(text))

    def __contains__(self, text):
        return True

    def __len__(self):
        return 1


class TokenTable:
    """Image and text tokens of vectors: one token each, and one that says nothing."""

    def __init__(self, embedded):
        self.embedded = embedded

    def images(self, pairs):
        vectors = self.embedded.image_matrix(pairs)
        return np.stack([vectors, np.zeros_like(vectors)], axis=1).astype(np.float16)

    def texts(self, texts):
        vectors = self.embedded.text_matrix(texts)[:, None].astype(np.float16)
        return vectors, np.ones(vectors.shape[:2], dtype=bool)


def dataset(task, classes=None):
    """Images of each kind of dataset, a third of them held out, two to a group."""
    manifest = Manifest("toy", task, "fundus", {}, "CC0-1.0", classes=classes or {})
    names = list(classes or {"none": []})
    pairs = []
    for k in range(COUNT):
        labels = [names[k % len(names)]] if task != "multilabel" else [n for j, n in enumerate(names) if k >> j & 1]
        split = ("train", "train", "validation", "test", "test", "test")[k // 6 % 6]
        own = Pair(f"p{k}", f"{k}.png", f"caption {k // 2}", "fundus", "|".join(labels), f"g{k // 6}", split)
        pairs.append(replace(own, sha256=f"h{k}"))
    questions, sides = [], np.random.default_rng(0).integers(0, 2, (COUNT, 2))
    for k in range(COUNT if task == "vqa" else 0):
        for text, answer in (
            ("is there retinopathy?", ("no", "yes")[sides[k, 0]]),
            ("which eye?", ("left", "right")[sides[k, 1]]),
        ):
            questions.append(Question(f"h{k}", text, answer, text.startswith("is"), "test" if k % 3 else "train"))
    parts = [[pair for pair in pairs if pair.split == split] for split in ("test", "train", "validation")]
    return make_samples(manifest, *parts, {p.id: p.sha256 for p in pairs}, questions)


def unit(key):
    vector = np.random.default_rng([ord(letter) for letter in f"{key} seed"]).normal(size=DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


def random_encoder(samples, seed=0):
    pairs = [*samples.train, *samples.validation, *samples.held_out]
    images = {p.id: unit(f"{p.id} {seed}") for p in pairs}
    return with_tokens(Embedded("random", "f", images=images, texts=Told(lambda text: unit(f"{text} {seed}"))))


def oracle(samples):
    """Images lie at the sum of what they show; a sentence lies at what it names, or at its contrary."""
    manifest = samples.manifest

    def image(pair):
        if manifest.task == "retrieval":
            return unit(pair.caption)
        if manifest.task == "vqa":
            answers = [q.answer for q in samples.dataset.questions if q.sha256 == pair.sha256]
            return signed("retinopathy", "yes" in answers) + signed("right", "right" in answers)
        return sum(signed(name, name in pair.label.split("|")) for name in manifest.classes)

    def text(sentence):
        if manifest.task == "vqa":
            return unit(sentence) if sentence.endswith("?") else signed("retinopathy", " no " not in sentence)
        prompts = manifest.prompts()
        for name, sentences in prompts.items():
            if sentence in sentences:
                return unit(name)
        contrary = [name for name, phrases in manifest.classes.items() if any(p in sentence for p in phrases)]
        return -unit(contrary[0]) if contrary else unit(sentence)

    pairs = [*samples.train, *samples.validation, *samples.held_out]
    images = {p.id: (v := image(p)) / np.linalg.norm(v) for p in pairs}
    return with_tokens(Embedded("oracle", "f", images=images, texts=Told(text)))


def signed(name, positive):
    return unit(name) * (1 if positive else -1)


def with_tokens(embedded):
    embedded.tokens = TokenTable(embedded)
    return embedded


def primary_metric(task, encoder):
    """The value, and its interval, of a task's primary metric; and all values."""
    points, drawn = replicate(partial(task.metrics, task.outputs(encoder)), task.units, REPLICATES, 0)
    return points, {name: interval(own) for name, own in drawn.items()}


FINDINGS = {"drusen": ["drusen"], "edema": ["macular edema"], "hemorrhage": ["retinal hemorrhage"]}
WORLDS = {
    "classification": (GRADES, {"zeroshot-toy", "probe-toy"}),
    "ordinal": (GRADES, {"zeroshot-toy", "probe-toy"}),
    "multilabel": (FINDINGS, {"zeroshot-toy", "probe-toy"}),
    "retrieval": (None, {"retrieval-toy"}),
}


@pytest.mark.parametrize("kind", WORLDS)
def test_random_is_at_chance_and_an_oracle_near_one(kind):
    classes, expected = WORLDS[kind]
    samples = dataset(kind, classes)
    found, _ = tasks_for(samples, KINDS, TaskOptions())
    assert expected <= {task.name for task in found}
    blind, seeing = [random_encoder(samples, seed) for seed in range(3)], oracle(samples)
    for task in found:
        points, _ = primary_metric(task, seeing)
        assert points[task.primary_metric] > 0.95, (task.name, points)
        chance, covered = task.description["chance"][task.primary_metric], []
        for encoder in blind:
            points, drawn = primary_metric(task, encoder)
            low, high = drawn[task.primary_metric]
            covered.append(low <= chance <= high)
            assert abs(points[task.primary_metric] - chance) < 0.15
        assert sum(covered) >= 2, (task.name, covered, "an interval of 95 % may miss one time in twenty")


def test_answers_of_random_vectors_come_from_the_question(monkeypatch):
    monkeypatch.setattr(heads, "TOKEN_EPOCHS", 6)
    samples = dataset("vqa")
    found, _ = tasks_for(samples, ["vqa"], TaskOptions())
    assert {"vqa-toy", "vqa-toy-meter", "vqa-toy-disjoint", "vqa-toy-meter-disjoint", "vqa-toy-zeroshot"} == {
        task.name for task in found
    }
    blind, seeing, covered = random_encoder(samples), oracle(samples), []
    for task in found:
        points, _ = primary_metric(task, seeing)
        assert points["accuracy"] > 0.95 and points["question_only_accuracy"] < 0.75, (task.name, points)
        points, drawn = primary_metric(task, blind)
        chance = task.description["chance"].get("yes_no_auroc", 0.5)
        name = "yes_no_auroc" if "zeroshot" in task.name else "accuracy"
        covered.append(drawn[name][0] <= chance <= drawn[name][1])
        assert abs(points[name] - chance) < 0.1, (task.name, points)
    assert sum(covered) >= 4, "an interval of 95 % may miss one time in twenty"
