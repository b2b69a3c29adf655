"""Reports from CSV, Parquet and a database joined to DICOM files, their sections, and columns of any name."""

import csv
import json
import sqlite3

import numpy as np
import pytest
from medical_files import SECRETS, dicom, run, write
from PIL import Image

from mmkd.command.settings import parse
from mmkd.curation.reports import HEADINGS, ReportSource, read_mapping, sections_of
from mmkd.curation.rules import read_rules
from mmkd.curation.stream import curate
from mmkd.data.table import map_table
from mmkd.train import curate as recipe

TEXT = """EXAM: CT CHEST
INDICATION: Cough since 3 weeks.
FINDINGS:
The lungs are clear.  No nodule.
Call Dr. Miller at 555-123-4567.
IMPRESSION: No acute disease.
"""
RNG = np.random.default_rng(0)
QUERY = "SELECT acc AS AccessionNumber, txt AS ReportText, pat, part AS split FROM reports"


def ct(number):
    pixels = RNG.integers(-1000, 1000, (32, 32)).astype("int16")
    return dicom(
        pixels, AccessionNumber=f"SECRET-{number}", PatientID=f"SECRET {number}", StudyInstanceUID=f"1.2.{number}"
    )


@pytest.fixture
def archive(tmp_path):
    """Four studies, of which three have a report, one of them two."""
    return write(tmp_path / "archive", {f"{number}/{k}.dcm": ct(number) for number in range(4) for k in range(2)})


ROWS = [
    ("SECRET-0", TEXT, "SECRET P", "train"),
    ("SECRET-1", "Normal study.", "SECRET P", "train"),
    ("SECRET-1", "Addendum: still normal.", "SECRET P", ""),
    ("SECRET-2", "", "SECRET Q", "test"),
    ("SECRET-9", "Of no file.", "SECRET Q", "test"),
    ("", "Of nothing.", "", ""),
]
NAMES = ("AccessionNumber", "ReportText", "pat", "split")


@pytest.fixture(params=["csv", "parquet", "sqlite"])
def source(request, tmp_path):
    """The same reports in three forms: address and query."""
    path = tmp_path / f"reports.{request.param}"
    if request.param == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([NAMES, *ROWS])
    elif request.param == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({name: [row[k] for row in ROWS] for k, name in enumerate(NAMES)}), path)
    else:
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE reports (acc, txt, pat, part)")
            database.executemany("INSERT INTO reports VALUES (?, ?, ?, ?)", ROWS)
        database.close()
        return f"sqlite:///{path}", QUERY
    return str(path), ""


def test_reports_become_captions(archive, source, tmp_path):
    address, query = source
    reports = ReportSource(
        address, "AccessionNumber", {"caption": "ReportText", "group": "pat", "split": "split"}, query
    )
    report = curate(str(archive), tmp_path / "pairs", read_rules("list", scrub=True), reports=reports, quiet=True)
    assert report["kept"] == 4 and report["dropped"] == {"no_caption": 2, "no_report": 2}
    rows = map_table(tmp_path / "pairs" / "manifest.arrow").to_pylist()
    captions = {row["caption"] for row in rows}
    assert "Normal study. Addendum: still normal." in captions and len(captions) == 2
    assert not [caption for caption in captions if "555-123" in caption]
    assert len({row["group"] for row in rows}) == 1 and {row["split"] for row in rows} == {"train"}
    for path in (tmp_path / "pairs").rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        assert not [secret for secret in (*SECRETS, b"sqlite:", b"SELECT") if secret in data], path
    stated = json.loads((tmp_path / "pairs" / "settings.json").read_text())["reports"]
    assert stated["join"] == "AccessionNumber" and stated["columns"]["caption"] == "ReportText"


def test_the_command(archive, source, tmp_path, capsys):
    address, query = source
    words = ["--source", str(archive), "--output", str(tmp_path / "pairs"), "--reports", address, "--join"]
    words += ["AccessionNumber", "--text", "ReportText", "--sections", "findings,impression", "--columns", "group=pat"]
    recipe.main(parse(recipe.CurateSettings, words + (["--query", query] if query else [])))
    assert "2 pairs" in capsys.readouterr().out
    rows = map_table(tmp_path / "pairs" / "manifest.arrow").to_pylist()
    assert {row["caption"] for row in rows} == {
        "The lungs are clear. No nodule. Call Dr. Miller at 555-123-4567. No acute disease."
    }
    dropped = [json.loads(line)["reason"] for line in (tmp_path / "pairs" / "dropped.jsonl").read_text().splitlines()]
    assert sorted(dropped) == ["no_report"] * 2 + ["no_section"] * 4


def test_sections():
    assert sections_of(TEXT, ["impression"]) == "No acute disease."
    assert sections_of(TEXT, ["Findings", "impression"]).startswith("The lungs are clear.")
    assert sections_of("Findings: a. Impression: b.", ["impression"]) == "b."
    assert sections_of("No headings here: at all.", ["findings"]) == ""
    assert sections_of("BEFUND: frei\nBEURTEILUNG: normal", ["beurteilung"]) == "normal"
    assert sections_of("REASON FOR EXAM: pain\nFINDINGS: x", ["exam"]) == ""
    assert all(heading == heading.lower() for heading in HEADINGS)


def test_reports_that_cannot_work(archive, tmp_path):
    columns = {"caption": "ReportText"}
    with pytest.raises(ValueError, match="--join Accession: DICOM has no such element"):
        ReportSource("x.csv", "Accession", columns)
    with pytest.raises(ValueError, match="--query gives the rows of a database"):
        ReportSource("sqlite:///x", "AccessionNumber", columns)
    with pytest.raises(ValueError, match="reports are joined to files by --join"):
        ReportSource("x.csv", "AccessionNumber", {"file": "x"})
    with pytest.raises(FileNotFoundError, match="no such file"):
        ReportSource(str(tmp_path / "x.csv"), "AccessionNumber", columns).read(b"")
    (tmp_path / "r.csv").write_text("AccessionNumber,Report Text\n1,x\n")
    with pytest.raises(ValueError, match=r"no column 'ReportText'.*found: AccessionNumber, Report Text"):
        ReportSource(str(tmp_path / "r.csv"), "AccessionNumber", columns).read(b"")
    secret = f"sqlite:///{tmp_path}/no/such?password=hunter2"
    for url, query in ((secret, "SELECT 1"), ("nonsense://me:hunter2@host/x", "SELECT 1")):
        with pytest.raises(ValueError, match="the database could not be read") as caught:
            ReportSource(url, "AccessionNumber", columns, query).read(b"")
        assert "hunter2" not in str(caught.value)
    with pytest.raises(ValueError, match=r"--columns captoin=x.*write FIELD=COLUMN"):
        read_mapping(["captoin=x"])
    assert not (tmp_path / "pairs.parts").exists()


def test_columns_of_a_list(tmp_path):
    source = write(tmp_path / "images", {})
    source.mkdir()
    for number in range(3):
        Image.new("RGB", (30, 30), (number * 60, 9, 200)).save(source / f"{number}.png")
    (source / "labels.csv").write_text("Path,Words,Patient,file\n0.png,one,a,z\n1.png,two,a,z\n2.png,three,b,z\n")
    mapping = read_mapping(["file=path", "caption=Words", "group=Patient"])
    report = curate(str(source), tmp_path / "pairs", read_rules("list"), columns=mapping, quiet=True)
    assert report["kept"] == 3
    _, rows = run(source, tmp_path / "again", columns=mapping)
    assert {row["caption"]: row["group"] for row in rows} == {"one": "a", "two": "a", "three": "b"}
    with pytest.raises(ValueError, match=r"--columns caption=Text: .*has the columns path, words"):
        curate(str(source), tmp_path / "x", read_rules("list"), columns={"caption": "Text"}, quiet=True)
