import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.alignment.covariances import Covariances
from mmkd.alignment.phi_s import PhiSAligner, equalizing_rotation, hadamard
from mmkd.distillation.heads import (
    TeacherHeads,
    angular_dispersion,
    angular_error,
    mean_over_teachers,
    standardized_error,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_standardized_error_by_hand():
    said, target = torch.tensor([[0.0, 3.0]]), torch.tensor([[0.5, 1.0]])
    smooth = (0.5 * 0.5**2 + (2.0 - 0.5)) / 2
    expected = (1 - 1.0 / math.hypot(0.5, 1.0)) / 2 + smooth / 2
    assert standardized_error(said, target).item() == pytest.approx(expected, abs=1e-6)


def test_angular_error_by_hand_and_with_a_gradient_that_stays_finite():
    said = torch.tensor([[0.0, 2.0], [1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    target = torch.tensor([[5.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    errors = angular_error(said, target, dispersion=0.5)
    assert errors[:2].tolist() == pytest.approx([(math.pi / 2 / 0.5) ** 2, 0], abs=1e-4)
    assert errors[2].item() == pytest.approx((math.pi / 0.5) ** 2, rel=0.01)
    errors.sum().backward()
    assert torch.isfinite(said.grad).all()


def test_dispersion_by_hand():
    features = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert angular_dispersion(features) == pytest.approx(math.pi / 4)
    assert angular_dispersion(torch.ones(3, 2)) > 0


def test_mean_over_teachers_by_hand():
    errors = {"a": torch.tensor([1.0, 2.0, 9.0]), "b": torch.tensor([3.0, 5.0, 9.0])}
    weights = {"a": torch.tensor([1.0, 1.0, 0.0]), "b": torch.tensor([3.0, 0.0, 0.0])}
    assert mean_over_teachers(errors, weights).item() == pytest.approx(((1 + 9) / 4 + 2 + 0) / 3)


def fitted(widths, n=300):
    features = {
        name: {
            "image": normal(n, width, seed=k) @ normal(width, width, seed=9 + k) + 3,
            "text": normal(n, width, seed=20 + k) @ normal(width, width, seed=9 + k) - 1,
            "mask": torch.arange(n) % 5 > 0,
        }
        for k, (name, width) in enumerate(widths.items())
    }
    return features, PhiSAligner.fit(Covariances.stream([features], widths, cross=False))


@pytest.mark.parametrize("width", [1, 2, 3, 7, 12, 24, 48, 768])
def test_rotation_is_orthogonal_and_spreads_variance_evenly(width):
    variances = torch.arange(1.0, width + 1, dtype=torch.float64) ** 2
    rotation = equalizing_rotation(variances)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(width, dtype=torch.float64))
    spread = (rotation.T @ torch.diag(variances) @ rotation).diagonal()
    torch.testing.assert_close(spread, variances.mean().expand(width))


def test_hadamard_matrices_where_they_are_known():
    for width in (1, 2, 4, 12, 20, 512, 640, 768, 1024):
        matrix = hadamard(width)
        assert matrix is not None
        assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
        torch.testing.assert_close(matrix @ matrix.T, width * torch.eye(width, dtype=torch.float64))
    assert hadamard(3) is None
    assert hadamard(7) is None


def test_phi_s_targets_vary_alike_keep_angles_and_go_back():
    features, aligner = fitted({"a": 12, "b": 5})
    for name, teacher in features.items():
        both = []
        for side in ("image", "text"):
            known = teacher[side][teacher["mask"]]
            standard = aligner.transform(name, known, side)
            assert standard.mean(dim=0).abs().max() < 1e-3
            torch.testing.assert_close(aligner.restore(name, standard, side), known, atol=1e-4, rtol=1e-4)
            centered = F.normalize(known - known.mean(dim=0), dim=1)
            unit = F.normalize(standard, dim=1)
            torch.testing.assert_close(unit @ unit.T, centered @ centered.T, atol=2e-3, rtol=0)
            both.append(standard)
        variance = torch.cat(both).square().mean(dim=0)
        torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-2, rtol=0)


def test_saved_heads_emulate_a_teacher_that_they_have_learned(tmp_path):
    widths = {"a": 12, "b": 5}
    features, aligner = fitted(widths)
    torch.manual_seed(0)
    heads = TeacherHeads({"image": 12, "text": 12}, widths, aligner)
    embedding = F.normalize(aligner.transform("a", features["a"]["image"], "image"), dim=1)
    optimizer = torch.optim.Adam(heads.parameters(), lr=3e-3)
    for _ in range(150):
        said = heads("b", embedding, "image")
        loss = standardized_error(said, heads.targets("b", features["b"]["image"], "image")).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    heads.save(tmp_path)
    loaded = TeacherHeads.load(tmp_path)
    emulated = loaded.emulate("b", embedding, "image")
    assert torch.equal(emulated, heads.emulate("b", embedding, "image"))
    truth = F.normalize(features["b"]["image"], dim=1)
    chance = F.cosine_similarity(truth, truth.mean(dim=0, keepdim=True)).mean()
    assert F.cosine_similarity(emulated, truth).mean() > chance
    with pytest.raises(FileNotFoundError, match=r"--losses\.heads"):
        TeacherHeads.load(tmp_path / "none")
