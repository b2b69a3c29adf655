"""The index of ids: exact, read from disk, and never wrong about an id it does not hold."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from mmkd.data.features import index
from mmkd.data.features.index import DIGEST, LISTED_TOGETHER, IdIndex, Ids, digests, refuse_repeated
from mmkd.data.features.shards import write_shard
from mmkd.data.features.store import VectorStore

ODD = ["", "a\0b", "a\n", "肺-7", "🫁", "é", "x" * 70_000, " a", "a", "A"]


def store(folder, ids, chunk=1000):
    folder.mkdir(exist_ok=True)
    files = []
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        files.append(folder / f"shard-{start}.safetensors")
        write_shard(files[-1], part, {"row": torch.arange(start, start + len(part))})
    return VectorStore(files)


def test_every_id_is_found_at_its_row_and_no_other(tmp_path):
    ids = [f"pair-{k}" for k in range(2 * LISTED_TOGETHER + 5)] + ODD
    found = store(tmp_path, ids)
    order = np.random.default_rng(0).permutation(len(ids))
    rows = found.rows([ids[k] for k in order])
    assert np.array_equal(rows, order) and np.array_equal(found.gather("row", rows), order)
    assert found.rows(["nobody", "pair-0 ", "pair-00"]).tolist() == [-1, -1, -1]
    assert found.rows([]).shape == (0,)


def test_ids_are_a_sequence_on_disk(tmp_path):
    ids = [f"pair-{k}" for k in range(LISTED_TOGETHER - 3)] + ODD + [f"more-{k}" for k in range(LISTED_TOGETHER)]
    found = store(tmp_path, ids).ids
    assert list(found) == ids and len(found) == len(ids)
    assert found[LISTED_TOGETHER - 5 : LISTED_TOGETHER + 9] == ids[LISTED_TOGETHER - 5 : LISTED_TOGETHER + 9]
    assert found[::-997] == ids[::-997]
    assert (found[0], found[LISTED_TOGETHER], found[-1]) == (ids[0], ids[LISTED_TOGETHER], ids[-1])
    with pytest.raises(IndexError, match="row 99999"):
        found[99999]


def test_an_index_made_in_pieces_is_the_same(tmp_path, monkeypatch):
    ids = [f"pair-{k}" for k in range(1000)]
    expected = IdIndex.of(digests(ids)).save(tmp_path)
    monkeypatch.setattr(index, "COMPARED_TOGETHER", 64)
    monkeypatch.setattr(index, "SORTED_TOGETHER", 100)
    assert IdIndex.of_many(ids, tmp_path).save(tmp_path) == expected
    assert [path.name for path in tmp_path.iterdir()] == [expected[0]]


def test_a_saved_index_is_the_same_and_nothing_else_is_taken_for_one(tmp_path):
    built = IdIndex.of(digests(["a", "b", "c"]))
    name, _ = built.save(tmp_path)
    assert (tmp_path / name).read_bytes() == save({part: getattr(built, part) for part in ("key", "check", "row")})
    assert IdIndex.open(tmp_path / name).rows(digests(["c", "x", "a"])).tolist() == [2, -1, 0]
    write_shard(tmp_path / "shard", ["a"], {"features": torch.ones(1, 2, 3)})
    with pytest.raises(ValueError, match="is not an index of ids"):
        IdIndex.open(tmp_path / "shard")
    assert IdIndex.of(digests([])).rows(digests(["a"])).tolist() == [-1]


def test_ids_with_equal_hashes_are_told_apart():
    """All 64-bit keys equal, then all but two: only the check decides, and a stranger is still a stranger."""

    def colliding(ids):
        table = digests(ids).copy()
        table["key"] = 7
        return table

    ids = [f"pair-{k}" for k in range(50)]
    found = IdIndex.of(colliding(ids))
    assert found.repeated() is None
    assert found.rows(colliding(ids)).tolist() == list(range(50))
    assert found.rows(colliding(["nobody"])).tolist() == [-1]
    above, below = np.zeros(1, dtype=DIGEST), np.zeros(1, dtype=DIGEST)
    above["key"], below["key"] = 2**64 - 1, 0
    assert found.rows(np.concatenate([above, below])).tolist() == [-1, -1]


@pytest.mark.parametrize("together", [2, 1 << 16])
def test_ids_that_cannot_be(tmp_path, monkeypatch, together):
    monkeypatch.setattr(index, "COMPARED_TOGETHER", together)
    monkeypatch.setattr(index, "SORTED_TOGETHER", together)
    with pytest.raises(ValueError, match="id 'pair-3' occurs twice"):
        refuse_repeated(store(tmp_path, ["a", "pair-3", "b", "pair-3"], chunk=2).ids, tmp_path)
    with pytest.raises(ValueError, match="not Unicode text"):
        store(tmp_path / "surrogates", ["a", "\ud800"])
    assert not list((tmp_path / "surrogates").iterdir())


def test_several_sequences_joined(tmp_path):
    parts = [["a", "b", "c"], ["c", "d", "a", "e"], ["b", "f", "e"], ["a", "b"]]
    stores = [store(tmp_path / str(k), part) for k, part in enumerate(parts)]
    joined = Ids.joined([(own.ids, own.index) for own in stores])
    assert list(joined) == ["a", "b", "c", "d", "e", "f"]
    assert len(joined) == 6
    assert joined[1:5] == ["b", "c", "d", "e"] and joined[::-2] == ["f", "d", "b"]
    assert (joined[-1], joined[3]) == ("f", "d")
    with pytest.raises(IndexError):
        joined[6]
