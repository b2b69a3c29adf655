"""Generalized Procrustes alignment: teachers are rotated until they agree on the same sample.

Angles between the samples of one teacher survive. Closed form, from streamed covariances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkd.alignment.aligner import LinearAligner
from mmkd.alignment.covariances import Covariances, Moments


class ProcrustesAligner(LinearAligner):
    """Generalized Procrustes analysis with missing views.

    For teacher k, with mean m_k (one for images and one for texts, which takes the modality gap away), root mean
    square norm r_k, and P_k the first `dim` principal axes (zero padding when the teacher is narrower),
    ``z_ik = (x_ik - m_k) P_k / r_k``; the orthogonal ``Q_k``, shared by images and texts, minimize
    ``sum_ik |z_ik Q_k - M_ik|^2``, with ``M_ik`` the mean of ``z_ij Q_j`` over the other teachers j of sample i.
    Each update is the polar factor of ``sum_j C_kj Q_j``, where ``C_kj = sum_i z_ik^T z_ij / (teachers of i - 1)``.
    The root mean square norm of the aligned features over the fitted samples is at most 1.
    Source: Gower 1975; Ten Berge 1977.
    """

    kind = "procrustes"

    @classmethod
    def fit(
        cls,
        covariances: Covariances,
        dim: int,
        sweeps: int = 100,
        tolerance: float = 1e-9,
    ) -> ProcrustesAligner:
        """Find the maps from second moments.

        Args:
            covariances: of every teacher, with cross-moments.
            dim: the width of the common space.
            sweeps: the most updates of each rotation.
            tolerance: stop when a sweep raises the agreement by less than this share.

        Raises:
            ValueError: a teacher has fewer than two samples.
        """
        names = sorted(covariances.widths)
        moments = {name: covariances.of(name) for name in names}
        maps = {name: _axes(moments[name], dim) for name in names}
        agreement = {(k, j): maps[k].T @ covariances.across(k, j) @ maps[j] for k in names for j in names if k != j}
        order = sorted(names, key=lambda name: -moments[name].count)
        rotations = _rotations(agreement, order, dim, sweeps, tolerance)
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= {f"{name}.{modality}_mean": mean for modality, mean in moments[name].mean.items()}
            tensors[f"{name}.map"] = maps[name] @ rotations[name]
        return cls(covariances.widths, dim, {name: tensor.float() for name, tensor in tensors.items()})


def _axes(moments: Moments, dim: int) -> Tensor:
    """The `(width, dim)` map onto the leading principal axes, divided by the root mean square norm."""
    spread = moments.spread
    norm = (spread.trace() / (2 * moments.count)).clamp(min=1e-12).sqrt()
    if len(spread) > dim:
        return torch.linalg.eigh(spread).eigenvectors.flip(1)[:, :dim] / norm
    return torch.eye(len(spread), dim, dtype=torch.float64) / norm


def _rotations(
    agreement: dict[tuple[str, str], Tensor], order: list[str], dim: int, sweeps: int, tolerance: float
) -> dict[str, Tensor]:
    """Orthogonal `(dim, dim)` matrices; the first teacher in `order` is where the others start from."""
    rotations = {order[0]: torch.eye(dim, dtype=torch.float64)}
    before = -torch.inf
    for _ in range(sweeps):
        reached = 0.0
        for name in order[1:] if len(rotations) < len(order) else order:
            pulls = [agreement[name, other] @ rotation for other, rotation in rotations.items() if other != name]
            if pulls:
                left, strength, right = torch.linalg.svd(torch.stack(pulls).sum(dim=0))
                rotations[name] = left @ right
                reached += float(strength.sum())
        if reached - before <= tolerance * abs(reached):
            break
        before = reached
    return rotations
