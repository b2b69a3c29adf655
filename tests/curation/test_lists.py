"""From a collection to pairs: what is dropped is counted, what is kept is whole, and nothing else is left on disk."""

import hashlib
import io
import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmkd.command.tasks import TaskSettings
from mmkd.curation import stream
from mmkd.curation.readers import list_rows
from mmkd.curation.rules import read_rules
from mmkd.curation.stream import curate
from mmkd.data.folder import open_pairs
from mmkd.data.images import open_image, read_image_bytes

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
    report = curate(str(source), source.parent / name, read_rules("list", **rules), quiet=True)
    assert report["read"] == report["kept"] + sum(report["dropped"].values())
    return report, open_pairs(source.parent / name)


def stored(folder, pair):
    return read_image_bytes(folder.image_path(pair))


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
    assert report["dropped"] == {
        "caption_too_long": 1, "corrupt": 1, "duplicate": 1, "malformed_row": 1, "missing": 1, "no_caption": 1,
        "no_file_named": 1, "path_outside": 3, "too_large": 1, "too_small": 1, "unsupported": 1,
    }  # fmt: skip
    assert [pair.caption for pair in folder.pairs] == ["first", folder.pairs[1].caption]
    assert "y" in folder.pairs[1].caption.lower()
    assert [pair.modality for pair in folder.pairs] == ["CT", "unknown"]
    assert {pair.split for pair in folder.pairs} == {"train", "test"}
    output = source.parent / "pairs"
    assert report == json.loads((output / "report.json").read_text())
    assert report["read"] == 15 == report["kept"] + sum(report["dropped"].values())
    dropped = [json.loads(line) for line in (output / "dropped.jsonl").read_text().splitlines()]
    assert Counter(row["reason"] for row in dropped) == report["dropped"]
    assert {"row": "labels.csv:12", "key": "no.png", "reason": "missing"} in dropped
    assert {"row": "labels.csv:7", "key": "copy of a.png", "reason": "duplicate"} in dropped
    assert "15 samples read, 2 pairs kept, 13 dropped" in (output / "README.md").read_text()


def test_original_bytes_are_kept_where_they_are_plain(source):
    noise().save(source / "a.png")
    noise().convert("L").save(source / "b.jpg")
    noise().convert("CMYK").save(source / "c.jpg")
    Image.fromarray((RNG.random((30, 40)) * 60_000).astype(np.uint16)).save(source / "d.tiff")
    listed(source, [f"{name},CT,,,," for name in ("a.png", "b.jpg", "c.jpg", "d.tiff")])
    _, folder = curated(source)
    a, b, c, d = folder.pairs
    assert stored(folder, a) == (source / "a.png").read_bytes()
    assert stored(folder, b) == (source / "b.jpg").read_bytes()
    for pair, name in ((c, "c.jpg"), (d, "d.tiff")):
        with Image.open(io.BytesIO(stored(folder, pair))) as image:
            assert (image.mode, image.format) == ("RGB", "PNG")
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
    formats = [Image.open(io.BytesIO(stored(folder, pair))).format for pair in folder.pairs]
    assert formats == ["JPEG", "PNG", "PNG"]


@pytest.mark.parametrize(("quality", "halved"), [(95, False), (90, True)])
def test_quality_of_images_that_are_stored_smaller(source, quality, halved):
    noise(200, 100).save(source / "a.jpg")
    noise(30, 40).save(source / "b.jpg")
    listed(source, ["a.jpg,CT,,,,", "b.jpg,CT,,,,"])
    _, folder = curated(source, short_side=32, jpeg_quality=quality)
    a, b = (stored(folder, pair) for pair in folder.pairs)
    with Image.open(io.BytesIO(a)) as image:
        assert (image.layer[0][1:3] == (2, 2)) == halved  # samples of brightness for each of colour
    expected = io.BytesIO()
    Image.new("RGB", (8, 8)).save(expected, "JPEG", quality=quality)
    with Image.open(io.BytesIO(a)) as image, Image.open(expected) as other:
        assert image.quantization == other.quantization
    assert b == (source / "b.jpg").read_bytes()
    with pytest.raises(ValueError, match="jpeg_quality is 20; allowed: 50 to 100"):
        read_rules("list", jpeg_quality=20)


def test_duplicates_across_splits_keep_the_held_out_copy(source):
    for name in ("a", "b", "c", "d"):
        noise().save(source / f"{name}.png")
    shutil.copy(source / "a.png", source / "e.png")
    listed(
        source, ["a.png,CT,,,,train", "b.png,CT,,,,train", "c.png,CT,,,,dev", "d.png,CT,,,,test", "e.png,CT,,,,test"]
    )
    report, folder = curated(source)
    assert report["dropped"] == {"duplicate_across_splits": 1}
    assert [pair.split for pair in folder.pairs] == ["train", "validation", "test", "test"]


def test_groups_and_unknown_split_names(source):
    for number in range(8):
        noise().save(source / f"{number}.png")
    splits = ["train", "train", "test", "fold-2", "train", "test", "valid", "test"]
    listed(source, [f"{n}.png,CT,,,{'g' if n < 3 else ''},{split}" for n, split in enumerate(splits)])
    report, folder = curated(source)
    assert [pair.split for pair in folder.pairs[:3]] == ["train"] * 3
    assert (report["splits"]["moved"], report["splits"]["assigned"]) == (1, 1)
    assert report["unknown_splits"] == {"fold-2": 1}


def test_order_workers_units_and_repetition_change_nothing(source, monkeypatch):
    for number in range(12):
        noise().save(source / f"{number}.png")
    listed(source, [f"{n}.png,CT,class {n % 3},,{n // 2}," for n in range(12)])
    curated(source, "one")
    monkeypatch.setattr("mmkd.curation.sources.UNIT_ROWS", 5)
    curate(str(source), source.parent / "many units", read_rules("list"), tasks=TaskSettings(workers=2), quiet=True)
    one, many = (list(open_pairs(source.parent / name).pairs) for name in ("one", "many units"))
    assert [replace(pair, image="") for pair in one] == [replace(pair, image="") for pair in many]
    monkeypatch.undo()
    curate(str(source), source.parent / "two", read_rules("list"), tasks=TaskSettings(workers=2), quiet=True)
    one, two = source.parent / "one", source.parent / "two"
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files if f.name != "README.md")


def test_max_pairs_counts_what_was_not_chosen(source):
    for number in range(20):
        noise().save(source / f"{number}.png")
    listed(source, [f"{n}.png,CT,class {n % 2},,," for n in range(20)])
    report, folder = curated(source, max_pairs=8)
    assert report["dropped"] == {"over_max_pairs": 12}
    assert Counter(pair.label for pair in folder.pairs) == {"class 0": 4, "class 1": 4}


def test_nothing_left_and_wrong_rules(source):
    listed(source, ["a.png,CT,,,,"])
    with pytest.raises(ValueError, match=r"nothing is left of the 1 samples .*missing"):
        curate(str(source), source.parent / "pairs", read_rules("list"), quiet=True)
    assert [path.name for path in source.parent.iterdir()] == [source.name]
    with pytest.raises(ValueError, match="minimum_side"):
        read_rules("list", minimum_side=0)
    for rule, value in (("mentions", 2), ("panel_types", ["single"])):
        with pytest.raises(ValueError, match=f"--{rule}: .*leave it out here"):
            curate(str(source), source.parent / "pairs", read_rules("list", **{rule: value}), quiet=True)


def test_a_full_disk_leaves_no_output_and_the_same_command_finishes(source, monkeypatch):
    noise().save(source / "a.png")
    listed(source, ["a.png,CT,,,,"])

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stream, "write_sheet", full)
        with pytest.raises(OSError, match="No space left"):
            curate(str(source), source.parent / "pairs", read_rules("list"), quiet=True)
    assert sorted(path.name for path in source.parent.iterdir()) == [source.name, "pairs.parts"]
    curated(source)
    assert sorted(path.name for path in source.parent.iterdir()) == [source.name, "pairs"]


def test_a_list_that_changed_is_refused_until_it_is_overwritten(source):
    noise().save(source / "a.png")
    noise().save(source / "b.png")
    listed(source, ["a.png,CT,,first,,", "b.png,CT,,second,,"])
    first, _ = curated(source)
    assert curated(source)[0] == first
    listed(source, ["a.png,CT,,first,,", "b.png,CT,,other,,"])
    with pytest.raises(FileExistsError, match="overwrite"):
        curated(source)


def test_options_of_streams_apply_to_lists(source, tmp_path):
    for name in ("a", "b", "c"):
        noise(200, 100).save(source / f"{name}.jpg")
    rows = ["a.jpg,CT,,Scan of Mr. Smith on 3 May 2019.,,", "b.jpg,CT,,one,,", "c.jpg,CT,,(A) Axial. (B) Coronal.,,"]
    listed(source, rows)
    (tmp_path / "sums.txt").write_text(hashlib.sha256((source / "b.jpg").read_bytes()).hexdigest())
    rules = read_rules("list", scrub=True, split_panels=True, languages=[], minimum_words=2)
    report = curate(str(source), tmp_path / "pairs", rules, exclude=[tmp_path / "sums.txt"], quiet=True)
    assert [pair.caption for pair in open_pairs(tmp_path / "pairs").pairs] == [
        "Scan of [name] on [date].", "(A) Axial.", "(B) Coronal.",
    ]  # fmt: skip
    assert report["dropped"] == {"caption_too_short": 1}
    report = curate(str(source), tmp_path / "more", read_rules("list"), exclude=[tmp_path / "sums.txt"], quiet=True)
    assert report["dropped"] == {"in_test_set_image": 1}


def copies(source, name, count):
    """An image and the same picture in other files of lower quality."""
    picture = noise(8, 6).resize((160, 120), Image.Resampling.BICUBIC)
    for number in range(count):
        picture.save(source / f"{name}{number}.jpg", quality=95 - 3 * number)


def test_near_images_are_never_on_both_sides(source):
    rows = []
    for number in range(12):
        copies(source, f"{number}-", 2)
        rows += [f"{number}-{copy}.jpg,CT,class {number % 2},,," for copy in range(2)]
    listed(source, rows)
    report, folder = curated(source)
    assert (report["kept"], report["dropped"], report["splits"]["groups_joined"]) == (24, {}, 12)
    splits = [pair.split for pair in folder.pairs]
    assert splits[::2] == splits[1::2]
    assert set(splits) == {"train", "validation", "test"}
    report, folder = curated(source, "dropped", near_duplicates="image")
    assert report["dropped"] == {"near_duplicate": 12}


def test_near_images_follow_the_stated_split_and_copies_of_held_out_ones_go(source):
    copies(source, "a", 3)
    copies(source, "b", 2)
    noise().save(source / "c.png")
    listed(source, ["a0.jpg,CT,,one,,train", "a1.jpg,CT,,two,,test", "a2.jpg,CT,,three,,", "b0.jpg,CT,,four,g,train",
                    "b1.jpg,CT,,five,h,train", "c.png,CT,,six,,valid"])  # fmt: skip
    report, folder = curated(source)
    assert report["dropped"] == {"near_duplicate_across_splits": 1}
    assert {pair.caption: pair.split for pair in folder.pairs} == {
        "two": "test", "three": "test", "four": "train", "five": "train", "six": "validation",
    }  # fmt: skip


def test_spellings_that_differ_in_case_or_white_space_are_merged_and_reported(source):
    for number in range(4):
        noise().save(source / f"{number}.png")
    listed(source, ["0.png,CT,Polyp,,,", "1.png,ct,polyp,,,", "2.png,CT,Polyp ,,,", "3.png,CT,n/a,-,none,"])
    report, folder = curated(source)
    assert [(pair.modality, pair.label, pair.group) for pair in folder.pairs] == [("CT", "Polyp", "")] * 3 + [
        ("CT", "", "")
    ]
    assert report["merged_spellings"] == {"label": {"polyp": "Polyp"}, "modality": {"ct": "CT"}}
    assert "label 'polyp' was written 'Polyp'" in (source.parent / "pairs" / "README.md").read_text()


HEADER = "file,modality,label,caption,group,split\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "name,caption\n",
            "has the columns name, caption; needed are file and at least one of caption, label, modality",
        ),
        ("file,group\na,b\n", "needed are file"),
        ("", "has the columns"),
        ("file,label,label\na,b,c\n", "label more than once"),
        (HEADER, "lists no images"),
        ('file,label\na.png,"x\ny"\nb.png,"x\nc.png,y\n', r"line 4 opens a quote"),
        ("\x01\x02\rjunk\nmore\n", r"has the columns [^\n\r]*; needed"),
    ],
)
def test_errors_name_what_is_needed(source, content, message):
    (source / "labels.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        list_rows(source)


def test_a_table_elsewhere(source, tmp_path):
    noise().save(source / "a.png")
    (tmp_path / "table.csv").write_text("FILE;Caption\na.png;one\n")
    report = curate(str(source), tmp_path / "pairs", read_rules("list"), table=tmp_path / "table.csv", quiet=True)
    assert report["kept"] == 1
    for where, table, message in (
        (source, "none.csv", "no such file"),
        (tmp_path / "x.tar", "table.csv", "lists images"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            curate(str(where), tmp_path / "other", read_rules("list"), table=tmp_path / table, quiet=True)


@pytest.mark.parametrize("name", FOLDERS)
def test_real_folders(shared_data, tmp_path, name):
    report = curate(str(shared_data / name), tmp_path / "pairs", read_rules("list", max_pairs=40), quiet=True)
    folder = open_pairs(tmp_path / "pairs")
    assert 6 <= len(folder.pairs) <= 40
    assert set(report["dropped"]) <= {"over_max_pairs", "duplicate", "near_duplicate_across_splits"}
    assert {pair.modality for pair in folder.pairs} <= FOLDERS[name] | {"xray", "ultrasound"}
    assert {pair.split for pair in folder.pairs} == {"train", "validation", "test"}
    assert all(pair.caption and stored(folder, pair) for pair in folder.pairs)
    sides = {}
    for pair in folder.pairs:
        assert sides.setdefault(pair.group or pair.id, pair.split) == pair.split


def test_published_folder_keeps_ids_and_teachers(shared_data, tmp_path):
    source = shared_data / "mmkd_clip_official" / "MMKDCLIP_DATA"
    curate(str(source), tmp_path / "pairs", read_rules("list"), quiet=True)
    kept = {pair.id: pair for pair in open_pairs(tmp_path / "pairs").pairs}
    for pair in open_pairs(source).pairs:
        assert kept[pair.id].teachers == pair.teachers
        assert kept[pair.id].caption == pair.caption
        assert kept[pair.id].license == "CC BY"


def test_tables_without_images_are_no_collection(shared_data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither labels\.csv nor meta\.jsonl"):
        curate(str(shared_data / "tcga_survival"), tmp_path / "pairs", read_rules("list"), quiet=True)
    assert not any(tmp_path.iterdir())


def test_published_rows_carry_what_the_json_beside_states(tmp_path):
    sample = {"folderid": "f", "id": "1", "imgpath": "features/f/1/x.png", "txt": "c", "available_clips": ["PLIP"]}
    lines = [sample, *({**sample, "id": n, "imgpath": f"features/f/{n}/x.png", "txt": f"d{n}"} for n in "23")]
    lines.append({**sample, "id": "4", "imgpath": ""})
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "meta.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for number in "123":
        folder = tmp_path / "s" / "features" / "f" / number
        folder.mkdir(parents=True)
        noise().save(folder / "x.png")
    facts = {"article_license": "CC BY", "article_accession_id": "PMC1", "image_secondary_label": ["endoscopy"]}
    (tmp_path / "s" / "features" / "f" / "1" / "x.json").write_text(json.dumps(facts))
    (tmp_path / "private.json").write_text(json.dumps({"article_license": "secret"}))
    (tmp_path / "s" / "features" / "f" / "3" / "x.json").symlink_to(tmp_path / "private.json")
    report = curate(str(tmp_path / "s"), tmp_path / "pairs", read_rules("list"), quiet=True)
    one, two, three = open_pairs(tmp_path / "pairs").pairs
    assert three.license == "" and report["dropped"] == {"no_file_named": 1}
    assert (one.id, one.license, one.group, one.modality, one.teachers) == (
        "1",
        "CC BY",
        "PMC1",
        "endoscopy",
        ("PLIP",),
    )
    assert (two.id, two.license, two.group, two.modality) == ("2", "", "2", "unknown")
