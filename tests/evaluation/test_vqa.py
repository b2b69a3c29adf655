"""Questions about images: the vocabulary, the frozen head, its controls, and who resamples together."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_dataset import pairs_samples, pairs_tasks
from PIL import Image

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.source import Question, normalise, read_vqa_rad, stated_split
from mmkd.evaluation.embeddings.embed import Embedded
from mmkd.evaluation.tasks.task import TaskOptions
from mmkd.evaluation.vqa.heads import fused
from mmkd.evaluation.vqa.tasks import texts

COLORS, DIM = ("red", "green", "blue"), 16


def world(count=120):
    """Images of three colors; "which color" needs the image, "is it an image" does not."""
    generator = np.random.default_rng(0)
    centers = np.eye(3, DIM)
    pairs, questions, images = [], [], {}
    for k in range(count):
        split = ("train", "train", "validation", "test")[k % 4]
        pairs.append(Pair(f"p{k}", f"{k}.png", "c", sha256=f"h{k}", group=f"g{k // 8}", split=split))
        color = k // 4 % 3
        vector = centers[color] + 0.1 * generator.normal(size=DIM)
        images[f"p{k}"] = (vector / np.linalg.norm(vector)).astype(np.float32)
        questions.append(Question(f"h{k}", "which color?", COLORS[color], False))
        questions.append(Question(f"h{k}", "is it an image?", "yes", True))
    texts = {"which color?": np.eye(1, DIM, 8), "is it an image?": np.eye(1, DIM, 9)}
    embedded = Embedded("e", "f", images=images, texts={t: v[0].astype(np.float32) for t, v in texts.items()})
    parts = {s: [p for p in pairs if p.split == s] for s in ("train", "validation", "test")}
    return pairs_samples(parts["test"], parts["train"], parts["validation"], {}, questions), embedded


def tasks(samples, questions=None):
    if questions is not None:
        samples = pairs_samples(samples.held_out, samples.train, samples.validation, {}, questions)
    return pairs_tasks(samples, "vqa")


def test_the_head_looks_at_the_image_and_the_controls_do_not():
    samples, embedded = world()
    (task,), skipped = tasks(samples)
    assert not skipped and task.answers.keys() == {*COLORS, "yes"}
    outputs = task.outputs(embedded)
    values = {name: float(v[0]) for name, v in task.metrics(outputs, {"image": np.ones((1, len(task.pairs)))}).items()}
    assert values["accuracy"] > 0.95 and values["closed_accuracy"] == 1 and values["open_accuracy"] > 0.9
    assert values["question_only_accuracy"] < 0.75 and values["shuffled_image_accuracy"] < 0.8
    again = task.outputs(embedded)
    assert all(np.array_equal(outputs[name], again[name]) for name in outputs)
    assert task.units["image"].groups == len({pair.group for pair in task.pairs})


def test_answers_come_from_training_and_validation_only():
    samples, embedded = world()
    unseen = samples.held_out[0].sha256
    questions = [replace(q, answer="purple") if q.sha256 == unseen else q for q in samples.dataset.questions]
    (task,), _ = tasks(samples, questions)
    assert "purple" not in task.answers
    assert task.description["unanswerable"] == pytest.approx(2 / len(task.pairs))
    right = task.sample_scores(task.outputs(embedded))["image"]
    assert [right[k] for k, pair in enumerate(task.pairs) if pair.sha256 == unseen] == [0, 0]


def test_vectors_that_are_not_finite_are_told():
    samples, embedded = world()
    (task,), _ = tasks(samples)
    embedded.images[samples.train[0].id] = np.full(DIM, np.nan, dtype=np.float32)
    assert all(np.isnan(value).all() for value in task.outputs(embedded).values())


def test_accuracy_over_questions_that_nobody_asks_has_its_reason():
    samples, embedded = world()
    (task,), _ = tasks(samples, [replace(q, closed=True) for q in samples.dataset.questions])
    outputs = task.outputs(embedded)
    ones = {"image": np.ones((1, len(task.pairs)))}
    undefined = [name for name, values in task.metrics(outputs, ones).items() if np.isnan(values[0])]
    assert task.extras(outputs) == {"undefined_metrics": dict.fromkeys(undefined, "no test question is open")}
    assert undefined == ["open_accuracy"]


def test_no_questions_no_task():
    samples, _ = world()
    assert tasks(samples, [])[1] == {"vqa": "no questions were given; name them with --questions FILE"}
    assert "0 held-out questions" in tasks(replace(samples, held_out=[]))[1]["vqa"]


def test_fusion_by_hand():
    v, q = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(fused(v, q), torch.cat([2 * v, 2 * q, 4 * v * q, 2 * (v - q).abs()], dim=1))


def test_the_split_that_a_question_states():
    assert [
        stated_split(row) for row in ({"split": "Val"}, {"phrase_type": "test_para"}, {"phrase_type": "para"}, {})
    ] == [
        "validation",
        "test",
        "train",
        "",
    ]
    with pytest.raises(ValueError, match="split 'foo'; allowed: train"):
        stated_split({"split": "foo", "question": "why?"})


def test_reading_questions(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "images" / "a.png")
    row = {"image_name": "a.png", "question": " What  is it? ", "answer": "Yes. ", "answer_type": "CLOSED "}
    gone, linked = ({**row, "image_name": name} for name in ("gone.png", "linked.png"))
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "private.png")
    (tmp_path / "images" / "linked.png").symlink_to(tmp_path / "private.png")
    (tmp_path / "q.json").write_text(json.dumps([row, {**row, "answer": 7, "answer_type": "OPEN"}, gone, linked]))
    questions = read_vqa_rad(tmp_path / "q.json")[0]
    assert [(q.text, q.answer, q.closed) for q in questions] == [
        ("What is it?", "yes", True),
        ("What is it?", "7", False),
    ]
    assert texts(questions, TaskOptions(question_heads=("vectors",))) == {"What is it?"}
    assert normalise(" T2, weighted. ") == "t2, weighted"
    (tmp_path / "q.json").write_text(json.dumps([{**row, "image_name": "../a.png"}]))
    with pytest.raises(ValueError, match="leaves the folder"):
        read_vqa_rad(tmp_path / "q.json")
    for change, lacking in (({"answer": None}, "answer"), ({"answer": " ."}, "answer"), ({"question": ""}, "text")):
        (tmp_path / "q.json").write_text(json.dumps([row, row | change]))
        with pytest.raises(ValueError, match=f"q.json: question .* has no {lacking}"):
            read_vqa_rad(tmp_path / "q.json")
    (tmp_path / "q.json").write_text("[{}]")
    with pytest.raises(ValueError, match="list of objects with image_name"):
        read_vqa_rad(tmp_path / "q.json")
