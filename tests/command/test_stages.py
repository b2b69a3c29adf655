"""What makes the pipeline run a stage again."""

from pathlib import Path

import pytest

from mmkd.command import stages
from mmkd.command.stages import Stage, hash_of_named


@pytest.fixture
def named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/images/0.png", "data/labels.csv", "teacher/model.safetensors", "work/pairs/manifest.arrow"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"before")
    values = {"source": "data", "teacher": ["own=teacher", "plip"], "pairs": "work/pairs", "query": "", "top": 1}
    return lambda: hash_of_named(values | {"text": 400 * "long "}, [Path("work")])


@pytest.mark.parametrize("file", ["data/images/0.png", "data/labels.csv", "teacher/model.safetensors"])
def test_a_file_that_is_replaced_by_one_of_equal_size_changes_the_key(named, file):
    before = named()
    Path(file).touch()
    assert named() == before
    Path(file).write_bytes(b"after!")
    assert named() != before


def test_outputs_of_stages_below_a_named_folder_do_not_change_the_key(named):
    before = hash_of_named({"source": "."}, [Path("work")])
    Path("work/pairs/manifest.arrow").write_bytes(b"after")
    assert hash_of_named({"source": "."}, [Path("work")]) == before
    Path("data/labels.csv").write_bytes(b"after")
    assert hash_of_named({"source": "."}, [Path("work")]) != before


def test_outputs_of_stages_and_files_that_no_setting_names_do_not_change_the_key(named):
    before = named()
    Path("work/pairs/manifest.arrow").write_bytes(b"after")
    Path("other").write_bytes(b"after")
    assert named() == before


def test_the_version_of_the_package_is_part_of_the_key(monkeypatch):
    before = Stage("curate", "curate", Path("pairs"), {"source": "data"}).key
    assert Stage("curate", "curate", Path("pairs"), {"source": "data"}).key == before
    monkeypatch.setattr(stages, "VERSION", "99")
    assert Stage("curate", "curate", Path("pairs"), {"source": "data"}).key != before
