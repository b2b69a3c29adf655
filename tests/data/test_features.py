"""Feature stores: exact look-up, resumable and byte-identical writing, and the authors' folder as it is."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch

from mmkd.data.features.lookup import TeacherFeatures
from mmkd.data.features.shards import write_shard
from mmkd.data.features.store import FeatureStore, faults, meta_sha256
from mmkd.data.features.writer import FeatureWriter

GENERATOR = torch.Generator().manual_seed(0)
IMAGE, TEXT = torch.randn(10, 6, generator=GENERATOR), torch.randn(10, 6, generator=GENERATOR)
IDS = [f"pair-{number}" for number in range(10)]


def write(path, name="plip", dtype="float16", step=10):
    writer = FeatureWriter(path, name, dtype, shard_size=4)
    for k in range(0, 10, step):
        writer.add(IDS[k : k + step], IMAGE[k : k + step], TEXT[k : k + step])
    writer.finish({"weights": "weights-1"})
    return path


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("float32", 0), ("bfloat16", 2e-2)])
def test_lookup(tmp_path, dtype, tolerance):
    store = FeatureStore(write(tmp_path / "plip", dtype=dtype))
    assert (store.name, store.dim, list(store.ids), store.provenance) == ("plip", 6, IDS, {"weights": "weights-1"})
    image, text, mask = store.lookup(["pair-9", "nobody", "pair-0", "pair-5", "pair-9"])
    assert mask.tolist() == [True, False, True, True, True]
    rows = [9, 0, 5, 9]
    torch.testing.assert_close(image[mask], IMAGE[rows], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(text[mask], TEXT[rows], atol=tolerance, rtol=tolerance)
    assert not image[1].any()
    assert image.dtype == text.dtype == torch.float32


def test_an_unfinished_store_is_none_and_the_same_features_are_the_same_bytes(tmp_path):
    FeatureWriter(tmp_path / "unfinished", "plip", shard_size=4).add(IDS[:8], IMAGE[:8], TEXT[:8])
    assert len(contents(tmp_path / "unfinished")) == 2
    with pytest.raises(FileNotFoundError, match="not a finished"):
        FeatureStore(tmp_path / "unfinished")
    write(tmp_path / "unfinished", step=3)
    assert contents(tmp_path / "unfinished") == contents(write(tmp_path / "whole"))


def test_a_meta_file_that_was_changed_or_is_of_another_version_is_refused(tmp_path):
    path = write(tmp_path / "plip") / "meta.json"
    text = path.read_text()
    path.write_text(text.replace('"weights-1"', '"weights-2"'))
    with pytest.raises(ValueError, match="was changed"):
        FeatureStore(path.parent)
    path.write_text(text.replace('"version": 3', '"version": 2'))
    with pytest.raises(ValueError, match=r"not of version 3.*extract again with `mmkd extract`"):
        FeatureStore(path.parent)


def forge(path, change):
    """Change ``meta.json`` and its checksum."""
    meta = json.loads((path / "meta.json").read_text())
    meta.pop("sha256")
    change(meta)
    (path / "meta.json").write_text(json.dumps({**meta, "sha256": meta_sha256(meta)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta["shards"][0].update(file="../../other.safetensors"), "impossible"),
        (lambda meta: meta["ids"].update(file="/etc/passwd"), "impossible"),
        (lambda meta: meta.update(count=11), "impossible"),
        (lambda meta: meta["shards"][0].update(rows=5), "impossible"),
        (lambda meta: meta.update(dtype="int4"), "impossible"),
        (lambda meta: meta.pop("dim"), "impossible"),
        (lambda meta: meta["shards"][1].update(bytes=7), "truncated"),
        (lambda meta: meta.update(dim=12), "does not hold 4 pairs of 12"),
        (lambda meta: meta.update(dtype="bfloat16"), "does not hold 4 pairs of 6 bfloat16"),
        (lambda meta: meta["shards"].reverse() or meta["shards"][0].update(rows=4), "impossible|does not match"),
        (lambda meta: meta["shards"][1].update(header_sha256="0" * 64), "does not match"),
    ],
)
def test_a_forged_store_is_refused_by_readers_and_verification_alike(tmp_path, change, message):
    path = write(tmp_path / "plip")
    assert not list(faults(path, every_byte=True))
    forge(path, change)
    with pytest.raises(ValueError, match=message):
        FeatureStore(path).read(np.arange(10))
    assert re.search(message, " ".join(map(str, faults(path, every_byte=True))))


def test_an_index_of_other_ids_is_found(tmp_path):
    """Files that are whole, with checksums that match, of two stores: rows would belong to other pairs."""
    path, other = write(tmp_path / "plip"), tmp_path / "other"
    writer = FeatureWriter(other, "plip", shard_size=4)
    writer.add(IDS[::-1], IMAGE, TEXT)
    writer.finish({})
    ids = json.loads((other / "meta.json").read_text())["ids"]
    shutil.copy(other / ids["file"], path)
    forge(path, lambda meta: meta.update(ids=ids))
    (fault,) = faults(path, every_byte=True)
    assert "does not belong to the ids of the shards" in str(fault)


def test_a_shard_of_another_store_is_refused_when_it_is_read(tmp_path):
    path = write(tmp_path / "plip")
    file = sorted(path.glob("shard-*"))[1]
    write_shard(file, IDS[4:8], {"features": torch.ones(4, 2, 6, dtype=torch.float16)})
    assert (forge(path, lambda meta: meta["shards"][1].update(bytes=file.stat().st_size))) is None
    with pytest.raises(ValueError, match=r"shard-00001.*header does not match"):
        FeatureStore(path).lookup(["pair-5"])
    assert FeatureStore(path).lookup(["pair-0"])[2].all()
    assert len(list(faults(path, every_byte=True))) == 1


def test_a_store_goes_to_another_process_by_its_name(tmp_path):
    features = TeacherFeatures.open(write(tmp_path / "plip"))
    data = pickle.dumps(features)
    assert len(data) < 2000
    found = pickle.loads(data).lookup(["pair-3"])["plip"]["image"]
    assert torch.equal(found, features.lookup(["pair-3"])["plip"]["image"])


def test_who_has_been_seen(tmp_path):
    write(tmp_path / "plip")
    writer = FeatureWriter(tmp_path / "bmca", "BMCA")
    writer.add(["extra", "pair-1"], IMAGE[:2], TEXT[:2])
    writer.finish({})
    features = TeacherFeatures.open(tmp_path)
    assert features.seen(["pair-1", "nobody", "extra", "pair-9"]).tolist() == [True, False, True, True]
    assert list(features.ids) == ["extra", "pair-1", "pair-0", *IDS[2:]]


def test_writer_refuses_what_it_cannot_store(tmp_path):
    writer = FeatureWriter(tmp_path / "plip", "plip", shard_size=4)
    with pytest.raises(ValueError, match="features must"):
        writer.add(IDS[:4], IMAGE[:4], TEXT[:4, :5])
    with pytest.raises(ValueError, match="3 ids for 4 pairs"):
        writer.add(IDS[:3], IMAGE[:4], TEXT[:4])
    for wrong in (1e6, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            writer.add(IDS[:4], IMAGE[:4] * wrong, TEXT[:4])
    with pytest.raises(ValueError, match="at least one"):
        writer.finish({})
    assert not (tmp_path / "plip").exists()
    writer.add(["a", "a", "b"], IMAGE[:3], TEXT[:3])
    with pytest.raises(ValueError, match=r"id 'a' occurs twice; ids must be unique"):
        writer.finish({})
    with pytest.raises(ValueError, match="dtype"):
        FeatureWriter(tmp_path / "plip", "plip", "int4")


def test_a_shard_cut_in_half_is_refused(tmp_path):
    store = write(tmp_path / "plip")
    path = store / "shard-00001.safetensors"
    data = path.read_bytes()
    for size in (len(data) // 2, len(data) - 1, 20, 0):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"shard-00001.*truncated"):
            FeatureStore(store)


def test_teachers_of_different_width_with_missing_pairs(tmp_path):
    write(tmp_path / "plip")
    writer = FeatureWriter(tmp_path / "bmca", "BMCA", "float32", shard_size=16)
    writer.add(["extra", "pair-1", "pair-3"], torch.cat([IMAGE, IMAGE], 1)[:3], torch.cat([TEXT, TEXT], 1)[:3])
    writer.finish({})
    features = TeacherFeatures.open(tmp_path)
    assert features.dims == {"BMCA": 12, "plip": 6}
    assert set(features.ids) == {"extra", *IDS}
    found = features.lookup(["pair-3", "pair-2", "extra", "nobody"])
    assert found["BMCA"]["mask"].tolist() == [True, False, True, False]
    assert found["plip"]["mask"].tolist() == [True, True, False, False]
    assert torch.equal(found["BMCA"]["image"][0, :6], IMAGE[2])
    torch.testing.assert_close(found["plip"]["text"][0], TEXT[3], atol=2e-3, rtol=2e-3)
    assert TeacherFeatures.open(tmp_path, ["plip"]).names == ["plip"]
    assert TeacherFeatures.open(tmp_path / "bmca").names == ["BMCA"]
    with pytest.raises(ValueError, match="it has: BMCA, plip"):
        TeacherFeatures.open(tmp_path, ["quilt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="mmkd extract"):
        TeacherFeatures.open(tmp_path / "empty")


def test_two_stores_of_one_name(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    with pytest.raises(ValueError, match="same teacher"):
        TeacherFeatures.open(tmp_path)


@pytest.mark.parametrize("kind", ["raw", "aligned"])
def test_published_features(shared_data, kind):
    folder = shared_data / "mmkd_clip_official" / "MMKDCLIP_DATA"
    features = TeacherFeatures.open(folder, kind=kind)
    assert set(features.dims.values()) == ({512, 768} if kind == "raw" else {512})
    found = features.lookup([features.ids[7], "nobody", features.ids[0]])
    file = {"raw": "clips_output.pt", "aligned": "clips_project_output.pt"}[kind]
    for row, id in ((0, features.ids[7]), (2, features.ids[0])):
        stored = torch.load(next(folder.glob(f"features/*/{id}/{file}")), weights_only=True)
        for name, teacher in found.items():
            assert bool(teacher["mask"][row]) == (f"{name}_img" in stored)
            if teacher["mask"][row]:
                assert torch.equal(teacher["image"][row], stored[f"{name}_img"])
                assert torch.equal(teacher["text"][row], stored[f"{name}_txt"])
    assert not any(teacher["mask"][1] for teacher in found.values())


def test_published_folder_with_a_missing_or_escaping_sample(shared_data, tmp_path):
    source = shared_data / "mmkd_clip_official" / "MMKDCLIP_DATA"
    lines = (source / "meta.jsonl").read_text().splitlines()
    shutil.copy(source / "meta.jsonl", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"clips_output\.pt is missing"):
        TeacherFeatures.open(tmp_path)
    row = json.loads(lines[0])
    (tmp_path / "meta.jsonl").write_text(json.dumps({**row, "id": "../../x"}) + "\n")
    with pytest.raises(ValueError, match="refused"):
        TeacherFeatures.open(tmp_path)


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", ""])
def test_a_teacher_whose_name_leaves_the_folder_is_refused(tmp_path, name):
    write(tmp_path / "store", name=name)
    with pytest.raises(ValueError, match="not the name of a folder"):
        TeacherFeatures.open(tmp_path)
    row = {"id": "a", "folderid": "f", "imgpath": "a.png", "txt": "b", "available_clips": [name]}
    (tmp_path / "meta.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="available_clips"):
        TeacherFeatures.open(tmp_path)


def published(folder, contents):
    """Two samples of one teacher, whose feature files hold `contents`: a dictionary or raw bytes."""
    rows = [{"id": id, "folderid": "f", "imgpath": "a.png", "txt": "b", "available_clips": ["P"]} for id in "ab"]
    (folder / "meta.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for id, content in zip("ab", contents, strict=True):
        file = folder / "features" / "f" / id / "clips_output.pt"
        file.parent.mkdir(parents=True)
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    return folder


def test_damaged_published_features_are_named(tmp_path):
    def pair(width):
        return {"P_img": torch.zeros(width), "P_txt": torch.zeros(width)}

    for number, damaged in enumerate((b"", b"no tensors", b"PK\x03\x04 cut", [torch.zeros(4)], pair(5))):
        folder = tmp_path / str(number)
        folder.mkdir()
        features = TeacherFeatures.open(published(folder, [pair(4), damaged]))
        with pytest.raises(ValueError, match=r"b/clips_output\.pt"):
            features.lookup(["a", "b"])
    (tmp_path / "lacking").mkdir()
    with pytest.raises(ValueError, match="lacks P_img"):
        TeacherFeatures.open(published(tmp_path / "lacking", [{}, {}]))


def test_random_rows_equal_a_plain_array(tmp_path):
    image = torch.randn(1000, 8, generator=GENERATOR)
    writer = FeatureWriter(tmp_path / "t", "t", "float32", shard_size=64)
    ids = [str(number) for number in range(1000)]
    writer.add(ids, image, -image)
    writer.finish({})
    rows = np.random.default_rng(0).integers(0, 1000, 500)
    found = TeacherFeatures.open(tmp_path).lookup([ids[row] for row in rows])["t"]
    assert torch.equal(found["image"], image[rows])
    assert torch.equal(found["text"], -image[rows])
