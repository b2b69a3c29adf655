"""Every verb on images and labels that cannot be used: each is named with its reason, and the others are done."""

import json
import shutil

import numpy as np
import pytest
from damage import png_of_size
from medical_files import dicom, sample
from PIL import Image
from served import noise, serve_here
from tiny_model import save_tiny

from mmkd.command.settings import parse
from mmkd.data.folder import write_manifest
from mmkd.data.table import Pair
from mmkd.hub import calibrate, embed, explain, index, predict, search, serve
from mmkd.serving.calibration import CALIBRATION_FILE
from mmkd.serving.index import SearchIndex

SETTINGS = {
    predict: predict.PredictSettings,
    embed: embed.EmbedSettings,
    index: index.IndexSettings,
    search: search.SearchSettings,
    calibrate: calibrate.CalibrateSettings,
    explain: explain.ExplainSettings,
    serve: serve.ServeSettings,
}
CAPTIONS = "w3,w4"
BAD = {
    "empty.png": (b"", "unsupported"),
    "words.png": (b"no image", "unsupported"),
    "film.mp4": (b"\0\0\0\x18ftypmp42" + bytes(range(256)), "unsupported"),
    "cut.jpg": (noise(1, form="JPEG")[:-300], "corrupt"),
    "narrow.png": (png_of_size(4000, 9), "too_narrow"),
    "bomb.png": (png_of_size(20_000, 20_000), "too_large"),
    "bomb.dcm": (dicom(np.zeros((20, 20), np.uint8), Rows=60_000, Columns=60_000), "too_large"),
    "plan.dcm": (sample("rtplan.dcm"), "no_pixels"),
    "locked.dcm": (b"\x30\x82\x10\x00\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x03" + bytes(100), "encrypted"),
    "lossless.dcm": (sample("SC_rgb_jpeg_gdcm.dcm"), "no_decoder"),
}


def ran(verb, *arguments):
    verb.main(parse(SETTINGS[verb], [str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, a folder of bad files with two images among them, and its index."""
    folder = tmp_path_factory.mktemp("bad")
    save_tiny(folder / "model")
    (folder / "scans").mkdir()
    for name, (data, _) in {**BAD, "good.png": (noise(2), ""), "good.dcm": (sample("CT_small.dcm"), "")}.items():
        (folder / "scans" / name).write_bytes(data)
    ran(index, folder / "scans", "--model", folder / "model", "--output", folder / "index", "--quiet")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def broken_pairs(world, folder):
    """Pairs of all files, written as if their images had been sound."""
    shutil.copytree(world / "scans", folder / "images")
    names = sorted(path.name for path in (folder / "images").iterdir())
    pairs = [Pair(f"{name}-{k}", name, "w3", "CT", CAPTIONS.split(",")[k], f"g{k}", "validation")
             for name in names for k in range(2)]  # fmt: skip
    write_manifest(folder, pairs)
    return folder


@pytest.mark.parametrize("verb", [predict, embed, index, calibrate], ids=lambda verb: verb.__name__)
def test_of_a_folder_what_can_be_read_is_done_and_the_rest_is_named(world, tmp_path, capsys, verb):
    model, output = ["--model", world / "model"], ["--output", tmp_path / "out"]
    if verb is calibrate:
        tmp_path.joinpath("out").mkdir()
        ran(verb, world / "model", "--pairs", broken_pairs(world, tmp_path / "pairs"), *output, "--replicates", 100)
        expected = {f"left out {name}-{k}: {reason}" for name, (_, reason) in BAD.items() for k in range(2)}
    else:
        more = {predict: ["--labels", CAPTIONS, *output], embed: ["--output", tmp_path / "out.npy"], index: output}
        ran(verb, world / "scans", *model, *more[verb])
        expected = {f"left out {name}: {reason}" for name, (_, reason) in BAD.items()}
    shown = capsys.readouterr().err
    assert {line for line in shown.splitlines() if line.startswith("left out ") and not line[9].isdigit()} == expected
    done = {
        predict: lambda: [line.split()[0] for line in (tmp_path / "out").read_text().splitlines()[:-1]],
        embed: lambda: json.loads((tmp_path / "out.ids.json").read_text()),
        index: lambda: sorted(SearchIndex.open(tmp_path / "out").ids),
        calibrate: lambda: list(json.loads((tmp_path / "out" / CALIBRATION_FILE).read_text())["sets"].values()),
    }
    found = done[verb]()
    assert [own["images"] for own in found] == [4] if verb is calibrate else found == ["good.dcm", "good.png"]
    assert str(tmp_path) not in shown


@pytest.mark.parametrize("name", BAD)
def test_a_single_image_that_cannot_be_read_is_an_error(world, tmp_path, name):
    bad, output = world / "scans" / name, tmp_path / "heat.png"
    for verb, arguments in (
        (search, [world / "index", bad]),
        (explain, [bad, "--model", world / "model", "--text", "w3", "--output", output]),
        (predict, [bad, "--model", world / "model", "--labels", CAPTIONS]),
    ):
        with pytest.raises(ValueError, match=BAD[name][1]):
            ran(verb, *arguments)
    assert not output.exists()


def test_the_service_refuses_each_with_its_reason_and_stays_up(world):
    async def work(client, service):
        found = {}
        for name, (data, _) in BAD.items():
            answer = await client.post("/v1/embeddings", files={"image": (name, data, "application/octet-stream")})
            found[name] = (answer.status_code, answer.json()["error"]["code"])
        return found, await client.post("/v1/embeddings", files={"image": ("good.png", noise(2), "image/png")})

    found, after = serve_here(world / "model", work)
    expected = {name: (400, f"image_{reason}") for name, (_, reason) in BAD.items()}
    assert found == expected | {"empty.png": (400, "empty_input")} and after.status_code == 200


@pytest.mark.parametrize("verb", [predict, calibrate, serve], ids=lambda verb: verb.__name__)
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "holds no label"),
        ("Übelkeit\nMüdigkeit".encode("latin-1"), "save it as UTF-8"),
        ("a\nb".encode("utf-16"), "save it as UTF-8"),
        (b"mass\nnormal\nMass\n", "'Mass' occurs twice"),
    ],
)
def test_labels_that_cannot_be_used_are_refused_before_the_model_is_loaded(tmp_path, verb, content, text):
    (tmp_path / "labels.txt").write_bytes(content)
    Image.new("RGB", (9, 9)).save(tmp_path / "image.png")
    (tmp_path / "model").mkdir()  # holds no model
    write_manifest(tmp_path / "pairs", [Pair("a", "a.png", "w3", label="mass", split="validation")])
    arguments = {
        predict: [tmp_path / "image.png", "--model", tmp_path / "model"],
        calibrate: [tmp_path / "model", "--pairs", tmp_path / "pairs"],
        serve: [tmp_path / "model", "--port", "0"],
    }
    with pytest.raises(ValueError, match=text):
        ran(verb, *arguments[verb], "--labels", tmp_path / "labels.txt")
