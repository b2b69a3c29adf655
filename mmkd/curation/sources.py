"""Divide a source into units of work: one tar, one Parquet file, or some thousand rows of a list.

The order of units is the order of the output, and depends on names alone. Tars of a repository on the Hub are fetched
one by one, when they are read, and deleted; other repositories are streamed by `datasets`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mmkd.curation.dicom import read_salt
from mmkd.curation.packaged import packaged_attribution, packaged_versions, read_packaged
from mmkd.curation.readers import (
    LABELS_FILE,
    is_dicom_file,
    list_file,
    list_rows,
    read_dicom_folder,
    read_image_folder,
    read_json_lines,
    read_list,
    read_parquet,
    read_tar,
    sample_of_row,
)
from mmkd.curation.samples import Item
from mmkd.data.folder import META_FILE
from mmkd.data.medical import require_pydicom
from mmkd.data.pixel_rules import DICOM_SUFFIXES
from mmkd.data.readers import (
    HUB_PREFIX,
    IMAGE_SUFFIXES,
    hub_errors,
    list_files,
    open_hub_dataset,
    parse_hub_address,
    suffix_of,
)
from mmkd.files import content_sha256

PACKAGED, DICOM, IMAGES = "packaged", "dicom", "images"
ROW_FORMS = ("tar", "parquet", "jsonl")  # of files that hold many samples each
ATTRIBUTION_FILE = "ATTRIBUTION.md"
UNIT_ROWS = 2_000
SHOWN_NAMES = 5
FILES_LOOKED_AT = 200  # for DICOM files without a known suffix


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of work.

    Attributes:
        number: its place in the source.
        kind: how it is read.
        path: a file, a folder or an address on the Hub.
        start: first row or byte, for lists.
        stop: row or byte after the last.
        line: number of the first line, for JSON lines.
        table: list of the images, where it lies elsewhere.
        columns: names of columns of a list, as ``field=column`` separated by line feeds.
        salt: file whose content is the key of hashes of patients; empty for a source of the Hub.
        state: size in bytes or checksum of the list, to notice that a source has changed.
    """

    number: int
    kind: str
    path: str
    start: int = 0
    stop: int = 0
    line: int = 1
    table: str = ""
    columns: str = ""
    salt: str = ""
    state: str = ""

    def key(self) -> bytes:
        """The key of hashes of patients."""
        return read_salt(Path(self.salt)) if self.salt else b""

    def read(self, scratch: Path) -> Iterator[Item]:
        """The samples of the unit; files from the Hub are stored in ``scratch`` meanwhile."""
        path = Path(self.path)
        if self.kind == "tar":
            return read_tar(path)
        if self.kind == "parquet":
            return read_parquet(path)
        if self.kind == "jsonl":
            return read_json_lines(path, self.start, self.stop, self.line)
        if self.kind == "list":
            return read_list(path, Path(self.table) if self.table else None, self.start, self.stop, self.columns)
        if self.kind == IMAGES:
            return read_image_folder(path, self.start, self.stop)
        if self.kind == DICOM:
            return read_dicom_folder(path, self.start, self.stop, self.key())
        if self.kind == PACKAGED:
            return read_packaged()
        if self.kind == "hub_tar":
            return _read_hub_tar(self.path, scratch / f"{self.number:06d}")
        return _read_hub_stream(self.path, self.start, self.stop)


def plan_units(
    source: str, table: Path | None = None, salt: Path | None = None, columns: Mapping[str, str] | None = None
) -> list[Unit]:
    """The units of a source, in order.

    Args:
        source: a file or folder of tars, Parquet files, JSON lines, images or DICOM, a folder with ``labels.csv`` or
            the authors' ``meta.jsonl``, ``hf://datasets/OWNER/NAME``, or ``packaged``.
        table: a list in the form of ``labels.csv`` of images in the folder ``source``.
        salt: file whose content is the key of hashes of patients; by default the first file of the source.
        columns: field -> column of a list that names it otherwise.

    Raises:
        FileNotFoundError: there is nothing of that kind.
        PermissionError: a gated repository to which this account has no access.
        ValueError: a list is broken, or a list is given for a source that has none.
    """
    if table is not None and (source == PACKAGED or not Path(source).is_dir()):
        raise ValueError(f"--table {table} lists images in a folder; --source {source} is none")
    if source == PACKAGED:
        found: list[dict[str, Any]] = [{"kind": PACKAGED, "path": PACKAGED, "state": packaged_versions()}]
    elif source.startswith(HUB_PREFIX):
        found = _hub_units(source)
    else:
        key = str(salt or _first_file(Path(source), table))
        renamed = "\n".join(f"{field}={column}" for field, column in (columns or {}).items())
        found = [unit | {"salt": key} for unit in _local_units(Path(source), table, renamed)]
    return [Unit(number, **values) for number, values in enumerate(found)]


def checksum_of(units: list[Unit]) -> str:
    """A hash that is equal for sources of equal names, sizes and lists, independent of their place."""
    described = [str(asdict(unit) | {"path": Path(unit.path).name, "table": "", "salt": ""}) for unit in units]
    described += [hashlib.sha256(key).hexdigest() for key in {unit.key() for unit in units if unit.kind == DICOM}]
    return hashlib.sha256("\n".join(described).encode("utf-8", "surrogatepass")).hexdigest()


def preset_of(source: str, table: Path | None = None) -> str:
    """The rules for a source: ``paper`` for WebDataset tars, ``list`` for labelled images, ``any`` for all else."""
    if source.startswith(HUB_PREFIX):
        return "paper" if "biomedica" in source.lower() else "any"
    form = PACKAGED if source == PACKAGED else _form_of(Path(source), table)
    return {"tar": "paper", "parquet": "any", "jsonl": "any", "": "any"}.get(form, "list")


def attribution(source: str) -> str | None:
    """The text about the origin of the images of a source; None if there is none."""
    if source == PACKAGED:
        return packaged_attribution()
    file = Path(source) / ATTRIBUTION_FILE
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _local_units(path: Path, table: Path | None, columns: str) -> list[dict[str, Any]]:
    form, units = _form_of(path, table), []
    if form == "list":
        rows = len(list_rows(path, table, columns))
        state = content_sha256(list_file(path, table))
        units = _ranges(form, path, rows, table=str(table or ""), columns=columns, state=state)
    elif form in (DICOM, IMAGES):
        if form == DICOM:
            require_pydicom()
        files = len(list_files(path))
        units = _ranges(form, path, files, state=str(files))
    elif form:
        files_of_form = [file for file in list_files(path) if suffix_of(file.name) == form] if path.is_dir() else [path]
        for file in files_of_form:
            unit = {"kind": form, "path": str(file), "state": str(file.stat().st_size)}
            units += [unit | lines for lines in _line_ranges(file)] if form == "jsonl" else [unit]
    elif not path.exists():
        raise FileNotFoundError(f"--source {path}: no such folder or file")
    if not units:
        raise FileNotFoundError(_nothing(path))
    return units


def _form_of(path: Path, table: Path | None) -> str:
    """What is read of a source: a list, else tars, Parquet, JSON lines, DICOM or images; empty if it has none."""
    if path.is_file():
        suffix = suffix_of(path.name)
        return suffix if suffix in ROW_FORMS else IMAGES if suffix in IMAGE_SUFFIXES else ""
    if table is not None or os.path.lexists(list_file(path)):
        return "list"
    suffixes = {suffix_of(name) for _, _, files in os.walk(path) for name in files}
    rows = next((form for form in ROW_FORMS if form in suffixes), "")
    if rows or not suffixes:
        return rows
    named, pictures = suffixes & {suffix[1:] for suffix in DICOM_SUFFIXES}, suffixes & IMAGE_SUFFIXES
    looked_at = () if named or pictures else islice(list_files(path), FILES_LOOKED_AT)
    if named or any(file.is_file() and is_dicom_file(file) for file in looked_at):
        return DICOM
    return IMAGES if pictures else ""


def _first_file(path: Path, table: Path | None) -> Path | str:
    """The file whose content is the default key: the list of a source that has one, else the first by its name."""
    listed = path if path.is_file() else list_file(path, table)
    return listed if listed.is_file() else next((file for file in list_files(path) if file.is_file()), "")


def _line_ranges(path: Path) -> Iterator[dict[str, Any]]:
    """Byte ranges of whole lines, so that each can be read without those before."""
    start = position = first = 0
    size = path.stat().st_size
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            position += len(line)
            if number % UNIT_ROWS == 0 or position == size:
                yield {"start": start, "stop": position, "line": first + 1}
                start, first = position, number


def _ranges(kind: str, path: Path, rows: int, **more: str) -> list[dict[str, Any]]:
    starts = range(0, rows, UNIT_ROWS)
    return [
        {"kind": kind, "path": str(path), "start": start, "stop": min(rows, start + UNIT_ROWS), **more}
        for start in starts
    ]


def _nothing(path: Path) -> str:
    found = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else [path.name]
    more = f" and {len(found) - SHOWN_NAMES} more" if len(found) > SHOWN_NAMES else ""
    return (
        f"--source {path} holds no tars, Parquet files, JSON lines, images or DICOM, and neither {LABELS_FILE} nor "
        f"{META_FILE} (found: {', '.join(found[:SHOWN_NAMES]) or 'nothing'}{more}). List its images in {LABELS_FILE} "
        "with a column file and at least one of caption, label, modality"
    )


def _hub_units(source: str) -> list[dict[str, Any]]:
    """The tars of a dataset repository, or the shards that `datasets` streams if it has none.

    Raises:
        ValueError: the address has another form.
        PermissionError: the repository is gated and this account has no access; the message gives the remedy.
        FileNotFoundError: there is no such repository, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    repository, revision, folder = parse_hub_address(source)
    with hub_errors(repository):
        tree = HfApi().list_repo_tree(repository, recursive=True, revision=revision, repo_type="dataset")
        listed = [(entry.path, entry.size) for entry in tree if isinstance(entry, RepoFile)]
    inside = f"{folder}/" if folder else ""
    tars = sorted((name, size) for name, size in listed if name.endswith(".tar") and name.startswith(inside))
    if tars:
        prefix = f"{HUB_PREFIX}datasets/{repository}@{revision or 'main'}/"
        return [{"kind": "hub_tar", "path": prefix + name, "state": str(size)} for name, size in tars]
    count = _hub_stream(source).num_shards
    return [{"kind": "hub_stream", "path": source, "start": n, "stop": count} for n in range(count)]


def _read_hub_tar(address: str, scratch: Path) -> Iterator[Item]:
    """The samples of one tar on the Hub, which is stored in ``scratch`` while it is read."""
    from huggingface_hub import hf_hub_download

    repository, revision, name = parse_hub_address(address)
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        with hub_errors(repository):
            path = hf_hub_download(repository, name, repo_type="dataset", revision=revision, local_dir=scratch)
        yield from read_tar(Path(path))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _read_hub_stream(source: str, shard: int, shards: int) -> Iterator[Item]:
    for number, row in enumerate(_hub_stream(source).shard(num_shards=shards, index=shard)):
        yield sample_of_row(row, f"{source}:{shard}:{number}")


def _hub_stream(source: str) -> Any:
    repository, revision, folder = parse_hub_address(source)
    return open_hub_dataset(repository, data_dir=folder or None, revision=revision, split="train", streaming=True)
