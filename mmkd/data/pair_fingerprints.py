"""What a pair held when it was looked at: four bytes that tell whether its caption or its image has changed since.

Features are found by the id of a pair. A caption that is rewritten under the same id, or a manifest that deals the ids
out anew, would train on targets that belong to something else, and nothing would look wrong. A feature store therefore
keeps, for each of its rows, a checksum of the caption and one of the image: of the SHA-256 that the manifest states
or, where it states none, of the file's name without its folder. 0 stands for unknown; checksums of the two kinds of
image differ in their lowest bit and are not compared. A single change goes unnoticed once in 65,536 times (an image's
once in 32,768), one of several pairs practically never; and the store stays small.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mmkd.data.feature_ids import FINGERPRINT
from mmkd.data.pair import Pair
from mmkd.data.pair_table import in_columns

SHOWN = 5


def fingerprints(captions: Iterable[str], hashes: Iterable[str], images: Iterable[str]) -> np.ndarray:
    """Fingerprints of n pairs.

    Args:
        captions: of each pair.
        hashes: SHA-256 of each image as the manifest states it, empty where it does not.
        images: path of each image.

    Returns:
        (n,) of `FINGERPRINT`.
    """
    crc = zlib.crc32
    texts = [crc(caption.encode("utf-8", "surrogatepass")) & 0xFFFF or 1 for caption in captions]
    files = [
        crc(stated.encode()) & 0xFFFF | 1 if stated else crc(_name(image)) & 0xFFFE or 2
        for stated, image in zip(hashes, images, strict=True)
    ]
    found = np.empty(len(texts), dtype=FINGERPRINT)
    found["caption"], found["image"] = texts, files
    return found


def fingerprints_of(pairs: Sequence[Pair]) -> np.ndarray:
    """Fingerprints of all pairs, (n,)."""
    parts = [np.zeros(0, dtype=FINGERPRINT), *(part for _, part in fingerprinted(pairs))]
    return np.concatenate(parts)


def fingerprinted(pairs: Sequence[Pair]) -> Iterator[tuple[list[str], np.ndarray]]:
    """Ids and fingerprints of all pairs, some thousands at a time; of a table only four columns are read."""
    for ids, *rest in in_columns(pairs, ("id", "caption", "sha256", "image")):
        yield ids, fingerprints(*rest)


def changes(before: np.ndarray, now: np.ndarray) -> dict[str, np.ndarray]:
    """Which of n captions and images are known to differ, (n,) bool each.

    Args:
        before: (n,) of `FINGERPRINT`.
        now: the same of the same pairs, later.
    """
    known = (before["image"] != 0) & (now["image"] != 0) & ((before["image"] ^ now["image"]) & 1 == 0)
    return {
        "captions": (before["caption"] != now["caption"]) & (before["caption"] != 0) & (now["caption"] != 0),
        "images": known & (before["image"] != now["image"]),
    }


def told(found: dict[str, np.ndarray], ids: Sequence[str], rows: np.ndarray) -> str:
    """How many captions and images differ, and the first of their pairs, for an error.

    Args:
        found: from `changes`.
        ids: of the n pairs.
        rows: those of the n that differ in anything.
    """
    counts = " and ".join(f"{int(wrong.sum())} {what}" for what, wrong in found.items() if wrong.any())
    first = ", ".join(ids[row] for row in rows[:SHOWN].tolist())
    return f"{counts} of {len(ids)} pairs differ, first {first}"


def _name(image: str) -> bytes:
    return image.rpartition("/")[2].encode("utf-8", "surrogatepass")
