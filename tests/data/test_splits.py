"""Splits: whole groups, given names first, none missing where it can be helped."""

import time
from collections import Counter

import pytest

from mmkd.data.splits import assign_splits, meaning_of, subsample


def test_names_in_use():
    assert [meaning_of(name) for name in ("Training", "dev", " VAL ", "valid", "testing", "holdout", "fold3", "")] == [
        "train", "validation", "validation", "validation", "test", "test", "", "",
    ]  # fmt: skip


def test_large_collections_come_near_the_shares():
    groups = [str(number // 2) for number in range(2000)]
    splits, counts = assign_splits(groups, [""] * 2000, ["x"] * 2000, seed=1)
    sizes = Counter(splits)
    assert (sizes["train"], sizes["validation"], sizes["test"]) == (1200, 300, 500)
    assert counts == {"moved": 0, "assigned": 2000, "filled": 0}
    assert all(splits[2 * pair] == splits[2 * pair + 1] for pair in range(1000))
    assert assign_splits(groups, [""] * 2000, ["x"] * 2000, seed=1)[0] == splits
    assert assign_splits(groups, [""] * 2000, ["x"] * 2000, seed=2)[0] != splits
    order = list(range(1999, -1, -1))
    backwards, _ = assign_splits([groups[row] for row in order], [""] * 2000, ["x"] * 2000, seed=1)
    assert backwards[::-1] == splits


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("groups", [["a", "b"], ["a"] * 5 + ["b"], list("abc"), list("abcdef")])
def test_tiny_collections_can_be_trained_on_and_tested(groups, seed):
    splits, _ = assign_splits(groups, [""] * len(groups), ["x"] * len(groups), seed)
    assert {"train", "test"} <= set(splits)
    assert ("validation" in splits) == (len(set(groups)) >= 4)


@pytest.mark.parametrize("seed", range(20))
def test_every_class_is_dealt_out_in_its_share(seed):
    labels = ["common"] * 400 + ["rare"] * 8 + ["single"]
    splits, _ = assign_splits([str(number) for number in range(409)], [""] * 409, labels, seed)
    assert Counter(zip(labels, splits, strict=True))["rare", "test"] in (1, 2, 3)
    assert 98 <= Counter(zip(labels, splits, strict=True))["common", "test"] <= 103
    six = ["a", "a", "b", "c", "c", "d"]
    splits, _ = assign_splits(list("abcdef"), [""] * 6, six, seed)
    assert len({label for label, split in zip(six, splits, strict=True) if split == "test"}) == 2


def test_classes_of_one_group_are_tested_as_often_as_others():
    labels = ["a"] * 10 + [f"single {number}" for number in range(10)]
    tested = Counter()
    for seed in range(40):
        splits, _ = assign_splits([str(number) for number in range(20)], [""] * 20, labels, seed)
        tested[sum(split == "test" for split in splits[10:])] += 1
    assert 2.0 <= sum(count * times for count, times in tested.items()) / 40 <= 3.0


def test_one_group_is_trained_on():
    assert assign_splits(["a", "a"], ["", ""], ["x", "x"], 0)[0] == ["train", "train"]
    assert assign_splits(["a"], ["test"], ["x"], 0)[0] == ["test"]


def test_given_splits_are_kept_and_missing_ones_filled():
    groups = [str(number) for number in range(20)]
    splits, counts = assign_splits(groups, ["train"] * 12 + ["test"] * 8, ["x"] * 20, 0)
    assert splits[12:] == ["test"] * 8
    assert Counter(splits)["validation"] == counts["filled"] == 2
    splits, counts = assign_splits(groups, ["train"] * 20, ["x"] * 20, 0)
    assert Counter(splits) == {"train": 13, "test": 5, "validation": 2}
    splits, counts = assign_splits(groups, ["test"] * 20, ["x"] * 20, 0)
    assert Counter(splits)["train"] == 10
    assert set(splits) == {"train", "validation", "test"}
    assert counts["moved"] == 0


def test_a_group_in_several_splits_is_forced_into_one():
    groups = ["a", "a", "a", "b", "b", "c", "d", "e", "e"]
    given = ["train", "train", "test", "train", "test", "validation", "train", "", "test"]
    splits, counts = assign_splits(groups, given, ["x"] * 9, 0)
    assert splits == ["train", "train", "train", "test", "test", "validation", "train", "test", "test"]
    assert counts == {"moved": 2, "assigned": 0, "filled": 0}


def test_subsample_is_proportional_and_forgets_no_stratum():
    strata = ["common"] * 900 + ["rare"] * 90 + ["single"]
    groups = [str(number) for number in range(991)]
    chosen = subsample(strata, groups, 100, seed=0)
    sizes = Counter(strata[row] for row in chosen)
    assert len(chosen) == 100
    assert sizes["single"] == 1
    assert 8 <= sizes["rare"] <= 11
    assert chosen == subsample(strata, groups, 100, seed=0) == sorted(chosen)
    assert chosen != subsample(strata, groups, 100, seed=1)


def test_subsample_keeps_groups_whole():
    groups = [str(number // 7) for number in range(140)]
    chosen = subsample(["x"] * 140, groups, 50, seed=0)
    assert len(chosen) == 49
    assert set(Counter(groups[row] for row in chosen).values()) == {7}


def test_subsample_takes_a_part_of_huge_groups():
    groups = [f"slide {number // 1000}" for number in range(3000)]
    chosen = subsample(["x"] * 3000, groups, 600, seed=0)
    assert Counter(groups[row] for row in chosen) == {"slide 0": 200, "slide 1": 200, "slide 2": 200}
    assert max(chosen) > 2990


def test_many_groups_take_no_longer_than_they_are_many():
    began = time.perf_counter()
    assign_splits([str(number) for number in range(30_000)], [""] * 30_000, ["x"] * 30_000, 0)
    assert time.perf_counter() - began < 5
