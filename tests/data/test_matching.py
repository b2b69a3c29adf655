"""Features say which captions and images they are of, so that a change under the same id is noticed."""

import dataclasses
import logging

import numpy as np
import pytest
import torch

from mmkd.data.features.index import changes, fingerprinted, fingerprints_of
from mmkd.data.features.lookup import TeacherFeatures, seen_pairs
from mmkd.data.features.store import FeatureStore
from mmkd.data.features.writer import FeatureWriter, merge
from mmkd.data.table import Pair

PAIRS = [Pair(f"p{k}", f"images/{k}.png", f"caption {k}", sha256=f"{k:064x}" if k % 2 else "") for k in range(20)]


def write(folder, pairs, name="plip", known=True):
    writer = FeatureWriter(folder / name, name)
    ones = torch.ones(len(pairs), 4)
    writer.add([pair.id for pair in pairs], ones, ones, fingerprints_of(pairs) if known else None)
    writer.finish({})
    return folder / name


def changed(rows, **more):
    return [dataclasses.replace(pair, **more) if k in rows else pair for k, pair in enumerate(PAIRS)]


def test_pairs_as_they_were_are_seen(tmp_path):
    write(tmp_path, PAIRS[:15])
    features = TeacherFeatures.open(tmp_path)
    moved = [dataclasses.replace(pair, image=f"elsewhere/{pair.image}", label="new") for pair in reversed(PAIRS)]
    assert seen_pairs(features, moved, tmp_path).tolist() == [False] * 5 + [True] * 15


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (changed({3, 8}, caption="another"), "plip: 2 captions; first p3, p8"),
        (changed({4}, image="images/5.png"), "plip: 1 images; first p4"),
        (changed({5, 7}, sha256="0" * 64), "plip: 2 images; first p5, p7"),
        ([dataclasses.replace(p, id=f"p{k}") for k, p in enumerate(PAIRS[1:])], "plip: 19 captions"),
    ],
)
def test_a_change_under_the_same_id_is_refused_with_number_and_ids(tmp_path, now, told):
    write(tmp_path, PAIRS)
    with pytest.raises(ValueError, match=r"Extract \(and align\) again.*new ids") as refused:
        seen_pairs(TeacherFeatures.open(tmp_path), now, tmp_path)
    assert told in str(refused.value)


def test_a_hash_that_is_stated_only_now_is_no_change(tmp_path):
    write(tmp_path, PAIRS)
    assert seen_pairs(TeacherFeatures.open(tmp_path), changed({2}, sha256="1" * 64), tmp_path).all()


def test_stores_without_fingerprints_are_taken_with_a_warning(tmp_path, caplog):
    write(tmp_path, PAIRS, known=False)
    with caplog.at_level(logging.WARNING):
        assert seen_pairs(TeacherFeatures.open(tmp_path), changed({1}, caption="new"), tmp_path).all()
    assert "the features of plip have no fingerprints of their captions and images" in caplog.text


def test_merging_keeps_fingerprints_and_what_is_unknown_stays_so(tmp_path):
    write(tmp_path / "one", PAIRS[:12])
    write(tmp_path / "two", PAIRS[8:], known=False)
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    store = FeatureStore(tmp_path / "both" / "plip")
    found = store.fingerprints(np.arange(20))
    assert np.array_equal(found[:12], fingerprints_of(PAIRS)[:12])
    assert not found[12:]["caption"].any()
    with pytest.raises(ValueError, match="plip: 1 captions; first p9"):
        seen_pairs(TeacherFeatures.open(tmp_path / "both"), changed({9, 15}, caption="new"), tmp_path)


def test_columns_of_a_table_give_the_fingerprints_of_its_pairs(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from mmkd.data.table import PairTable

    columns = {field.name: [getattr(pair, field.name) for pair in PAIRS] for field in dataclasses.fields(Pair)}
    table = pa.table(columns | {"teachers": pa.array(columns["teachers"], pa.list_(pa.string()))})
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    rows = np.array([7, 2, 19])
    chosen = PairTable(tmp_path / "x.arrow").take(rows)
    (found,) = fingerprinted(chosen)
    assert found[0] == ["p7", "p2", "p19"]
    assert np.array_equal(found[1], fingerprints_of(PAIRS)[rows])


def test_odd_text_has_a_fingerprint():
    pairs = [Pair("a", "", ""), Pair("b", "\udc80.png", "half a character \ud800")]
    found = fingerprints_of(pairs)
    assert (found["caption"] != 0).all() and (found["image"] != 0).all()
    assert not any(wrong.any() for wrong in changes(found, found).values())
