"""PHI-S: every teacher's features rotated and scaled by one number so that all dimensions vary alike.

A loss over raw features follows the few directions in which a teacher varies most, and the teacher whose numbers are
largest. Dividing each dimension by its own deviation would distort the space; a rotation that spreads the variance
evenly, and one scale, does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmkd.alignment.aligner import LinearAligner
from mmkd.data.features.lookup import Modality

if TYPE_CHECKING:
    from mmkd.alignment.covariances import Covariances


class PhiSAligner(LinearAligner):
    """``z = (x - m) U H / phi`` for each teacher by itself.

    m is the mean (one for images and one for texts), U the principal axes of images and texts together, with
    eigenvalues l, H orthogonal with all entries of one size (a Hadamard matrix over its root), and ``phi^2 = mean(l)``:
    every dimension of z has variance 1. Where no Hadamard matrix of the width is at hand, H is a product of plane
    rotations that equalizes the variances too. Source: Ranzinger et al. 2024 (PHI-S).
    """

    kind = "phi-s"

    @classmethod
    def fit(cls, covariances: Covariances) -> PhiSAligner:
        """Find the maps from second moments.

        Args:
            covariances: of every teacher; cross-moments are not read.

        Raises:
            ValueError: a teacher has fewer than two samples.
        """
        tensors: dict[str, Tensor] = {}
        for name in sorted(covariances.widths):
            moments = covariances.of(name)
            variances, axes = torch.linalg.eigh(moments.spread / (2 * moments.count))
            scale = variances.mean().clamp(min=1e-12).sqrt()
            tensors |= {f"{name}.{modality}_mean": mean.float() for modality, mean in moments.mean.items()}
            tensors[f"{name}.map"] = (axes @ equalizing_rotation(variances) / scale).float()
        return cls(covariances.widths, 0, tensors)

    def restore(self, name: str, standardized: Tensor, modality: Modality) -> Tensor:
        """The features `(n, width)` that `transform` would give back as `standardized`."""
        matrix = self._tensors[f"{name}.map"].to(standardized.device)
        inverse_square = matrix.square().sum() / len(matrix)  # of the scale: the map is orthogonal but for it
        return standardized.to(matrix) @ matrix.T / inverse_square + self._tensors[f"{name}.{modality}_mean"].to(matrix)


def equalizing_rotation(variances: Tensor) -> Tensor:
    """An orthogonal matrix H such that ``H^T diag(variances) H`` has one number on its whole diagonal.

    Args:
        variances: `(width,)`.

    Returns:
        `(width, width)` float64.
    """
    width = len(variances)
    matrix = hadamard(width)
    return matrix / width**0.5 if matrix is not None else _plane_rotations(variances.double())


def hadamard(width: int) -> Tensor | None:
    """A Hadamard matrix `(width, width)` of ones and minus ones with orthogonal rows, or None if we know none.

    Sylvester's doubling of order 1, 2 or Paley's first construction (a prime p = 3 mod 4 gives order p + 1).
    """
    core = width
    while core > 2 and not (core % 4 == 0 and _is_prime(core - 1)):
        if core % 2:
            return None
        core //= 2
    matrix = _paley(core - 1) if core > 2 else torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix


def _paley(prime: int) -> Tensor:
    """Order ``prime + 1``: the identity plus a skew matrix of quadratic characters of differences."""
    squares = {k * k % prime for k in range(1, prime)}
    character = torch.tensor([0.0, *(1.0 if k in squares else -1.0 for k in range(1, prime))], dtype=torch.float64)
    number = torch.arange(prime)
    skew = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = character[(number[:, None] - number) % prime]
    return skew + torch.eye(prime + 1, dtype=torch.float64)


def _plane_rotations(variances: Tensor) -> Tensor:
    """Turn the largest and the smallest remaining variance until one of them is the mean; repeat with the rest."""
    width, mean = len(variances), variances.mean()
    moment, turned = torch.diag(variances), torch.eye(width, dtype=torch.float64)
    left = torch.ones(width, dtype=torch.bool)
    for _ in range(width - 1):
        diagonal = moment.diagonal()
        high = int(torch.where(left, diagonal, -torch.inf).argmax())
        low = int(torch.where(left, diagonal, torch.inf).argmin())
        a, b, c = diagonal[high], diagonal[low], moment[high, low]
        if a - b <= 1e-12 * mean.abs():
            break
        # tan of the angle t that solves a cos^2 + 2 c sin cos + b sin^2 = mean
        tangent = (-c + (c * c - (b - mean) * (a - mean)).clamp(min=0).sqrt()) / (b - mean) if b != mean else 0 * a
        cosine = 1 / (1 + tangent * tangent).sqrt()
        plane = torch.stack([torch.stack([cosine, -tangent * cosine]), torch.stack([tangent * cosine, cosine])])
        pair = torch.tensor([high, low])
        moment[:, pair] = moment[:, pair] @ plane
        moment[pair] = plane.T @ moment[pair]
        turned[:, pair] = turned[:, pair] @ plane
        left[high] = False
    return turned


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % k for k in range(2, int(number**0.5) + 1))
