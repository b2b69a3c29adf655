"""Exact search of every query's right answers in a pool of any size, in blocks of bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmkd.evaluation.metrics import Floats, Integers

SHOWN = 5
BLOCK_ELEMENTS = 1 << 27  # similarities held at once, 512 MB
TILE_ROWS = 1 << 15

Vectors = NDArray[np.float32]


def search(queries: NDArray[Any], pool: NDArray[Any], right: Sequence[Integers]) -> tuple[Floats, Integers, Vectors]:
    """Rank the best right answer of every query.

    Args:
        queries: ``(n, dim)``, any floating type; may be memory-mapped, as the pool.
        pool: ``(m, dim)``; half precision is widened tile by tile.
        right: indices into the pool of each query's right answers, at least one each.

    Returns:
        Rank of the best right answer ``(n,)`` from 1, wrong answers that tie with it counting one half, NaN where its
        similarity is; indices and similarities of the first answers ``(n, <=5)``.
    """
    shown, rows = min(SHOWN, len(pool)), max(1, min(len(queries), BLOCK_ELEMENTS // len(pool)))
    ranks, top = np.empty(len(queries)), np.empty((len(queries), shown), dtype=np.int64)
    top_scores = np.empty((len(queries), shown), dtype=np.float32)
    room = torch.empty(rows, len(pool))
    for start in range(0, len(queries), rows):
        part = slice(start, min(start + rows, len(queries)))
        block = room[: part.stop - start]
        _similarities(queries[part], pool, block)
        ranks[part] = _ranks(block, right[part.start : part.stop])
        top[part], top_scores[part] = _first(block, shown)
    return ranks, top, top_scores


def _similarities(queries: NDArray[Any], pool: NDArray[Any], block: torch.Tensor) -> None:
    """Inner products of ``(rows, dim)`` with ``(m, dim)`` into ``(rows, m)``."""
    wide = _widened(queries)
    for start in range(0, len(pool), TILE_ROWS):
        tile = _widened(pool[start : start + TILE_ROWS])
        block[:, start : start + len(tile)] = wide @ tile.T


def _ranks(block: torch.Tensor, right: Sequence[Integers]) -> Floats:
    """Ranks ``(rows,)`` from similarities ``(rows, m)``."""
    query = torch.from_numpy(np.repeat(np.arange(len(right)), [len(own) for own in right]))
    own = block[query, torch.from_numpy(np.concatenate(right))]
    best = torch.full((len(right),), -torch.inf).scatter_reduce(0, query, own, "amax")
    level = -torch.bincount(query[own == best[query]], minlength=len(right)).numpy()
    scores, bar = block.numpy(), best[:, None].numpy()
    above = np.count_nonzero(scores > bar, axis=1)  # several times as fast as torch's sum of booleans
    level += np.count_nonzero(scores == bar, axis=1)
    return np.where(np.isnan(bar[:, 0]), np.nan, 1 + above + level / 2)


def _first(block: torch.Tensor, shown: int) -> tuple[Integers, Vectors]:
    """Indices and similarities of the highest, in order; the lower index first where two are equal."""
    scores, places = torch.topk(block, shown, dim=1)
    places, order = places.sort(dim=1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return places.gather(1, order).numpy(), scores.numpy()


def _widened(rows: NDArray[Any]) -> torch.Tensor:
    """A copy in single precision, also of memory that is mapped read-only."""
    return torch.from_numpy(np.array(rows)).float()
