"""Exact search of every query's right answers in a pool of any size, in blocks of bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmkd.evaluation.statistics.metrics import Floats, Integers

SHOWN = 5
BLOCK_ELEMENTS = 1 << 26  # similarities held at once, 256 MB
WHOLE_ELEMENTS = 1 << 28  # similarities of all pairs that are held for both ways, 1 GB
TILE_ROWS = 1 << 15

Vectors = NDArray[np.float32]
Found = tuple[Floats, Integers, Vectors]


class Answers:
    """Right answers of each query, laid end to end: millions of small arrays would take more room than vectors do.

    Attributes:
        counts: how many each query has, ``(n,)``.
        values: those of the first, of the second ...
        starts: where those of each query begin, and where the last ones end, ``(n + 1,)``.
    """

    def __init__(self, counts: Integers, values: Integers) -> None:
        """Take counts and values."""
        self.counts, self.values = counts, values
        self.starts = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, part: slice) -> Answers:
        first, last, _ = part.indices(len(self.counts))
        return Answers(self.counts[first:last], self.values[self.starts[first] : self.starts[last]])

    def tolist(self) -> list[list[int]]:
        """A list for each query."""
        values = self.values.tolist()
        return [values[start:stop] for start, stop in pairwise(self.starts.tolist())]


def search_both(images: Any, captions: Any, right_captions: Answers, right_images: Answers) -> tuple[Found, Found]:
    """`search` of every image among the captions and of every caption among the images.

    Where the similarities of all pairs fit into a gigabyte they are computed once for both.
    """
    if len(images) * len(captions) > WHOLE_ELEMENTS:
        return search(images, captions, right_captions), search(captions, images, right_images)
    whole = torch.empty(len(images), len(captions))
    _similarities(images[:], captions, whole)
    return _ranked(whole, right_captions), _ranked(whole.T, right_images)


def search(queries: Any, pool: Any, right: Answers) -> Found:
    """Rank the best right answer of every query.

    Args:
        queries: ``(n, dim)``, any floating type; parts of them are read as they are needed, as of the pool.
        pool: ``(m, dim)``.
        right: indices into the pool of each query's right answers, at least one each.

    Returns:
        Rank of the best right answer ``(n,)`` from 1, wrong answers that tie with it counting one half, NaN where its
        similarity is; indices and similarities of the first answers ``(n, <=5)``.
    """
    parts = _parts(len(queries), len(pool))
    room = torch.empty(parts[0].stop, len(pool))
    found = []
    for part in parts:
        block = room[: part.stop - part.start]
        _similarities(queries[part], pool, block)
        found.append(_answered(block, right[part]))
    return _joined(found)


def _ranked(similarities: torch.Tensor, right: Answers) -> Found:
    """`search` where similarities ``(n, m)`` are known."""
    parts = _parts(*similarities.shape)
    return _joined([_answered(similarities[part].contiguous(), right[part]) for part in parts])


def _parts(queries: int, pool: int) -> list[slice]:
    """Parts of the queries whose similarities are held at once."""
    rows = max(1, min(queries, BLOCK_ELEMENTS // pool))
    return [slice(start, min(start + rows, queries)) for start in range(0, queries, rows)]


def _answered(block: torch.Tensor, right: Answers) -> Found:
    return _ranks(block, right), *_first(block, min(SHOWN, block.shape[1]))


def _joined(found: Sequence[Found]) -> Found:
    ranks, top, scores = (np.concatenate(column) for column in zip(*found, strict=True))
    return ranks, top, scores


def _similarities(queries: NDArray[Any], pool: Any, block: torch.Tensor) -> None:
    """Inner products of ``(rows, dim)`` with ``(m, dim)`` into ``(rows, m)``."""
    wide = _widened(queries)
    for start in range(0, len(pool), TILE_ROWS):
        tile = _widened(pool[start : start + TILE_ROWS])
        torch.mm(wide, tile.T, out=block[:, start : start + len(tile)])


def _ranks(block: torch.Tensor, right: Answers) -> Floats:
    """Ranks ``(rows,)`` from similarities ``(rows, m)``."""
    query = torch.from_numpy(np.repeat(np.arange(len(right)), right.counts))
    own = block[query, torch.from_numpy(right.values)]
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
