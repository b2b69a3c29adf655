"""Folders of DICOM: patients by hash, text in pixels left out, bad files counted, nothing of a header written."""

import json
import os

import numpy as np
import pytest
from medical_files import CT, MR, SECRETS, changed, dicom, encoded, nifti, run, sample, write
from PIL import Image

from mmkd.curation.dicom import read_header
from mmkd.curation.rules import read_rules
from mmkd.curation.stream import curate
from mmkd.data.folder import open_pairs
from mmkd.data.images import open_image
from mmkd.data.pixel_rules import Window

RNG = np.random.default_rng(0)


def slice_of(patient, **values):
    pixels = RNG.integers(-1000, 1000, (32, 32)).astype(np.int16)
    more = {"PatientName": "DOE^JANE", "AccessionNumber": f"SECRET-{patient}"}
    return dicom(pixels, PatientID=f"SECRET {patient}", StudyInstanceUID=f"1.2.826.0.7.{patient}", **more, **values)


@pytest.fixture
def archive(tmp_path):
    """Five patients, names of files as disks from PACS have them, and two of pydicom's files."""
    files = {f"DOE JANE {n}/ST{k}/IM{k:05d}": slice_of(n) for n in range(5) for k in range(3)}
    files |= {"DOE JANE 0/ct.dcm": sample(CT), "mr.dcm": sample(MR), "DICOMDIR": b"x" * 200}
    return write(tmp_path / "archive", files)


def test_an_archive_needs_no_list(archive, tmp_path):
    report, rows = run(archive, tmp_path / "pairs")
    assert report["read"] == report["kept"] == report["contents"]["uncaptioned"] == 17 and report["dropped"] == {}
    assert {row["modality"] for row in rows} == {"CT", "MRI"}
    assert {row["caption"] for row in rows} == {""} == {row["label"] for row in rows}
    assert len({row["group"] for row in rows}) == len({row["study"] for row in rows}) == 7
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], set()).add(row["split"])
        assert len(row["group"]) == len(row["study"]) == len(row["key"]) == 24
    assert all(len(splits) == 1 for splits in groups.values())
    folder = open_pairs(tmp_path / "pairs")
    for pair in folder.pairs:
        assert open_image(folder.image_path(pair)).size in ((32, 32), (128, 128), (64, 64))


def test_nothing_of_a_header_or_of_a_file_s_name_is_written(archive, tmp_path, capsys, caplog):
    files = {"DOE/broken.dcm": slice_of(9)[:700], "DOE/text.dcm": b"SECRET", "DOE/notes.txt": b"SECRET"}
    run(write(archive, files), tmp_path / "pairs")
    for path in (tmp_path / "pairs").rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        assert not [secret for secret in SECRETS if secret in data], path
    said = capsys.readouterr()
    assert not [secret for secret in SECRETS if secret.decode() in said.out + said.err + caplog.text]
    assert not (tmp_path / "pairs.parts").exists()


def test_hashes_depend_on_a_secret(archive, tmp_path):
    _, first = run(archive, tmp_path / "a")
    _, again = run(archive, tmp_path / "b")
    assert first == again
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    keyed = [run(archive, tmp_path / f"out-{name}", salt=tmp_path / name)[1] for name in ("one", "two")]
    groups = [{row["group"] for row in rows} for rows in (first, *keyed)]
    assert not (groups[0] & groups[1] or groups[1] & groups[2])
    smaller = write(tmp_path / "part", {"one": slice_of(0)})
    assert {row["group"] for row in run(smaller, tmp_path / "c", salt=tmp_path / "one")[1]} < groups[1]
    with pytest.raises(FileExistsError, match="exists; choose another"):
        run(archive, tmp_path / "out-one", salt=tmp_path / "two")


def test_the_default_key_is_not_in_the_manifest(tmp_path):
    source = write(tmp_path / "dicom", {"only.dcm": slice_of(3)})
    _, rows = run(source, tmp_path / "pairs")
    known = [bytes.fromhex(rows[0]["sha256"]), b"", rows[0]["sha256"].encode()]
    data = (source / "only.dcm").read_bytes()
    assert rows[0]["group"] not in {read_header(data, "x", key).patient for key in known}


def test_text_in_the_pixels_is_left_out_unless_it_is_wanted(tmp_path):
    files = {
        "a.dcm": slice_of(1),
        "b.dcm": slice_of(2, BurnedInAnnotation="YES"),
        "c.dcm": slice_of(3, SOPClassUID="1.2.840.10008.5.1.4.1.1.7"),
        "d.dcm": slice_of(4, SOPClassUID="1.2.840.10008.5.1.4.1.1.7.2"),
        "e.dcm": slice_of(5, ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"]),
        "f.dcm": slice_of(6, BurnedInAnnotation="NO", ImageType=["ORIGINAL", "PRIMARY", "AXIAL"]),
    }
    source = write(tmp_path / "dicom", files)
    report, rows = run(source, tmp_path / "pairs")
    assert len(rows) == 2 and report["dropped"] == {"burned_in_annotation": 1, "secondary_capture": 3}
    assert run(source, tmp_path / "burned", burned_in=True)[0]["dropped"] == {"secondary_capture": 3}
    assert run(source, tmp_path / "both", burned_in=True, secondary_captures=True)[0]["dropped"] == {}
    (source / "labels.csv").write_text("file,label\n" + "".join(f"{name},x\n" for name in files))
    assert len(run(source, tmp_path / "listed")[1]) == 6  # somebody chose these


def test_every_bad_file_is_counted(archive, tmp_path):
    item = encoded_without_pixels()
    bad = {
        "x/rt.dcm": sample("rtstruct.dcm"), "x/sr.dcm": sample("test-SR.dcm"), "x/cut.dcm": sample("MR_truncated.dcm"),
        "x/lossless.dcm": sample("SC_rgb_jpeg_gdcm.dcm"), "x/bomb.dcm": changed(CT, NumberOfFrames=10**9),
        "x/large.dcm": changed(CT, Rows=50_000, Columns=50_000), "x/locked.dcm": item, "x/notes.txt": b"words",
        "x/empty": b"", "x/junk.dcm": b"junk" * 100, "x/empty.dcm": b"",
    }  # fmt: skip
    write(archive, bad)
    os.mkfifo(archive / "x" / "pipe.dcm")
    (tmp_path / "outside.dcm").write_bytes(sample(CT))
    (archive / "x" / "link.dcm").symlink_to(tmp_path / "outside.dcm")
    report, rows = run(archive, tmp_path / "pairs", secondary_captures=True)
    assert len(rows) == 17
    assert report["dropped"] == {
        "corrupt": 2, "empty_image": 1, "encrypted": 1, "missing": 1, "no_decoder": 1, "no_pixels": 2, "not_dicom": 2,
        "path_outside": 1, "too_large": 2,
    }  # fmt: skip
    listed = [json.loads(line) for line in (tmp_path / "pairs" / "dropped.jsonl").read_text().splitlines()]
    names = sorted(path.relative_to(archive).as_posix() for path in archive.rglob("*") if not path.is_dir())
    place = {row["reason"]: names[int(row["row"].removeprefix("file ")) - 1] for row in listed}
    assert place["encrypted"] == "x/locked.dcm" and place["path_outside"] == "x/link.dcm"


def encoded_without_pixels():
    import io

    import pydicom
    from pydicom.dataset import Dataset

    dataset = pydicom.dcmread(io.BytesIO(sample(CT)))
    del dataset.PixelData
    item = Dataset()
    item.EncryptedContentTransferSyntaxUID, item.EncryptedContent = "1.2.840.10008.1.2", b"1234"
    dataset.EncryptedAttributesSequence = [item]
    return encoded(dataset)


def test_frames_and_windows(tmp_path):
    stack = RNG.integers(-1000, 1000, (4, 32, 32)).astype(np.int16)
    source = write(tmp_path / "dicom", {"loop.dcm": dicom(stack), "one.dcm": slice_of(1), "two.dcm": slice_of(2)})
    report, rows = run(source, tmp_path / "each", frame="each", window="lung")
    assert len(rows) == 6 and report["read"] == 3 and len({row["sha256"] for row in rows}) == 6
    settings = json.loads((tmp_path / "each" / "settings.json").read_text())
    assert (settings["rules"]["frame"], settings["rules"]["window"]) == ("each", "lung")
    folder = open_pairs(tmp_path / "each")
    found = [np.asarray(open_image(folder.image_path(pair))) for pair in folder.pairs]
    for frame in range(1, 5):
        expected = np.asarray(open_image(source / "loop.dcm", window=Window("lung", frame)))
        assert (found[frame - 1] == expected).all()
    report, rows = run(source, tmp_path / "second", frame="2")
    assert len(rows) == 1 and report["dropped"] == {"no_frame": 2}
    with pytest.raises(ValueError, match="frame is 'last'; allowed: middle, each"):
        read_rules("list", frame="last")
    with pytest.raises(ValueError, match="window is 'liver'"):
        read_rules("list", window="liver")


def test_a_list_of_dicom_and_nifti_gets_patients_and_modalities(tmp_path):
    files = {f"{n}.dcm": slice_of(n // 2) for n in range(4)} | {"IM1": slice_of(7)}
    volume = RNG.normal(size=(30, 30, 5)).astype(np.float32)
    files |= {"brain.nii.gz": nifti(volume, compressed=True), "brain.nii": nifti(volume + 1)}
    source = write(tmp_path / "listed", files)
    Image.new("RGB", (30, 30), "red").save(source / "x.png")
    rows = "".join(f"{name},words about {name},\n" for name in (*files, "x.png"))
    (source / "labels.csv").write_text("file,caption,group\n" + rows + "0.dcm,another,own\n")
    _, found = run(source, tmp_path / "pairs", near_duplicates="off")
    by_file = {row["key"]: row for row in found}
    assert len(by_file) == 8 and by_file["0.dcm"]["group"] == by_file["1.dcm"]["group"] != ""
    assert by_file["2.dcm"]["group"] == by_file["3.dcm"]["group"] != by_file["0.dcm"]["group"]
    assert {by_file[name]["modality"] for name in ("0.dcm", "IM1")} == {"CT"}
    assert {by_file[name]["group"] for name in ("x.png", "brain.nii", "brain.nii.gz")} == {""}


def test_without_pydicom_an_archive_is_refused_at_once(archive, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[dicom\]"'):
        curate(str(archive), tmp_path / "pairs", read_rules("list"), quiet=True)
    assert not (tmp_path / "pairs").exists() and not (tmp_path / "pairs.parts").exists()
