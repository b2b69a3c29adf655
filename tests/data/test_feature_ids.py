"""The index of ids: exact, streamed, and never wrong about an id it does not hold."""

import pickle

import numpy as np
import pytest

from mmkd.data.features import index as feature_ids
from mmkd.data.features.index import BLOCK, DIGEST, FINGERPRINT, IdIndex, JoinedIds, digests, write_index

ODD = ["", "a\0b", "a\n", "肺-7", "🫁", "é", "x" * 70_000, " a", "a", "A"]


def index(folder, ids, chunk=1000):
    folder.mkdir(exist_ok=True)
    parts = (ids[start : start + chunk] for start in range(0, len(ids), chunk))
    name, _ = write_index(folder, ((part, np.zeros(len(part), FINGERPRINT)) for part in parts), len(ids))
    return IdIndex(folder / name)


def test_every_id_is_found_at_its_row_and_no_other(tmp_path):
    ids = [f"pair-{k}" for k in range(2 * BLOCK + 5)] + ODD
    found = index(tmp_path, ids)
    order = np.random.default_rng(0).permutation(len(ids))
    assert np.array_equal(found.rows(digests([ids[k] for k in order])), order)
    assert found.rows(digests(["nobody", "pair-0 ", "pair-00"])).tolist() == [-1, -1, -1]
    assert found.rows(digests([])).shape == (0,)


def test_ids_are_a_sequence_on_disk(tmp_path):
    ids = [f"pair-{k}" for k in range(BLOCK - 3)] + ODD + [f"more-{k}" for k in range(BLOCK)]
    found = index(tmp_path, ids)
    assert list(found) == ids and len(found) == len(ids)
    assert found[BLOCK - 5 : BLOCK + 9] == ids[BLOCK - 5 : BLOCK + 9]
    assert found[::-997] == ids[::-997]
    assert (found[0], found[BLOCK], found[-1]) == (ids[0], ids[BLOCK], ids[-1])
    with pytest.raises(IndexError, match="row 99999"):
        found[99999]
    assert list(pickle.loads(pickle.dumps(found))[:3]) == ids[:3]
    assert len(pickle.dumps(found)) < 1000


def test_ids_with_equal_hashes_are_told_apart(tmp_path, monkeypatch):
    """All 64-bit keys equal, then all but two: only the check decides, and a stranger is still a stranger."""

    def colliding(ids):
        table = digests(ids).copy()
        table["key"] = 7
        return table

    monkeypatch.setattr(feature_ids, "digests", colliding)
    ids = [f"pair-{k}" for k in range(50)]
    found = index(tmp_path, ids)
    assert found.rows(colliding(ids)).tolist() == list(range(50))
    assert found.rows(colliding(["nobody"])).tolist() == [-1]
    above, below = np.zeros(1, dtype=DIGEST), np.zeros(1, dtype=DIGEST)
    above["key"], below["key"] = 2**64 - 1, 0
    assert found.rows(np.concatenate([above, below])).tolist() == [-1, -1]


def test_ids_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="id 'pair-3' occurs twice"):
        index(tmp_path, ["a", "pair-3", "b", "pair-3"], chunk=2)
    with pytest.raises(ValueError, match="not Unicode text"):
        index(tmp_path, ["a", "\ud800"])
    with pytest.raises(ValueError, match="0 ids"):
        index(tmp_path, [])
    assert not list(tmp_path.glob("ids-*"))


def test_several_indexes_joined(tmp_path):
    parts = [["a", "b", "c"], ["c", "d", "a", "e"], ["b", "f", "e"], ["a", "b"]]
    joined = JoinedIds([index(tmp_path / str(k), part) for k, part in enumerate(parts)])
    assert list(joined) == ["a", "b", "c", "d", "e", "f"]
    assert len(joined) == 6
    assert joined[1:5] == ["b", "c", "d", "e"] and joined[::-2] == ["f", "d", "b"]
    assert (joined[-1], joined[3]) == ("f", "d")
    with pytest.raises(IndexError):
        joined[6]
