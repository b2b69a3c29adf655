import numpy as np
import pytest
import torch

from mmkd.screening import available, default_minimum, pools


def by_hand(image, text, captions, percentile):
    """The rule as a sentence, one pair at a time."""
    n = range(len(image))
    mismatched = [float(image[i] @ text[j]) for i in n for j in n if captions[i] != captions[j]]
    own = [float(image[i] @ text[i]) for i in n]
    return [sum(m < value for m in mismatched) >= percentile / 100 * len(mismatched) for value in own]


@pytest.mark.parametrize("percentile", [0, 50, 80, 100])
def test_the_percentile_rule_by_hand(percentile):
    generator = torch.Generator().manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator, dtype=torch.float64), dim=1)
    noise = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    image = torch.nn.functional.normalize(text + noise, dim=1)
    captions = [f"caption {k % 31}" for k in range(40)]
    found = available(image, text, captions, "percentile", percentile)
    assert found.tolist() == by_hand(image, text, captions, percentile)
    assert percentile in (0, 100) or 0 < found.sum() < 40


def test_an_untrained_teacher_passes_what_chance_passes():
    generator = torch.Generator().manual_seed(0)
    image, text = torch.nn.functional.normalize(torch.randn(2, 1000, 64, generator=generator), dim=-1)
    passed = available(image, text, [str(k) for k in range(1000)], "percentile", 80)
    assert 0.15 < passed.float().mean() < 0.25


def test_scale_and_offset_of_similarities_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    image = text + torch.randn(50, 8, generator=generator, dtype=torch.float64)
    captions = [str(k) for k in range(50)]
    shifted = torch.cat([0.01 * image, torch.ones(50, 1)], dim=1), torch.cat([text, 5 * torch.ones(50, 1)], dim=1)
    one, other = available(image, text, captions, "percentile", 80), available(*shifted, captions, "percentile", 80)
    assert torch.equal(one, other)


def test_the_papers_rule_is_the_rank_of_the_own_caption():
    image = torch.eye(3)
    text = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.9], [0, 0.6, 0.8]])
    assert available(image, text, ["a", "b", "c"], "paper", 80).tolist() == [True, False, False]
    assert available(image, text, ["a", "b", "b"], "paper", 80).tolist() == [True, True, True]
    assert available(image, text, ["a", "b", "c"], "all", 80).all()


def test_without_mismatches_nothing_speaks_against_a_pair():
    features = -torch.ones(2, 2), torch.ones(2, 2)
    assert available(*features, ["same", "same"], "percentile", 80).all()
    assert available(torch.ones(0, 2), torch.ones(0, 2), [], "percentile", 80).shape == (0,)


def test_pools_hold_every_position_once():
    for count in (1, 2, 7, 1000):
        parts = pools(count, 8, seed=1)
        assert sorted(np.concatenate(parts)) == list(range(count))
        assert max(map(len, parts)) <= 12
    assert [p.tolist() for p in pools(20, 8, 1)] == [p.tolist() for p in pools(20, 8, 1)]
    assert pools(20, 8, 1)[0].tolist() != pools(20, 8, 2)[0].tolist()


def test_five_of_nine():
    assert [default_minimum(count) for count in range(1, 11)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
