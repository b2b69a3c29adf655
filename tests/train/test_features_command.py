"""`mmkd features`: what is listed, checked, merged, exported and imported is what was written."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmkd.command import settings
from mmkd.data.features import writer as feature_writer
from mmkd.data.features.lookup import TeacherFeatures
from mmkd.data.features.published import PublishedFeatures
from mmkd.data.features.store import FeatureStore, faults
from mmkd.data.features.writer import FeatureWriter
from mmkd.data.folder import open_pairs, write_manifest
from mmkd.data.table import Pair
from mmkd.train import features

ABOUT = {"fingerprint": "f" * 64, "preprocessing": "p", "tokenizer": "t", "context": 77, "pooling": "first"}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def numbers(ids, dim=32):
    """The features a pair of that id has, everywhere."""
    rows = [torch.randn(2, dim, generator=torch.Generator().manual_seed(int(id[1:]))) for id in ids]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def write(path, ids, name="plip", dtype="float16", dim=32, **about):
    writer = FeatureWriter(Path(path), name, dtype, shard_size=7)
    found = numbers(ids, dim)
    writer.add(ids, found[:, 0], found[:, 1])
    writer.finish({**ABOUT, "weights": "vinid/plip", "license": "MIT", **about})


def run(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mmkd features", *arguments])
        settings.run(features.ACTIONS, features.main)


def ids(*numbers):
    return [f"p{k}" for k in range(*numbers)]


def test_ls(capsys):
    write("features/plip", ids(20))
    write("features/bmca", ids(5), "BMCA", "bfloat16", dim=64, license="not declared")
    Path("features/half").mkdir()
    Path("features/half/shard-0.safetensors").write_bytes(b"")
    run("ls", "features")
    out = capsys.readouterr().out.splitlines()
    assert out[1].split()[:5] == ["BMCA", "5", "64", "bfloat16", "1"] and "not declared" in out[1]
    assert out[2].split()[:5] == ["plip", "20", "32", "float16", "3"] and "vinid/plip ffffffffffff" in out[2]
    assert out[3].startswith("half") and "unfinished: 1 shards" in out[3]
    with pytest.raises(SystemExit):
        run("ls", "features/half/nothing")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_verify_finds_one_flipped_byte_in_any_file(capsys, dtype):
    write("features/plip", ids(20), dtype=dtype)
    run("verify", "features", "--quiet")
    for file in sorted(Path("features/plip").iterdir()):
        data = file.read_bytes()
        for position in (0, 9, len(data) // 3, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :])
            with pytest.raises(SystemExit):
                run("verify", "features", "--quiet")
            assert file.name in capsys.readouterr().err, (file.name, position)
        file.write_bytes(data)
    Path("features/plip/shard-00001.safetensors").unlink()
    with pytest.raises(SystemExit):
        run("verify", "features", "--quiet")
    assert "shard-00001.safetensors is missing" in capsys.readouterr().err
    assert len(list(faults(Path("features/plip"), every_byte=True))) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_merge_takes_every_pair_once_bit_for_bit(monkeypatch, dtype):
    monkeypatch.setattr(feature_writer, "SHARD_SIZE", 16)
    monkeypatch.setattr(feature_writer, "COPIED_TOGETHER", 5)
    write("one/plip", ids(20), dtype=dtype)
    write("two/plip", ids(12, 33), dtype=dtype)
    write("two/bmca", ids(3), "BMCA", dtype)
    run("merge", "one,two/plip,two/bmca", "--output", "all", "--quiet")
    merged = FeatureStore(Path("all/plip"))
    assert list(merged.ids) == ids(33)
    assert [shard["rows"] for shard in merged.meta["shards"]] == [16, 16, 1]
    write("whole", ids(33), dtype=dtype)
    for found, expected in zip(merged.lookup(ids(40)), FeatureStore(Path("whole")).lookup(ids(40)), strict=True):
        assert torch.equal(found, expected)
    assert merged.provenance == FeatureStore(Path("one/plip")).provenance
    assert TeacherFeatures.open(Path("all")).names == ["BMCA", "plip"]
    run("verify", "all", "--quiet")
    run("merge", "all/plip", "--output", "packed", "--quiet")
    assert Path("packed/plip/meta.json").read_bytes() == Path("all/plip/meta.json").read_bytes()


def test_merge_refuses_other_weights(capsys):
    write("one/plip", ids(20))
    write("two/plip", ids(12, 33), fingerprint="0" * 64)
    with pytest.raises(SystemExit):
        run("merge", "one,two", "--output", "all")
    assert "differ in fingerprint" in capsys.readouterr().err
    assert not Path("all").exists()


def test_the_authors_folder_and_back(shared_data, monkeypatch, capsys):
    published = shared_data / "mmkd_clip_official" / "MMKDCLIP_DATA"
    for kind in ("raw", "aligned"):
        run("import", str(published), "--output", kind, "--kind", kind, "--dtype", "float32", "--quiet")
    original = PublishedFeatures(published)
    stores = TeacherFeatures.open(Path("raw"))
    assert stores.dims == {name: original.dims[name] for name in stores.names} and len(stores.names) == 8
    run("export", "raw", "--pairs", str(published), "--aligned", "aligned", "--output", "back", "--quiet")
    for kind in ("raw", "aligned"):
        before, after = PublishedFeatures(published, kind), PublishedFeatures(Path("back"), kind)
        assert after.ids == before.ids and after.dims == before.dims
        found = after.lookup(before.ids)
        for name, expected in before.lookup(before.ids).items():
            for part, values in expected.items():
                assert torch.equal(found[name][part], values), (kind, name, part)
    ours, theirs = open_pairs(Path("back")), open_pairs(published)
    for one, other in zip(ours.pairs, theirs.pairs, strict=True):
        assert (one.id, one.caption, set(one.teachers)) == (other.id, other.caption, set(other.teachers))
        assert ours.image_path(one).read_bytes() == theirs.image_path(other).read_bytes()
    assert all(part.numel() < 800 for part in torch.load(next(Path("back").rglob("*.pt")), weights_only=True).values())


def test_export_leaves_out_what_no_teacher_has_and_respects_screening(capsys):
    pairs = [Pair(f"p{k}", f"{k}.png", f"Leyenda {k} 肺", teachers=("plip",) if k else ()) for k in range(4)]
    Path("pairs/images").mkdir(parents=True)
    for k in range(4):
        Image.new("RGB", (9, 9)).save(f"pairs/images/{k}.png")
    write_manifest(Path("pairs"), pairs)
    write("features/plip", ids(3))
    write("features/bmca", ids(4), "BMCA", dim=64)
    run("export", "features", "--pairs", "pairs", "--output", "out", "--images", "false")
    assert "2 pairs; 2 left out" in capsys.readouterr().out
    rows = [json.loads(line) for line in Path("out/meta.jsonl").read_text().splitlines()]
    assert [(row["id"], row["available_clips"]) for row in rows] == [("p1", ["plip"]), ("p2", ["plip"])]
    assert rows[0]["txt"] == "Leyenda 1 肺"
    stored = torch.load("out/features/train/p1/clips_output.pt", weights_only=True)
    assert set(stored) == {"plip_img", "plip_txt"}
    torch.testing.assert_close(stored["plip_img"], numbers(["p1"])[0, 0], atol=1e-3, rtol=0)


def test_what_is_no_action_or_no_folder(capsys):
    for arguments, said in (
        (["verfy", "x"], "did you mean 'verify'"),
        (["verify", "nowhere"], "nowhere holds no feature store"),
        (["verify"], "--folder is required"),
        (["import", "nowhere", "--output", "x"], "nowhere"),
    ):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        run()
    assert "merge     Merge feature stores" in capsys.readouterr().out
