import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.distillation.losses import TeacherSimilarity
from mmkd.distillation.options import DistillOptions
from mmkd.distillation.targets import Rows, combined_target
from mmkd.distillation.weighting import drop_teachers, teacher_confidence, uniform, weights_by_name


def test_uniform_numbers_are_even_and_depend_on_each_of_the_four():
    index = torch.arange(20000)
    draws = uniform(3, 4, index, 0)
    assert 0 <= draws.min() < draws.max() < 1
    counts = torch.histc(draws.float(), bins=20, min=0, max=1)
    assert ((counts - 1000).square() / 1000).sum() < 50  # chi-squared of 19 degrees of freedom
    for other in (
        uniform(4, 4, index, 0),
        uniform(3, 5, index, 0),
        uniform(3, 4, index, 1),
        uniform(3, 4, index + 1, 0),
    ):
        assert abs(torch.corrcoef(torch.stack([draws, other]))[0, 1]) < 0.03
    assert torch.equal(draws[5:9], uniform(3, 4, index[5:9], 0))


def test_dropped_teachers_never_leave_a_pair_alone():
    mask = torch.rand(4000, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    kept = drop_teachers(mask, 0.3, 1, 2, torch.arange(4000))
    assert not (kept & ~mask).any()
    assert torch.equal(kept.any(dim=1), mask.any(dim=1))
    several = mask.sum(dim=1) == 3  # one stays, two stay with probability .7 each
    assert kept[several].sum(dim=1).float().mean().item() == pytest.approx(1 + 2 * 0.7, abs=0.08)
    assert not torch.equal(kept, drop_teachers(mask, 0.3, 1, 3, torch.arange(4000)))


def test_own_pair_probability_by_hand():
    images, texts = (F.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(s)), dim=1) for s in (0, 1))
    known = torch.tensor([True, True, False, True])
    found = teacher_confidence(TeacherSimilarity(images, texts, known, known, 6.0), row_offset=0)
    for i in range(4):
        weight = [math.exp(6 * float(images[i] @ texts[j])) if known[j] else 0.0 for j in range(4)]
        assert found[i].item() == pytest.approx(weight[i] / sum(weight) if known[i] else 0.0, abs=1e-6)


def test_leave_one_out_weighs_teachers_by_their_agreement_with_the_others():
    a, b = F.normalize(torch.tensor([1.0, 0.1, 0.0]), dim=0), F.normalize(torch.tensor([1.0, -0.1, 0.2]), dim=0)
    stray = torch.tensor([-0.5, 0.0, math.sqrt(0.75)])
    features, known = torch.stack([a, 3 * b, stray])[None], torch.ones(1, 3)
    agreement = [
        max(0.0, float(own @ F.normalize(rest[0] + rest[1], dim=0)))
        for own, rest in ((a, (b, stray)), (b, (a, stray)), (stray, (a, b)))
    ]
    assert agreement[2] == 0
    expected = F.normalize(agreement[0] * a + agreement[1] * b, dim=0)
    torch.testing.assert_close(combined_target(features, known, "leave_one_out", unit=True)[0], expected)
    one = torch.tensor([[0.0, 2.0, 0.0]])
    torch.testing.assert_close(combined_target(features, one, "leave_one_out", unit=True)[0], b)
    torch.testing.assert_close(combined_target(features, one, "mean", unit=False)[0], 3 * b)


def test_weights_by_name_take_the_more_specific():
    weights = {"plip": 2.0, "ct/plip": 0.5}
    assert weights_by_name(weights, "plip", ["ct", "mri"]) == [0.5, 2.0]
    assert weights_by_name(weights, "other", ["ct"]) == [1.0]


def test_weights_of_a_batch_multiply_availability_names_and_confidence():
    g = torch.Generator().manual_seed(3)
    mask = torch.tensor([True, True, False])
    teacher = {"image": torch.randn(3, 4, generator=g), "text": torch.randn(3, 4, generator=g), "mask": mask}
    batch = {"teachers": {"plip": teacher}, "index": torch.arange(3), "epoch": 0, "modality": ["ct", "mri", "ct"]}
    options = DistillOptions(losses={"affinity": 1}, teacher_weights={"mri/plip": 3.0}, confidence=2.0)
    rows = Rows({"image": torch.eye(3), "text": torch.eye(3)}, batch, options, {}, seed=0)
    found = rows.weights()["plip"]
    p = rows.confidence()["plip"]
    torch.testing.assert_close(found, torch.tensor([1.0, 3.0, 0.0]) * p**2)
    assert found[2] == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"teacher_dropout": 1.0}, "teacher_dropout is 1.0; it must be at least 0 and below 1"),
        ({"teacher_scale": 0.0}, "teacher_scale is 0.0; it must be above 0"),
        ({"teacher_scales": {"plip": -1.0}}, "teacher_scales.plip"),
        ({"teacher_weights": {"plip": -1.0}}, "teacher_weights.plip"),
        ({"confidence": -1.0}, "confidence is -1.0"),
        ({"false_negatives": 1.5}, "false_negatives is 1.5; it must be above 0 and at most 1, or null"),
        ({"losses": {"afinity": 1.0}}, "did you mean 'affinity'"),
    ],
)
def test_options_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DistillOptions(**wrong)


def test_unknown_teachers_and_modalities_are_refused_with_the_nearest():
    options = DistillOptions(teacher_weights={"plipp": 1.0})
    with pytest.raises(ValueError, match=r"'plipp' is unknown.*'plip'"):
        options.require_known(["plip"], [])
    options = DistillOptions(teacher_weights={"mrt/plip": 1.0})
    with pytest.raises(ValueError, match=r"modality 'mrt' is unknown.*'mri'"):
        options.require_known(["plip"], ["mri", "ct"])
    with pytest.raises(ValueError, match="scales belong to teachers"):
        DistillOptions(teacher_scales={"ct/plip": 1.0}).require_known(["plip"], ["ct"])
