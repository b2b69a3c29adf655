"""``mmkd embed``: the vectors of the encoder under relative ids, in every form."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmkd.command.settings import parse
from mmkd.data.features.store import VectorStore
from mmkd.data.images import open_image
from mmkd.encoders.zoo import load_encoder
from mmkd.hub.embed import EmbedSettings, main


def run(model, *arguments):
    main(parse(EmbedSettings, [*map(str, arguments), "--model", str(model), "--device", "cpu", "--quiet"]))


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans"
    (folder / "deep").mkdir(parents=True)
    for k, name in enumerate(("b.png", "deep/a.png")):
        Image.new("RGB", (40, 30), (k * 90, 80, 90)).save(folder / name)
    (folder / "broken.png").write_text("no image")
    return folder


def test_images_in_every_form(published_student, scans, tmp_path, capsys):
    encoder = load_encoder(str(published_student))
    ids = ["b.png", "deep/a.png"]
    expected = encoder.encode_images([open_image(scans / id) for id in ids]).numpy()
    for name in ("v.parquet", "v.npy", "v.safetensors"):
        run(published_student, scans, "--output", tmp_path / name)
    assert "left out broken.png: unsupported" in capsys.readouterr().err
    table = pq.read_table(tmp_path / "v.parquet")
    assert table["id"].to_pylist() == ids
    assert np.array(table["vector"].to_pylist(), np.float32) == pytest.approx(expected, abs=1e-6)
    assert json.loads(table.schema.metadata[b"mmkd"])["fingerprint"] == encoder.provenance["fingerprint"]
    assert np.load(tmp_path / "v.npy") == pytest.approx(expected, abs=1e-6)
    assert json.loads((tmp_path / "v.ids.json").read_text()) == ids
    store = VectorStore([tmp_path / "v.safetensors"])
    assert list(store.ids) == ids
    assert store.gather("vectors", store.rows(["deep/a.png"]))[0] == pytest.approx(expected[1], abs=1e-6)


def test_texts_from_arguments_and_files(published_student, tmp_path):
    (tmp_path / "t.txt").write_text("an MRI\n\nlung, left\nan MRI\n", encoding="utf-8-sig")
    output = tmp_path / "v.npy"
    run(published_student, "a CT", tmp_path / "t.txt", "--kind", "texts", "--output", output, "--log", tmp_path / "l")
    texts = ["a CT", "an MRI", "lung, left"]
    assert json.loads(output.with_suffix(".ids.json").read_text()) == texts
    assert np.load(output) == pytest.approx(load_encoder(str(published_student)).encode_texts(texts).numpy(), abs=1e-6)
    assert (
        json.loads((tmp_path / "l").read_text())["vectors"] == 3 and str(tmp_path) not in (tmp_path / "l").read_text()
    )


def test_what_is_refused(published_student, scans, tmp_path):
    (tmp_path / "there.npy").write_text("")
    (tmp_path / "latin.txt").write_bytes("ä".encode("latin-1"))
    for arguments, error, text in (
        ([scans, "--output", tmp_path / "v.csv"], ValueError, r"must end in .parquet, .npy, .safetensors"),
        ([scans, "--output", tmp_path / "there.npy"], FileExistsError, "there.npy exists"),
        ([scans / "broken.png", "--output", tmp_path / "v.npy"], ValueError, "none of the 1 images could be read"),
        (["https://a/b.png", "--output", tmp_path / "v.npy"], ValueError, "is a URL"),
        (["none.txt", "--kind", "texts", "--output", tmp_path / "v.npy"], FileNotFoundError, "no such file"),
        ([" ", "--kind", "texts", "--output", tmp_path / "v.npy"], ValueError, "no text is given"),
        ([tmp_path / "latin.txt", "--kind", "texts", "--output", tmp_path / "v.npy"], ValueError, "not UTF-8"),
    ):
        with pytest.raises(error, match=text):
            run(published_student, *arguments)
    assert not (tmp_path / "v.npy").exists()
