"""Tar files by offset: the members that the standard library finds, and nothing of what must be refused."""

import os
import tarfile
from pathlib import Path

import pytest
from biomedica_form import write_tar

from mmkd.data.archives import ArchivedFile, ArchiveWriter, DamagedArchiveError, archived_file, members


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_members_that_tarfile_finds(tmp_path, format):
    names = ["a.jpg", "folder/b.txt", "x" * 90 + "/" + "y" * 80 + ".json"]
    if format != tarfile.USTAR_FORMAT:
        names += ["é" * 120 + ".jpg", "z" * 200]
    contents = [(name, os.urandom(100 * number)) for number, name in enumerate(names)]
    path = write_tar(tmp_path / "a.tar", [*contents, tarfile.TarInfo("folder")], format)
    found = [member for member in members(path) if member.plain]
    assert [member.name for member in found][: len(names)] == names
    for member, (_, data) in zip(found, contents, strict=False):
        assert ArchivedFile(path, member.offset, member.size).read_bytes() == data


def test_links_and_devices_are_told_apart(tmp_path):
    infos = []
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        info = tarfile.TarInfo(f"{kind.decode()}.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        infos.append(info)
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    path = write_tar(tmp_path / "a.tar", [*infos, folder, ("last.jpg", b"x")])
    assert [member.plain for member in members(path)] == [False] * 4 + [True]


@pytest.mark.parametrize("end", [10, 512 + 50, 512 + 1024, 512 + 1024 + 100])
def test_what_comes_before_the_damage_is_found(tmp_path, end):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"x" * 1000), ("b.jpg", b"y" * 1000)])
    path.write_bytes(path.read_bytes()[:end])
    found = []
    with pytest.raises(DamagedArchiveError):
        found.extend(member.name for member in members(path))
    assert list(_before_damage(path)) == (["a.jpg"] if end >= 512 + 1024 else [])


def _before_damage(path):
    try:
        for member in members(path):
            yield member.name
    except DamagedArchiveError:
        return


@pytest.mark.parametrize("data", [b"", b"no tar at all " * 100, b"\x1f\x8b" + b"\0" * 2000])
def test_what_is_no_tar(tmp_path, data):
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with pytest.raises(DamagedArchiveError):
        list(members(path))


def test_a_header_that_claims_too_much_is_refused(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40
    long = tarfile.TarInfo("././@LongLink")
    long.size, long.type = 1 << 33, tarfile.GNUTYPE_LONGNAME
    for header in (info, long):
        path = tmp_path / "a.tar"
        path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
        with pytest.raises(DamagedArchiveError):
            list(members(path))


def test_written_archives_are_tars_and_always_the_same(tmp_path):
    contents = {f"{number}.jpg": os.urandom(number * 300) for number in range(5)}
    written = []
    for _ in range(2):
        path = tmp_path / "b.tar"
        with path.open("wb") as file:
            writer = ArchiveWriter(file)
            places = {name: writer.add(name, data) for name, data in contents.items()}
            writer.finish()
        written.append(path.read_bytes())
    assert written[0] == written[1]
    assert len(written[0]) % 10_240 == 0
    with tarfile.open(path) as archive:
        assert {m.name: archive.extractfile(m).read() for m in archive} == contents
    for name, member in places.items():
        file = archived_file(tmp_path, str(ArchivedFile(Path("b.tar"), member.offset, member.size)))
        assert file.read_bytes() == contents[name]


def test_reading_past_the_end_and_replaced_files(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"first")])
    file = ArchivedFile(path, 512, 5)
    assert file.read_bytes() == b"first"
    write_tar(tmp_path / "b.tar", [("a.jpg", b"other")]).replace(path)
    assert file.read_bytes() == b"other"
    with pytest.raises(OSError, match="ends before"):
        ArchivedFile(path, 0, 1 << 20).read_bytes()
    with pytest.raises(OSError, match="larger"):
        ArchivedFile(path, 0, 1 << 40).read_bytes()
    with pytest.raises(FileNotFoundError):
        ArchivedFile(tmp_path / "none.tar", 0, 1).read_bytes()
