import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmkd.alignment import autoencoder
from mmkd.distillation import losses
from mmkd.distillation.losses import TeacherSimilarity, relational
from mmkd.training.chunked_loss import pairwise_sigmoid
from mmkd.training.dataset import caption_numbers
from mmkd.training.objectives import contrastive


def views(teachers, masks, scale):
    """Teachers of one process, each known sample counting alike."""
    return [
        TeacherSimilarity(teacher, teacher, mask, mask, scale) for teacher, mask in zip(teachers, masks, strict=True)
    ]


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("case", range(4))
def test_paper_mode_equals_the_authors_values_and_gradients(golden, case):
    expected = json.loads((golden / "loss.json").read_text())[case]
    arrays = {name: torch.tensor(array) for name, array in np.load(golden / f"loss_{case}.npz").items()}
    image, text = arrays["image"].requires_grad_(), arrays["text"].requires_grad_()
    student = F.normalize(image, dim=1), F.normalize(text, dim=1)
    teacher = arrays["teacher_image"], arrays["teacher_text"]
    known = torch.ones(len(image), dtype=torch.bool)
    task = contrastive(*student, *student, expected["logit_scale"])
    feature = sum(losses.feature_squared(s, t, known) for s, t in zip(student, teacher, strict=True))
    interactive = losses.interactive(*student, *teacher, known)
    total = task + 50 * feature + interactive
    total.backward()
    for name, value in {"task": task, "fd": feature, "icl": interactive, "total": total}.items():
        assert value.item() == pytest.approx(expected[name], abs=1e-5)
    torch.testing.assert_close(image.grad, arrays["grad_image"], atol=1e-5, rtol=0)
    torch.testing.assert_close(text.grad, arrays["grad_text"], atol=1e-5, rtol=0)


def test_contrastive_by_hand():
    image, text, scale = unit(3, 4), unit(3, 4, seed=1), 7.0
    expected = 0.0
    for i in range(3):
        to_texts = [math.exp(scale * float(image[i] @ text[j])) for j in range(3)]
        to_images = [math.exp(scale * float(text[i] @ image[j])) for j in range(3)]
        expected -= math.log(to_texts[i] / sum(to_texts)) + math.log(to_images[i] / sum(to_images))
    assert contrastive(image, text, image, text, scale).item() == pytest.approx(expected / 6, abs=1e-6)


def test_views_of_one_report_are_positives_of_each_other():
    """Captions 0 and 2 are one text; its negatives are all others, whatever a mask says of it."""
    image, text, scale, captions = unit(4, 5), unit(4, 5, seed=1), 7.0, torch.tensor([8, 3, 8, 9])
    expected = 0.0
    for rows, columns in ((image, text), (text, image)):
        shares = (scale * rows @ columns.T).log_softmax(dim=1)
        for i, positives in enumerate(([0, 2], [1], [0, 2], [3])):
            expected -= sum(float(shares[i, j]) for j in positives) / len(positives)
    value = contrastive(image, text, image, text, scale, captions=captions)
    assert value.item() == pytest.approx(expected / 8, abs=1e-6)
    mask = torch.eye(4).bool() | (captions != 8)[:, None] | (captions != 8)
    assert not mask[0, 2]
    torch.testing.assert_close(contrastive(image, text, image, text, scale, mask=mask, captions=captions), value)
    halves = [
        contrastive(image[r], text[r], image, text, scale, r.start, chunk=1, captions=captions)
        for r in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(halves) / 2, value)
    different = contrastive(image, text, image, text, scale, captions=caption_numbers(["a", "b", "a ", ""]))
    torch.testing.assert_close(different, contrastive(image, text, image, text, scale))


@pytest.mark.parametrize("captions", [None, torch.tensor([8, 3, 8, 9])])
def test_sigmoid_asks_of_every_image_and_caption_whether_they_belong_together(captions):
    image, text = unit(4, 5).float(), unit(4, 5, seed=1).float()
    scale, bias = torch.tensor(7.0), torch.tensor([-2.0])
    same = torch.eye(4).bool() if captions is None else captions == captions[:, None]
    signs = torch.where(same, 1.0, -1.0)
    expected = -(signs * (scale * image @ text.T + bias)).sigmoid().log().sum() / 4
    torch.testing.assert_close(pairwise_sigmoid(image, text, image, text, scale, bias, captions=captions), expected)
    halves = [
        pairwise_sigmoid(image[r], text[r], image, text, scale, bias, r.start, chunk=1, captions=captions)
        for r in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(halves) / 2, expected)
    mask = same | (torch.arange(4) != 1)
    masked = -((signs * (scale * image @ text.T + bias)).sigmoid().log() * mask).sum() / 4
    torch.testing.assert_close(
        pairwise_sigmoid(image, text, image, text, scale, bias, mask=mask, captions=captions), masked
    )


def test_scale_and_bias_of_the_sigmoid_are_learned_in_chunks_too():
    image, text = unit(4, 5).float(), unit(4, 5, seed=1).float()
    gradients = []
    for chunk in (None, 3):
        scale, bias = torch.tensor(7.0, requires_grad=True), torch.tensor([-2.0], requires_grad=True)
        pairwise_sigmoid(image, text, image, text, scale, bias, chunk=chunk).backward()
        gradients.append((scale.grad, bias.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert all(gradient.abs() > 0.01 for gradient in gradients[0])


def test_interactive_leaves_unknown_pairs_out_of_rows_and_columns():
    image, text, teacher_image, teacher_text = (unit(4, 5, seed=s) for s in range(4))
    known = torch.tensor([True, False, True, True])
    masked = losses.interactive(image, text, teacher_image, teacher_text, known, 5.0)
    alone = losses.interactive(
        image[known], text[known], teacher_image[known], teacher_text[known], torch.ones(3, dtype=torch.bool), 5.0
    )
    assert masked.item() == pytest.approx(alone.item() * 3 / 4, abs=1e-6)


def test_losses_without_any_teacher_are_zero_with_zero_gradient():
    image = unit(3, 4).float().requires_grad_()
    none = torch.zeros(3, dtype=torch.bool)
    zeros = torch.zeros(3, 4)
    total = (
        losses.interactive(image, image, zeros, zeros, none)
        + losses.feature_cosine(image, zeros, none)
        + losses.feature_squared(image, zeros, none)
        + relational(image, image, [TeacherSimilarity(zeros, zeros, none, none, 10.0)], 10.0)
    )
    total.backward()
    assert total.item() == 0
    assert torch.equal(image.grad, torch.zeros_like(image))


def test_cosine_is_half_the_width_times_squared_for_unit_targets():
    student, target, known = unit(4, 6), unit(4, 6, seed=1), torch.tensor([True, True, False, True])
    cosine = losses.feature_cosine(student, target, known)
    assert cosine.item() == pytest.approx(3 * losses.feature_squared(student, target, known).item(), abs=1e-6)
    assert losses.feature_cosine(student, 5 * target, known).item() == pytest.approx(cosine.item(), abs=1e-6)


def relational_by_hand(student, teachers, masks, scale):
    """Loops over samples and teachers, with softmax written out."""
    n, total = len(student), 0.0
    for i in range(n):
        rows = []
        for teacher, mask in zip(teachers, masks, strict=True):
            allowed = [j for j in range(n) if j != i and mask[j]]
            if mask[i] and allowed:
                weight = {j: math.exp(scale * float(teacher[i] @ teacher[j])) for j in allowed}
                rows.append({j: value / sum(weight.values()) for j, value in weight.items()})
        if not rows:
            continue
        own = {j: math.exp(scale * float(student[i] @ student[j])) for j in range(n) if j != i}
        for j in own:
            p = sum(row.get(j, 0.0) for row in rows) / len(rows)
            if p > 0:
                total += p * math.log(p / (own[j] / sum(own.values())))
    return total / n


def test_relational_by_hand_with_missing_teachers_of_unequal_widths():
    student, teachers = unit(5, 4), [unit(5, 3, seed=1), unit(5, 7, seed=2), unit(5, 4, seed=3)]
    masks = [torch.tensor(m, dtype=torch.bool) for m in ([1, 1, 0, 1, 0], [1, 1, 1, 1, 0], [0, 0, 0, 1, 0])]
    value = relational(student, student, views(teachers, masks, 6.0), 6.0)
    assert value.item() == pytest.approx(relational_by_hand(student, teachers, masks, 6.0), abs=1e-6)


def test_relational_is_zero_for_a_student_with_the_teachers_relations():
    teacher, known = unit(6, 4), torch.ones(6, dtype=torch.bool)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64))[0]
    value = relational(teacher @ rotation, teacher @ rotation, views([teacher], [known], 20.0), 20.0)
    assert value.item() == pytest.approx(0, abs=1e-5)


def test_teacher_order_does_not_matter():
    student, teachers = unit(5, 4), [unit(5, 3, seed=1), unit(5, 7, seed=2)]
    masks = [torch.tensor([1, 1, 0, 1, 1]).bool(), torch.tensor([1, 0, 1, 1, 1]).bool()]
    both = list(zip(teachers, masks, strict=True))
    values = [relational(student, student, views(*zip(*order, strict=True), 6.0), 6.0) for order in (both, both[::-1])]
    torch.testing.assert_close(*values)


def test_mean_of_row_shares_is_the_whole_in_value_and_gradient():
    """What two processes compute: half of the rows each, against all columns."""
    target_image, target_text, raw = unit(6, 4, seed=3).float(), unit(6, 4, seed=4).float(), unit(6, 3, seed=5).float()
    known = torch.tensor([1, 0, 1, 1, 1, 0]).bool()

    def loss(image, text, begin, end):
        rows = slice(begin, end)
        return (
            contrastive(image[rows], text[rows], image, text, 9.0, begin)
            + losses.interactive(image[rows], text[rows], target_image, target_text, known, 4.0, begin)
            + losses.feature_squared(image[rows], target_image[rows], known[rows])
            + losses.feature_cosine(text[rows], target_text[rows], known[rows])
            + relational(image[rows], image, [TeacherSimilarity(raw[rows], raw, known[rows], known, 8.0)], 8.0, begin)
        )

    whole = [unit(6, 4, seed=s).float().requires_grad_() for s in (1, 2)]
    shares = [unit(6, 4, seed=s).float().requires_grad_() for s in (1, 2)]
    one = loss(*whole, 0, 6)
    two = (loss(*shares, 0, 3) + loss(*shares, 3, 6)) / 2
    one.backward()
    two.backward()
    torch.testing.assert_close(one, two)
    for a, b in zip(whole, shares, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_similarities_stay_in_fp32_under_autocast():
    image, text = unit(8, 64).float(), unit(8, 64, seed=1).float()
    plain = contrastive(image, text, image, text, 100.0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrastive(image, text, image, text, 100.0)
    assert inside.dtype == torch.float32
    assert torch.equal(plain, inside)


def test_reconstruction_by_hand():
    restored, original = torch.tensor([[1.0, 2.0], [5.0, 5.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert autoencoder.reconstruction(restored, original, torch.tensor([True, False])).item() == pytest.approx(2.5 / 2)
