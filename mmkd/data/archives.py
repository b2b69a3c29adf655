"""Tar files as stores of images: members found without being unpacked, read by offset, and written the same each time.

A reader that knows where a member lies needs one ``pread`` for it, in any order and from any process, so that the
shards people stream with WebDataset are random-access stores as well. Nothing is ever extracted: a member's name is
only a key, and names that leave their folder, links and devices are reported by name instead of followed.
"""

from __future__ import annotations

import os
import re
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK = 512
END_BYTES = 10_240  # tar pads with zero blocks to a multiple of this
LARGEST_EXTENDED_HEADER = 1 << 20
LARGEST_MEMBER = 1 << 30
MOST_OPEN = 64
EXTENDED, FOLDER, PLAIN = b"xgLK", b"5", (b"0", b"\0", b"7")
REFERENCE = re.compile(r"(.+\.tar)@(\d+)\+(\d+)")


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a tar file: its name, where its bytes begin, how many they are, and whether it is a plain file."""

    name: str
    offset: int
    size: int
    plain: bool = True


class DamagedArchive(ValueError):
    """A tar file that is cut off or holds no header where one must be; what came before is good."""


@dataclass(frozen=True, slots=True)
class ArchivedFile:
    """A file inside a tar file, as much of a path as reading needs."""

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
    """The file a manifest's image names inside an archive, None where the image is a file of its own."""
    match = REFERENCE.fullmatch(image)
    return ArchivedFile(root / match[1], int(match[2]), int(match[3])) if match else None


def members(path: Path) -> Iterator[Member]:
    """The members of an uncompressed tar file in their order, without reading their contents.

    Long names (GNU and pax) are resolved by the standard library; folders are passed over.

    Raises:
        DamagedArchive: the file is cut off, or is no tar file from some point on.
    """
    end = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        descriptor, offset = file.fileno(), 0
        while offset < end:
            block = os.pread(descriptor, BLOCK, offset)
            if len(block) == BLOCK and not block.strip(b"\0"):
                return
            if len(block) < BLOCK or not _is_header(block):
                raise DamagedArchive(f"{path} has no tar header at byte {offset}")
            kind = block[156:157]
            member = _extended(file, block, offset) if kind in EXTENDED else _plain(block, offset)
            if member.offset + member.size > end:
                raise DamagedArchive(f"{path} ends inside {member.name!r}")
            offset = member.offset + -(-member.size // BLOCK) * BLOCK
            if kind != FOLDER:
                yield member
    raise DamagedArchive(f"{path} ends without the two empty blocks of a whole tar file")


class ArchiveWriter:
    """Writes a tar file whose bytes depend on nothing but names and contents."""

    def __init__(self, file: BinaryIO) -> None:
        """Write to an open file at its beginning."""
        self._file, self._offset = file, 0

    def add(self, name: str, data: bytes) -> Member:
        """Append a file and say where its bytes lie."""
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(data), 0o644
        block = header.tobuf(tarfile.GNU_FORMAT)
        self._file.write(block)
        self._file.write(data)
        self._file.write(bytes(-len(data) % BLOCK))
        member = Member(name, self._offset + len(block), len(data))
        self._offset = member.offset + -(-len(data) // BLOCK) * BLOCK
        return member

    def finish(self) -> None:
        """Write the end of the archive and make sure that it is on the disk."""
        self._file.write(bytes(2 * BLOCK + -(self._offset + 2 * BLOCK) % END_BYTES))
        self._file.flush()
        os.fsync(self._file.fileno())


def _is_header(block: bytes) -> bool:
    """Whether the checksum of a header is right."""
    try:
        stated = int(block[148:156].split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return False
    return stated == 256 + sum(block[:148]) + sum(block[156:])


def _plain(block: bytes, offset: int) -> Member:
    name, prefix = _text(block[:100]), b""
    if block[257:263] == b"ustar\0":
        prefix = _text(block[345:500])
    full = (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")
    is_plain = block[156:157] in PLAIN
    return Member(full, offset + BLOCK, _size(block) if is_plain else 0, is_plain)


def _extended(file: BinaryIO, block: bytes, offset: int) -> Member:
    """A member with GNU or pax headers before it, resolved by the standard library."""
    if _size(block) > LARGEST_EXTENDED_HEADER:
        raise DamagedArchive(f"{file.name} has a header of {_size(block)} bytes at byte {offset}")
    file.seek(offset)
    try:
        with tarfile.TarFile.open(fileobj=file, mode="r:", errors="surrogateescape") as archive:
            entry = archive.next()
    except (tarfile.TarError, ValueError, RecursionError) as error:
        raise DamagedArchive(f"{file.name} has a broken extended header at byte {offset}: {error}") from error
    if entry is None:
        raise DamagedArchive(f"{file.name} ends after the extended header at byte {offset}")
    is_plain = entry.isreg() and not entry.issparse()
    return Member(entry.name, entry.offset_data, entry.size if entry.isreg() else 0, is_plain)


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _size(block: bytes) -> int:
    """The size field: octal digits, or a binary number where its first bit is set."""
    field = block[124:136]
    if field[0] in (0x80, 0xFF):
        size = int.from_bytes(field[1:], "big")
    else:
        try:
            size = int(_text(field).strip() or b"0", 8)
        except ValueError as error:
            raise DamagedArchive(f"a tar header has the size {field!r}") from error
    if size < 0:
        raise DamagedArchive(f"a tar header has the size {size}")
    return size


class _Descriptors(threading.local):
    """The archives that this thread has open, so that no thread closes what another reads."""

    def __init__(self) -> None:
        self.open: dict[tuple[Path, int, int], int] = {}


_OPEN = _Descriptors()


def _descriptor(path: Path) -> int:
    """An open descriptor of the file that lies at ``path`` now, not of one that it has replaced."""
    status = path.stat()
    key = path, status.st_ino, status.st_mtime_ns
    descriptor = _OPEN.open.get(key)
    if descriptor is None:
        if len(_OPEN.open) >= MOST_OPEN:
            os.close(_OPEN.open.pop(next(iter(_OPEN.open))))
        descriptor = _OPEN.open[key] = os.open(path, os.O_RDONLY)
    return descriptor
