"""Find equal and near-duplicate pairs among millions, independent of their order, with fingerprints mapped from files.

Exact: of equal SHA-256 sums one stays. Near: candidate pairs share a range of bits, found by sorting one key array at a
time; each candidate is then measured. With distance d, two hashes of 64 bits that differ in at most d bits are equal in
one of d + 1 ranges, so that none is missed. Captions are compared by 64 MinHash values of their three-word shingles
(datasketch), of which 16 bits each are kept: four of them read as one integer are a band, so that a row of 128 bytes is
16 ready-made keys for locality-sensitive hashing; near captions share one band, which finds 99.98 % of those of
similarity 0.8. In a bucket of many alike every pair is compared with the thousand that follow it.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from mmkd.curation.rules import NearMode

MOST_COMPARED = 1000
CHUNK = 1 << 20


@dataclass(frozen=True)
class Fingerprints:
    """Fixed-width fingerprints of n pairs in their order.

    Attributes:
        sample: (n,) int64, the same for captions of one image's panels.
        digest: (n, 2) uint64, the first half of the SHA-256 of the image file.
        perceptual: (n,) uint64, ImageHash's 64-bit perceptual hash.
        signature: (n, 64) uint16, of the caption, see `caption_signature`.
        key: (n,) int64, hash of the source's key.
        stated: (n,) int8, the split that the source states: 0 none, 1 train, 2 validation, 3 test.
    """

    sample: np.ndarray
    digest: np.ndarray
    perceptual: np.ndarray
    signature: np.ndarray
    key: np.ndarray
    stated: np.ndarray


def first_of_equals(keys: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The row that stays for each of n rows with equal keys, (n,) or (n, k): the one of lowest rank, then the first."""
    rows = keys[:, None] if keys.ndim == 1 else keys
    order = np.lexsort((ranks, *rows.T[::-1]))
    ordered = rows[order]
    new = np.ones(len(keys), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(keys), dtype=np.int64)
    first[order] = order[new][np.cumsum(new) - 1]  # lexsort is stable: the first of equals came first
    return first


def near_components(
    prints: Fingerprints, rows: np.ndarray, mode: NearMode, distance: int, caption_similarity: float
) -> np.ndarray:
    """The connected component of each of m pairs, (m,); near-duplicates are connected.

    Args:
        prints: of n pairs.
        rows: (m,) the pairs to compare, ascending.
        mode: what must be near: both, image or caption; off connects none.
        distance: bits in which perceptual hashes of near images may differ.
        caption_similarity: from which captions are near.
    """
    count = len(rows)
    if mode == "off" or count < 2:
        return np.arange(count)
    edges: list[np.ndarray] = [np.zeros((2, 0), dtype=np.int32)]
    for keys in _keys(prints, rows, mode, distance):
        for left, right in candidates(keys):
            near = _near(prints, rows[left], rows[right], mode, distance, caption_similarity)
            edges.append(np.stack([left[near], right[near]]).astype(np.int32))
    return components(np.concatenate(edges, axis=1), count)


def components(edges: np.ndarray, count: int) -> np.ndarray:
    """The connected component of each of ``count`` nodes, (count,), which edges (2, m) connect."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(edges.shape[1], dtype=np.int8), tuple(edges)), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1])


def candidates(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows (left < right) of equal keys (n,), in chunks; each row with at most the next thousand."""
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


def bit_ranges(hashes: np.ndarray, distance: int, together: int = 1) -> Iterator[np.ndarray]:
    """Keys (n,) of 64-bit hashes (n,), of which two that differ in at most ``distance`` bits share one.

    Of ``distance + together`` ranges of bits, at least ``together`` are equal; each choice of so many is a key. One
    gives the fewest keys, two give keys of more bits and thus few candidates among millions.
    """
    edges = np.linspace(0, HASH_BITS, distance + together + 1).round().astype(int).tolist()
    for ranges in itertools.combinations(itertools.pairwise(edges), together):
        yield hashes & np.uint64(sum((1 << high) - (1 << low) for low, high in ranges))


def _keys(prints: Fingerprints, rows: np.ndarray, mode: NearMode, distance: int) -> Iterator[np.ndarray]:
    """Arrays of keys (m,), one at a time; near-duplicates have an equal key in one of them."""
    captions = bands(prints.signature)
    if mode == "caption":
        yield from (captions[rows, band] for band in range(BANDS))
    elif mode == "image":
        yield from bit_ranges(prints.perceptual[rows], distance, together=2)
    else:
        for bits in bit_ranges(prints.perceptual[rows], distance):
            yield from (_mixed(bits, captions[rows, band]) for band in range(BANDS))


def _mixed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Combine two keys (n,) into one; collisions are rare, and are resolved by measuring the distance."""
    with np.errstate(over="ignore"):
        return (first * np.uint64(0x9E3779B97F4A7C15)) ^ (second * np.uint64(0xC2B2AE3D27D4EB4F))


def _near(
    prints: Fingerprints, left: np.ndarray, right: np.ndarray, mode: NearMode, distance: int, caption_similarity: float
) -> np.ndarray:
    near = prints.sample[left] != prints.sample[right]
    if mode in ("both", "image"):
        near &= hamming(prints.perceptual, left, right) <= distance
    if mode in ("both", "caption"):
        rows = np.flatnonzero(near)
        near[rows] = similarity(prints.signature, left[rows], right[rows]) >= caption_similarity
    return near


PERMUTATIONS, BANDS = 64, 16
HASH_BITS = 64
SHINGLE_WORDS = 3
WORD = re.compile(r"\w+")
SIGNATURE_BYTES = 2 * PERMUTATIONS


def caption_signature(caption: str) -> bytes:
    """64 MinHash values of 16 bits (little-endian); the share of equal ones estimates the Jaccard similarity."""
    words = WORD.findall(caption.lower())
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    shingles = [" ".join(words[start : start + SHINGLE_WORDS]).encode() for start in range(last)]
    minhash = _empty().copy()
    minhash.update_batch(shingles)
    return np.asarray(minhash.hashvalues).astype("<u2").tobytes()  # the low 16 bits


def short_hash(text: str) -> int:
    """63 bits of the SHA-256 of a text."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def bands(signatures: np.ndarray) -> np.ndarray:
    """Signatures (n, 64) uint16 as keys (n, 16) uint64."""
    return signatures.view("<u8")


def similarity(signatures: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity (m,) of rows ``left`` and ``right`` of signatures (n, 64)."""
    return (signatures[left] == signatures[right]).mean(axis=1)


def hamming(hashes: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Differing bits (m,) between rows ``left`` and ``right`` of hashes (n,) uint64."""
    return np.bitwise_count(hashes[left] ^ hashes[right])


@cache
def _empty() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, seed=1)
