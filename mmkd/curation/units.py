"""A source cut into units of work: one tar, one Parquet file, ten thousand lines of a list; each is read on its own.

The order of units is the order of the output, and depends on names alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.curation.hub import HUB_PREFIX, hub_units, read_hub_stream, read_hub_tar
from mmkd.curation.listings import list_files, read_image_folder, read_json_listing, read_labels_listing
from mmkd.curation.parquet import read_parquet
from mmkd.curation.samples import IMAGE_SUFFIXES, Item
from mmkd.curation.tars import read_tar
from mmkd.data.published import META_FILE
from mmkd.data.sources import LABELS_FILE, read_rows

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
