"""``mmkd predict`` on folders with good and bad files, in every form."""

import csv
import json

import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmkd.command.settings import parse
from mmkd.hub.predict import PredictSettings, main


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def scans(tmp_path):
    """Five images, one of them without a suffix, and two files that are none."""
    folder = tmp_path / "scans"
    (folder / "a").mkdir(parents=True)
    for k, name in enumerate(("1.png", "a/2.jpg", "a/3", "a/4, left.png", "5.tif")):
        form = {"jpg": "JPEG", "tif": "TIFF"}.get(name.rpartition(".")[2], "PNG")
        Image.new("RGB", (40, 30), (k * 40, 200 - k * 40, 90)).save(folder / name, format=form)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (folder / "text").write_text("no image")
    return folder


NAMES = ["1.png", "5.tif", "a/2.jpg", "a/3", "a/4, left.png"]


def run(model, *arguments):
    main(parse(PredictSettings, [*map(str, arguments), "--model", str(model), "--device", "cpu", "--quiet"]))


def test_csv_holds_the_first_labels_of_each_image(published_student, scans, capsys):
    run(published_student, scans, "--labels", "an MRI,a CT,a photograph", "--top", "2", "--format", "csv")
    shown = capsys.readouterr()
    rows = list(csv.DictReader(shown.out.splitlines()))
    assert [row["image"] for row in rows[::2]] == NAMES and [row["rank"] for row in rows[:2]] == ["1", "2"]
    assert {row["predicted"] for row in rows[::2]} == {"True"} and {row["in_set"] for row in rows} == {""}
    assert all(float(a["probability"]) >= float(b["probability"]) for a, b in zip(rows[::2], rows[1::2], strict=True))
    assert "left out text: unsupported" in shown.err and "left out 2: " in shown.err
    assert str(scans) not in shown.out + shown.err


def test_json_parquet_table_and_the_log_agree(published_student, scans, tmp_path, capsys):
    labels = tmp_path / "labels.yaml"
    labels.write_text("- {label: MRI, prompt: [an MRI scan, an MR image]}\n- {label: CT, modality: CT}\n")
    output, log = tmp_path / "out.json", tmp_path / "run.json"
    run(published_student, scans, "--labels", labels, "--format", "json", "--output", output, "--log", log)
    found = json.loads(output.read_text())
    assert [entry["image"] for entry in found] == NAMES
    assert sum(found[0]["probabilities"].values()) == pytest.approx(1)
    run(published_student, scans, "--labels", labels, "--format", "parquet", "--output", tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert {(row["image"], row["label"]): row["probability"] for row in table} == {
        (entry["image"], label): value for entry in found for label, value in entry["probabilities"].items()
    }
    capsys.readouterr()
    run(published_student, scans / "1.png", f"{scans}/a/*", "--labels", labels)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "%" in lines[0] and lines[-1].startswith("# not calibrated")
    text = log.read_text()
    written = json.loads(text)
    assert written["model"]["fingerprint"] and "size" in written["model"]["preprocessing"]
    assert written["skipped"].keys() == {"broken.png", "text"}
    assert written["images"] == 5 and str(tmp_path) not in text and str(published_student.parent) not in text


@pytest.mark.parametrize("mode", ["multilabel", "normal"])
def test_other_modes(published_student, scans, capsys, mode):
    labels = [] if mode == "normal" else ["--labels", "nodule,effusion"]
    run(published_student, scans, "--mode", mode, *labels, "--templates", "X-ray", "--format", "json")
    found = json.loads(capsys.readouterr().out)
    assert set(found[0]["probabilities"]) == ({"normal", "abnormal"} if mode == "normal" else {"nodule", "effusion"})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--labels", "a"], "needs at least 2"),
        (["--labels", "a,A"], "occurs twice"),
        ([], "--labels is required"),
        (["--labels", "a,b", "--top", "0"], "--top is 0"),
        (["--labels", "a,b", "--format", "parquet"], "--format parquet needs --output"),
        (["--labels", "a,b", "--calibration", "nowhere"], "--calibration nowhere is no folder"),
        (["--labels", "a,b", "--templates", "sentence without"], "names no known modality"),
    ],
)
def test_settings_that_cannot_work(published_student, scans, arguments, text):
    with pytest.raises(ValueError, match=text):
        run(published_student, scans, *arguments)


def test_only_when_nothing_could_be_read_it_fails(published_student, scans, tmp_path):
    output = tmp_path / "out.csv"
    with pytest.raises(ValueError, match=r"none of the 2 images could be read \(unsupported 2\)"):
        run(published_student, scans / "broken.png", scans / "text", "--labels", "a,b", "--output", output)
    assert not output.exists()
