"""Second moments of all teachers' features, within and across teachers, streamed.

Sums are float64 in the order of the samples: the same samples in the same order give the same bits, and any other
order differs by rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from mmkd.data.features.lookup import MODALITIES, Features

Sums = dict[tuple[str, str], Tensor]  # of two teachers, `(width + 2, width + 2)`


@dataclass(frozen=True)
class Moments:
    """Of one teacher: the number of its samples, its means by modality, and its centered second moment.

    Attributes:
        count: samples.
        mean: modality -> `(width,)`.
        spread: `(width, width)`, the sum over images and texts of ``(x - mean)(x - mean)^T``.
    """

    count: int
    mean: dict[str, Tensor]
    spread: Tensor


class Covariances:
    """Moments of each teacher and centered cross-moments of each pair of teachers, float64."""

    def __init__(self, sums: Sums, widths: dict[str, int]) -> None:
        """Take the sums of all samples, see `moment_sums`, and the feature width of each teacher."""
        self._sums, self.widths = sums, widths
        self._moments = {name: self._own(name) for name in widths}

    @classmethod
    def stream(cls, chunks: Iterable[Features], widths: dict[str, int], cross: bool) -> Covariances:
        """Of samples that are read once; see `moment_sums`."""
        return cls(moment_sums(chunks, widths, cross), widths)

    def of(self, name: str) -> Moments:
        """Moments of one teacher.

        Raises:
            ValueError: it has features of fewer than two samples.
        """
        moments = self._moments[name]
        if moments.count < 2:
            raise ValueError(
                f"teacher {name!r} has features for {moments.count} training pairs; alignment needs at least 2: "
                "extract features of these pairs, or leave this teacher out (--teachers)"
            )
        return moments

    def across(self, k: str, j: str) -> Tensor:
        """``sum_i (x_ik - mean_k)^T (x_ij - mean_j) / (teachers of i - 1)`` over the samples of both."""
        if k > j:
            return self.across(j, k).T
        sums, (rows, columns) = self._sums[k, j], (self.widths[k], self.widths[j])
        result = sums[:rows, :columns].clone()
        for number, modality in enumerate(MODALITIES):
            mean_k, mean_j = self._moments[k].mean[modality], self._moments[j].mean[modality]
            result -= mean_k.outer(sums[rows + number, :columns]) + sums[:rows, columns + number].outer(mean_j)
            result += sums[rows + number, columns + number] * mean_k.outer(mean_j)
        return result

    def _own(self, name: str) -> Moments:
        sums, width = self._sums[name, name], self.widths[name]
        count = int(sums[width, width])
        mean: dict[str, Tensor] = {}
        spread = sums[:width, :width].clone()
        for number, modality in enumerate(MODALITIES):
            mean[modality] = sums[:width, width + number] / max(count, 1)
            spread -= count * mean[modality].outer(mean[modality])
        return Moments(count, mean, spread)


def moment_sums(chunks: Iterable[Features], widths: dict[str, int], cross: bool) -> Sums:
    """Sums of the products of some samples' features, which may be added to those of others.

    Args:
        chunks: of samples, each with every teacher in `widths`.
        widths: the feature width of each teacher.
        cross: whether to compute cross-moments of pairs of teachers.
    """
    names = sorted(widths)
    pairs = [(k, j) for k, j in combinations_with_replacement(names, 2) if cross or k == j]
    sums = {(k, j): torch.zeros(widths[k] + 2, widths[j] + 2, dtype=torch.float64) for k, j in pairs}
    for chunk in chunks:
        _add(sums, chunk, names)
    return sums


def _add(sums: Sums, chunk: Features, names: list[str]) -> None:
    """Add the products of some samples; two columns of ones, for images and texts, carry counts and sums along."""
    masks = {name: chunk[name]["mask"].double() for name in names}
    weight = 1 / (torch.stack(list(masks.values())).sum(dim=0) - 1).clamp(min=1)
    for number, modality in enumerate(MODALITIES):
        extended = {}
        for name in names:
            ones = torch.zeros(len(weight), 2, dtype=torch.float64)
            ones[:, number] = 1
            extended[name] = torch.cat([chunk[name][modality].double(), ones], dim=1) * masks[name][:, None]
        for (k, j), total in sums.items():
            left = extended[k] if k == j else extended[k] * weight[:, None]
            total.addmm_(left.T, extended[j])
