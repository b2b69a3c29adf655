import pytest
import torch

from mmkd.data.table import Pair
from mmkd.distillation.screening import (
    Meanings,
    Pool,
    above,
    deciding_labels,
    default_minimum,
    depleted,
    named_label,
    within_top,
    words_of,
)


def said(captions):
    """Pairs of which only the captions are known."""
    return Meanings.of([Pair(str(k), f"{k}.png", caption) for k, caption in enumerate(captions)], {})


def unit(count, dim, seed=0, noise=1.0):
    """Texts, and images that are texts with noise; float64, unit length."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.nn.functional.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1)
    image = text + noise * torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(image, dim=1), text


def by_hand(image, text, captions, pool, percentile):
    """The rule as a sentence, one pair at a time."""
    n = range(len(captions))
    mismatched = [float(pool.image[i] @ pool.text[j]) for i in n for j in n if captions[i] != captions[j]]
    own = [float(i @ t) for i, t in zip(image, text, strict=True)]
    return [sum(m < value for m in mismatched) >= percentile / 100 * len(mismatched) for value in own]


@pytest.mark.parametrize("percentile", [0, 50, 80, 100])
def test_the_percentile_rule_by_hand(percentile):
    captions = [f"caption {k % 31}" for k in range(40)]
    pool = Pool(said(captions), *unit(40, 6))
    image, text = unit(60, 6, seed=1)
    found = above(image, text, pool.threshold(percentile))
    assert found.tolist() == by_hand(image, text, captions, pool, percentile)
    assert percentile in (0, 100) or 0 < found.sum() < 60


def test_a_teacher_that_knows_nothing_passes_what_chance_passes():
    generator = torch.Generator().manual_seed(0)
    image, text = torch.nn.functional.normalize(torch.randn(2, 1500, 64, generator=generator), dim=-1)
    pool = Pool(said([str(k) for k in range(500)]), image[:500], text[:500])
    passed = above(image[500:], text[500:], pool.threshold(80))
    assert 0.15 < passed.float().mean() < 0.25


def test_scale_and_offset_of_similarities_do_not_matter():
    image, text = unit(50, 8)
    captions = [str(k) for k in range(50)]
    shifted = torch.cat([0.01 * image, torch.ones(50, 1)], dim=1), torch.cat([text, 5 * torch.ones(50, 1)], dim=1)
    one = above(image, text, Pool(said(captions), image, text).threshold(80))
    assert torch.equal(one, above(*shifted, Pool(said(captions), *shifted).threshold(80)))
    assert 0 < one.sum() < 50


@pytest.mark.parametrize("top", [1, 3])
def test_the_rank_of_the_own_caption_by_hand(top):
    others = [f"caption {k % 17}" for k in range(20)]
    pool = Pool(said(others), *unit(20, 5))
    image, text = unit(30, 5, seed=1)
    captions = [f"caption {k}" for k in range(30)]
    ranks = [
        1 + sum(float(i @ other) >= float(i @ t) for other, c in zip(pool.text, others, strict=True) if c != own)
        for i, t, own in zip(image, text, captions, strict=True)
    ]
    found = within_top(image, text, said(captions), pool, top)
    assert found.tolist() == [rank <= top for rank in ranks]
    assert 0 < found.sum() < 30


def test_the_first_place_needs_to_be_won_and_equal_words_do_not_compete():
    image = torch.eye(3)
    text = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.9], [0, 0.6, 0.8]])
    for captions, expected in ((["a", "b", "c"], [True, False, False]), (["a", "b", "b"], [True, True, True])):
        assert within_top(image, text, said(captions), Pool(said(captions), image, text), 1).tolist() == expected
    tied = Pool(said(["a", "b"]), torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert within_top(torch.eye(2)[:1], torch.eye(2)[:1], said(["x"]), tied, 1).tolist() == [False]


def test_without_mismatches_nothing_speaks_against_a_pair():
    features = -torch.ones(2, 2), torch.ones(2, 2)
    same = Pool(said(["same", "same"]), *features)
    assert above(*features, same.threshold(80)).all()
    assert within_top(*features, said(["same", "same"]), same, 1).all()
    empty = Pool(said([]), torch.ones(0, 2), torch.ones(0, 2))
    assert above(*features, empty.threshold(100)).all()
    assert within_top(*features, said(["a", "b"]), empty, 1).all()
    assert above(torch.ones(0, 2), torch.ones(0, 2), 0.0).shape == (0,)


def meaning_pairs():
    """Captions and labels, and which of them mean the same."""
    rows = [
        ("an X-ray image showing pneumonia", "X-ray", "pneumonia"),
        ("radiograph of pneumonia", "X-ray", "pneumonia"),
        ("an X-ray image showing effusion", "X-ray", "effusion"),
        ("an MRI scan showing effusion", "MRI", "effusion"),  # the only label, most captions differ: by words
        ("MRI, effusion of the left knee", "MRI", "effusion"),
        ("a lung with a nodule of 12 mm, upper lobe, left side, no further finding", "CT", ""),
        ("Lung with a nodule of 12 mm, upper lobe, left side: no further findings!", "CT", ""),
    ]
    return [Pair(str(k), f"{k}.png", *row) for k, row in enumerate(rows)]


def test_pairs_differ_by_label_and_without_labels_by_words():
    pairs = meaning_pairs()
    labels = deciding_labels(pairs)
    assert labels == {"X-ray": {("pneumonia",): "pneumonia", ("effusion",): "effusion"}}
    meanings = Meanings.of(pairs, labels)
    same = {(i, j) for i, row in enumerate(meanings.differ(meanings).tolist()) for j, it in enumerate(row) if not it}
    assert same == {(k, k) for k in range(7)} | {(0, 1), (1, 0), (5, 6), (6, 5)}
    one = [Pair("a", "a.png", f"polyp {k % 2}", "endoscopy", "polyp") for k in range(6)]
    meanings = Meanings.of(one, deciding_labels(one))
    assert not meanings.differ(meanings).any()


def test_a_perfect_teacher_of_two_classes_in_several_words_passes_for_every_pair():
    sentences = ("a microscopy image of {}", "micrograph showing {}", "{} under the microscope")
    labels = ("lymphocyte", "monocyte")
    pairs = [
        Pair(f"{k}", "x.png", sentences[k // 2 % 3].format(labels[k % 2]), "cells", labels[k % 2]) for k in range(60)
    ]
    features = torch.eye(2)[torch.arange(60) % 2]
    pool = Pool(Meanings.of(pairs, deciding_labels(pairs)), features, features)
    assert above(features, features, pool.threshold(80)).all()
    by_words = Pool(Meanings.of(pairs, {}), features, features)
    assert not above(features, features, by_words.threshold(80)).any()  # the other words of a class are its mismatches


def test_a_caption_that_names_another_label_has_its_meaning():
    labels = {words_of(label): label for label in ("tumor", "glioma tumor", "no tumor", "cyst")}
    for sentence, expected in (
        ("MRI of a Glioma-tumor.", "glioma tumor"),
        ("a tumor", "tumor"),
        ("tumorous", None),
        ("no tumor beside a glioma tumor", None),
        ("glioma of the tumor board", "tumor"),
        ("nothing", None),
    ):
        assert named_label(words_of(sentence), labels) == expected
    pairs = [
        Pair(f"{k}", "x.png", f"image of {c}", "US", label)
        for k, (c, label) in enumerate([("cyst", "cyst"), ("cyst", "node"), ("it", "node")])
    ]
    meanings = Meanings.of(pairs, deciding_labels(pairs))
    assert meanings.differ(meanings).tolist() == [[False, False, True], [True, True, False], [True, True, False]]


def test_a_class_that_keeps_far_less_than_the_others_is_named():
    def of(label, pairs, kept):
        return {"label": label, "pairs": pairs, "kept": kept}

    classes = [of("a", 100, 90), of("b", 100, 33), of("c", 50, 25), of("few", 9, 0)]
    assert [own["label"] for own in depleted(classes)] == ["b"]
    assert depleted([of("alone", 100, 1)]) == [] and depleted([of("a", 50, 0), of("b", 50, 0)]) == []


def test_five_of_nine():
    assert [default_minimum(count) for count in range(1, 11)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
