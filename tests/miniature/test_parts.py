"""Who sees which groups, and captions made wrong: disjoint, seeded, recorded, and as many as asked for."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from mmkd.data.table import Pair
from mmkd.miniature.data import COLLECTIONS, COLUMNS, PARTS, SHARES, VAGUE, deal, with_noise, write_table


def pairs(count=400):
    return [
        Pair(f"p{k}", f"{k}.png", f"caption {k % 90}", label="ab"[k % 2], source="xy"[k % 3 == 0], group=f"g{k // 2}")
        for k in range(count)
    ]


def test_groups_are_never_cut_and_shares_hold():
    dealt = deal(pairs(), 1)
    groups = {part: {pair.group for pair in own} for part, own in dealt.items()}
    assert sum(len(own) for own in dealt.values()) == 400
    assert all(not groups[a] & groups[b] for a in PARTS for b in PARTS if a < b)
    for part, share in SHARES.items():
        assert len(dealt[part]) / 400 == pytest.approx(share, abs=0.03)
        assert {pair.label for pair in dealt[part]} == {"a", "b"}
    assert deal(pairs(), 1) == dealt and deal(pairs(), 2) != dealt


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_captions_are_wrong_or_vague_as_often_as_asked(share):
    clean = pairs()
    noisy, kinds = with_noise(clean, share, 3)
    changed = [k for k in range(400) if noisy[k].caption != clean[k].caption]
    assert len(changed) == len(kinds) == round(share * 400)
    counts = Counter(kinds.values())
    assert abs(counts["wrong"] - counts["vague"]) <= 1
    for k in changed:
        assert (noisy[k].caption in VAGUE) == (kinds[f"p{k}"] == "vague")
    assert with_noise(clean, share, 3)[0] == noisy


def test_more_noise_keeps_what_less_replaced():
    _, few = with_noise(pairs(), 0.2, 3)
    _, many = with_noise(pairs(), 0.4, 3)
    assert few.items() <= many.items()


def test_the_table_of_real_collections(shared_data: Path, tmp_path):
    found = write_table(shared_data, tmp_path / "table.csv")
    assert set(found) == set(COLLECTIONS)
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and all(row["modality"] for row in rows)
    assert sum(not row["caption"] for row in rows) < 5  # without notes or facts: curation says the modality
    assert not any("{" in row["caption"] for row in rows)
    templated = [row for row in rows if row["source"] == "ham10000"]
    assert all(row["label"].lower() in row["caption"].lower() for row in templated)
    medpix = {row["file"].rpartition("_")[2]: row["group"] for row in rows if row["source"] == "medpix2"}
    shared = [row for row in rows if row["source"] == "vqa_rad" and Path(row["file"]).name in medpix]
    assert shared and all(row["group"] == medpix[Path(row["file"]).name] for row in shared)


def test_a_folder_without_collections_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="at least two of medpix2"):
        write_table(tmp_path, tmp_path / "table.csv")
