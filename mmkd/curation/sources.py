"""A source cut into units of work: one tar, one Parquet file, ten thousand lines of a list; each is read on its own.

The order of units is the order of the output, and depends on names alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mmkd.curation.labels import LABELS_FILE, read_rows
from mmkd.curation.readers import (
    list_files,
    read_image_folder,
    read_json_listing,
    read_labels_listing,
    read_parquet,
    read_tar,
    sample_of_row,
)
from mmkd.curation.samples import IMAGE_SUFFIXES, Item
from mmkd.data.published import META_FILE

UNIT_ROWS = 10_000

FOUND_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a source.

    Attributes:
        number: its place in the source.
        kind: how it is read.
        path: a file, a folder or an address on the Hub.
        start: first row or byte, for lists.
        stop: row or byte after the last.
        size: bytes, to notice that a source has changed.
    """

    number: int
    kind: str
    path: str
    start: int = 0
    stop: int = 0
    size: int = 0

    def read(self, scratch: Path) -> Iterator[Item]:
        """The unit's samples; files from the Hub pass through ``scratch``."""
        path = Path(self.path)
        if self.kind == "tar":
            return read_tar(path)
        if self.kind == "parquet":
            return read_parquet(path)
        if self.kind == "jsonl":
            return read_json_listing(path, self.start, self.stop)
        if self.kind == "labels":
            return read_labels_listing(path, self.start, self.stop)
        if self.kind == "images":
            return read_image_folder(path, self.start, self.stop)
        if self.kind == "hub_tar":
            return read_hub_tar(self.path, scratch / f"{self.number:06d}")
        return read_hub_stream(self.path, self.start, self.stop)


def plan_units(source: str) -> list[Unit]:
    """The units of a source, in order.

    Args:
        source: a file or folder of tars, Parquet files, JSON lines or images, a folder with ``labels.csv`` or the
            authors' ``meta.jsonl``, or ``hf://datasets/OWNER/NAME``.

    Raises:
        FileNotFoundError: there is nothing of that kind.
        PermissionError: a gated repository to which this account has no access.
        ValueError: a list is broken.
    """
    if source.startswith(HUB_PREFIX):
        found: list[dict[str, Any]] = hub_units(source)
    else:
        found = _local_units(Path(source))
    return [Unit(number, **values) for number, values in enumerate(found)]


def kind_of_source(source: str) -> str:
    """``tar`` for WebDataset tars, on disk or on the Hub's BIOMEDICA, else another word."""
    if source.startswith(HUB_PREFIX):
        return "tar" if "biomedica" in source.lower() else "hub"
    path = Path(source)
    if path.suffix == ".tar" or (path.is_dir() and _holds(path, ".tar")):
        return "tar"
    if (path / LABELS_FILE).is_file() or (path / META_FILE).is_file():
        return "list"
    return "other"


def _local_units(path: Path) -> list[dict[str, Any]]:
    if path.is_file():
        units = _file_units(path)
    elif not path.is_dir():
        raise FileNotFoundError(f"--source {path}: no such folder or file")
    elif (path / LABELS_FILE).is_file() or (path / META_FILE).is_file():
        units = _ranges("labels", path, len(read_rows(path)))
    else:
        files = list_files(path)
        wanted = next((s for s in (".tar", ".parquet", ".jsonl") if any(f.suffix.lower() == s for f in files)), None)
        units = [unit for file in files if file.suffix.lower() == wanted for unit in _file_units(file)]
        if wanted is None and any(file.suffix.lower()[1:] in IMAGE_SUFFIXES for file in files):
            units = _ranges("images", path, len(files))
    if not units:
        raise FileNotFoundError(_nothing(path))
    return units


def _file_units(path: Path) -> list[dict[str, Any]]:
    suffix = path.suffix.lower()
    if suffix in (".tar", ".parquet"):
        return [{"kind": suffix[1:], "path": str(path), "size": path.stat().st_size}]
    return _line_units(path) if suffix == ".jsonl" else []


def _line_units(path: Path) -> list[dict[str, Any]]:
    """Stretches of whole lines, by byte, so that each is read without reading those before."""
    units, start, lines, position = [], 0, 0, 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            lines += 1
            if lines % UNIT_ROWS == 0:
                units.append((start, position))
                start = position
    if position > start:
        units.append((start, position))
    return [{"kind": "jsonl", "path": str(path), "start": a, "stop": b, "size": b - a} for a, b in units]


def _ranges(kind: str, path: Path, rows: int) -> list[dict[str, Any]]:
    starts = range(0, rows, UNIT_ROWS)
    return [
        {"kind": kind, "path": str(path), "start": start, "stop": min(rows, start + UNIT_ROWS), "size": rows}
        for start in starts
    ]


def _holds(folder: Path, suffix: str) -> bool:
    return any(name.endswith(suffix) for _, _, files in os.walk(folder) for name in files)


def _nothing(path: Path) -> str:
    found = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else [path.name]
    shown = ", ".join(found[:FOUND_SHOWN]) + (
        f" and {len(found) - FOUND_SHOWN} more" if len(found) > FOUND_SHOWN else ""
    )
    kinds = f"tars, Parquet files, JSON lines, images or {LABELS_FILE}"
    return f"--source {path} holds no {kinds} (found: {shown or 'nothing'})"


# Section: Datasets on the Hugging Face Hub: tars fetched one by one and forgotten, everything else streamed by
# `datasets`.
#
# A BIOMEDICA tar is some ten gigabytes; a process has one at a time on its disk. Nothing is fetched before it is
# needed.


HUB_PREFIX = "hf://"

FORM = "hf://datasets/OWNER/NAME, with @REVISION and a folder after it if you like"


def hub_units(source: str) -> list[dict[str, Any]]:
    """The tars of a dataset repository, or where it has none the shards that `datasets` streams.

    Raises:
        ValueError: the address has another form.
        PermissionError: the repository is gated and this account has no access; the message says how to get it.
        FileNotFoundError: there is no such repository, or the Hub cannot be reached.
    """
    repository, revision, folder = parse_address(source)
    listed = _listed(repository, revision)
    inside = f"{folder}/" if folder else ""
    tars = sorted((name, size) for name, size in listed if name.endswith(".tar") and name.startswith(inside))
    if tars:
        prefix = f"{HUB_PREFIX}datasets/{repository}@{revision or 'main'}/"
        return [{"kind": "hub_tar", "path": prefix + name, "size": size} for name, size in tars]
    count = _stream(source).num_shards
    return [{"kind": "hub_stream", "path": source, "start": n, "stop": count} for n in range(count)]


def parse_address(source: str) -> tuple[str, str | None, str]:
    """Repository, revision and folder of ``hf://datasets/OWNER/NAME[@REVISION][/FOLDER]``.

    Raises:
        ValueError: another form.
    """
    parts = source.removeprefix(HUB_PREFIX).strip("/").split("/")
    if len(parts) < 3 or parts[0] != "datasets" or not all(parts):
        raise ValueError(f"--source {source}: write {FORM}")
    name, _, revision = parts[2].partition("@")
    return f"{parts[1]}/{name}", revision or None, "/".join(parts[3:])


def read_hub_tar(address: str, scratch: Path) -> Iterator[Item]:
    """The samples of one tar on the Hub, which lies in ``scratch`` as long as it is read."""
    from huggingface_hub import hf_hub_download

    repository, revision, name = parse_address(address)
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        with _explained(repository):
            path = hf_hub_download(repository, name, repo_type="dataset", revision=revision, local_dir=scratch)
        yield from read_tar(Path(path))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_hub_stream(source: str, shard: int, shards: int) -> Iterator[Item]:
    """The samples of one of a dataset's shards, images as bytes."""
    for number, row in enumerate(_stream(source).shard(num_shards=shards, index=shard)):
        yield sample_of_row(row, f"{source}:{shard}:{number}")


def _stream(source: str) -> Any:
    from datasets import Image, load_dataset

    repository, revision, folder = parse_address(source)
    with _explained(repository):
        stream = load_dataset(repository, data_dir=folder or None, revision=revision, split="train", streaming=True)
        for name, feature in (stream.features or {}).items():
            if isinstance(feature, Image):
                stream = stream.cast_column(name, Image(decode=False))
        return stream


def _listed(repository: str, revision: str | None) -> list[tuple[str, int]]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with _explained(repository):
        tree = HfApi().list_repo_tree(repository, recursive=True, revision=revision, repo_type="dataset")
        return [(entry.path, entry.size) for entry in tree if isinstance(entry, RepoFile)]


@contextlib.contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Errors of the Hub as one line that says what to do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    transport_error = cast(type[Exception], HfHubHTTPError.__bases__[0])  # whichever HTTP library the client uses
    page = f"https://huggingface.co/datasets/{repository}"
    try:
        yield
    except GatedRepoError:
        raise PermissionError(
            f"{repository} is gated: open {page}, accept its terms while logged in, make a token with read access at "
            "https://huggingface.co/settings/tokens and run `hf auth login`; then give the same command again"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{repository} is not on the Hub, or is private and `hf auth login` has not been run ({page})"
        ) from None
    except (HfHubHTTPError, OfflineModeIsEnabled, transport_error, ConnectionError) as error:
        raise FileNotFoundError(
            f"the Hub could not be reached for {repository} ({type(error).__name__}); check the network and "
            "HF_HUB_OFFLINE, or download the files and give their folder as --source"
        ) from None
