"""Tar files of images: list members without unpacking, read them by offset, and write reproducible files.

A reader with the offset of a member needs one ``pread`` for it, in any order and from any process, so that the
shards people stream with WebDataset are random-access stores as well. Nothing is ever extracted: a member's name is
only a key, and links and devices are reported by name instead of followed.
"""

from __future__ import annotations

import os
import re
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO, RawIOBase
from pathlib import Path
from typing import IO, BinaryIO, cast

BLOCK = 512
COPY_BYTES = 1 << 24
LARGEST_HEADER = 1 << 20
LARGEST_MEMBER = 1 << 30
MOST_OPEN = 64
REFERENCE = re.compile(r"(.+\.tar)@(\d+)\+(\d+)")


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a tar file: its name, offset, size, and whether it is a plain file."""

    name: str
    offset: int
    size: int
    plain: bool = True


class DamagedArchiveError(ValueError):
    """A tar file is truncated or lacks a header; earlier members are intact."""


@dataclass(frozen=True, slots=True)
class ArchivedFile:
    """A file inside a tar file, by archive, offset and size."""

    archive: Path
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}@{self.offset}+{self.size}"

    def read_bytes(self) -> bytes:
        """The bytes.

        Raises:
            FileNotFoundError: the archive is not there.
            OSError: the archive ends before the file does, or the file is over a gibibyte.
        """
        if self.size > LARGEST_MEMBER:
            raise OSError(f"{self} is larger than {LARGEST_MEMBER} bytes")
        data = os.pread(_descriptor(self.archive), self.size, self.offset)
        if len(data) != self.size:
            raise OSError(f"{self.archive} ends before byte {self.offset + self.size}")
        return data


def archived_file(root: Path, image: str) -> ArchivedFile | None:
    """The archived file that a manifest's image names; None if the image is a separate file."""
    match = REFERENCE.fullmatch(image)
    return ArchivedFile(root / match[1], int(match[2]), int(match[3])) if match else None


def members(path: Path) -> Iterator[Member]:
    """The members of an uncompressed tar file in order, without their contents and without folders.

    Raises:
        DamagedArchiveError: the file is truncated or damaged; earlier members are intact.
    """
    end = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        try:
            archive = tarfile.TarFile(fileobj=cast(IO[bytes], _Headers(file)), errors="surrogateescape")
            while (entry := archive.next()) is not None:
                if entry.size < 0 or entry.offset_data + entry.size > end:
                    raise DamagedArchiveError(f"{path} ends inside {entry.name!r}, which states {entry.size} bytes")
                archive.members = []  # type: ignore[attr-defined]  # or the list of all members stays in memory
                if not entry.isdir():
                    plain = entry.isreg() and not entry.issparse()
                    yield Member(entry.name, entry.offset_data, entry.size if plain else 0, plain)
        except (tarfile.TarError, ValueError, RecursionError) as error:
            raise DamagedArchiveError(f"{path} is damaged or not a tar file: {error}") from error
        if os.pread(file.fileno(), BLOCK, archive.offset) != bytes(BLOCK):
            raise DamagedArchiveError(f"{path} ends without the empty blocks of a whole tar file")


class _Headers:
    """A file for `tarfile` that refuses headers of more than a mebibyte."""

    def __init__(self, file: RawIOBase | BinaryIO) -> None:
        self.name, self.mode = getattr(file, "name", ""), "rb"
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LARGEST_HEADER:
            raise DamagedArchiveError(f"a tar header states {size} bytes")
        return cast(bytes, self._read(size))


class ArchiveWriter:
    """Writes a tar file whose bytes depend on names and contents only."""

    def __init__(self, file: BinaryIO) -> None:
        """Write to an open file at its beginning."""
        self._file = file
        self._tar = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.GNU_FORMAT)

    def add(self, name: str, data: bytes) -> Member:
        """Append a file; returns its place."""
        header = tarfile.TarInfo(name)
        header.size = len(data)
        self._tar.addfile(header, BytesIO(data))
        self._tar.members = []  # type: ignore[attr-defined]  # or the list of all members stays in memory
        return Member(name, self._tar.offset + -len(data) // BLOCK * BLOCK, len(data))

    def copy(self, source: BinaryIO, start: int, end: int) -> None:
        """Append the whole members that lie between two bytes of another archive."""
        source.seek(start)
        for position in range(start, end, COPY_BYTES):
            self._file.write(source.read(min(COPY_BYTES, end - position)))
        self._tar.offset += end - start

    def finish(self) -> None:
        """Write the end of the archive and flush it to the disk."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())


class _Descriptors(threading.local):
    """The open archives of this thread, so that no thread closes a file that another reads."""

    def __init__(self) -> None:
        self.open: dict[tuple[Path, int, int], int] = {}


_OPEN = _Descriptors()


def _descriptor(path: Path) -> int:
    """An open descriptor of the current file at ``path``, not of one that it has replaced."""
    status = path.stat()
    key = path, status.st_ino, status.st_mtime_ns
    descriptor = _OPEN.open.get(key)
    if descriptor is None:
        if len(_OPEN.open) >= MOST_OPEN:
            os.close(_OPEN.open.pop(next(iter(_OPEN.open))))
        descriptor = _OPEN.open[key] = os.open(path, os.O_RDONLY)
    return descriptor
