"""Feature stores: exact look-up, resumable and byte-identical writing, and the authors' folder as it is."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from mmkd.data.features.lookup import TeacherFeatures
from mmkd.data.features.store import FeatureStore, FeatureWriter, shard_path

GENERATOR = torch.Generator().manual_seed(0)
IMAGE, TEXT = torch.randn(10, 6, generator=GENERATOR), torch.randn(10, 6, generator=GENERATOR)
IDS = [f"pair-{number}" for number in range(10)]


def write(path, shards=(0, 1, 2), name="plip", ids=IDS, dtype="float16"):
    writer = FeatureWriter(path, name, dtype, shard_size=4)
    for k in shards:
        writer.write_shard(k, IMAGE[4 * k : 4 * k + 4], TEXT[4 * k : 4 * k + 4])
    writer.finish(ids, {"weights": "weights-1"})
    return path


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float16", 2e-3), ("float32", 0), ("bfloat16", 2e-2), ("int8", 2e-2)]
)
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
    FeatureWriter(tmp_path / "unfinished", "plip", shard_size=4).write_shard(1, IMAGE[4:8], TEXT[4:8])
    with pytest.raises(FileNotFoundError, match="no finished"):
        FeatureStore(tmp_path / "unfinished")
    write(tmp_path / "unfinished", shards=(2, 0, 1))
    assert contents(tmp_path / "unfinished") == contents(write(tmp_path / "whole"))


def test_a_meta_file_that_was_changed_or_is_of_another_version_is_refused(tmp_path):
    path = write(tmp_path / "plip") / "meta.json"
    text = path.read_text()
    path.write_text(text.replace('"weights-1"', '"weights-2"'))
    with pytest.raises(ValueError, match="was changed"):
        FeatureStore(path.parent)
    path.write_text(text.replace('"version": 2', '"version": 1'))
    with pytest.raises(ValueError, match="not of version 2"):
        FeatureStore(path.parent)


def test_a_store_goes_to_another_process_by_its_name(tmp_path):
    features = TeacherFeatures.open(write(tmp_path / "plip"))
    data = pickle.dumps(features)
    assert len(data) < 2000
    found = pickle.loads(data).lookup(["pair-3"])["plip"]["image"]
    assert torch.equal(found, features.lookup(["pair-3"])["plip"]["image"])


def test_who_has_been_seen(tmp_path):
    write(tmp_path / "plip")
    writer = FeatureWriter(tmp_path / "bmca", "BMCA")
    writer.write_shard(0, IMAGE[:2], TEXT[:2])
    writer.finish(["extra", "pair-1"], {})
    features = TeacherFeatures.open(tmp_path)
    assert features.seen(["pair-1", "nobody", "extra", "pair-9"]).tolist() == [True, False, True, True]
    assert list(features.ids) == ["extra", "pair-1", "pair-0", *IDS[2:]]


def test_writer_refuses_what_it_cannot_store(tmp_path):
    writer = FeatureWriter(tmp_path / "plip", "plip", shard_size=4)
    for image, text in ((IMAGE[:4], TEXT[:4, :5]), (IMAGE[:5], TEXT[:5]), (IMAGE[:0], TEXT[:0])):
        with pytest.raises(ValueError, match="features must"):
            writer.write_shard(0, image, text)
    with pytest.raises(ValueError, match="not finite"):
        writer.write_shard(0, IMAGE[:4] * 1e6, TEXT[:4])
    assert not (tmp_path / "plip").exists()
    writer.write_shard(0, IMAGE[:4], TEXT[:4])
    with pytest.raises(FileNotFoundError, match="shard-00001"):
        writer.finish(IDS[:6], {})
    with pytest.raises(ValueError, match="expected"):
        writer.finish(IDS[:3], {})
    with pytest.raises(ValueError, match="unique"):
        writer.finish(["a", "a", "b", "c"], {})
    with pytest.raises(ValueError, match="dtype"):
        FeatureWriter(tmp_path / "plip", "plip", "int4")


def test_a_shard_cut_in_half_is_refused(tmp_path):
    store = write(tmp_path / "plip")
    path = shard_path(store, 1)
    data = path.read_bytes()
    for size in (len(data) // 2, len(data) - 1, 20, 0):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"shard-00001.*truncated"):
            FeatureStore(store)


def test_teachers_of_different_width_with_missing_pairs(tmp_path):
    write(tmp_path / "plip")
    writer = FeatureWriter(tmp_path / "bmca", "BMCA", "float32", shard_size=16)
    writer.write_shard(0, torch.cat([IMAGE, IMAGE], 1)[:3], torch.cat([TEXT, TEXT], 1)[:3])
    writer.finish(["extra", "pair-1", "pair-3"], {})
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
    for k in range(0, 1000, 64):
        writer.write_shard(k // 64, image[k : k + 64], -image[k : k + 64])
    ids = [str(number) for number in range(1000)]
    writer.finish(ids, {})
    rows = np.random.default_rng(0).integers(0, 1000, 500)
    found = TeacherFeatures.open(tmp_path).lookup([ids[row] for row in rows])["t"]
    assert torch.equal(found["image"], image[rows])
    assert torch.equal(found["text"], -image[rows])
