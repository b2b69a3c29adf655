"""Decisions over all parts: which pairs stay, in which split, and how labels and modalities are spelt.

Only fixed-width fingerprints are kept for all pairs, in files; memory holds some numbers of eight bytes a pair, while
one key at a time is sorted. In this order: pairs in a test set go, then repeated images (the held-out copy stays, else
the first) and repeated keys, then near duplicates, then what is over ``max_pairs``. Groups without a split are assigned
by hash; groups with near images are assigned together, so that no near images are on both sides of a split. Where the
source itself states such splits they are followed, but a training image that looks the same as a held-out one (equal
perceptual hash) goes.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmkd.curation.contamination import Exclusions, find_in_test_sets
from mmkd.curation.duplicates import PERMUTATIONS, Fingerprints, components, first_of_equals, near_components
from mmkd.curation.part import STATED
from mmkd.curation.rules import Rules
from mmkd.data.splits import assign_splits, subsample
from mmkd.data.table import ROWS_TOGETHER, SPLITS, map_table

if TYPE_CHECKING:
    import pyarrow as pa

REASONS = (
    "in_test_set_image", "in_test_set_near_image", "in_test_set_article", "duplicate", "duplicate_across_splits",
    "duplicate_key", "near_duplicate", "near_duplicate_across_splits", "over_max_pairs",
)  # fmt: skip


@dataclass(frozen=True)
class Decisions:
    """The decision for each of n pairs.

    Attributes:
        reasons: (n,) int8, 0 for pairs that stay, else 1 + the position in `REASONS`.
        splits: (n,) int8, the position in `SPLITS` for pairs that stay.
        spellings: for label and modality the values that are written in another spelling.
        found_in: row -> reason and name of the test set it is in.
        bounds: (parts + 1,) the rows of each part.
        split_counts: how many rows got their split in which way.
    """

    reasons: np.ndarray
    splits: np.ndarray
    spellings: dict[str, dict[str, str]]
    found_in: dict[int, tuple[str, str]]
    bounds: np.ndarray
    split_counts: dict[str, int]

    def kept(self, part: int) -> np.ndarray:
        """Which rows (m,) of a part stay."""
        return np.asarray(self.reasons[self.bounds[part] : self.bounds[part + 1]] == 0)

    def fingerprint(self) -> str:
        """A hash that is equal for equal decisions."""
        data = self.reasons.tobytes() + self.splits.tobytes() + repr(self.spellings).encode("utf-8", "surrogatepass")
        return hashlib.sha256(data).hexdigest()

    def counts(self) -> dict[str, int]:
        """Dropped pairs by reason."""
        numbers = np.bincount(self.reasons, minlength=len(REASONS) + 1)[1:]
        return {name: int(number) for name, number in zip(REASONS, numbers, strict=True) if number}


def decide(parts: Sequence[Path], rules: Rules, exclusions: Exclusions) -> Decisions:
    """Decide which pairs of all parts stay; of equal pairs the first in the order of the parts is kept."""
    import pyarrow as pa

    prints, bounds = read_fingerprints(parts)
    reasons = np.zeros(len(prints.sample), dtype=np.int8)
    found_in = find_in_test_sets(parts, prints, bounds, exclusions, rules.image_distance)
    for row, (reason, _) in found_in.items():
        reasons[row] = 1 + REASONS.index(reason)

    def drop(rows: np.ndarray, reason: str) -> None:
        reasons[rows] = 1 + REASONS.index(reason)

    held_out_first = len(STATED) - prints.stated
    for reason, keys in (("duplicate", prints.digest), ("duplicate_key", prints.key)):
        staying = np.flatnonzero(reasons == 0)
        first = staying[first_of_equals(keys[staying], held_out_first[staying])]
        repeated = prints.sample[first] != prints.sample[staying]
        across = repeated & (prints.stated[first] != prints.stated[staying]) & (reason == "duplicate")
        drop(staying[repeated], reason)
        drop(staying[across], "duplicate_across_splits")
    staying = np.flatnonzero(reasons == 0)
    component = near_components(prints, staying, rules.near_duplicates, rules.image_distance, rules.caption_similarity)
    first = staying[first_of_equals(component, held_out_first[staying])]
    drop(staying[prints.sample[first] != prints.sample[staying]], "near_duplicate")
    spellings = merged_spellings(parts)
    texts = pa.concat_tables([map_table(part).select(["group", "key", "modality", "label"]) for part in parts])
    staying = np.flatnonzero(reasons == 0)
    if rules.max_pairs and len(staying) > rules.max_pairs:
        groups, classes = _groups_and_classes(texts, staying, spellings)
        strata = list(zip(prints.stated[staying].tolist(), classes, strict=True))
        chosen = np.zeros(len(staying), dtype=bool)
        chosen[subsample(strata, groups, rules.max_pairs, rules.seed)] = True
        drop(staying[~chosen], "over_max_pairs")
        staying = staying[chosen]
    splits = np.zeros(len(reasons), dtype=np.int8)
    splits[staying], split_counts = _assigned(prints, texts, staying, rules, spellings)
    first = staying[first_of_equals(prints.perceptual[staying], -splits[staying])]
    drop(staying[splits[first] != splits[staying]], "near_duplicate_across_splits")
    return Decisions(reasons, splits, spellings, found_in, bounds, split_counts)


def read_fingerprints(parts: Sequence[Path]) -> tuple[Fingerprints, np.ndarray]:
    """The concatenated fingerprints of all parts, mapped from files beside them, and the first row of each part.

    Returns:
        Of n pairs in all; (parts + 1,).
    """
    bounds = np.cumsum([0, *(map_table(part).num_rows for part in parts)])

    def column(name: str, kind: str, *shape: int) -> np.ndarray:
        if not bounds[-1]:
            return np.empty((0, *shape), kind)  # an empty file cannot be mapped
        place = parts[0].with_name(f"fingerprints.{name}.npy")
        return np.lib.format.open_memmap(place, "w+", kind, (int(bounds[-1]), *shape))

    prints = Fingerprints(
        sample=column("sample", "<i8"),
        digest=column("digest", "<u8", 2),
        perceptual=column("perceptual", "<u8"),
        signature=column("signature", "<u2", PERMUTATIONS),
        key=column("key", "<i8"),
        stated=column("stated", "i1"),
    )
    samples = 0
    for part, start, stop in zip(parts, bounds[:-1], bounds[1:], strict=True):
        table = map_table(part)
        local = table["sample"].to_numpy()
        prints.sample[start:stop] = local + samples
        samples += int(local.max(initial=0)) + 1
        halves = bytes.fromhex("".join(digest[:32] for digest in table["sha256"].to_pylist()))
        prints.digest[start:stop] = np.frombuffer(halves, "<u8").reshape(len(local), 2)
        prints.perceptual[start:stop] = table["perceptual"].to_numpy()
        raw = b"".join(table["signature"].to_pylist())
        prints.signature[start:stop] = np.frombuffer(raw, "<u2").reshape(len(local), PERMUTATIONS)
        prints.key[start:stop] = table["key_hash"].to_numpy()
        prints.stated[start:stop] = table["stated_split"].to_numpy()
    return prints, bounds


def merged_spellings(parts: Sequence[Path]) -> dict[str, dict[str, str]]:
    """Labels and modalities that differ from a more frequent one in case only, with that one."""
    import pyarrow.compute as pc

    merged: dict[str, dict[str, str]] = {}
    for column in ("label", "modality"):
        counts: Counter[str] = Counter()
        for part in parts:
            for entry in pc.value_counts(map_table(part)[column]).to_pylist():
                counts[entry["values"]] += entry["counts"]
        alike: dict[str, list[str]] = defaultdict(list)
        for value in sorted(counts, key=lambda value: (-counts[value], value)):
            alike[value.casefold()].append(value)
        merged[column] = {value: first for first, *others in alike.values() for value in others}
    return merged


def _assigned(
    prints: Fingerprints, texts: pa.Table, rows: np.ndarray, rules: Rules, spellings: dict[str, dict[str, str]]
) -> tuple[np.ndarray, dict[str, int]]:
    """The split of m pairs, (m,), and counts."""
    stated = prints.stated[rows]
    counts = {"stated": int((stated > 0).sum()), "groups_joined": 0, "near_images_across_splits": 0}
    if not stated.any() and not (rules.validation_share or rules.test_share):
        return np.zeros(len(rows), dtype=np.int8), counts | {"moved": 0, "assigned": len(rows), "filled": 0}
    groups, classes = _groups_and_classes(texts, rows, spellings)
    near = near_components(prints, rows, "image", rules.image_distance, rules.caption_similarity)
    joined, given = join_near_groups(groups, near, stated)
    counts["groups_joined"] = len(set(groups)) - len(set(joined))
    names, more = assign_splits(
        joined, [STATED[split] for split in given], classes, rules.seed, (rules.validation_share, rules.test_share)
    )
    splits = np.array([SPLITS.index(name) for name in names], dtype=np.int8)
    most = np.zeros(int(near.max(initial=0)) + 1, dtype=np.int8)
    np.maximum.at(most, near, splits)
    counts["near_images_across_splits"] = int((most[near] > splits).sum())
    return splits, counts | more


def join_near_groups(groups: list[str], near: np.ndarray, stated: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Join groups that share near-duplicate images, unless the source states different splits for them.

    Args:
        groups: the group of each of m rows.
        near: (m,) the set of near images to which each row belongs.
        stated: (m,) the split that the source states, 0 for none.

    Returns:
        For each row the group to assign, and (m,) its split; a group without one takes that of the near images.
    """
    numbers: dict[str, int] = {}
    codes = np.fromiter((numbers.setdefault(group, len(numbers)) for group in groups), np.int32, len(groups))
    count = int(codes.max(initial=-1)) + 1
    size = count + int(near.max(initial=-1)) + 1
    cluster = components(np.stack([codes, count + near]), size)[codes]
    highest = np.zeros(size, dtype=np.int8)
    np.maximum.at(highest, cluster, stated)
    lowest = np.full(size, len(STATED), dtype=np.int8)
    np.minimum.at(lowest, cluster[stated > 0], stated[stated > 0])
    of_group = np.zeros(count, dtype=np.int8)
    np.maximum.at(of_group, codes, stated)
    given = np.where(of_group[codes] == 0, highest[cluster], stated)
    first = np.full(size, len(codes))
    np.minimum.at(first, cluster, np.arange(len(codes)))
    named_by = np.where((lowest >= highest)[cluster], first[cluster], np.arange(len(codes)))
    return [groups[row] for row in named_by], given


def _groups_and_classes(
    texts: pa.Table, rows: np.ndarray, spellings: dict[str, dict[str, str]]
) -> tuple[list[str], list[tuple[str, str]]]:
    """The group of each row (its key if it has none), its modality and its label; rows (m,) ascending."""
    named: list[str] = []
    classes: list[tuple[str, str]] = []
    names: dict[str, str] = {}  # rows of a group share its name, and those of a class the class
    known: dict[tuple[str, str], tuple[str, str]] = {}
    for start in range(0, len(rows), ROWS_TOGETHER):
        some = rows[start : start + ROWS_TOGETHER]
        chosen = texts.slice(some[0], some[-1] + 1 - some[0]).take(some - some[0])
        columns = (chosen[name].to_pylist() for name in ("group", "key", "modality", "label"))
        for group, key, modality, label in zip(*columns, strict=True):
            name = f"group:{group}" if group else f"file:{key}"
            own = spellings["modality"].get(modality, modality), spellings["label"].get(label, label)
            named.append(names.setdefault(name, name))
            classes.append(known.setdefault(own, own))
    return named, classes
