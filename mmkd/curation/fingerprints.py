"""Fixed-width marks of a pair by which equal and nearly equal ones are found without holding the pairs.

Exact: the first half of the SHA-256 of the original file. Near: ImageHash's 64-bit perceptual hash, and 64 MinHash
values of the caption's three-word shingles (datasketch), of which 16 bits each are kept: four of them read as one
integer are a band, so that a row of 128 bytes is 16 ready-made keys for locality-sensitive hashing.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from typing import Any

import numpy as np

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
    return bit_counts(hashes[left] ^ hashes[right])


def bit_counts(values: np.ndarray) -> np.ndarray:
    """Set bits (m,) of values (m,) uint64."""
    words = np.ascontiguousarray(values).view("<u2").reshape(-1, 4)
    return np.asarray(_bit_table()[words].sum(axis=1, dtype=np.int64))


@cache
def _bit_table() -> np.ndarray:
    counts = np.zeros(1 << 16, dtype=np.uint8)
    for bit in range(16):
        counts += (np.arange(1 << 16) >> bit & 1).astype(np.uint8)
    return counts


@cache
def _empty() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, seed=1)
