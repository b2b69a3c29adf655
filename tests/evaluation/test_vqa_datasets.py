"""Visual question answering of a dataset with a manifest: its splits, its three heads, what none of them may do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import save_tiny

from mmkd.data.table import Pair
from mmkd.encoders.encoder import DualEncoder, NoTokens
from mmkd.encoders.zoo import load_encoder
from mmkd.evaluation.datasets.dataset import Dataset, Samples
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.datasets.source import Question, read_vqa_rad
from mmkd.evaluation.embeddings.embed import Embedded, TokenSource, UndefinedMetricError, at_most_a_map
from mmkd.evaluation.tasks.task import TaskOptions
from mmkd.evaluation.vqa import heads
from mmkd.evaluation.vqa.statements import choices
from mmkd.evaluation.vqa.tasks import tasks, texts

MANIFEST = Manifest("toy", "vqa", "MRI", {}, "CC0-1.0")
COLORS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}
COLOR, BRIGHT, RED = "what color is the image?", "is the image colorful?", "is the image red?"
ALL = ("vqa-toy", "vqa-toy-meter", "vqa-toy-disjoint", "vqa-toy-meter-disjoint", "vqa-toy-zeroshot")


class ColorImages(Dataset):
    """Images of one color each."""

    def image(self, pair):
        return Image.new("RGB", (8, 8), COLORS[pair.label])

    def digest(self, pair):
        return pair.sha256


class ColorEncoder(DualEncoder):
    """Sees the color, reads the words; ``tokens`` of images are that of the color among others."""

    def __init__(self, tokens=True):
        super().__init__("colors", 16, {})
        self.tokens, self.calls = tokens, 0

    def image_features(self, prepared):
        return torch.stack([self._vector(COLORS_OF[image.getpixel((0, 0))]) for image in prepared])

    def text_features(self, texts):
        return torch.stack([self._vector("red" if text == "the image is red" else text) for text in texts])

    def image_token_features(self, prepared):
        if not self.tokens:
            return super().image_token_features(prepared)
        self.calls += 1
        return (
            torch.stack([self._vector("patch"), self._vector("border")])
            .expand(len(prepared), 2, 16)
            .index_put(
                (torch.arange(len(prepared)), torch.zeros(len(prepared), dtype=torch.long)),
                self.image_features(prepared),
            )
        )

    def text_token_features(self, texts):
        words = [text.split() for text in texts]
        found = torch.zeros(len(texts), max(map(len, words)), 16)
        for row, own in enumerate(words):
            found[row, : len(own)] = torch.stack([self._vector(word) for word in own])
        return found, torch.tensor([[k < len(own) for k in range(found.shape[1])] for own in words])

    @staticmethod
    def _vector(word):
        generator = torch.Generator().manual_seed(sum(ord(c) * 31**k for k, c in enumerate(word)) % 2**31)
        return torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)


COLORS_OF = {value: name for name, value in COLORS.items()}


def world(cache, count=120, tokens=True, stated=True):
    """Images about which training and test ask different questions, as in VQA-RAD."""
    names = list(COLORS)
    pairs, questions = [], []
    for k in range(count):
        color = names[k % 3]
        pairs.append(Pair(f"p{k}", f"{k}.png", "", "MRI", color, sha256=f"h{k}", split="train"))
        split = ("train" if k % 4 else "test") if stated else ""
        questions.append(Question(f"h{k}", COLOR, color, False, split))
        questions.append(Question(f"h{k}", BRIGHT, "yes", True, split))
        questions.append(Question(f"h{k}", RED, "yes" if color == "red" else "no", True, "train" if stated else ""))
    if stated:
        questions += [Question("h1", COLOR, names[1], False, "test"), Question("h0", RED, "yes", True, "test")]
    collection, encoder = ColorImages(MANIFEST, pairs, questions), ColorEncoder(tokens)
    digests = {pair.id: pair.sha256 for pair in pairs}
    samples = Samples(MANIFEST, [], pairs, [], digests, collection)
    own = sorted(texts(questions, TaskOptions()))
    embedded = Embedded("e", "f", texts=dict(zip(own, encoder.encode_texts(own).numpy(), strict=True)))
    vectors = encoder.encode_images([collection.image(pair) for pair in pairs]).numpy()
    embedded.images = dict(zip([pair.id for pair in pairs], vectors, strict=True))
    embedded.tokens = TokenSource(lambda: encoder, collection.image, collection.digest, "f", cache)
    return samples, embedded, encoder


def values(task, outputs):
    weights = {"image": np.ones((1, len(task.pairs)))}
    return {name: float(found[0]) for name, found in task.metrics(outputs, weights).items()}


def test_a_dataset_is_answered_by_three_heads_on_two_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "TOKEN_EPOCHS", 6)
    samples, embedded, encoder = world(tmp_path)
    found, skipped = tasks(samples, TaskOptions())
    assert not skipped and tuple(task.name for task in found) == ALL
    assert {(task.manifest.dataset, task.manifest.modality, task.kind) for task in found} == {("toy", "MRI", "vqa")}
    assert [task.variant for task in found] == ["", "meter", "disjoint", "meter-disjoint", "zeroshot"]
    for task in found[:4]:
        outputs = task.outputs(embedded)
        told = values(task, outputs)
        assert told["accuracy"] > 0.95, (task.name, told)
        assert told["question_only_accuracy"] < 0.85 and told["shuffled_image_accuracy"] < 0.85
        assert outputs["image.answers"].shape == (len(task.pairs), 5)
        np.testing.assert_allclose(outputs["image.answers"].sum(axis=1), 1, atol=1e-5)
    calls = encoder.calls
    embedded.tokens.images(samples.train[:9])
    assert encoder.calls > calls > 0, "other images are read anew"
    calls = encoder.calls
    embedded.tokens.images(samples.train[:9])
    assert encoder.calls == calls, "the same ones from the cache"


def test_the_official_split_is_kept_and_says_what_it_shares(tmp_path):
    samples, _, _ = world(tmp_path)
    official, _, disjoint, *_ = tasks(samples, TaskOptions())[0]
    assert official.description["split"] == "official" and official.description["shared_images"] > 20
    assert official.description["questions_about_shared_images"] > 20
    assert disjoint.description["shared_images"] == 0
    for task in (official, disjoint):
        held = {split: {pair.id for pair, _ in own} for split, own in task.questions.items()}
        assert all(held.values()) and not held["train"] & held["validation"]
    held = {split: {pair.id for pair, _ in own} for split, own in disjoint.questions.items()}
    assert not held["test"] & (held["train"] | held["validation"])
    assert [q.split for _, q in official.questions["test"]] == ["test"] * len(official.pairs)


def test_a_split_by_group_keeps_groups_whole(tmp_path):
    samples, _, _ = world(tmp_path)
    pairs = [replace(pair, group=f"g{k // 5}") for k, pair in enumerate(samples.train)]
    disjoint = tasks(replace(samples, train=pairs), TaskOptions())[0][2]
    groups = {split: {pair.group for pair, _ in own} for split, own in disjoint.questions.items()}
    assert not groups["test"] & (groups["train"] | groups["validation"])
    assert disjoint.units["image"].groups == len(groups["test"])


def test_without_a_stated_split_images_are_assigned_by_hash(tmp_path):
    samples, _, _ = world(tmp_path, stated=False)
    assert [task.name for task in tasks(samples, TaskOptions())[0]] == [ALL[2], ALL[3], ALL[4]]


def test_answering_without_training(tmp_path):
    samples, embedded, _ = world(tmp_path)
    asked = [q for q in samples.dataset.questions if q.text == RED]
    samples.dataset.questions = [replace(q, split="test") for q in asked[:-3]] + asked[-3:]
    task = tasks(samples, TaskOptions())[0][-1]
    told = values(task, task.outputs(embedded))
    assert told["yes_no_auroc"] == 1 and told["question_only_accuracy"] < 1
    assert list(task.extras({})["undefined_metrics"]) == [name for name in told if np.isnan(told[name])]
    task.targets = np.zeros_like(task.targets)
    assert "yes_no_auroc" in task.extras({})["undefined_metrics"]
    assert task.description["statements"][0] == ["the image is red", "the image is not red"]
    nothing = Embedded("e", "f", images=embedded.images)
    for own in tasks(samples, TaskOptions())[0]:
        with pytest.raises(UndefinedMetricError):
            own.outputs(nothing)


def test_encoders_without_tokens_say_so(tmp_path):
    samples, embedded, _ = world(tmp_path, tokens=False)
    with pytest.raises(UndefinedMetricError, match=r"colors \(ColorEncoder\) gives no sequences"):
        tasks(samples, TaskOptions())[0][1].outputs(embedded)


def test_other_manifests_and_missing_images(tmp_path):
    samples, _, _ = world(tmp_path)
    gone = replace(samples, train=[])
    assert tasks(gone, TaskOptions())[1] == {"vqa-toy": "0 of its 362 questions are about an image that can be read"}


@pytest.mark.parametrize(
    ("question", "answers", "statements"),
    [
        ("Is the heart enlarged?", ("yes", "no"), ("the heart is enlarged", "the heart is not enlarged")),
        ("Is there any evidence of a mass?", ("yes", "no"), ("there is mass", "there is no mass")),
        ("Does the patient have a mass?", None, ("the patient have a mass", "the patient does not have a mass")),
        ("Can you see both kidneys", ("yes", "no"), ("there is both kidneys", "there is no both kidneys")),
        ("Is this a CT or an MRI?", ("a ct", "an mri"), ("this is a CT", "this is an MRI")),
        (
            "Is this a T1, T2, or FLAIR image?",
            ("t1", "t2", "flair"),
            ("this is a T1 image", "this is a T2 image", "this is a FLAIR image"),
        ),
    ],
)
def test_questions_become_statements(question, answers, statements):
    own = choices(question)
    assert own.statements == statements and own.answers == (answers or ("yes", "no"))


def test_answers_find_their_choice():
    side = choices("Is the lesion on the left or right side?")
    assert [side.index(a) for a in ("left", "right side", "left side", "both")] == [0, 1, 0, -1]
    assert choices("Is it red?").index("maybe") == -1
    assert choices("Where?") is None and choices("What color is the lesion?") is None


def test_most_closed_questions_of_vqa_rad_can_be_turned(shared_data):
    questions = read_vqa_rad(shared_data / "vqa_rad" / "vqa_rad.json")[0]
    assert sum(q.split == "test" for q in questions) == 451
    turned = [(own, q.answer) for q in questions if q.closed and (own := choices(q.text))]
    answerable = sum(own.index(answer) >= 0 for own, answer in turned)
    assert len(turned) / sum(q.closed for q in questions) > 0.98 and answerable / len(turned) > 0.97


def test_large_maps_are_averaged():
    tokens = torch.randn(2, 1 + 196, 3)
    pooled = at_most_a_map(tokens)
    assert pooled.shape == (2, 50, 3) and torch.equal(pooled[:, 0], tokens[:, 0])
    torch.testing.assert_close(pooled[:, 1], tokens[:, [1, 2, 15, 16]].mean(dim=1))
    assert torch.equal(at_most_a_map(tokens[:, :50]), tokens[:, :50])
    assert at_most_a_map(torch.randn(1, 130, 3)).shape == (1, 49, 3)


def test_padding_changes_no_answer():
    torch.manual_seed(0)
    head = heads.CoAttention(6, 5, 4).eval()
    images, words = torch.randn(2, 3, 6), torch.randn(2, 4, 5)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    with torch.no_grad():
        both, alone = head(images, words, mask), head(images[1:], words[1:, :2], mask[1:, :2])
    torch.testing.assert_close(both[1:], alone)


def test_our_models_give_tokens(tmp_path):
    encoder = load_encoder(str(save_tiny(tmp_path / "tiny")), device="cpu")
    with torch.inference_mode():
        images = encoder.image_token_features([encoder.prepare(Image.new("RGB", (40, 32), "red"))])
        words, mask = encoder.text_token_features(["a", "a longer text"])
    assert images.shape == (1, 5, 32) and words.shape == (2, mask.shape[1], 32)
    assert mask[0].sum() < mask[1].sum() == mask.shape[1]
    encoder.model = torch.nn.Linear(1, 1)
    with pytest.raises(NoTokens, match="Linear has no text_model"):
        encoder._tower("text_model")
