"""Captions in chunks: the fewest padded tokens, the same features and the same gradients."""

import itertools
import random

import pytest
import torch
from captioned_batches import batch, descending, model

from mmkd.student.embed import MOST_CHUNKS, PixelStatistics, embed, normalized_pixels, padding_free_share, text_chunks
from mmkd.training.contrastive import ContrastiveObjective


def test_chunks_are_the_best_there_are():
    generator = random.Random(0)
    for _ in range(60):
        lengths = sorted((generator.randint(1, 6) for _ in range(generator.randint(16, 18))), reverse=True)
        rows, (first, second) = len(lengths), text_chunks(lengths)
        assert (first[0], first[1], second[1]) == (0, second[0], rows)
        assert (first[2], second[2]) == (lengths[0], lengths[second[0]])
        best = min(cut * lengths[0] + (rows - cut) * lengths[cut] for cut in range(1, rows))
        assert sum((stop - start) * longest for start, stop, longest in (first, second)) == best


@pytest.mark.parametrize("rows", [1, 7, 8, 15, 16, 33, 64, 200])
def test_the_number_of_chunks_depends_on_rows_alone_and_chunks_cover_them(rows):
    generator = random.Random(rows)
    kinds = (
        [5] * rows,
        descending(rows),
        list(range(rows + 1, 1, -1)),
        [generator.randint(2, 60) for _ in range(rows)],
    )
    for lengths in kinds:
        chunks = text_chunks(lengths)
        assert len(chunks) == max(1, min(MOST_CHUNKS, rows // 8))
        assert [row for start, stop, _ in chunks for row in range(start, stop)] == list(range(rows))
        assert all(longest == max(lengths[start:stop]) for start, stop, longest in chunks)


def test_little_of_a_batch_is_padding():
    assert padding_free_share(descending(64)) > 0.9
    assert padding_free_share([7] * 20) == 1
    assert text_chunks([9, 3, 3]) == [(0, 3, 9)]


def test_features_loss_and_gradients_are_those_of_the_padded_batch():
    objective, given = ContrastiveObjective(model()), batch(descending(40))
    padded = {
        **{key: value for key, value in given.items() if key not in ("text_lengths", "pixel_statistics")},
        "pixel_values": normalized_pixels(given["pixel_values"], given["pixel_statistics"]),
    }
    results = []
    for one in (given, padded):
        objective.zero_grad()
        features = objective.encode(one)
        loss = objective.loss(features, one)["loss"]
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in objective.parameters() if parameter.grad is not None]
        results.append((features, loss, gradients))
    (features, loss, gradients), (other, other_loss, other_gradients) = results
    for name in ("image", "text"):
        torch.testing.assert_close(features[name], other[name], atol=1e-6, rtol=0)
    assert abs(loss.item() - other_loss.item()) < 1e-5
    for gradient, other_gradient in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(gradient, other_gradient, atol=1e-6, rtol=1e-4)


def test_the_text_tower_sees_few_padded_tokens():
    given, seen = batch(descending(64)), []
    student = model()
    student.text_model.register_forward_pre_hook(
        lambda _, positional, named: seen.append(named["attention_mask"]), with_kwargs=True
    )
    embed(student, given)
    assert len(seen) == 8
    useful, processed = (sum(map(count, seen)) for count in (lambda mask: mask.sum().item(), torch.numel))
    assert useful == sum(given["text_lengths"])
    assert useful / processed == pytest.approx(padding_free_share(given["text_lengths"])) and useful / processed > 0.85


def test_pieces_of_a_batch_may_be_embedded_alone():
    student, given = model(), batch(descending(40))
    whole = embed(student, given, trunk=True)
    projected = student.visual_projection(whole["image_trunk"])
    torch.testing.assert_close(torch.nn.functional.normalize(projected, dim=1), whole["image"])
    assert len(whole["text_trunk"]) == 40
    for start, stop in itertools.pairwise((0, 3, 30, 40)):
        piece = {
            key: value if isinstance(value, PixelStatistics) else value[start:stop] for key, value in given.items()
        }
        for name, features in embed(student, piece, trunk=True).items():
            torch.testing.assert_close(features, whole[name][start:stop], atol=1e-6, rtol=0)


def test_pixels_are_normalized_by_channel():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    result = normalized_pixels(pixels, PixelStatistics((0.5, 0.1, 0.5), (0.5, 0.2, 0.25)))
    torch.testing.assert_close(result.flatten(), torch.tensor([-1.0, 0.5, 2.0]))
    assert pixels.flatten().tolist() == [0, 51, 255]
