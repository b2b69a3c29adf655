"""Which teachers understand which pair: a teacher's own image-text similarity against its similarities of mismatches.

The paper's rule is unpublished; known is that kept pairs match their own caption best among their batch, and that a
sample stays when at least five of nine teachers are kept. Comparing within one teacher only, by rank, makes teachers
comparable whose similarities lie on different scales (0.08 for one, 0.5 for another). An image and another pair's
caption in the very same words are no mismatch and are left out of the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Rule = Literal["percentile", "paper", "all"]


def available(image: Tensor, text: Tensor, captions: Sequence[str], rule: Rule, percentile: float) -> Tensor:
    """Which pairs of a pool one teacher may teach.

    ``percentile``: the pair's similarity is above this percentage of the teacher's mismatched similarities in the pool.
    An untrained teacher passes ``100 - percentile`` percent of pairs.
    ``paper``: the image's own caption ranks first among the pool's.
    ``all``: every pair that has features.

    Args:
        image: (n, dim) image features, unit length.
        text: (n, dim) text features of the same pairs, unit length.
        captions: n captions.
        rule: see above.
        percentile: of the first rule, 0 to 100.

    Returns:
        (n,) bool. A pair without a single mismatch passes, since nothing speaks against it.
    """
    if rule == "all":
        return torch.ones(len(image), dtype=torch.bool)
    similarity = image @ text.T
    own = similarity.diagonal()
    codes = torch.tensor(np.unique(np.array(captions, dtype=object), return_inverse=True)[1])
    mismatched = codes[:, None] != codes[None, :]
    if rule == "paper":
        return ~((similarity >= own[:, None]) & mismatched).any(dim=1)
    beaten = math.ceil(percentile / 100 * int(mismatched.sum()))
    if beaten == 0:
        return torch.ones(len(image), dtype=torch.bool)
    return own > similarity[mismatched].kthvalue(beaten).values


def pools(count: int, size: int, seed: int) -> list[np.ndarray]:
    """Positions 0 to ``count`` - 1, shared out at random among pools of about ``size``: mismatches are random pairs."""
    order = np.random.default_rng(seed).permutation(count)
    return np.array_split(order, max(1, round(count / size)))


def default_minimum(teachers: int) -> int:
    """How many teachers must agree: the paper's five of nine, and the same share of fewer."""
    return min(5, max(1, round(5 / 9 * teachers)))
