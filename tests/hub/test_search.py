"""``mmkd index`` and ``mmkd search``: a folder that changes, and queries by text and image."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mmkd.command.settings import parse
from mmkd.hub import index as index_recipe
from mmkd.hub import search as search_recipe
from mmkd.serving import encoding
from mmkd.serving.index import SearchIndex
from mmkd.student.folder import save_student
from mmkd.student.towers import build_model


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    Image.fromarray(pixels).resize((48, 40)).save(path, format="PNG")
    return path


@pytest.fixture
def scans(tmp_path):
    for k in range(6):
        picture(tmp_path / "scans" / f"p{k % 2}" / f"{k}.png", k)
    (tmp_path / "scans" / "broken").write_text("no image")
    return tmp_path / "scans"


def make(model, scans, *arguments):
    output = scans.parent / "index"
    settings = [str(scans), "--model", str(model), "--output", str(output), "--device", "cpu", *arguments]
    index_recipe.main(parse(index_recipe.IndexSettings, settings))
    return output


def ask(index, *arguments):
    settings = parse(search_recipe.SearchSettings, [str(index), *map(str, arguments), "--device", "cpu"])
    search_recipe.main(settings)


IDS = ["p0/0.png", "p0/2.png", "p0/4.png", "p1/1.png", "p1/3.png", "p1/5.png"]


def test_an_index_follows_its_folder(published_student, scans, capsys, monkeypatch):
    output = make(published_student, scans)
    shown = capsys.readouterr()
    assert "6 images; 6 added or changed, 0 removed" in shown.out and "left out broken: unsupported" in shown.err
    assert sorted(SearchIndex.open(output).ids) == IDS
    before = SearchIndex.open(output).vectors(IDS)
    (scans / "p0" / "0.png").unlink()
    picture(scans / "p0" / "2.png", 77)
    os.utime(scans / "p1" / "1.png", (1, 1))  # touched, the same content
    picture(scans / "p2" / "new", 78)
    (scans / "p0" / "4.png").write_text("an image no longer")
    encoded = []
    read = index_recipe.read_image
    monkeypatch.setattr(index_recipe, "read_image", lambda file, window: encoded.append(file.id) or read(file, window))
    make(published_student, scans)
    assert "5 images; 2 added or changed, 1 removed" in capsys.readouterr().out
    opened = SearchIndex.open(output)
    assert sorted(opened.ids) == ["p0/2.png", "p1/1.png", "p1/3.png", "p1/5.png", "p2/new"]
    assert sorted(encoded) == ["broken", "p0/2.png", "p0/4.png", "p2/new"]
    after = opened.vectors(IDS)
    assert (before[3:] == after[3:]).all() and not np.allclose(before[1], after[1])
    encoded.clear()
    make(published_student, scans, "--quiet")
    assert sorted(encoded) == ["broken", "p0/4.png"]  # what could not be read is tried again


def test_queries_by_text_and_image(published_student, scans, capsys):
    output = make(published_student, scans, "--quiet")
    capsys.readouterr()
    ask(output, scans / "p1" / "3.png", "-k", "2", "--format", "json")
    hits = json.loads(capsys.readouterr().out)
    assert len(hits) == 2 and hits[0]["image"] == "p1/3.png" and hits[0]["score"] == pytest.approx(1, abs=1e-3)
    ask(output, "an MRI, of the brain", "-k", "100", "--format", "csv")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "image,score" and len(lines) == 7
    ask(output, scans / "p1" / "3.png", "--near")
    assert all(float(line.split()[0]) >= 0.95 for line in capsys.readouterr().out.splitlines())
    ask(output, "text", "--least", "1")
    shown = capsys.readouterr()
    assert shown.out == "" and "no answer" in shown.err


def test_index_and_model_move_together(published_student, scans, capsys, tmp_path):
    (tmp_path / "work").mkdir()
    shutil.copytree(published_student, tmp_path / "work" / "model")
    shutil.move(scans, tmp_path / "work" / "scans")
    make(tmp_path / "work" / "model", tmp_path / "work" / "scans", "--quiet")
    text = (tmp_path / "work" / "index" / "index.json").read_text()
    assert json.loads(text)["model"]["source"] == "../model" and str(tmp_path) not in text
    (tmp_path / "work").rename(tmp_path / "moved")
    ask(tmp_path / "moved" / "index", "text", "-k", "1")
    assert capsys.readouterr().out.endswith(".png\n")


def test_another_model_is_refused(published_student, scans, tmp_path):
    output = make(published_student, scans, "--quiet")
    torch.manual_seed(5)
    save_student(tmp_path / "other", *build_model("random:tiny", "random:tiny", 16))
    with pytest.raises(ValueError, match="was made with other weights"):
        make(tmp_path / "other", scans)
    with pytest.raises(ValueError, match="was made with other weights"):
        ask(output, "text", "--model", tmp_path / "other")


@pytest.mark.parametrize("added", [0, 2])
def test_a_killed_run_keeps_what_it_added_and_goes_on(published_student, scans, monkeypatch, capsys, added):
    monkeypatch.setattr(encoding, "PART_ITEMS", 2)
    add, calls = SearchIndex.add, []

    def killed(self, *arguments):
        calls.append(1)
        if len(calls) > added:
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(SearchIndex, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        make(published_student, scans)
    monkeypatch.setattr(SearchIndex, "add", add)
    output = scans.parent / "index"
    assert bool(len(SearchIndex.open(output))) == bool(added) and len(SearchIndex.open(output)) < 6
    make(published_student, scans)
    assert sorted(SearchIndex.open(output).ids) == IDS


def test_what_is_refused(published_student, scans, tmp_path):
    output = make(published_student, scans, "--quiet")
    (tmp_path / "bad.png").write_text("no image")
    for arguments, error, text in (
        ([tmp_path / "none", "text"], FileNotFoundError, "is no index; make one"),
        ([output, "text", "-k", "0"], ValueError, "--k is 0; it must be at least 1"),
        ([output, " "], ValueError, "the query is empty"),
        ([output, "none.png"], FileNotFoundError, "no such file; it is taken for an image"),
        ([output, "https://host/a.png"], ValueError, "is a URL"),
        ([output, tmp_path / "bad.png"], ValueError, "unsupported"),
    ):
        with pytest.raises(error, match=text):
            ask(*arguments)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        make(published_student, tmp_path / "nowhere")
    (tmp_path / "broken").mkdir()
    shutil.copy(tmp_path / "bad.png", tmp_path / "broken")
    with pytest.raises(ValueError, match="could be read"):
        index_recipe.main(
            parse(
                index_recipe.IndexSettings,
                [str(tmp_path / "broken"), "--model", str(published_student), "--output", str(tmp_path / "new")],
            )
        )


def test_an_index_inside_its_folder_does_not_index_itself(published_student, scans, capsys):
    inside = scans / "index"
    settings = [str(scans), "--model", str(published_student), "--output", str(inside), "--device", "cpu"]
    for _ in range(2):
        index_recipe.main(parse(index_recipe.IndexSettings, settings))
    assert sorted(SearchIndex.open(inside).ids) == IDS
