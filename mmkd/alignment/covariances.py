"""Second moments of all teachers' features, within and across teachers, streamed and summed exactly.

Floating-point sums depend on their order, and so would everything fitted from them. Here features are rounded to a grid
(2^15 steps up to each teacher's largest number, about what half precision keeps), so that blocks of products are whole
numbers below 2^53, which any matrix product in float64 adds without rounding, and blocks are added as integers. The
same samples give the same bits in any order, cut into any chunks, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from mmkd.data.features.lookup import MODALITIES, Features
from mmkd.distributed import maximum_over_processes, rank, sum_over_processes, world_size

GRID = 2**15
LEAST_COMMON_MULTIPLE = 2520  # of 1 .. 10: weights 1 / (teachers of the sample - 1) are whole shares of it
BLOCK_ROWS = 2**11  # 2^11 rows x 2^15 x 2^15 x 2520 is below 2^53
CARRY = 2**40


@dataclass(frozen=True)
class Moments:
    """Of one teacher: how many samples it knows, its means by modality, and its centered second moment.

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

    def __init__(self, sums: dict[tuple[str, str], Tensor], widths: dict[str, int]) -> None:
        """Use `stream` instead."""
        self._sums, self.widths = sums, widths
        self._moments = {name: self._own(name) for name in widths}

    @classmethod
    def stream(cls, chunks: Callable[[], Iterable[Features]], widths: dict[str, int], cross: bool) -> Covariances:
        """Read all samples twice: for the largest number of each teacher, and for the sums.

        Each process works on its share of the chunks, which every process must list alike.

        Args:
            chunks: returns an iterator over chunks of samples, each with every teacher in `widths`.
            widths: the feature width of each teacher.
            cross: whether pairs of teachers are wanted.

        Raises:
            ValueError: a teacher knows fewer than two samples.
        """
        names = sorted(widths)
        steps = _grid_steps(chunks, names)
        pairs = [(k, j) for k, j in combinations_with_replacement(names, 2) if cross or k == j]
        totals = {(k, j): _ExactSum(widths[k] + 2, widths[j] + 2) for k, j in pairs}
        for chunk in _own_share(chunks()):
            for begin in range(0, len(chunk[names[0]]["mask"]), BLOCK_ROWS):
                _add_block(totals, chunk, slice(begin, begin + BLOCK_ROWS), steps)
        sums = {}
        for (k, j), total in totals.items():
            unit_k, unit_j = _units(steps[k], widths[k]), _units(steps[j], widths[j])
            sums[k, j] = total.value() * unit_k[:, None] * unit_j
        return cls(sums, widths)

    def of(self, name: str) -> Moments:
        """Moments of one teacher.

        Raises:
            ValueError: it knows fewer than two samples.
        """
        moments = self._moments[name]
        if moments.count < 2:
            raise ValueError(
                f"teacher {name!r} has features for {moments.count} training pairs; alignment needs at least 2"
            )
        return moments

    def across(self, k: str, j: str) -> Tensor:
        """``sum_i (x_ik - mean_k)^T (x_ij - mean_j) / (teachers of i - 1)`` over the samples that both know."""
        if k > j:
            return self.across(j, k).T
        sums, (rows, columns) = self._sums[k, j], (self.widths[k], self.widths[j])
        result = sums[:rows, :columns].clone()
        for number, modality in enumerate(MODALITIES):
            mean_k, mean_j = self._moments[k].mean[modality], self._moments[j].mean[modality]
            result -= mean_k.outer(sums[rows + number, :columns]) + sums[:rows, columns + number].outer(mean_j)
            result += sums[rows + number, columns + number] * mean_k.outer(mean_j)
        return result / LEAST_COMMON_MULTIPLE

    def _own(self, name: str) -> Moments:
        sums, width = self._sums[name, name], self.widths[name]
        count = int(sums[width, width])
        mean: dict[str, Tensor] = {}
        spread = sums[:width, :width].clone()
        for number, modality in enumerate(MODALITIES):
            mean[modality] = sums[:width, width + number] / max(count, 1)
            spread -= count * mean[modality].outer(mean[modality])
        return Moments(count, mean, spread)


class _ExactSum:
    """A running sum of matrices of whole numbers, each below 2^53 in size, in two int64 halves."""

    def __init__(self, rows: int, columns: int) -> None:
        self.low = torch.zeros(rows, columns, dtype=torch.int64)
        self.high = torch.zeros_like(self.low)

    def add(self, block: Tensor) -> None:
        self.low += block.to(torch.int64)
        self._carry()

    def value(self) -> Tensor:
        """The sum over processes, rounded to float64 once."""
        self.low, self.high = sum_over_processes(self.low), sum_over_processes(self.high)
        self._carry()
        return self.high.double() * CARRY + self.low.double()

    def _carry(self) -> None:
        over = torch.div(self.low, CARRY, rounding_mode="floor")
        self.high += over
        self.low -= over * CARRY


def _add_block(totals: dict[tuple[str, str], _ExactSum], chunk: Features, rows: slice, steps: dict[str, float]) -> None:
    """Add the products of some samples; two columns of ones, for images and texts, carry counts and sums along."""
    masks = {name: chunk[name]["mask"][rows].double() for name in steps}
    others = torch.stack(list(masks.values())).sum(dim=0) - 1
    weight = (LEAST_COMMON_MULTIPLE / others.clamp(min=1)).round()
    for number, modality in enumerate(MODALITIES):
        whole = {}
        for name, step in steps.items():
            ones = torch.zeros(len(weight), 2, dtype=torch.float64)
            ones[:, number] = 1
            features = (chunk[name][modality][rows].double() / step).round()
            whole[name] = torch.cat([features, ones], dim=1) * masks[name][:, None]
        for (k, j), total in totals.items():
            left = whole[k] if k == j else whole[k] * weight[:, None]
            total.add(left.T @ whole[j])


def _grid_steps(chunks: Callable[[], Iterable[Features]], names: list[str]) -> dict[str, float]:
    """Per teacher the distance of grid points: a power of two, so that scaling is exact."""
    largest = torch.zeros(len(names), dtype=torch.float64)
    for chunk in _own_share(chunks()):
        for number, name in enumerate(names):
            for modality in MODALITIES:
                known = chunk[name][modality][chunk[name]["mask"]]
                if len(known):
                    largest[number] = max(largest[number], known.abs().max().double())
    exponents = torch.ceil(torch.log2(maximum_over_processes(largest).clamp(min=2.0**-60)))
    return {name: 2.0 ** int(exponent) / GRID for name, exponent in zip(names, exponents.tolist(), strict=True)}


def _units(step: float, width: int) -> Tensor:
    """What one grid step of each column is worth: `step` for features, 1 for the two columns of ones."""
    return torch.cat([torch.full((width,), step, dtype=torch.float64), torch.ones(2, dtype=torch.float64)])


def _own_share(chunks: Iterable[Features]) -> Iterable[Features]:
    return (chunk for number, chunk in enumerate(chunks) if number % world_size() == rank())
