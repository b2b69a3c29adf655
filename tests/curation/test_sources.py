"""Sources other than tars: Parquet, JSON lines, folders of classes, lists, the Hub."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from biomedica_form import picture, sample, write_tar

from mmkd.curation import sources
from mmkd.curation.rules import read_rules
from mmkd.curation.sources import plan_units, preset_of
from mmkd.curation.stream import curate
from mmkd.data.folder import open_pairs
from mmkd.data.images import read_image_bytes

ANY = read_rules("any", validation_share=0.0, test_share=0.0)


def curated(source, output):
    report = curate(str(source), output, ANY, quiet=True)
    assert report["read"] == report["kept"] + sum(report["dropped"].values())
    folder = open_pairs(output)
    return report, folder, [read_image_bytes(folder.image_path(pair)) for pair in folder.pairs]


@pytest.mark.parametrize("form", ["struct", "bytes"])
def test_parquet(tmp_path, form):
    images = [{"bytes": picture(n), "path": f"PMC77_{n}.jpg"} if form == "struct" else picture(n) for n in range(3)]
    rows = {
        "image": [*images, None],
        "text": ["one", "two", None, "four"],
        "label": [0, 1, 2, 3],
        "pmcid": ["PMC1"] * 4,
    }
    (tmp_path / "s").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "s" / "train-00000.parquet")
    (tmp_path / "s" / "train-00001.parquet").write_bytes(b"PAR1 and nothing else")
    report, folder, stored = curated(tmp_path / "s", tmp_path / "pairs")
    assert report["dropped"] == {"damaged_shard": 1, "no_image": 1}
    assert stored == [picture(n) for n in range(3)]
    assert [pair.caption for pair in folder.pairs][:2] == ["one", "two"]
    assert "2" in folder.pairs[2].caption  # of the label
    assert {pair.group for pair in folder.pairs} == {"PMC1"}


def test_json_lines_of_pmc_oa_and_roco(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_ROWS", 2)
    source = tmp_path / "s"
    (source / "images").mkdir(parents=True)
    for number in range(4):
        (source / "images" / f"PMC100{number}_Figure_1.jpg").write_bytes(picture(number))
    (tmp_path / "secret.jpg").write_bytes(picture(9))
    (source / "images" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    lines = [
        {"image": "PMC1000_Figure_1.jpg", "caption": "PMC-OA's form", "alignment_score": 0.3},
        {"id": "ROCO_2", "img": ["images/PMC1001_Figure_1.jpg"], "text": "ROCO's form", "pmc_id": "PMC55"},
        {"file_name": "PMC1002_Figure_1.jpg", "text": "metadata.jsonl", "modality": "CT", "license": "CC BY"},
        {"image": "PMC1003_Figure_1.jpg", "caption": ["a", "list"]},
        {"image": "../secret.jpg", "caption": "x"}, {"image": "link.jpg", "caption": "x"},
        {"image": "none.jpg", "caption": "x"}, {"caption": "x"}, [1],
    ]  # fmt: skip
    text = "\n".join([*map(json.dumps, lines), '{"image": ', "", ""])
    (source / "pmc_oa.jsonl").write_text(text)
    assert len(plan_units(str(source))) == 6
    report, folder, stored = curated(source, tmp_path / "pairs")
    assert report["dropped"] == {
        "invalid_json": 1, "missing": 1, "no_file_named": 1, "path_outside": 2, "wrong_type": 2,
    }  # fmt: skip
    assert [(pair.caption, pair.group) for pair in folder.pairs] == [
        ("PMC-OA's form", "PMC1000"), ("ROCO's form", "PMC55"), ("metadata.jsonl", "PMC1002"),
    ]  # fmt: skip
    assert stored == [picture(number) for number in range(3)]
    assert (folder.pairs[2].modality, folder.pairs[2].license) == ("CT", "CC BY")


def test_folders_of_classes(tmp_path):
    for number, place in enumerate(["train/glioma", "train/healthy", "test/glioma", "test/healthy"]):
        folder = tmp_path / "s" / place
        folder.mkdir(parents=True)
        (folder / "a.JPG").write_bytes(picture(number))
    (tmp_path / "s" / "train" / "glioma" / "a.txt").write_text("A caption of its own.")
    (tmp_path / "s" / "notes.md").write_text("no image")
    report, folder, stored = curated(tmp_path / "s", tmp_path / "pairs")
    assert [(pair.label, pair.split) for pair in folder.pairs] == [
        ("glioma", "test"), ("healthy", "test"), ("glioma", "train"), ("healthy", "train"),
    ]  # fmt: skip
    assert folder.pairs[2].caption == "A caption of its own."
    assert "glioma" in folder.pairs[0].caption.lower()
    assert report["dropped"] == {}
    assert stored[2] == picture(0)


def test_presets_and_units(tmp_path):
    write_tar(tmp_path / "tars" / "deep" / "0.tar", sample(0))
    (tmp_path / "classes" / "a").mkdir(parents=True)
    (tmp_path / "classes" / "a" / "x.JPG").write_bytes(picture(0))
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "x.jsonl").write_text("{}\n\n{}")
    expected = {
        "tars": "paper", "tars/deep/0.tar": "paper", "classes": "list", "classes/a/x.JPG": "list", "lines": "any",
    }  # fmt: skip
    assert {name: preset_of(str(tmp_path / name)) for name in expected} == expected
    assert preset_of("hf://datasets/BIOMEDICA/biomedica_webdataset_24M") == "paper"
    assert preset_of("hf://datasets/axiong/pmc_oa") == "any"
    assert preset_of("packaged") == preset_of(str(tmp_path / "lines"), tmp_path / "table.csv") == "list"
    assert [unit.kind for unit in plan_units(str(tmp_path / "tars/deep/0.tar"))] == ["tar"]
    assert [(unit.start, unit.stop) for unit in plan_units(str(tmp_path / "lines"))] == [(0, 6)]


def test_groups_without_a_split_are_held_out_in_every_form(tmp_path):
    (tmp_path / "s").mkdir()
    rows = {"image": [picture(n) for n in range(12)], "text": [f"caption {n}" for n in range(12)]}
    pq.write_table(pa.table(rows), tmp_path / "s" / "a.parquet")
    report = curate(str(tmp_path / "s"), tmp_path / "pairs", read_rules("any", near_duplicates="off"), quiet=True)
    assert report["contents"]["split"] == {"train": 7, "validation": 2, "test": 3}


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [("GatedRepoError", PermissionError, "accept its terms"), ("RepositoryNotFoundError", FileNotFoundError, "private"),
     ("HfHubHTTPError", FileNotFoundError, "could not be reached")],
)  # fmt: skip
def test_errors_of_the_hub_say_what_to_do(monkeypatch, tmp_path, name, kind, message):
    import huggingface_hub
    from huggingface_hub import errors

    error = getattr(errors, name).__new__(getattr(errors, name))
    Exception.__init__(error, "403")

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", refuse)
    with pytest.raises(kind, match=message) as told:
        curate("hf://datasets/BIOMEDICA/biomedica_webdataset_24M", tmp_path / "pairs", ANY, quiet=True)
    assert "BIOMEDICA/biomedica_webdataset_24M" in str(told.value)
    assert not any(tmp_path.iterdir())


def test_tars_of_the_hub_pass_through_a_scratch_folder(monkeypatch, tmp_path):
    """A repository of two tars, served from this disk through the library's own entry points."""
    import shutil

    import huggingface_hub
    from huggingface_hub.hf_api import RepoFile

    for shard in range(2):
        write_tar(tmp_path / "remote" / "train" / f"{shard}.tar", [*sample(8 * shard), *sample(8 * shard + 4)])

    def tree(self, repo, **_):
        files = [p.relative_to(tmp_path / "remote").as_posix() for p in (tmp_path / "remote").rglob("*.tar")]
        return [RepoFile(path=name, size=1, oid="0") for name in [*files, "README.md"]]

    def download(repo, name, repo_type, revision, local_dir):
        assert (repo, repo_type) == ("BIOMEDICA/small", "dataset")
        (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(tmp_path / "remote" / name, local_dir / name))

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", tree)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    report, _, stored = curated("hf://datasets/BIOMEDICA/small", tmp_path / "pairs")
    assert report["kept"] == 4
    assert stored == [picture(number) for number in (0, 4, 8, 12)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs", "remote"]
