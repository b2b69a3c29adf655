"""Which teachers understand which pair: a teacher's own image-text similarity against its similarities of mismatches.

The paper's rule is unpublished; known is that kept pairs match their own caption best among their batch, and that a
sample stays when at least five of nine teachers are kept. Comparing within one teacher only, by rank, makes teachers
comparable whose similarities lie on different scales (0.08 for one, 0.5 for another). Mismatches come from one pool of
random pairs, drawn once, so that any number of pairs can pass by one after the other. An image and another pair's
caption in the very same words are no mismatch and are left out of the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Rule = Literal["percentile", "rank", "all"]


@dataclass(frozen=True)
class Pool:
    """What one teacher makes of random pairs.

    Attributes:
        captions: of the m pairs.
        image: (m, dim) features, unit length.
        text: (m, dim) features, unit length.
    """

    captions: Sequence[str]
    image: Tensor
    text: Tensor

    def mismatched(self) -> Tensor:
        """Similarities of images and captions that do not belong together, flat."""
        similarity = self.image @ self.text.T
        return similarity[_differ(self.captions, self.captions)]

    def threshold(self, percentile: float) -> float:
        """What this percentage of the mismatched similarities does not exceed; minus infinity where there are none."""
        mismatched = self.mismatched()
        rank = math.ceil(percentile / 100 * len(mismatched))
        return -math.inf if rank == 0 else float(mismatched.kthvalue(rank).values)


def above(image: Tensor, text: Tensor, threshold: float) -> Tensor:
    """Whether the similarity of each of n pairs is above a threshold.

    With the ``p``-th percentile of mismatches, a teacher that knows nothing passes ``100 - p`` percent of pairs.

    Args:
        image: (n, dim) image features, unit length.
        text: (n, dim) text features of the same pairs, unit length.
        threshold: see `Pool.threshold`.

    Returns:
        (n,) bool.
    """
    return (image * text).sum(dim=1) > threshold


def within_top(image: Tensor, text: Tensor, captions: Sequence[str], pool: Pool, top: int) -> Tensor:
    """Whether each image's own caption ranks among its best ``top`` when the pool's other captions compete.

    Args:
        image: (n, dim) image features, unit length.
        text: (n, dim) text features of the same pairs, unit length.
        captions: n captions.
        pool: who competes.
        top: 1 for the first place alone; a tie counts against the own caption.

    Returns:
        (n,) bool.
    """
    own = (image * text).sum(dim=1, keepdim=True)
    better = (image @ pool.text.T >= own) & _differ(captions, pool.captions)
    return better.sum(dim=1) < top


def default_minimum(teachers: int) -> int:
    """How many teachers must agree: the paper's five of nine, and the same share of fewer."""
    return min(5, max(1, round(5 / 9 * teachers)))


def _differ(ones: Sequence[str], others: Sequence[str]) -> Tensor:
    """Which captions are not the same words, (n, m) bool."""
    codes = np.unique(np.array([*ones, *others], dtype=object), return_inverse=True)[1]
    return torch.from_numpy(codes[: len(ones), None] != codes[None, len(ones) :])
