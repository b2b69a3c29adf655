"""Every kind of source read from a tiny dataset, and everything that manifest and data may disagree on."""

import json

import numpy as np
import pytest
from PIL import Image

from mmkd.data.archives import ArchiveWriter
from mmkd.data.images import UnreadableImageError
from mmkd.evaluation.datasets.dataset import open_dataset
from mmkd.evaluation.datasets.manifest import DatasetNotFoundError, load_suite, make_manifest
from mmkd.evaluation.slides.survival import read_cohort

CLASSES = {"cat": ["a cat"], "dog": ["a dog", "a hound"]}


def manifest(source, **changes):
    values = {"id": "pets", "task": "classification", "modality": "ultrasound", "license": "CC0-1.0"}
    return make_manifest(values | {"classes": CLASSES, "source": source} | changes)


def save(path, number=0, size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number * 7 % 256, 40, 90)).save(path)
    return path


def png(number, size=(20, 16)):
    from io import BytesIO

    buffer = BytesIO()
    Image.new("RGB", size, (number * 7 % 256, 40, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def table(folder, rows, header="file,label,group,split", name="labels.csv"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    return {"csv": "${DATA}/" + f"{folder.name}/{name}"}


def splits(collection):
    return {pair.image: (pair.label, pair.split) for pair in collection.pairs}


def test_folders_of_classes_with_and_without_splits(tmp_path):
    for number in range(20):
        save(tmp_path / "flat" / ("cat", "dog")[number % 2] / f"{number}.png", number)
    save(tmp_path / "flat" / "cat" / "0_mask.png")
    flat = open_dataset(manifest({"imagefolder": "${DATA}/flat", "skip": "*_mask*"}), tmp_path)
    assert len(flat.pairs) == 20 and {pair.split for pair in flat.pairs} == {"train", "validation", "test"}
    assert flat.image(flat.pairs[3]).size == (20, 16) and len({flat.digest(pair) for pair in flat.pairs}) == 20
    for split in ("Training", "val", "Testing"):
        for name in ("cat", "dog"):
            save(tmp_path / "split" / split / name / "a.png")
    found = splits(open_dataset(manifest({"imagefolder": "${DATA}/split"}), tmp_path))
    assert found["Training/cat/a.png"] == ("cat", "train") and found["val/dog/a.png"] == ("dog", "validation")
    assert found["Testing/dog/a.png"] == ("dog", "test")
    with pytest.raises(ValueError, match=r"label 'cat' .* is no class of the manifest: cats, dog"):
        open_dataset(manifest({"imagefolder": "${DATA}/split"}, classes=["cats", "dog"]), tmp_path)


def test_tables(tmp_path):
    rows = [f"images/{n}.png,{('cat', 'dog')[n % 2]},g{n // 2},{('train', 'test')[n // 8]}" for n in range(16)]
    source = table(tmp_path / "t", rows)
    for n in range(15):
        save(tmp_path / "t" / "images" / f"{n}.png", n)
    collection = open_dataset(manifest(source, expects={"n": 16, "n_test": 8, "n_cases": 8}), tmp_path)
    counted = [pair.split for pair in collection.pairs]
    assert counted.count("test") == 8 and counted.count("train") + counted.count("validation") == 8
    assert collection.pairs[0].id == "pets:images/0.png" and collection.pairs[0].modality == "ultrasound"
    with pytest.raises(UnreadableImageError, match="no such file"):
        collection.image(collection.pairs[15])
    assert collection.digest(collection.pairs[15]) == "missing"
    only = open_dataset(manifest(source | {"where": {"group": ["g6", "g7"]}}, split="held-out"), tmp_path)
    assert [pair.split for pair in only.pairs] == ["test"] * 4
    assigned = open_dataset(manifest(source | {"group_pattern": r"/(\d)"}, split="assigned"), tmp_path)
    assert len({pair.split for pair in assigned.pairs if pair.group == "1"}) == 1


def test_tables_as_their_publishers_write_them(tmp_path):
    rows = ["a1;CAT;1;p1", "a2;DOG;1;p2", "a1.jpg;DOG;0;p3", "a2;CAT;0;p4"]
    source = table(tmp_path / "t", rows, "stem;kind;Train ;patient")
    source |= {"file": "{kind}/{stem}.jpg", "label": "kind", "splits": {"1": "train", "0": "test"}, "split": "Train"}
    pairs = open_dataset(manifest(source, group="patient"), tmp_path).pairs
    assert [pair.image for pair in pairs] == ["CAT/a1.jpg", "DOG/a2.jpg", "DOG/a1.jpg", "CAT/a2.jpg"]
    assert [pair.label for pair in pairs] == ["cat", "dog", "dog", "cat"] and pairs[2].split == pairs[3].split == "test"
    with pytest.raises(ValueError, match=r"file names a column 'knd' \(did you mean 'kind'\?\)"):
        open_dataset(manifest(source | {"file": "{knd}/{stem}.jpg"}), tmp_path)


def test_findings_in_columns_and_in_one_text(tmp_path):
    rows = ["a.png,1,0,train", "b.png,1,1,train", "c.png,0,1,test", "d.png,0,0,test"]
    source = table(tmp_path / "m", rows, "file,cat,dog,split") | {"label": ["cat", "dog"]}
    pairs = open_dataset(manifest(source, task="multilabel"), tmp_path).pairs
    assert [pair.label for pair in pairs] == ["cat", "cat|dog", "dog", ""]
    with pytest.raises(ValueError, match=r"b.png has 2 labels \(cat, dog\); a classification needs one"):
        open_dataset(manifest(source), tmp_path)
    source = table(tmp_path / "m", ["a.png,cat;dog", "b.png,none", "c.png,Dog"], "file,label")
    source |= {"separator": ";", "rename": {"none": "", "Dog": "dog"}}
    pairs = open_dataset(manifest(source, task="multilabel"), tmp_path).pairs
    assert [pair.label for pair in pairs] == ["cat|dog", "", "dog"]


@pytest.mark.parametrize(
    ("rows", "changes", "match"),
    [
        (["a.png,cat,p1,train", "b.png,dog,p1,test"], {}, r"1 groups are in several splits: p1 \(test and train\)"),
        (["a.png,cat,,train", "b.png,dgo,,test"], {}, r"label 'dgo' \(did you mean 'dog'\?\)"),
        (["a.png,cat|dgo,,train", "b.png,dog,,test"], {"task": "multilabel"}, r"label 'dgo' \(did you mean 'dog'\?\)"),
        (["a.png,cat,,train", "b.png,cat,,test"], {}, r"class 'dog' of the manifest is not in the data"),
        (["a.png,cat,,train", "b.png,dog,,"], {}, "1 of 2 rows have no split"),
        (["a.png,cat,,train", "b.png,dog,,val"], {}, "no sample is in the test split"),
        (["a.png,cat,,train", "b.png,dog,,foo"], {}, "split 'foo' is none of train"),
        (["a.png,cat,,train", "b.png,,,test"], {"classes": ["cat", "x"]}, "class 'x'"),
        (["a.png,cat,,train", "b.png,dog,,test"], {"expects": {"n_test": 2}}, "n_test is 1, the manifest expects 2"),
        (["a.png,cat,,train", "b.png,dog,,test"], {"group": "grup"}, r"no column 'grup' for group \(did you mean"),
        (["a.png,cat,,train", "b.png,dog,test"], {}, "line 3: not as many values"),
        (["a.png,cat,,train", "b.png,dog,,test"], {"sha256": "0" * 64}, "the manifest states 0000"),
        (["a.png,cat,,train", "b.png,dog,,test", "b.png,cat,,test"], {}, "b.png is in 2 rows.*labels are 'cat', 'd"),
        (
            ["a.png,cat,,train", "b.png,dog,,test", "a.png,cat,,test"],
            {},
            "a.png is in 2 rows.*splits are 'test', 't",
        ),
        (["a.png,cat,,train", "b.png,dog,,test", "b.png,dog,,test"], {}, "b.png is in 2 rows; keep one"),
        (
            ["a.png,cat,,train"] * 2,
            {"task": "retrieval", "classes": {}, "source": {"caption": "label"}},
            "no sample is",
        ),
        (
            ["a.png,cat,,train", "a.png,dog,,test"],
            {"task": "retrieval", "classes": {}, "source": {"caption": "label"}},
            "a.png is in 2 rows",
        ),
        (["a.png,cat,,train"], {"source": {"where": {"label": "cow"}}}, "holds no samples, or `where` leaves none"),
        (["a.png,cat,1,train"], {"source": {"label": ["group"]}}, "class 'group'|label 'group'"),
        (["a.png,cat,-1,test"], {"source": {"label": ["group"]}}, "'group' holds '-1', neither 0 nor 1"),
    ],
)
def test_what_manifest_and_data_disagree_on(tmp_path, rows, changes, match):
    source = table(tmp_path / "t", rows) | changes.get("source", {})
    with pytest.raises(ValueError, match=match):
        open_dataset(manifest(source, **{key: changes[key] for key in changes if key != "source"}), tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"file,lab\xe9l\na.png,cat\n", r"did you mean 'labél'"),
        (b"file,label,label\na.png,cat,dog\n", r"labels\.csv has 2 columns 'label'"),
        (b"file,label\n", r"labels\.csv holds no rows"),
    ],
)
def test_tables_that_are_none(tmp_path, content, match):
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        open_dataset(manifest({"csv": "${DATA}/labels.csv"}), tmp_path)


def test_what_limits_an_evaluation_is_noted(tmp_path):
    rows = ["a.png,cat,,train", "b.png,dog,,train", "c.png,cat,,test"]
    notes = open_dataset(manifest(table(tmp_path / "t", rows)), tmp_path).notes
    assert "all test images are of one class, cat" in notes


def test_nothing_leaves_the_folder(tmp_path):
    save(tmp_path / "secret.png")
    source = table(tmp_path / "t", ["../secret.png,cat,,train", "link.png,dog,,test"])
    (tmp_path / "t" / "link.png").symlink_to(tmp_path / "secret.png")
    collection = open_dataset(manifest(source), tmp_path)
    for pair in collection.pairs:
        with pytest.raises(UnreadableImageError, match="refused"):
            collection.image(pair)
    with pytest.raises(ValueError, match="leaves"):
        open_dataset(manifest(source | {"images": "../.."}), tmp_path)


def test_a_folder_of_images_is_named_as_seen_from_the_table(tmp_path):
    save(tmp_path / "t" / "images" / "a.png")
    save(tmp_path / "t" / "images" / "b.png")
    source = table(tmp_path / "t", ["a.png,cat,,train", "b.png,dog,,test"])
    collection = open_dataset(manifest(source | {"images": "images"}), tmp_path)
    assert all(collection.image(pair).size for pair in collection.pairs)
    for wrong in ("imags", "${DATA}/t/images"):
        with pytest.raises(ValueError, match=r"is no folder in .*/t; name it relative to the folder"):
            open_dataset(manifest(source | {"images": wrong}), tmp_path)


def test_absent_data_say_where_they_are_to_be_had(tmp_path, monkeypatch):
    monkeypatch.delenv("MMKD_DATA", raising=False)
    asked = manifest({"csv": "${DATA}/t/labels.csv"}, tier="B", register="https://example.org/data")
    with pytest.raises(
        DatasetNotFoundError, match=r"--data DIR or MMKD_DATA; register for it at https://example.org/data"
    ):
        open_dataset(asked)
    monkeypatch.setenv("MMKD_DATA", str(tmp_path))
    with pytest.raises(DatasetNotFoundError, match=r"not at .*/t/labels.csv; register for it"):
        open_dataset(asked)


def medmnist(path, labels, size=28, **changes):
    arrays = {}
    for part in ("train", "val", "test"):
        arrays[f"{part}_images"] = np.arange(6 * size * size, dtype=np.uint8).reshape(6, size, size)
        arrays[f"{part}_labels"] = np.array(labels, dtype=np.uint8)
    np.savez_compressed(path, **(arrays | changes))


def test_medmnist_arrays(tmp_path):
    medmnist(tmp_path / "pets.npz", [[0], [1], [0], [1], [1], [0]])
    source = {"medmnist": "${DATA}/pets"}
    collection = open_dataset(manifest(source), tmp_path)
    assert [pair.label for pair in collection.pairs[:3]] == ["cat", "dog", "cat"]
    assert [pair.split for pair in collection.pairs[::6]] == ["train", "validation", "test"]
    assert np.asarray(collection.image(collection.pairs[1]))[0, :3, 0].tolist() == [16, 17, 18]
    with pytest.raises(DatasetNotFoundError, match=r"pets_224\.npz"):
        open_dataset(manifest(source | {"size": 224}), tmp_path)
    medmnist(tmp_path / "pets_64.npz", [[0, 1], [1, 1], [0, 0], [1, 0], [0, 0], [1, 1]], 64)
    several = open_dataset(manifest(source | {"size": 64}, task="multilabel"), tmp_path)
    assert [pair.label for pair in several.pairs[:3]] == ["dog", "cat|dog", ""]
    with pytest.raises(ValueError, match="is not the number of one of the manifest's 2 classes"):
        open_dataset(manifest(source | {"size": 64}), tmp_path)
    medmnist(tmp_path / "pets_64.npz", [[0, 1], [1, 2], [0, 0]] * 2, 64)
    with pytest.raises(ValueError, match=r"findings \[1, 2\] are not zeros and ones"):
        open_dataset(manifest(source | {"size": 64}, task="multilabel"), tmp_path)
    (tmp_path / "pets_64.npz").unlink()
    medmnist(tmp_path / "pets.npz", [[0]] * 6, test_labels=np.full((6, 1), np.nan))
    with pytest.raises(ValueError, match=r"label \[nan\] is not the number"):
        open_dataset(manifest(source), tmp_path)
    medmnist(tmp_path / "pets.npz", [[0]] * 6, test_images=np.array([{}] * 6))
    with pytest.raises(ValueError, match="test_images is no array of numbers: it holds Python objects"):
        open_dataset(manifest(source), tmp_path)
    medmnist(tmp_path / "pets.npz", [[0], [1]] * 3, train_images=np.zeros((6, 4, 4, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"train_images is uint8 \(6, 4, 4, 4\); needed"):
        open_dataset(manifest(source), tmp_path)
    medmnist(tmp_path / "pets.npz", [[0], [1]] * 3, val_images=np.zeros((5, 28, 28), dtype=np.uint8))
    with pytest.raises(ValueError, match="val_images has 5 rows, its labels 6"):
        open_dataset(manifest(source), tmp_path)
    (tmp_path / "pets.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"is no \.npz file"):
        open_dataset(manifest(source), tmp_path)


def test_webdataset_tars(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "wds" / split).mkdir(parents=True)
        with (tmp_path / "wds" / split / "0.tar").open("wb") as file:
            writer = ArchiveWriter(file)
            for n in range(4):
                writer.add(f"s{n}.png", png(n))
                writer.add(f"s{n}.cls", str(n % 2).encode())
                writer.add(f"s{n}.txt", b"one\ntwo\n")
            writer.add("../out.png", png(9))
            writer.finish()
    collection = open_dataset(manifest({"wds": "${DATA}/wds"}), tmp_path)
    assert [pair.label for pair in collection.pairs if pair.split == "test"] == ["cat", "dog"] * 2
    assert collection.image(collection.pairs[2]).getpixel((0, 0))[0] == 14
    with (tmp_path / "captions.tar").open("wb") as file:
        writer = ArchiveWriter(file)
        writer.add("a.png", png(1))
        writer.add("a.txt", b"one caption\nanother one\n")
        writer.finish()
    asked = manifest({"wds": "${DATA}/captions.tar"}, task="retrieval", classes={}, split="held-out")
    pairs = open_dataset(asked, tmp_path).pairs
    assert [pair.caption for pair in pairs] == ["one caption", "another one"] and pairs[0].image == pairs[1].image


def test_parquet_and_datasets(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "p").mkdir()
    for split in ("train", "test"):
        columns = {"image": [{"bytes": png(n), "path": None} for n in range(6)], "label": ["cat", "dog"] * 3}
        parquet.write_table(pyarrow.table(columns), tmp_path / "p" / f"{split}-0.parquet", row_group_size=2)
    collection = open_dataset(manifest({"parquet": "${DATA}/p"}), tmp_path)
    assert [pair.label for pair in collection.pairs if pair.split == "test"] == ["cat", "dog"] * 3
    assert collection.image(collection.pairs[5]).getpixel((0, 0))[0] == 35
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    place = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features["second"], features["several"] = place, [place]
    named = {"bytes": None, "path": str(tmp_path / "private.png")}
    values = {"image": columns["image"], "label": [0, 1] * 3, "second": [named] * 6, "several": [[named]] * 6}
    part = datasets.Dataset.from_dict(values, features=features)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "hf")
    for split in ("train", "test"):  # a forged description: these columns are images, too, in files that rows name
        file = tmp_path / "hf" / split / "dataset_info.json"
        info = json.loads(file.read_text())
        info["features"] |= {"second": {"_type": "Image"}, "several": {"feature": {"_type": "Image"}, "_type": "List"}}
        file.write_text(json.dumps(info))
    saved = open_dataset(manifest({"hf": "${DATA}/hf"}), tmp_path)
    assert [pair.label for pair in saved.pairs if pair.split == "test"] == ["cat", "dog"] * 3
    assert saved.image(saved.pairs[1]).getpixel((0, 0))[0] == 7  # and nothing has opened the other columns' files
    with pytest.raises(UnreadableImageError, match="holds no picture"):
        forged = open_dataset(manifest({"hf": "${DATA}/hf", "image": "second"}), tmp_path)
        forged.image(forged.pairs[0])


def test_a_name_of_the_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    asked = manifest({"hf": "nobody/pets"}, register="https://example.org/pets")
    with pytest.raises(
        DatasetNotFoundError, match=r"Hub could not be reached for nobody/pets.*download it from https://example"
    ):
        open_dataset(asked, tmp_path)


def test_questions_in_parquet_and_in_the_form_of_slake(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    changes = {"task": "vqa", "classes": {}}
    columns = {"image": [png(0), png(0), png(1)], "question": ["is it?", "what  is it?", "is it?"]}
    columns["answer"] = ["Yes.", "a cat", "no"]
    parquet.write_table(pyarrow.table(columns), tmp_path / "test-0.parquet")
    collection = open_dataset(manifest({"parquet": "${DATA}/test-0.parquet"}, **changes), tmp_path)
    assert len(collection.pairs) == 2 and [question.closed for question in collection.questions] == [True, False, True]
    assert collection.questions[1].sha256 == collection.digest(collection.pairs[0])
    assert collection.questions[1].text == "what is it?" and collection.questions[0].split == "test"
    folder = tmp_path / "slake"
    for number, (split, name) in enumerate((("train", "train"), ("validate", "val"), ("test", "test"))):
        save(folder / "imgs" / name / "source.jpg", number * 12)
        row = {"img_name": f"{name}/source.jpg", "question": "is it?", "answer": "Yes", "answer_type": "CLOSED"}
        other = row | {"q_lang": "zh"}
        (folder / f"{split}.json").write_text(json.dumps([row | {"q_lang": "en"}, other]))
    for name in ("validate.json", "validation.json"):  # as the project's page and as the Hub call it
        (folder / "validate.json").rename(folder / name)
        collection = open_dataset(manifest({"questions": "${DATA}/slake"}, **changes), tmp_path)
        assert [question.split for question in collection.questions] == ["train", "validation", "test"]
        assert [pair.split for pair in collection.pairs] == ["train", "validation", "test"]
    (folder / "test.json").write_text(json.dumps([row | {"answer": " "}]))
    with pytest.raises(ValueError, match=r"test\.json: question 'is it\?' has no answer"):
        open_dataset(manifest({"questions": "${DATA}/slake"}, **changes), tmp_path)
    parquet.write_table(pyarrow.table(columns | {"answer": ["yes", None, "no"]}), tmp_path / "test-0.parquet")
    with pytest.raises(ValueError, match=r"test-0\.parquet@0\+1: question 'what is it\?' has no answer"):
        open_dataset(manifest({"parquet": "${DATA}/test-0.parquet"}, **changes), tmp_path)


def test_slides_of_a_cohort(tmp_path):
    rows = ["s1,c1,10.5,1", "s2,c1,10.5,1", "s3,c2,3,0", "s4,c2,3,"]
    table(tmp_path / "cohort", rows, "slide,case,months,censored")
    source = {"bags": "${DATA}/cohort", "time": "months", "censored": "censored"}
    cohort = open_dataset(manifest(source, task="survival", classes={}, expects={"n_cases": 2}), tmp_path)
    assert cohort.root == tmp_path / "cohort" and [pair.group for pair in cohort.pairs] == ["c1", "c1", "c2", "c2"]
    assert [cohort.metadata[pair.id]["event"] for pair in cohort.pairs] == ["0", "0", "1", ""]
    assert cohort.metadata[cohort.pairs[2].id]["time"] == "3" and {pair.split for pair in cohort.pairs} == {"test"}
    with pytest.raises(ValueError, match="no column 'event' for event"):
        open_dataset(manifest({"bags": "${DATA}/cohort", "time": "months"}, task="survival", classes={}), tmp_path)
    for row, match in {
        "s5,c5,-2,0": "pets:s5: time '-2'",
        "s5,c1,9,1": "case c1 disagree",
        "s4,c2,3,": "s4 is in 2",
    }.items():
        table(tmp_path / "cohort", [*rows, row], "slide,case,months,censored")
        with pytest.raises(ValueError, match=match):
            read_cohort(open_dataset(manifest(source, task="survival", classes={}), tmp_path), None)


@pytest.mark.parametrize(
    ("row", "match"), [("s3,c1,dog,test", "1 groups are in several splits: c1"), ("s3,c3,dgo,test", "label 'dgo'")]
)
def test_slides_of_a_diagnosis(tmp_path, row, match):
    source = {"bags": "${DATA}/slides"}
    table(tmp_path / "slides", ["s1,c1,cat,train", "s2,c2,dog,test"], "slide,case,label,split")
    assert open_dataset(manifest(source, task="diagnosis"), tmp_path).root == tmp_path / "slides"
    table(tmp_path / "slides", ["s1,c1,cat,train", "s2,c2,dog,test", row], "slide,case,label,split")
    with pytest.raises(ValueError, match=match):
        open_dataset(manifest(source, task="diagnosis"), tmp_path)


def test_the_offline_suite_opens(shared_data):
    opened = {own.id: open_dataset(own, shared_data) for own in load_suite("offline")}
    assert len(opened["modality"].pairs) == 6450 and len(opened["vqa-rad"].questions) == 2248
    assert sum(question.split == "test" for question in opened["vqa-rad"].questions) == 451
    assert sum(pair.split == "test" for pair in opened["medpix2"].pairs) == 200
    assert {pair.modality for pair in opened["modality"].pairs} == {"any"}
    events = [facts["event"] for facts in opened["tcga-blca-clinical"].metadata.values()]
    assert len(events) == 437 and set(events) == {"0", "1"}
    for name in ("brain-mri-subset", "vqa-rad", "modality"):
        assert opened[name].image(opened[name].pairs[0]).mode == "RGB"
