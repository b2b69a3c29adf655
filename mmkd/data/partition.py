"""Who sees what: the training pairs shared out among specialists, each with its own modalities.

Where there are too few modalities the labels are shared out, and where there are too few labels the groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mmkd.data.records import Pair

FEWEST_PAIRS = 8


def partition(pairs: Sequence[Pair], count: int) -> dict[str, dict[str, Any]]:
    """Share training pairs out among ``count`` specialists.

    Args:
        pairs: the training pairs.
        count: how many specialists to name.

    Returns:
        For each specialist's name the settings that select its pairs (``modalities``, ``labels`` or ``part``); settings
        are empty, so that every specialist sees every pair and only seeds differ, when a share would fall below eight.

    Raises:
        ValueError: fewer than one specialist, or no pairs.
    """
    if count < 1 or not pairs:
        raise ValueError(f"cannot share {len(pairs)} training pairs out among {count} specialists")
    for field, values in (("modalities", [p.modality for p in pairs]), ("labels", [p.label for p in pairs])):
        shares = _balanced(Counter(value for value in values if value), count)
        if len(shares) == count and min(sum(share.values()) for share in shares) >= FEWEST_PAIRS:
            return _named({_name(share): {field: sorted(share)} for share in shares}, count)
    if len(pairs) >= 2 * FEWEST_PAIRS * count and len({p.group or p.id for p in pairs}) >= 2 * count:
        return {f"specialist-{k}": {"part": f"{k}/{count}"} for k in range(1, count + 1)}
    return {f"specialist-{k}": {} for k in range(1, count + 1)}


def _balanced(sizes: Counter[str], count: int) -> list[Counter[str]]:
    """Largest value first into the smallest share."""
    shares: list[Counter[str]] = [Counter() for _ in range(min(count, len(sizes)))]
    for value, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        min(shares, key=lambda share: sum(share.values()))[value] = size
    return shares


def _named(shares: dict[str, dict[str, Any]], count: int) -> dict[str, dict[str, Any]]:
    if len(shares) == count:
        return shares
    return {f"specialist-{k}": share for k, share in enumerate(shares.values(), start=1)}


def _name(share: Counter[str]) -> str:
    """A folder name from the two largest values of a share."""
    largest = [value for value, _ in share.most_common(2)]
    words = "-".join(largest).lower()
    return "-".join("".join(c if c.isalnum() else " " for c in words).split())[:40] or "specialist"
