"""The search index against a plain product, through changes, kills and damage."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch

from mmkd.data.features.shards import TensorMap, read_header, write_shard
from mmkd.files import OutputInUseError
from mmkd.serving import index as module
from mmkd.serving.index import INDEX_FILE, FileStates, SearchIndex

DIM = 16
MODEL = {"teacher": "tiny", "fingerprint": "weights", "preprocessing": "square", "context": 24}


def unit(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, DIM, generator=generator), dim=1)


def names(rows, start=0):
    return [f"s{k % 7}/image {k}.png" for k in range(start, start + rows)]


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_ROWS", 64)
    return tmp_path / "index"


@pytest.fixture
def index(path):
    own = SearchIndex.create(path, MODEL, DIM)
    own.add(names(200), unit(200))
    return own


def expected(vectors, ids, queries, k):
    best, rows = (queries @ vectors.half().float().T).topk(k)
    return [
        [(ids[row], pytest.approx(min(1, score), abs=1e-5)) for row, score in zip(*own, strict=True)]
        for own in zip(rows.tolist(), best.tolist(), strict=True)
    ]


def answers(index, queries, k):
    return [[(hit.id, hit.score) for hit in hits] for hits in index.search(queries, k)]


def test_search_is_the_plain_product(index, path):
    queries = unit(5, seed=1)
    for own in (index, SearchIndex.open(path)):
        assert len(own) == 200
        assert answers(own, queries, 7) == expected(unit(200), names(200), queries, 7)
        assert own.ids == names(200)


def test_k_beyond_the_index_gives_all_and_wrong_queries_are_refused(index, path):
    assert [len(hits) for hits in index.search(unit(2), 1000)] == [200, 200]
    assert SearchIndex.create(path.parent / "empty", MODEL, DIM).search(unit(2), 3) == [[], []]
    assert index.search(unit(0), 3) == []
    for queries, k, text in (
        (unit(1), 0, "k is 0; it must be at least 1"),
        (torch.zeros(1, 3), 1, r"queries are \(1, 3\)"),
        (unit(1) * float("nan"), 1, "finite"),
    ):
        with pytest.raises(ValueError, match=text):
            index.search(queries, k)


def test_forged_rows_and_shards_are_refused(index, path):
    index.delete(names(200)[:3])
    meta = json.loads((path / INDEX_FILE).read_text())
    whole = (path / meta["removed"]).read_bytes()
    for rows in ([0, 1, 200], [-1, 0, 1], [1, 0, 2], [0, 0, 2]):
        (path / meta["removed"]).write_bytes(safetensors.numpy.save({"rows": np.array(rows)}))
        with pytest.raises(ValueError, match=r"removed-.* is damaged; make the index again"):
            SearchIndex.open(path)
    (path / meta["removed"]).write_bytes(whole)
    shard = path / meta["shards"][0]["file"]
    arrays = {name: torch.from_numpy(np.array(array)) for name, array in TensorMap(shard).arrays.items()}
    sound = {name: arrays[name] for name in ("vectors", "stamps", "sha256")}
    for name in sound:
        write_shard(shard, names(64), {**sound, name: sound[name][:, :1].contiguous()})
        meta["shards"][0]["header_sha256"] = read_header(shard).sha256
        (path / INDEX_FILE).write_text(json.dumps(meta))
        with pytest.raises(ValueError, match="is not the file that"):
            SearchIndex.open(path)


def test_the_lock_of_a_forged_index_empties_no_other_file(index, path):
    (path.parent / "private").write_text("kept")
    (path / f".{INDEX_FILE}.lock").symlink_to(path.parent / "private")
    with pytest.raises(OSError, match="index"):
        index.add(["more"], unit(1, seed=9))
    assert (path.parent / "private").read_text() == "kept"


def test_adding_replacing_and_deleting(index, path):
    index.add(["new", names(200)[3]], unit(2, seed=5))
    assert index.delete([names(200)[0], "never there", names(200)[0]]) == 1
    vectors = torch.cat([unit(200), unit(2, seed=5)])
    kept = [k for k in range(202) if k not in (0, 3)]
    ids = [*names(200), "new", names(200)[3]]
    queries = torch.cat([unit(4, seed=5), unit(200)[:4]])
    for own in (index, SearchIndex.open(path)):
        assert len(own) == 200 and own.ids == [ids[k] for k in kept]
        assert answers(own, queries, 5) == expected(vectors[kept], own.ids, queries, 5)
    assert np.allclose(index.vectors(["new", "none"])[0], unit(2, seed=5)[0], atol=1e-3)
    assert not index.vectors(["none"]).any()


def test_small_additions_fill_the_last_shard(index, path):
    for k in range(100):
        index.add([f"more {k}"], unit(1, seed=k))
    assert [shard["rows"] for shard in index.meta["shards"]] == [64, 64, 64, 64, 44]
    assert len(list(path.glob("vectors-*"))) == 5


def test_states_show_what_has_changed(index):
    files = FileStates(np.ones(2, bool), np.array([[5, 7], [8, 9]]), np.arange(64, dtype=np.uint8).reshape(2, 32))
    index.add(["a", "b"], unit(2), files)
    found = index.states(["b", "none", "a"])
    assert found.known.tolist() == [True, False, True]
    assert found.stamps.tolist() == [[8, 9], [0, 0], [5, 7]]
    assert found.sha256[2].tolist() == list(range(32))


@pytest.mark.parametrize("vectors", [unit(3), torch.zeros(2, 3), unit(2) * float("inf")])
def test_what_cannot_be_added(index, vectors):
    with pytest.raises(ValueError, match=r"the index takes different ids and finite vectors \(n, 16\)"):
        index.add(["a", "b"], vectors)
    with pytest.raises(ValueError, match="2 ids, 1 of them different"):
        index.add(["a", "a"], unit(2))
    assert len(index) == 200


@pytest.mark.parametrize("moment", range(5))
def test_a_killed_writer_leaves_the_index_as_it_was(index, path, monkeypatch, moment):
    """Each rename of an addition is the last thing that happens."""
    before, count = answers(index, unit(3, seed=2), 5), 0
    rename = type(path).replace

    def killed(self, target):
        nonlocal count
        count += 1
        if count > moment:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(path), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        index.add([names(200)[1], *names(150, start=200)], unit(151, seed=3))
    monkeypatch.undo()
    monkeypatch.setattr(module, "SHARD_ROWS", 64)
    opened = SearchIndex.open(path)
    assert len(opened) == 200
    assert answers(opened, unit(3, seed=2), 5) == before
    opened.add(["last"], unit(1, seed=4))
    assert len(opened) == 201
    left = {file.name for file in path.iterdir()}
    assert len(left) == 1 + len(opened.meta["shards"]) + (opened.meta["removed"] is not None)


def test_a_reader_keeps_what_it_opened(index, path):
    reader = SearchIndex.open(path)
    index.add(names(100, start=200), unit(100, seed=6))
    index.delete(names(50))
    assert answers(reader, unit(2, seed=1), 3) == expected(unit(200), names(200), unit(2, seed=1), 3)
    reader.add(["x"], unit(1, seed=9))  # starts from what the other has left
    assert len(reader) == 251 == len(SearchIndex.open(path))


def test_one_writer_at_a_time(index, path):
    with index._writing(), pytest.raises(OutputInUseError, match="is being written by another run"):
        SearchIndex.open(path).delete(["a"])


def test_another_model_is_refused(index):
    index.require_model(MODEL)
    with pytest.raises(ValueError, match=r"was made with other weights .model tiny.; give that --model"):
        index.require_model({**MODEL, "fingerprint": "others"})
    with pytest.raises(ValueError, match="other preprocessing"):
        index.require_model({**MODEL, "preprocessing": "crop"})


def test_create_takes_no_folder_that_holds_something(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(FileExistsError, match="exists and is no index"):
        SearchIndex.create(tmp_path / "full", MODEL, DIM)
    with pytest.raises(FileNotFoundError, match=r"is no index; make one with `mmkd index"):
        SearchIndex.open(tmp_path / "full")


def test_create_takes_what_a_killed_run_left(tmp_path):
    for name in ("vectors-0.safetensors", f".{INDEX_FILE}.lock", ".vectors-1.safetensors.0123abcd.tmp"):
        (tmp_path / name).write_text("x")
    SearchIndex.create(tmp_path, MODEL, DIM).add(["a"], unit(1))
    assert len(SearchIndex.open(tmp_path)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {INDEX_FILE, *(path.name for path in tmp_path.glob("v*"))}
    assert len(list(tmp_path.iterdir())) == 2


def damage_meta(path, change):
    meta = json.loads((path / INDEX_FILE).read_text())
    change(meta)
    (path / INDEX_FILE).write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda path: (path / INDEX_FILE).write_text("{"), "not valid JSON"),
        (lambda path: (path / INDEX_FILE).write_text("[]"), "is damaged, or of another version"),
        (lambda path: damage_meta(path, lambda meta: meta.update(version=9)), "of another version"),
        (lambda path: damage_meta(path, lambda meta: meta["shards"][0].update(file="../x")), "is damaged"),
        (
            lambda path: damage_meta(path, lambda meta: meta["shards"][0].update(rows=63)),
            "is not the file that index.json names",
        ),
        (lambda path: damage_meta(path, lambda meta: meta.update(dim=8)), "is not the file that index.json names"),
        (lambda path: next(path.glob("vectors-*")).unlink(), "is missing"),
        (lambda path: next(path.glob("vectors-*")).write_bytes(b"short"), "is truncated"),
        (lambda path: (f := next(path.glob("vectors-*"))).write_bytes(f.read_bytes()[:-9]), "is truncated"),
        (lambda path: (f := next(path.glob("vectors-*"))).write_bytes(f.read_bytes()[:-9] + b"~" * 9), "its checksum"),
    ],
)
def test_a_damaged_index_is_refused(index, path, damage, text):
    damage(path)
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        SearchIndex.open(path)


def test_a_large_index_has_a_graph_that_finds_the_same(path, monkeypatch):
    pytest.importorskip("usearch", reason="the graph needs usearch, of the extra search")
    monkeypatch.setattr(module, "GRAPH_ROWS", 1000)
    monkeypatch.setattr(module, "TAIL_ROWS", 100)
    index = SearchIndex.create(path, MODEL, DIM)
    index.add(names(2000), unit(2000))
    index.optimize(threads=1)
    assert index.meta["graph"]["rows"] == 2000
    index.delete(names(40, start=100))
    index.add(["near", *names(3)], torch.cat([unit(2000)[500:501], unit(3, seed=8)]))
    vectors, ids = torch.cat([unit(2000), unit(2000)[500:501], unit(3, seed=8)]), [*names(2000), "near", *names(3)]
    kept = [k for k in range(2004) if not (100 <= k < 140 or k < 3)]
    queries = torch.cat([unit(40, seed=3), unit(2000)[100:104], unit(3, seed=8)])
    for own in (index, SearchIndex.open(path)):
        found = answers(own, queries, 10)
        right = expected(vectors[kept], [ids[k] for k in kept], queries, 10)
        shared = [len({id for id, _ in a} & {id for id, _ in b}) for a, b in zip(found, right, strict=True)]
        assert np.mean(shared) >= 9.8
        assert found[0][0] == right[0][0] and found[-1][0] == right[-1][0]
        assert {hit.id for hit in own.search(unit(2000)[500:501], 2)[0]} == {"near", names(2000)[500]}
        assert len(own.search(queries[:1], 1964)[0]) == len(own) == 1961
    index.add(names(200, start=5000), unit(200, seed=11))
    index.optimize(threads=1)  # extended
    assert index.meta["graph"]["rows"] == 2204 and len(list(path.glob("graph-*"))) == 1
    assert index.search(unit(200, seed=11)[7:8], 1)[0][0].id == names(200, start=5000)[7]
    graph = next(path.glob("graph-*"))
    graph.write_bytes(graph.read_bytes()[:-5])
    damaged = SearchIndex.open(path)
    assert damaged.search(unit(200, seed=11)[7:8], 1)[0][0].id == names(200, start=5000)[7]
    damaged.optimize(threads=1)
    assert SearchIndex.open(path).meta["graph"]["rows"] == 2204
    assert damaged.delete(names(900, start=1000)) == 900
    damaged.optimize(threads=1)  # written anew
    assert len(damaged) == 1261 == sum(shard["rows"] for shard in damaged.meta["shards"])
    assert damaged.meta["removed"] is None and damaged.meta["graph"]["rows"] == 1261
    assert damaged.search(unit(200, seed=11)[7:8], 1)[0][0].id == names(200, start=5000)[7]
