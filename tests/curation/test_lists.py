"""From a collection to pairs: what is dropped is counted, what is kept is whole, and nothing else is left on disk."""

import io
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mmkd.curation import lists as curation
from mmkd.curation.lists import CurationRules, curate
from mmkd.data.folder import open_pairs
from mmkd.data.images import open_image

RNG = np.random.default_rng(0)
FOLDERS = {
    "bccd": {"microscopy"},
    "brain_mri": {"MRI"},
    "covid_cxr_notes": {"X-ray", "CT"},
    "dsb2018": {"microscopy"},
    "fundus": {"fundus"},
    "ham10000": {"dermatoscopy"},
    "kvasir_seg": {"endoscopy"},
    "lc25000_lung": {"histopathology"},
    "medpix2": {"CT", "MR"},
    "mmkd_clip_official": {"PMC figure", "ct", "dermatology", "endoscopy", "fundus", "mri", "oct", "pathology"},
    "oct": {"OCT"},
    "vqa_rad": {"radiology (X-ray/CT/MR)"},
}


def noise(width=40, height=30):
    return Image.fromarray(RNG.integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "my images"
    folder.mkdir()
    return folder


def listed(source, lines, header="file,modality,label,caption,group,split"):
    (source / "labels.csv").write_text("\n".join([header, *lines]) + "\n")


def curated(source, name="pairs", **rules):
    report = curate(source, source.parent / name, CurationRules(**rules), quiet=True)
    assert report.read == len(report.pairs) + sum(report.reasons.values())
    return report, open_pairs(source.parent / name)


def test_every_reason(source):
    for name in ("a", "b", "c", "d", "e"):
        noise().save(source / f"{name}.png")
    shutil.copy(source / "a.png", source / "copy of a.png")
    (source / "cut.png").write_bytes((source / "b.png").read_bytes()[:500])
    noise(1, 1).save(source / "dot.png")
    Image.new("1", (20_000, 20_000)).save(source / "bomb.png")
    (source / "text.png").write_text("this is no image at all")
    (source.parent / "secret.png").write_bytes((source / "a.png").read_bytes())
    (source / "link.png").symlink_to(source.parent / "secret.png")
    listed(source, [
        "a.png,CT,x,first,,", "b.png,,y,,,", "c.png,,,,,", "d.png,CT,," + "word " * 5000 + ",,",
        "e.png,CT,x,one,two,,too,many", "copy of a.png,CT,x,again,,", "cut.png,CT,x,,,", "dot.png,CT,x,,,",
        "bomb.png,CT,x,,,", "text.png,CT,x,,,",
        "no.png,CT,x,,,", "../secret.png,CT,x,,,", f"{source.parent}/secret.png,CT,x,,,", "link.png,CT,x,,,",
        ",CT,x,,,",
    ])  # fmt: skip
    report, folder = curated(source)
    assert report.reasons == {
        "caption_too_long": 1, "corrupt": 1, "duplicate": 1, "malformed_row": 1, "missing": 1, "no_caption": 1,
        "no_file_named": 1, "path_outside": 3, "too_large": 1, "too_small": 1, "unsupported": 1,
    }  # fmt: skip
    assert [pair.caption for pair in folder.pairs] == ["first", folder.pairs[1].caption]
    assert "y" in folder.pairs[1].caption.lower()
    assert [pair.modality for pair in folder.pairs] == ["CT", "unknown"]
    assert {pair.split for pair in folder.pairs} == {"train", "test"}
    output = source.parent / "pairs"
    assert sorted(path.name for path in (output / "images").iterdir()) == sorted(pair.image for pair in folder.pairs)
    summary = json.loads((output / "report.json").read_text())
    assert summary["read"] == 15 == summary["kept"] + sum(summary["dropped"].values())
    dropped = [json.loads(line) for line in (output / "dropped.jsonl").read_text().splitlines()]
    assert Counter(row["reason"] for row in dropped) == summary["dropped"]
    assert {"row": "labels.csv:12", "file": "no.png", "reason": "missing"} in dropped
    assert "15 rows were read, 2 kept and 13 dropped" in (output / "README.md").read_text()


def test_original_bytes_are_kept_where_they_are_plain(source):
    noise().save(source / "a.png")
    noise().convert("L").save(source / "b.jpg")
    noise().convert("CMYK").save(source / "c.jpg")
    Image.fromarray((RNG.random((30, 40)) * 60_000).astype(np.uint16)).save(source / "d.tiff")
    listed(source, [f"{name},CT,,,," for name in ("a.png", "b.jpg", "c.jpg", "d.tiff")])
    _, folder = curated(source)
    a, b, c, d = folder.pairs
    assert folder.image_path(a).read_bytes() == (source / "a.png").read_bytes()
    assert folder.image_path(b).read_bytes() == (source / "b.jpg").read_bytes()
    for pair, name in ((c, "c.jpg"), (d, "d.tiff")):
        with Image.open(folder.image_path(pair)) as stored:
            assert stored.mode == "RGB"
        assert folder.image_path(pair).suffix == ".png"
        assert open_image(folder.image_path(pair)).tobytes() == open_image(source / name).tobytes()
    assert (a.width, a.height) == (40, 30)


def test_short_side(source):
    noise(200, 100).save(source / "a.jpg")
    noise(100, 200).save(source / "b.png")
    noise(30, 40).save(source / "c.png")
    listed(source, [f"{name},CT,,,," for name in ("a.jpg", "b.png", "c.png")])
    _, folder = curated(source, short_side=32)
    assert [(pair.width, pair.height) for pair in folder.pairs] == [(64, 32), (32, 64), (30, 40)]
    assert [open_image(folder.image_path(pair)).size for pair in folder.pairs] == [(64, 32), (32, 64), (30, 40)]
    assert [folder.image_path(pair).suffix for pair in folder.pairs] == [".jpg", ".png", ".png"]


@pytest.mark.parametrize(("quality", "halved"), [(95, False), (90, True)])
def test_quality_of_images_that_are_stored_smaller(source, quality, halved):
    noise(200, 100).save(source / "a.jpg")
    noise(30, 40).save(source / "b.jpg")
    listed(source, ["a.jpg,CT,,,,", "b.jpg,CT,,,,"])
    _, folder = curated(source, short_side=32, jpeg_quality=quality)
    a, b = (folder.image_path(pair) for pair in folder.pairs)
    with Image.open(a) as stored:
        assert (stored.layer[0][1:3] == (2, 2)) == halved  # samples of brightness for each of colour
    expected = io.BytesIO()
    Image.new("RGB", (8, 8)).save(expected, "JPEG", quality=quality)
    with Image.open(a) as stored, Image.open(expected) as other:
        assert stored.quantization == other.quantization
    assert b.read_bytes() == (source / "b.jpg").read_bytes()
    with pytest.raises(ValueError, match="jpeg_quality is 20; allowed: 50 to 100"):
        CurationRules(jpeg_quality=20)


def test_duplicates_across_splits_keep_the_held_out_copy(source):
    for name in ("a", "b", "c", "d"):
        noise().save(source / f"{name}.png")
    shutil.copy(source / "a.png", source / "e.png")
    listed(
        source, ["a.png,CT,,,,train", "b.png,CT,,,,train", "c.png,CT,,,,dev", "d.png,CT,,,,test", "e.png,CT,,,,test"]
    )
    report, folder = curated(source)
    assert report.reasons == {"duplicate_across_splits": 1}
    assert [pair.split for pair in folder.pairs] == ["train", "validation", "test", "test"]


def test_groups_and_unknown_split_names(source):
    for number in range(8):
        noise().save(source / f"{number}.png")
    splits = ["train", "train", "test", "fold-2", "train", "test", "valid", "test"]
    listed(source, [f"{n}.png,CT,,,{'g' if n < 3 else ''},{split}" for n, split in enumerate(splits)])
    report, folder = curated(source)
    assert [pair.split for pair in folder.pairs[:3]] == ["train"] * 3
    summary = report.summary()
    assert summary["rows_of_groups_in_several_splits"] == 1
    assert summary["unknown_split_names"] == {"fold-2": 1}
    assert summary["rows_split_by_hash"] == 1


def test_order_workers_and_repetition_change_nothing(source):
    for number in range(12):
        noise().save(source / f"{number}.png")
    listed(source, [f"{n}.png,CT,class {n % 3},,{n // 2}," for n in range(12)])
    curated(source, "one")
    curate(source, source.parent / "two", CurationRules(), workers=2, quiet=True)
    one, two = source.parent / "one", source.parent / "two"
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files if f.name != "README.md")


def test_max_pairs_counts_what_was_not_chosen(source):
    for number in range(20):
        noise().save(source / f"{number}.png")
    listed(source, [f"{n}.png,CT,class {n % 2},,," for n in range(20)])
    report, folder = curated(source, max_pairs=8)
    assert report.reasons == {"over_max_pairs": 12}
    assert Counter(pair.label for pair in folder.pairs) == {"class 0": 4, "class 1": 4}


def test_nothing_left_and_wrong_rules(source):
    listed(source, ["a.png,CT,,,,"])
    with pytest.raises(ValueError, match=r"nothing is left of the 1 rows .*missing"):
        curate(source, source.parent / "pairs", CurationRules(), quiet=True)
    assert [path.name for path in source.parent.iterdir()] == [source.name]
    with pytest.raises(ValueError, match="minimum_side"):
        CurationRules(minimum_side=0)


def test_a_full_disk_leaves_nothing(source, monkeypatch):
    noise().save(source / "a.png")
    listed(source, ["a.png,CT,,,,"])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(curation, "write_datasheet", full)
    with pytest.raises(OSError, match="No space left"):
        curate(source, source.parent / "pairs", CurationRules(), quiet=True)
    assert [path.name for path in source.parent.iterdir()] == [source.name]


@pytest.mark.parametrize("name", FOLDERS)
def test_real_folders(shared_data, tmp_path, name):
    report = curate(shared_data / name, tmp_path / "pairs", CurationRules(max_pairs=40), quiet=True)
    folder = open_pairs(tmp_path / "pairs")
    assert 6 <= len(folder.pairs) <= 40
    assert set(report.reasons) <= {"over_max_pairs", "duplicate"}
    assert {pair.modality for pair in folder.pairs} <= FOLDERS[name] | {"xray", "ultrasound"}
    assert {pair.split for pair in folder.pairs} == {"train", "validation", "test"}
    assert all(pair.caption and folder.image_path(pair).is_file() for pair in folder.pairs)
    sides = {}
    for pair in folder.pairs:
        assert sides.setdefault(pair.group or pair.id, pair.split) == pair.split


def test_published_folder_keeps_ids_and_teachers(shared_data, tmp_path):
    source = shared_data / "mmkd_clip_official" / "MMKDCLIP_DATA"
    curate(source, tmp_path / "pairs", CurationRules(), quiet=True)
    kept = {pair.id: pair for pair in open_pairs(tmp_path / "pairs").pairs}
    for pair in open_pairs(source).pairs:
        assert kept[pair.id].teachers == pair.teachers
        assert kept[pair.id].caption == pair.caption
        assert kept[pair.id].license == "CC BY"


def test_tables_without_images_are_no_collection(shared_data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither labels\.csv nor meta\.jsonl"):
        curate(shared_data / "tcga_survival", tmp_path / "pairs", CurationRules(), quiet=True)
    assert not any(tmp_path.iterdir())
