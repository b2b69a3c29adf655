"""Losses over the teachers' relations, against their formulas in loops, in chunks, and by automatic differentiation."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.distillation import losses
from mmkd.distillation.losses import TeacherSimilarity, affinity, relational
from mmkd.distillation.weighting import NegativesMask
from mmkd.training.objectives import contrastive

ROWS, TEACHERS = 7, 3


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


@pytest.fixture
def world():
    """A student and three teachers of other widths, temperatures and weights, each blind to some samples."""
    student = {"image": unit(ROWS, 4), "text": unit(ROWS, 4, seed=1)}
    g = torch.Generator().manual_seed(5)
    mask = torch.rand(ROWS, TEACHERS, generator=g) > 0.35
    mask[2] = False
    teachers = [
        {
            "image": unit(ROWS, 3 + k, seed=10 + k),
            "text": unit(ROWS, 3 + k, seed=20 + k),
            "known": mask[:, k],
            "weight": mask[:, k] * (1.0 + k),
            "scale": 5.0 + k,
        }
        for k in range(TEACHERS)
    ]
    return student, teachers


def views(teachers, rows, columns, part=slice(None)):
    return [TeacherSimilarity(t[rows][part], t[columns], t["weight"][part], t["known"], t["scale"]) for t in teachers]


def softmax(values):
    top = max(values.values())
    weight = {j: math.exp(value - top) for j, value in values.items()}
    return {j: value / sum(weight.values()) for j, value in weight.items()}


def cross_entropy_by_hand(student, other, teachers, rows, columns, scale):
    """Sum over rows of CE(weighted mean over teachers of their softmax, student's softmax), in loops."""
    total = 0.0
    for i in range(ROWS):
        p, votes = [0.0] * ROWS, 0.0
        for t in teachers:
            known = [j for j in range(ROWS) if t["known"][j]]
            if t["known"][i]:
                of_teacher = softmax({j: t["scale"] * float(t[rows][i] @ t[columns][j]) for j in known})
                for j in known:
                    p[j] += float(t["weight"][i]) * of_teacher[j]
                votes += float(t["weight"][i])
        if votes:
            q = softmax({j: scale * float(student[i] @ other[j]) for j in range(ROWS)})
            total -= sum(p[j] / votes * math.log(q[j]) for j in range(ROWS))
    return total


def test_affinity_by_hand(world):
    student, teachers = world
    expected = sum(
        cross_entropy_by_hand(student[a], student[b], teachers, a, b, 9.0)
        for a, b in (("image", "text"), ("text", "image"))
    ) / (2 * ROWS)
    both = views(teachers, "image", "text"), views(teachers, "text", "image")
    value = affinity(student["image"], student["text"], student["image"], student["text"], *both, 9.0)
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_affinity_of_a_student_that_is_the_only_teacher_is_its_entropy_and_pulls_nowhere():
    image, text = (unit(6, 4, seed=s).float().requires_grad_() for s in (1, 2))
    known = torch.ones(6, dtype=torch.bool)
    both = [[TeacherSimilarity(a.detach(), b.detach(), known, known, 8.0)] for a, b in ((image, text), (text, image))]
    affinity(image, text, image, text, *both, 8.0).backward()
    assert max(image.grad.abs().max(), text.grad.abs().max()) < 1e-6


def plain_affinity(image, text, teachers, scale):
    """The same with whole matrices and automatic differentiation."""
    total = 0.0
    for student, other, rows, columns in ((image, text, "image", "text"), (text, image, "text", "image")):
        p, votes = 0, 0
        for t in teachers:
            logits = (t["scale"] * t[rows] @ t[columns].T).masked_fill(~t["known"], -torch.inf)
            p = p + t["weight"][:, None] * logits.softmax(dim=1)
            votes = votes + t["weight"][:, None]
        p = p / votes.clamp(min=1e-12)
        total = total - (p * (scale * student @ other.T).log_softmax(dim=1)).sum()
    return total / (2 * ROWS)


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_gradients_in_chunks_are_those_of_whole_matrices(world, chunk):
    student, teachers = world
    grads = []
    for form in ("plain", "chunked"):
        leaves = [student["image"].clone(), student["text"].clone(), torch.tensor([2.2], dtype=torch.float64)]
        image, text, log_scale = (leaf.requires_grad_() for leaf in leaves)
        if form == "plain":
            value = plain_affinity(image, text, teachers, log_scale.exp())
        else:
            both = views(teachers, "image", "text"), views(teachers, "text", "image")
            value = affinity(image, text, image, text, *both, log_scale.exp(), chunk)
        (3 * value).backward()
        grads.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for plain, ours in zip(*grads, strict=True):
        assert ((plain - ours).norm() / plain.norm()).item() < 1e-6


def test_chunks_leave_every_loss_and_gradient_as_it_is(world):
    _, teachers = world
    available = torch.tensor([1, 1, 0, 1, 1, 0, 1]).bool()

    def values(chunk):
        image, text = (unit(ROWS, 4, seed=seed).float().requires_grad_() for seed in (0, 1))
        found = torch.stack(
            [
                contrastive(image, text, image, text, 9.0, chunk=chunk),
                losses.interactive(image, text, text.detach(), image.detach(), available, 4.0, chunk=chunk),
                relational(image, image, views(teachers, "image", "image"), 6.0, chunk=chunk),
            ]
        )
        found.sum().backward()
        return found.detach(), image.grad, text.grad

    for whole, chunked in zip(values(None), values(2), strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-7)


def test_false_negatives_by_hand(world):
    _, teachers = world
    sides = [views(teachers, side, side) for side in ("image", "text")]
    found = NegativesMask(sides, 0.3, row_offset=0)[0:ROWS]
    for i in range(ROWS):
        for j in range(ROWS):
            both = [t for t in teachers if t["known"][i] and t["known"][j]]
            means = [sum(float(t[s][i] @ t[s][j]) for t in both) / len(both) for s in ("image", "text")] if both else []
            assert found[i, j].item() != (i != j and any(mean > 0.3 for mean in means))
    assert not found.all()
    assert torch.equal(NegativesMask(views_of_rows(teachers, 2), 0.3, row_offset=2)[1:3], found[3:5])


def views_of_rows(teachers, begin):
    return [views(teachers, side, side, slice(begin, None)) for side in ("image", "text")]


def test_a_false_negative_neither_counts_nor_gets_a_gradient():
    image, text = unit(4, 5).float().requires_grad_(), unit(4, 5, seed=1).float().requires_grad_()
    same = torch.zeros(4, 4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    contrastive(image, text, image, text, 5.0, mask=~same).backward()
    logits = (5.0 * image.detach() @ text.detach().T).masked_fill(same, -torch.inf).requires_grad_()
    (F.cross_entropy(logits, torch.arange(4)) / 2).backward()
    assert logits.grad[0, 1] == 0
    q = (5.0 * text.detach() @ image.detach().T).masked_fill(same, -torch.inf).softmax(dim=1)
    expected = 5.0 * (logits.grad @ text.detach() + (q - torch.eye(4)).T @ text.detach() / 8)
    torch.testing.assert_close(image.grad, expected)
