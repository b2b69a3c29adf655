import os
import zipfile

import pytest

from mmkd import files


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "a.json"
    files.write_json(target, {"x": 1})

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_json(target, {"x": 2})
    assert files.read_json(target) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []
    with files.atomic_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["whole"]
    with pytest.raises(FileExistsError, match="--overwrite"), files.atomic_folder(tmp_path / "out"):
        pass
    with files.atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]


def test_broken_json_names_the_file(tmp_path):
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b\.json is not valid JSON"):
        files.read_json(tmp_path / "b.json")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil"])
def test_zip_members_stay_in_their_folder(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as zipped:
        zipped.writestr(name, "x")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="leaves its folder"):
        files.extract_zip(tmp_path / "z.zip", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_zip_links_and_bombs_are_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as zipped:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        zipped.writestr(link, "/etc")
    with pytest.raises(ValueError, match="leaves its folder"):
        files.extract_zip(tmp_path / "z.zip", tmp_path)
    monkeypatch.setattr(files, "ZIP_LIMIT_BYTES", 3)
    with pytest.raises(ValueError, match="unpacks to more"):
        files.extract_zip(tmp_path / "z.zip", tmp_path)


def test_fingerprint_follows_content(tmp_path):
    (tmp_path / "a").write_text("1")
    before = files.fingerprint([tmp_path / "a"])
    assert before == files.fingerprint([tmp_path / "a"])
    (tmp_path / "a").write_text("2")
    assert before != files.fingerprint([tmp_path / "a"])


def test_a_file_or_link_is_replaced_and_what_the_link_names_stays(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "mine.txt").write_text("keep")
    (tmp_path / "link").symlink_to("disk")
    for name in ("file", "link"):
        with files.atomic_folder(tmp_path / name, overwrite=True) as folder:
            (folder / "new.txt").write_text("new")
        assert (tmp_path / name / "new.txt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "file", "link"]
    assert (tmp_path / "disk" / "mine.txt").read_text() == "keep"


def test_files_are_as_readable_as_their_folder(tmp_path):
    before = os.umask(0o027)
    try:
        with files.atomic_folder(tmp_path / "out") as folder:
            (folder / "inside").mkdir()
            (folder / "inside" / "weights").write_bytes(b"w")
            (folder / "inside" / "weights").chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "inside" / "weights").stat().st_mode & 0o777 == 0o640
