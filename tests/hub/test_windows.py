"""DICOM through the verbs, each in the window that was asked for."""

import json
import shutil

import numpy as np
import pytest
from tiny_model import save_tiny

from mmkd.command.settings import parse
from mmkd.hub import embed, explain, index, predict, search

pydicom = pytest.importorskip("pydicom", reason="DICOM is read by pydicom")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("windows")
    save_tiny(folder / "model")
    (folder / "scans").mkdir()
    for name in ("CT_small.dcm", "MR_small.dcm"):
        shutil.copy(pydicom.data.get_testdata_file(name), folder / "scans" / name)
    (folder / "scans" / "MR_small.dcm").rename(folder / "scans" / "without-suffix")
    return folder


def ran(recipe, settings, *arguments):
    recipe.main(parse(settings, [*map(str, arguments), *(["--quiet"] if recipe is not search else [])]))


def test_the_window_changes_ct_alone(world, tmp_path):
    vectors = {}
    for window in ("auto", "lung", "three"):
        output = tmp_path / f"{window}.npy"
        ran(
            embed,
            embed.EmbedSettings,
            world / "scans",
            "--model",
            world / "model",
            "--output",
            output,
            "--window",
            window,
        )
        vectors[window] = np.load(output)
    ids = json.loads((tmp_path / "auto.ids.json").read_text())
    ct, mr = ids.index("CT_small.dcm"), ids.index("without-suffix")
    assert np.array_equal(vectors["auto"][mr], vectors["lung"][mr])
    assert not np.allclose(vectors["auto"][ct], vectors["lung"][ct], atol=1e-3)
    assert not np.allclose(vectors["three"][ct], vectors["lung"][ct], atol=1e-3)


def test_an_index_records_its_window(world, tmp_path, capsys):
    made = (world / "scans", "--model", world / "model", "--output", tmp_path / "index")
    ran(index, index.IndexSettings, *made, "--window", "lung")
    ran(index, index.IndexSettings, *made)  # brought up to date, in its own window
    with pytest.raises(ValueError, match="was made with --window lung, not bone"):
        ran(index, index.IndexSettings, *made, "--window", "bone")
    query = world / "scans" / "CT_small.dcm"
    ran(search, search.SearchSettings, tmp_path / "index", query, "--format", "json", "--model", world / "model")
    best = json.loads(capsys.readouterr().out)[0]
    assert best["image"] == "CT_small.dcm" and best["score"] == pytest.approx(1, abs=1e-3)


def test_dicom_is_predicted_and_explained(world, tmp_path, capsys):
    options = ("--model", world / "model", "--window", "soft")
    labels = ("--labels", "CT,MRI", "--format", "json")
    ran(predict, predict.PredictSettings, world / "scans", *options, *labels)
    assert {entry["image"] for entry in json.loads(capsys.readouterr().out)} == {"CT_small.dcm", "without-suffix"}
    output = tmp_path / "heat.png"
    ran(
        explain, explain.ExplainSettings, world / "scans" / "CT_small.dcm", *options, "--text", "CT", "--output", output
    )
    assert output.read_bytes().startswith(b"\x89PNG")
