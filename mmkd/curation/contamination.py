"""Training pairs compared with test sets: the same image, nearly the same image, or the same article."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmkd.curation.duplicates import Marks, stretches
from mmkd.curation.exclusions import Exclusions
from mmkd.curation.fingerprints import bit_counts
from mmkd.data.pair_table import map_table


def find_in_test_sets(
    parts: Sequence[Path], marks: Marks, bounds: np.ndarray, exclusions: Exclusions, distance: int
) -> dict[int, tuple[str, str]]:
    """Which pairs are in a test set.

    Args:
        parts: Arrow files of the parts.
        marks: of the n pairs of all parts.
        bounds: (parts + 1,) the rows of each part.
        exclusions: the test sets.
        distance: bits of 64 in which perceptual hashes of near images may differ.

    Returns:
        row -> (reason, name of the test set); an equal image goes before its article, and that before a near image.
    """
    found: dict[int, tuple[str, str]] = {}
    if not exclusions.report:
        return found
    for number, part in enumerate(parts):
        table = map_table(part)
        for column, names, reason in (
            ("sha256", exclusions.digests, "in_test_set_image"),
            ("article", exclusions.articles, "in_test_set_article"),
        ):
            for row, value in enumerate(table[column].to_pylist() if names else ()):
                if value in names:
                    found.setdefault(int(bounds[number]) + row, (reason, names[value]))
    nearest = near_test_image(marks.perceptual, exclusions.hashes, distance)
    for row in np.flatnonzero(nearest >= 0).tolist():
        found.setdefault(row, ("in_test_set_near_image", exclusions.hash_sets[nearest[row]]))
    return found


def near_test_image(hashes: np.ndarray, tests: np.ndarray, distance: int) -> np.ndarray:
    """For each of n hashes the first of m test hashes within ``distance`` bits, -1 for none."""
    nearest = np.full(len(hashes), -1)
    if not len(tests):
        return nearest
    unique, where = np.unique(hashes, return_inverse=True)
    found = np.full(len(unique), -1)
    for keys, test_keys in zip(stretches(unique, distance), stretches(tests, distance), strict=True):
        order = np.argsort(test_keys, kind="stable")
        first = np.searchsorted(test_keys[order], keys, "left")
        last = np.searchsorted(test_keys[order], keys, "right")
        for step in range(int((last - first).max(initial=0))):
            rows = np.flatnonzero((first + step < last) & (found < 0))
            images = order[first[rows] + step]
            near = bit_counts(unique[rows] ^ tests[images]) <= distance
            found[rows[near]] = images[near]
    return np.asarray(found[where])
