"""Equal and nearly equal pairs among millions, in memory of some 250 bytes a pair and in an order-free way.

Exact: the first of equal hashes stays. Near: candidate pairs share a stretch of bits, found by sorting one key array at
a time; each candidate is then measured, and of every connected set the first pair stays. With distance d, two hashes of
64 bits that differ in at most d bits are equal in one of d + 1 stretches, so that none is missed; captions share one of
16 MinHash bands, which finds 99.98 % of those of similarity 0.8. In a bucket of many alike every pair is compared with
the thousand that follow it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mmkd.curation.fingerprints import BANDS, HASH_BITS, bands, hamming, similarity
from mmkd.curation.settings import NearMode

MOST_COMPARED = 1000
CHUNK = 1 << 20


@dataclass(frozen=True)
class Marks:
    """Marks of n pairs in their order.

    Attributes:
        sample: (n,) int64, the same for captions of one image's panels.
        digest: (n, 2) uint64, of the image file.
        perceptual: (n,) uint64.
        signature: (n, 64) uint16.
        key: (n,) int64, hash of the source's key.
    """

    sample: np.ndarray
    digest: np.ndarray
    perceptual: np.ndarray
    signature: np.ndarray
    key: np.ndarray


def repeats(keys: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Which rows (n,) repeat a key, (n,) or (n, k), that an earlier row of another sample has."""
    rows = keys[:, None] if keys.ndim == 1 else keys
    order = np.lexsort(rows.T[::-1])
    ordered = rows[order]
    new = np.ones(len(keys), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = order[new][np.cumsum(new) - 1]  # lexsort is stable: the first of a run came first
    repeated = np.zeros(len(keys), dtype=bool)
    repeated[order] = samples[order] != samples[first]
    return repeated


def near_repeats(
    marks: Marks, rows: np.ndarray, mode: NearMode, distance: int, caption_similarity: float
) -> np.ndarray:
    """Which of some pairs (m,) are nearly an earlier one of them, of another sample.

    Args:
        marks: of n pairs.
        rows: (m,) the pairs to compare, ascending.
        mode: what must be near: both, image or caption; off for none.
        distance: bits in which perceptual hashes of near images may differ.
        caption_similarity: from which captions are near.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = len(rows)
    if mode == "off" or count < 2:
        return np.zeros(count, dtype=bool)
    edges: list[np.ndarray] = [np.zeros((2, 0), dtype=np.int32)]
    for keys in _keys(marks, rows, mode, distance):
        for left, right in candidates(keys):
            near = _near(marks, rows[left], rows[right], mode, distance, caption_similarity)
            edges.append(np.stack([left[near], right[near]]).astype(np.int32))
    left, right = np.concatenate(edges, axis=1)
    graph = coo_matrix((np.ones(len(left), dtype=np.int8), (left, right)), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    first = np.full(component.max() + 1, count)
    np.minimum.at(first, component, np.arange(count))
    samples = marks.sample[rows]
    return np.asarray(samples != samples[first[component]])


def candidates(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows (left < right) of equal keys (n,), in pieces; each row with at most the next thousand."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    alive = np.flatnonzero(ordered[:-1] == ordered[1:])
    for step in range(1, MOST_COMPARED + 1):
        alive = alive[alive < len(keys) - step]
        alive = alive[ordered[alive] == ordered[alive + step]]
        if not alive.size:
            return
        for start in range(0, alive.size, CHUNK):
            piece = alive[start : start + CHUNK]
            yield order[piece], order[piece + step]


def stretches(hashes: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """The ``distance + 1`` stretches of 64-bit hashes (n,), each as keys (n,)."""
    edges = np.linspace(0, HASH_BITS, distance + 2).round().astype(int)
    for low, high in itertools.pairwise(edges):
        mask = np.uint64((1 << int(high - low)) - 1)
        yield (hashes >> np.uint64(low)) & mask


def _keys(marks: Marks, rows: np.ndarray, mode: NearMode, distance: int) -> Iterator[np.ndarray]:
    """Key arrays (m,) one after another; a near pair has an equal key in one of them."""
    captions = bands(marks.signature)
    if mode == "caption":
        yield from (captions[rows, band] for band in range(BANDS))
    elif mode == "image":
        yield from stretches(marks.perceptual[rows], distance)
    else:
        for stretch in stretches(marks.perceptual[rows], distance):
            yield from (_mixed(stretch, captions[rows, band]) for band in range(BANDS))


def _mixed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Two keys (n,) as one; unequal ones rarely meet, and are measured then."""
    with np.errstate(over="ignore"):
        return (first * np.uint64(0x9E3779B97F4A7C15)) ^ (second * np.uint64(0xC2B2AE3D27D4EB4F))


def _near(
    marks: Marks, left: np.ndarray, right: np.ndarray, mode: NearMode, distance: int, caption_similarity: float
) -> np.ndarray:
    near = marks.sample[left] != marks.sample[right]
    if mode in ("both", "image"):
        near &= hamming(marks.perceptual, left, right) <= distance
    if mode in ("both", "caption"):
        rows = np.flatnonzero(near)
        near[rows] = similarity(marks.signature, left[rows], right[rows]) >= caption_similarity
    return near
