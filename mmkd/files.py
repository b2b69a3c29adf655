"""Outputs that appear whole or not at all and belong to one run, JSON and YAML, and names that cannot leave a folder.

Every stage writes beside its destination and renames, so that a killed run never leaves half a file under the final
name. Renames are atomic only within one file system, hence the temporary names are siblings. A run holds its output
with `exclusive`; what a killed run left beside it is then removed.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import platform
import shutil
import stat
import time
import uuid
import zipfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import yaml

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HEX8 = "[0-9a-f]" * 8  # of temporary names, as a pattern
ZIP_LIMIT_BYTES = 8 * 1024**3
YAML_LIMIT_BYTES, DEEPEST_YAML, MOST_ALIASES = 16 * 1024**2, 50, 100
YAML_STARTS = (
    *(yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken),
    *(yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken),
)
MOST_NAMED = 6
_read: dict[Path, None] = {}  # the last ones, in the order of reading
YAML_ENDS = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


class OutputInUseError(OSError):
    """Another run writes the same output."""


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that readers see the old file or the whole new one.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is then untouched.
    """
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file that becomes ``path`` when the block succeeds, and vanishes when it fails.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # a full disk names none
        temporary.unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8; see `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines, or pieces of them, as UTF-8 while they come, without holding them all; see `atomic_write_bytes`."""
    with atomic_file(path) as file:
        file.writelines(line.encode("utf-8") for line in lines)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with sorted keys; see `atomic_write_bytes`."""
    encoder = json.JSONEncoder(indent=2, sort_keys=True, ensure_ascii=False)
    atomic_write_lines(path, chain(encoder.iterencode(value), ["\n"]))


def note_read(path: Path) -> None:
    """Remember the file that is read now, for an error that names no file."""
    _read.pop(path, None)
    _read[path] = None
    if len(_read) > MOST_NAMED:
        del _read[next(iter(_read))]


def last_read() -> Path | None:
    """The file of the last `note_read`."""
    return next(reversed(_read), None)


def files_read() -> str:
    """The files of the last `note_read`, the last one first."""
    return " or ".join(map(str, reversed(_read)))


@contextlib.contextmanager
def as_written(*more: type[Exception]) -> Iterator[None]:
    """Name the files that were read last in an error about keys or types, which libraries report without a file.

    It is put around code that uses values of files that other commands wrote.

    Args:
        *more: kinds of errors that are treated in the same way.

    Raises:
        ValueError: a file that was read holds other keys or types than what writes it; the message names it.
    """
    kinds: tuple[type[Exception], ...] = (
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        *more,
    )
    try:
        yield
    except kinds as error:
        if any(str(path) in str(error) for path in _read):
            raise
        raise ValueError(f"{files_read()} is not what mmkd writes ({error!r}); make it again") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; see `read_json`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else; the message names it.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON; the message names it.
    """
    note_read(path)
    try:
        value = json.loads(text := path.read_text(encoding="utf-8"))
        if "\\ud" in text.lower():  # perhaps half a character, which no file that is written can hold
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be read") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it may be truncated, write it again") from error


def read_yaml(path: Path) -> Any:
    """Read a YAML file with the plain types alone; None if it is empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, over 16 MiB, nested too deeply, or full of aliases; the message names it.
    """
    note_read(path)
    if path.stat().st_size > YAML_LIMIT_BYTES:
        raise ValueError(f"{path} has more than {YAML_LIMIT_BYTES} bytes; refused")
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_hostile_yaml(text)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def json_lines(path: Path, start: int = 0, stop: int | None = None, line: int = 1) -> Iterator[tuple[int, bytes]]:
    """The lines of a JSON-lines file that are not empty, each with its number.

    Args:
        path: the file.
        start: byte at which a line begins.
        stop: byte after the last line; None for all.
        line: number of the first line.
    """
    note_read(path)
    with path.open("rb") as file:
        file.seek(start)
        while stop is None or file.tell() < stop:
            content = file.readline()
            if not content:
                return
            if content.strip():
                yield line, content
            line += 1


def parse_json_object(content: bytes, place: str) -> dict[str, Any]:
    """One line of a JSON-lines file.

    Raises:
        ValueError: it is not JSON.
        TypeError: it is JSON, but not an object.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}); the file may be truncated, write it again") from error
    if not isinstance(value, dict):
        raise TypeError(f"{place} must hold a JSON object, not a {type(value).__name__}")
    return value


def _refuse_hostile_yaml(text: str) -> None:
    """Refuse nesting that takes hours to parse, copies of copies that fill the memory when printed, half characters."""
    depth = aliases = 0
    for token in yaml.scan(text):
        depth += isinstance(token, YAML_STARTS) - isinstance(token, YAML_ENDS)
        aliases += isinstance(token, yaml.AliasToken)
        if depth > DEEPEST_YAML or aliases > MOST_ALIASES:
            raise ValueError(f"nested deeper than {DEEPEST_YAML} levels, or more than {MOST_ALIASES} aliases")
        if isinstance(token, yaml.ScalarToken):
            token.value.encode()


@contextlib.contextmanager
def atomic_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes ``path`` when the block succeeds and vanishes when it fails.

    Args:
        path: the folder to create.
        overwrite: replace an existing folder (the old one stays until the new one is complete).

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is false; raised before the block runs.
    """
    refuse_existing(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        rename_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def rename_folder(source: Path, destination: Path) -> None:
    """Move a finished folder to its final name, replacing what is there.

    Its files become as readable as the folder is: safetensors writes weights for their owner alone, whatever the umask,
    and a colleague could not load what lies in a shared folder.
    """
    readable = source.stat().st_mode & 0o666
    for file in source.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(file.stat().st_mode & 0o777 | readable)
    if destination.exists():
        old = _sibling(destination)
        destination.rename(old)
        source.rename(destination)
        remove(old)
    else:
        source.rename(destination)


def remove(path: Path) -> None:
    """Take away a folder, a file or a link (not what it names), if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path, output: Path) -> None:
    """Take away a folder beside an output in one step, of which `exclusive` removes the rest if it is interrupted."""
    left = _sibling(output)
    path.rename(left)
    remove(left)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise before any work when ``path`` holds something and may not be replaced.

    Raises:
        FileExistsError: ``path`` exists, is not an empty folder, and ``overwrite`` is false.
    """
    if overwrite or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    raise FileExistsError(f"{path} exists; choose another --output, or replace it with --overwrite true")


@contextlib.contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Hold an output against other runs, on this machine and on those that share its folder; not on Windows.

    The lock is the system's (``flock`` of ``.NAME.lock`` beside the output) and ends with the process, however that
    ends. What a killed run left under temporary names beside the output and in it is removed.

    Args:
        output: file or folder that is written.

    Raises:
        OutputInUseError: another run holds it; the message says which.
    """
    output = output.absolute()  # "." has no name
    made = [folder for folder in output.parents if not folder.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    place = output.with_name(f".{output.name}.lock")
    handle = _locked(place)
    try:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()}, started {started}".encode())
        beside = output.parent.glob(f".{glob.escape(output.name)}.{HEX8}.tmp")
        inside = () if Path.cwd().is_relative_to(output) else output.rglob(f".*.{HEX8}.tmp")
        for left in [*beside, *(path for path in inside if not _is_of_another_run(path))]:
            remove(left)
        yield
    finally:
        place.unlink(missing_ok=True)  # before the lock ends, so that nobody holds a file that another has removed
        os.close(handle)
        for folder in made:
            with contextlib.suppress(OSError):  # it is in use
                folder.rmdir()


def _locked(place: Path) -> int:
    """A descriptor of the file at a place, which this process holds.

    Raises:
        OutputInUseError: another one holds it.
    """
    while True:
        handle = os.open(place, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if fcntl is None or _is_at(handle, place):
                return handle
        except BlockingIOError:
            holder = os.read(handle, 1000).decode("utf-8", "replace") or "which has just started"
            os.close(handle)
            raise OutputInUseError(
                f"{place.name[1 : -len('.lock')]} is being written by another run ({holder}); wait for it, stop it, or "
                "choose another output"
            ) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder removed it in between


def _is_of_another_run(temporary: Path) -> bool:
    """Whether the output to which a temporary name belongs has a lock of its own."""
    return temporary.with_name(f"{temporary.name[: -len('.01234567.tmp')]}.lock").exists()


def _is_at(handle: int, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), place.stat())
    except FileNotFoundError:
        return False


def fingerprint(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files, in sorted order: equal files give equal fingerprints."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode())
        for block in _blocks(path):
            digest.update(block)
    return digest.hexdigest()


def content_sha256(*paths: Path) -> str:
    """SHA-256 over the contents of files, one after another, without holding them in memory."""
    digest = hashlib.sha256()
    for path in paths:
        for block in _blocks(path):
            digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block


def is_inside(relative: str) -> bool:
    """Whether a relative path, read without following links, stays inside the folder it is joined to."""
    path = PurePosixPath(relative.replace("\\", "/"))
    windows_drive = len(relative) > 1 and relative[1] == ":"
    return (
        bool(relative)
        and "\0" not in relative
        and not path.is_absolute()
        and ".." not in path.parts
        and not windows_drive
    )


def leads_inside(root: Path, path: Path) -> bool:
    """Whether a path, with its links followed, stays inside a folder; a loop of links leads nowhere."""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):
        return False


def is_folder_name(name: object) -> bool:
    """Whether a name from a file may become the name of a folder: one part of a path, and not a way out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(c in name for c in "/\\\0")


def extract_zip(archive: Path, destination: Path) -> None:
    """Unpack a zip whose members must all stay inside ``destination``.

    Raises:
        ValueError: a member is a link, leaves the folder, or the archive unpacks to more than 8 GiB.
    """
    with zipfile.ZipFile(archive) as zipped:
        if sum(member.file_size for member in zipped.infolist()) > ZIP_LIMIT_BYTES:
            raise ValueError(f"{archive} unpacks to more than {ZIP_LIMIT_BYTES} bytes; refused")
        root = destination.resolve()
        for member in zipped.infolist():
            target = (root / member.filename).resolve()
            if not target.is_relative_to(root) or stat.S_ISLNK(member.external_attr >> 16):
                raise ValueError(f"{archive} holds {member.filename!r}, which leaves its folder; refused")
        zipped.extractall(root)


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
