"""Collections as their owners keep them, read into one kind of row; nothing is judged here.

A collection is a folder with ``labels.csv`` or the authors' published folder with ``meta.jsonl``. CSV files come from
spreadsheets, so a byte-order mark, any line ending, comma, semicolon or tab, capital letters in the header, UTF-16 and
the Windows code page are accepted; columns that are not known are ignored, and the marks that spreadsheets and pandas
leave in an empty cell (``nan``, ``null``, ``<NA>``, ``#N/A``) count as empty.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.data.published import META_FILE, PublishedSample, read_published
from mmkd.data.readers import is_inside

LABELS_FILE = "labels.csv"
TEXT_COLUMNS = ("caption", "label", "modality")
KNOWN_COLUMNS = ("file", *TEXT_COLUMNS, "group", "split", "license", "source")
LONGEST_FIELD = 1 << 24
EMPTY_MARKS = ("nan", "null", "<na>", "#n/a")
SHOWN_COLUMNS, SHOWN_LETTERS = 12, 40


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a collection as listed.

    Attributes:
        place: where it is listed, for reports.
        file: path relative to the collection.
        malformed: the line has more fields than the header, as an unquoted comma in a caption makes them.
        id: the collection's own id, empty for most.
        teachers: names of available teachers, where the collection lists them.
    """

    place: str
    file: str
    caption: str = ""
    modality: str = ""
    label: str = ""
    group: str = ""
    split: str = ""
    license: str = ""
    source: str = ""
    malformed: bool = False
    id: str = ""
    teachers: tuple[str, ...] | None = None


def read_rows(source: Path, table: Path | None = None) -> list[Row]:
    """All rows of a collection, in its order.

    Args:
        source: the folder.
        table: a list of its images in the form of ``labels.csv`` that lies elsewhere.

    Raises:
        FileNotFoundError: the folder or table does not exist, or the folder holds neither ``labels.csv`` nor
            ``meta.jsonl``.
        ValueError: the list lacks a needed column, is broken or empty.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"--source {source}: no such folder")
    if table is not None:
        if not table.is_file():
            raise FileNotFoundError(f"--table {table}: no such file")
        rows = _read_labels(table)
    elif (source / LABELS_FILE).is_file():
        rows = _read_labels(source / LABELS_FILE)
    elif (source / META_FILE).is_file():
        rows = [_published_row(source, number, sample) for number, sample in enumerate(read_published(source), start=1)]
    else:
        found = sorted(path.name for path in source.iterdir())
        shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise FileNotFoundError(
            f"{source} holds neither {LABELS_FILE} nor {META_FILE} (found: {shown or 'nothing'}). List its images in "
            f"{LABELS_FILE} with a column file and at least one of caption, label, modality"
        )
    if not rows:
        raise ValueError(f"{source} lists no images")
    return rows


def _read_labels(path: Path) -> list[Row]:
    text = _decode(path.read_bytes()).replace("\0", "").lstrip()
    header = text.splitlines()[0] if text else ""
    delimiter = max(",;\t", key=header.count)
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        _refuse_open_quote(path, text, delimiter)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        _check_columns(path, list(reader.fieldnames))
        return [_row(f"{path.name}:{reader.line_num}", fields) for fields in reader]
    except csv.Error as error:
        raise ValueError(f"{path} is no readable CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _refuse_open_quote(path: Path, text: str, delimiter: str) -> None:
    """A quote that is never closed would swallow all rows after it: a line put behind the text must stay a line."""
    *before, last = csv.reader(io.StringIO(f"{text}\n{LABELS_FILE}", newline=""), delimiter=delimiter)
    if last != [LABELS_FILE]:
        line = 1 + sum(1 + "".join(row).count("\n") for row in before)
        raise ValueError(f'{path}: the row at line {line} opens a quote (") that is never closed; close or double it')


def _decode(data: bytes) -> str:
    """UTF-8, or what spreadsheets write where it is not: UTF-16 with its mark, or the Windows code page."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def _check_columns(path: Path, columns: list[str]) -> None:
    if "file" not in columns or not any(column in columns for column in TEXT_COLUMNS):
        shown = [" ".join(column.split())[:SHOWN_LETTERS] for column in columns[:SHOWN_COLUMNS]]
        raise ValueError(
            f"{path} has the columns {', '.join(shown) or '(none)'}; needed are file and at least one of "
            f"{', '.join(TEXT_COLUMNS)}, optional are group, split, license and source"
        )
    twice = sorted({column for column in columns if columns.count(column) > 1 and column in KNOWN_COLUMNS})
    if twice:
        raise ValueError(f"{path} has the column {', '.join(twice)} more than once")


def _row(place: str, fields: dict[str | Any, Any]) -> Row:
    cells = {name: (fields.get(name) or "").strip() for name in KNOWN_COLUMNS}
    values: dict[str, Any] = {name: "" if cell.lower() in EMPTY_MARKS else cell for name, cell in cells.items()}
    values["file"] = values["file"].replace("\\", "/")
    return Row(place=place, malformed=any(fields.get(None, ())), **values)


def _published_row(source: Path, number: int, sample: PublishedSample) -> Row:
    """A sample with what the JSON beside its image says of modality, article and licence."""
    facts = _sidecar(source / Path(sample.image).with_suffix(".json")) if is_inside(sample.image) else {}
    modalities = facts.get("image_secondary_label")
    return Row(
        place=f"{META_FILE}:{number}",
        file=sample.image,
        caption=sample.caption,
        modality=str(modalities[0]) if isinstance(modalities, list) and modalities else "",
        group=str(facts.get("article_accession_id") or sample.id),
        license=str(facts.get("article_license") or ""),
        id=sample.id,
        teachers=sample.teachers,
    )


def _sidecar(path: Path) -> dict[str, Any]:
    """The JSON beside an image, empty where it is missing or broken: image and caption are good without it."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
