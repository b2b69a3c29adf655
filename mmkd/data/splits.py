"""Train, validation and test splits of whole groups: the collection's own split, or by hash if it has none.

A group (patient, case, specimen) is never cut. Names such as ``dev`` or ``testing`` mean train, validation or test.
Groups without a split are assigned by the hash of the group, stratified by class: about 60 % train, 15 % validation and
25 % test of every stratum (modality and label). A collection that comes without train, test or validation gives groups
to the missing one from its largest, so that even six images in two groups can be trained on and tested.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

from mmkd.data.table import SPLITS, Pair

VALIDATION_SHARE, TEST_SHARE = 0.15, 0.25
FEWEST_GROUPS_FOR_VALIDATION = 4
MOST_SHARES = 4  # a group takes at most this part of a subsample

MEANINGS = {
    **dict.fromkeys(("train", "training", "trn", "tr"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "validate", "dev", "development"), "validation"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation", "holdout", "held-out"), "test"),
}


def meaning_of(name: str) -> str:
    """Train, validation or test for a usual name of a split; empty for any other."""
    return MEANINGS.get(name.strip().lower(), "")


def assign_splits(
    groups: Sequence[str],
    given: Sequence[str],
    strata: Sequence[Hashable],
    seed: int,
    shares: tuple[float, float] = (VALIDATION_SHARE, TEST_SHARE),
) -> tuple[list[str], dict[str, int]]:
    """One split for each of n rows, the same for all rows of a group.

    Args:
        groups: the group of each row; rows that belong together share one.
        given: train, validation or test for each row, or an empty string.
        strata: the stratum of each row; a group belongs to that of its first row.
        seed: of the order in which groups are assigned.
        shares: of the groups without a split that are held out for validation and test; a split of share 0 stays empty
            where the collection gives it no rows.

    Returns:
        The splits, and counts of rows that were ``moved`` (their group was given several splits, of which the most
        frequent is kept, of equals the held-out one), ``assigned`` (no split given) or ``filled`` (given to a split
        that was empty).
    """
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for group, split in zip(groups, given, strict=True):
        if split:
            votes[group][split] += 1
    chosen = dict.fromkeys(groups, "") | {group: _majority(counts) for group, counts in votes.items()}
    order = _in_turn(groups, strata, seed, none_late=False)
    undecided = [group for group in order if not chosen[group]]
    assigned = dict(zip(undecided, _by_shares(len(undecided), shares), strict=True))
    chosen |= assigned
    filled = _fill_empty(chosen, order, shares)
    splits = [chosen[group] for group in groups]
    counts = {
        "moved": sum(bool(old) and old != chosen[g] and g not in filled for g, old in zip(groups, given, strict=True)),
        "assigned": sum(group in assigned for group in groups),
        "filled": sum(group in filled for group in groups),
    }
    return splits, counts


def subsample(strata: Sequence[Hashable], groups: Sequence[str], maximum: int, seed: int) -> list[int]:
    """Choose at most ``maximum`` of n rows: whole groups, stratified, each stratum at least once if there is room.

    Of a group that alone would take more than a quarter of ``maximum`` a part is kept, evenly from its rows, so that a
    few huge groups (slides, volumes) leave room for each other.

    Args:
        strata: the stratum of each row, for example its modality and label; a group belongs to that of its first row.
        groups: the group of each row.
        maximum: most rows to keep.
        seed: of the choice.

    Returns:
        The chosen rows, ascending.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    most = max(1, maximum // min(MOST_SHARES, len(members)))
    kept: list[int] = []
    for group in _in_turn(groups, strata, seed, none_late=True):
        rows = members[group][:: math.ceil(len(members[group]) / most)]
        if len(kept) + len(rows) <= maximum:
            kept += rows
    return sorted(kept)


def spread(keys: Sequence[str], modalities: Sequence[str], count: int) -> list[int]:
    """Positions of up to ``count`` keys: modalities in turn, inside each by hash; results are not used."""
    by_modality: dict[str, list[int]] = defaultdict(list)
    for position in sorted(range(len(keys)), key=lambda k: hashlib.sha256(keys[k].encode()).hexdigest()):
        by_modality[modalities[position]].append(position)
    queues = [by_modality[modality] for modality in sorted(by_modality)]
    turns = [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
    return turns[:count]


def hashed(seed: int, key: str) -> str:
    """A reproducible random order: the hash of seed and key."""
    return hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogatepass")).hexdigest()


def _in_turn(groups: Sequence[str], strata: Sequence[Hashable], seed: int, none_late: bool) -> list[str]:
    """The distinct groups, those of each stratum spread evenly, by hash within it.

    With ``none_late`` every stratum begins at the front; else at a place by hash, so that strata of a single group come
    anywhere.
    """
    first = dict(zip(reversed(groups), reversed(strata), strict=True))
    by_stratum: dict[Hashable, list[str]] = defaultdict(list)
    by_hash = sorted(first, key=lambda group: bytes.fromhex(hashed(seed, group)))
    for group in by_hash:
        by_stratum[first[group]].append(group)
    places: dict[str, float] = {}
    for own in by_stratum.values():
        start = 0.0 if none_late else int(hashed(seed, f"start:{own[0]}")[:8], 16) / 16**8
        places |= {group: (rank + start) / len(own) for rank, group in enumerate(own)}
    return sorted(by_hash, key=places.__getitem__)  # stable: groups of one place stay in the order of their hashes


def _majority(counts: Counter[str]) -> str:
    """The most frequent split of a group, of equally frequent ones the held-out one."""
    return max(counts, key=lambda split: (counts[split], SPLITS.index(split)))


def _by_shares(n: int, shares: tuple[float, float]) -> list[str]:
    """Splits of n groups in hash order, with at least one training group."""
    test = max(1, round(shares[1] * n)) if shares[1] and n > 1 else 0
    validation = max(1, round(shares[0] * n)) if shares[0] and n >= FEWEST_GROUPS_FOR_VALIDATION else 0
    return ["train"] * (n - test - validation) + ["validation"] * validation + ["test"] * test


def _fill_empty(chosen: dict[str, str], order: list[str], shares: tuple[float, float]) -> set[str]:
    """Move groups of the largest split to an empty one; returns the moved groups."""
    filled: set[str] = set()
    for split, share in (("train", 1 - sum(shares)), ("test", shares[1]), ("validation", shares[0])):
        sizes = Counter(chosen.values())
        largest = max(SPLITS, key=lambda name: sizes[name])
        needed = FEWEST_GROUPS_FOR_VALIDATION if split == "validation" else 2
        if sizes[split] or sizes[largest] < needed or not share:
            continue
        given = [group for group in order if chosen[group] == largest][-max(1, round(share * sizes[largest])) :]
        chosen.update(dict.fromkeys(given, split))
        filled.update(given)
    return filled


FEWEST_PAIRS = 8


def partition(pairs: Sequence[Pair], count: int) -> dict[str, dict[str, Any]]:
    """Divide training pairs among ``count`` specialists: by modality, else by group.

    Labels are never divided: a specialist that sees one class does not learn to distinguish it from others.

    Args:
        pairs: the training pairs.
        count: how many specialists to name.

    Returns:
        For each specialist's name the settings that select its pairs (``modalities`` or ``part``); settings
        are empty, so that every specialist sees every pair and only seeds differ, when a share would fall below eight.

    Raises:
        ValueError: fewer than one specialist, or no pairs.
    """
    if count < 1 or not pairs:
        raise ValueError(f"cannot divide {len(pairs)} training pairs among {count} specialists")
    shares = _balanced(Counter(pair.modality for pair in pairs if pair.modality), count)
    if len(shares) == count and min(share.total() for share in shares) >= FEWEST_PAIRS:
        return _named({_name(share): {"modalities": sorted(share)} for share in shares}, count)
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
    return slug("-".join(value for value, _ in share.most_common(2))) or "specialist"


def slug(name: str) -> str:
    """A name as part of a file name: letters and digits, the rest hyphens, cut at 40 characters."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())[:40]
