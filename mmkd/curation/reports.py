"""Reports of images: read from a table or a database, and joined to DICOM files by an element of their header.

The values that files and reports are joined by, and those of a group, exist on the disk as salted hashes only; the
address of a database, which may hold a password, is not kept at all.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmkd.command.settings import nearest
from mmkd.curation.dicom import keyed_hash
from mmkd.data.medical import is_element
from mmkd.data.readers import is_empty, parquet_rows, read_csv
from mmkd.files import read_json, write_json

REPORTS_FILE = "reports.json"
FIELDS = ("file", "caption", "group", "split", "label", "modality", "license", "source")
HEADINGS = (
    "findings", "impression", "indication", "history", "clinical history", "clinical information", "technique",
    "comparison", "examination", "exam", "procedure", "conclusion", "opinion", "recommendation", "recommendations",
    "summary", "addendum", "reason for examination", "reason for exam", "wet read", "final report", "notification",
)  # fmt: skip


@dataclass(frozen=True)
class ReportSource:
    """Where reports are, and how they belong to files.

    Attributes:
        address: a CSV or Parquet file, or the URL of a database that SQLAlchemy opens.
        query: SQL that gives the rows of a database; empty for files.
        join: keyword of the DICOM element that is equal to a column of the reports: ``AccessionNumber``, or
            ``AccessionNumber=COLUMN`` where the column has another name.
        columns: field (`FIELDS`) -> column of the reports; ``caption`` is the text.
        sections: headings of the report whose text becomes the caption; empty for all of it.
    """

    address: str
    join: str
    columns: Mapping[str, str]
    query: str = ""
    sections: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is read."""
        if not is_element(self.element):
            raise ValueError(f"--join {self.element}: DICOM has no such element; one is AccessionNumber")
        if "file" in self.columns:
            raise ValueError("--columns file=...: reports are joined to files by --join; leave it out")
        if ("://" in self.address) != bool(self.query):
            raise ValueError("--query gives the rows of a database: give it with a URL in --reports, and only then")

    @property
    def element(self) -> str:
        """The DICOM element that is joined."""
        return self.join.partition("=")[0]

    def describe(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """What the settings of an output state: names, and a checksum of the rows."""
        content = json.dumps(rows, sort_keys=True).encode()
        named = {"join": self.join, "columns": dict(self.columns), "sections": list(self.sections)}
        return {**named, "sha256": hashlib.sha256(content).hexdigest()}

    def read(self, salt: bytes) -> dict[str, dict[str, str]]:
        """The fields of each report by the hash of its joined value; texts of several rows follow each other.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a column is missing, or the database cannot be read.
        """
        column = self.join.partition("=")[2] or self.element
        wanted = {"join": column, **self.columns}
        found: dict[str, dict[str, str]] = {}
        for row in self._rows():
            spelt = {name.casefold(): name for name in row}
            absent = next((name for name in wanted.values() if name.casefold() not in spelt), None)
            if absent is not None:
                raise ValueError(f"--reports: no column {absent!r}{nearest(absent, row)}; found: {', '.join(row)}")
            cells = {field: _cell(row[spelt[name.casefold()]]) for field, name in wanted.items()}
            key = keyed_hash(salt, "join", cells.pop("join"))
            if not key:
                continue
            if "group" in cells:
                cells["group"] = keyed_hash(salt, "patient", cells["group"])
            known = found.setdefault(key, dict.fromkeys(cells, ""))
            for field, value in cells.items():
                if field != "caption":
                    known[field] = known[field] or value
                elif value not in known[field].split("\n\n"):
                    known[field] = f"{known[field]}\n\n{value}".strip()
        if not found:
            raise ValueError(f"--reports: no row has a value in the column {column!r}")
        return found

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        if "://" in self.address:
            yield from _database_rows(self.address, self.query)
            return
        path = Path(self.address)
        if not path.is_file():
            raise FileNotFoundError(f"--reports {path}: no such file")
        if path.suffix.lower() == ".parquet":
            yield from (values for _, _, values in parquet_rows(path))
        else:
            yield from (row.cells for row in read_csv(path).rows)


def read_mapping(entries: Sequence[str]) -> dict[str, str]:
    """Fields and their columns from texts such as ``caption=ReportText``.

    Raises:
        ValueError: an entry of another form, or a field that pairs do not have.
    """
    mapping = {}
    for entry in entries:
        field, _, column = entry.partition("=")
        if not column or field not in FIELDS:
            raise ValueError(
                f"--columns {entry}{nearest(field, FIELDS)}: write FIELD=COLUMN; fields: {', '.join(FIELDS)}"
            )
        mapping[field] = column
    return mapping


def write_reports(folder: Path, source: ReportSource, rows: Mapping[str, Mapping[str, str]]) -> None:
    """Keep the reports for all processes of a run, with the chosen sections as captions."""
    if source.sections:
        rows = {key: {**row, "caption": sections_of(row["caption"], source.sections)} for key, row in rows.items()}
    write_json(folder / REPORTS_FILE, {"element": source.element, "sections": bool(source.sections), "rows": rows})


def open_reports(folder: Path) -> Reports | None:
    """The reports that `write_reports` kept; None if the run has none."""
    path = folder / REPORTS_FILE
    return _reports_in(path, path.stat().st_mtime_ns) if path.is_file() else None


@lru_cache(maxsize=1)
def _reports_in(path: Path, _modified: int) -> Reports:
    """The reports of a file, cached, because a process works on several units."""
    return Reports(**read_json(path))


@dataclass(frozen=True)
class Reports:
    """Reports by the hash of the value that they are joined by.

    Attributes:
        element: of the DICOM header.
        sections: captions are sections of the reports, which some lack.
        rows: fields by hash.
    """

    element: str
    sections: bool
    rows: dict[str, dict[str, str]]


def sections_of(text: str, names: Sequence[str]) -> str:
    """The text under some headings of a report, in their order there; empty if it has none of them.

    A heading is a usual one (`HEADINGS`) or one of ``names``, at the start of a line or sentence and before a colon.
    """
    known = "|".join(sorted(map(re.escape, {*HEADINGS, *map(str.lower, names)}), key=len, reverse=True))
    found = list(re.finditer(rf"(?:^|(?<=[.\n]))\s*({known})\s*:", text, re.IGNORECASE))
    ends = [*(heading.start() for heading in found[1:]), len(text)]
    wanted = [name.lower() for name in names]
    parts = [
        text[heading.end() : end].strip()
        for heading, end in zip(found, ends, strict=False)  # without headings there is one end
        if " ".join(heading[1].lower().split()) in wanted
    ]
    return " ".join(part for part in parts if part)


def _database_rows(url: str, query: str) -> list[dict[str, Any]]:
    """The rows of a query; errors and warnings of the library are left out, because they quote the address."""
    try:
        import sqlalchemy
    except ImportError:
        raise ValueError('reports in a database need SQLAlchemy: pip install -e ".[reports]" in your clone') from None
    engine = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine = sqlalchemy.create_engine(url)
            with engine.connect() as connection:
                return [dict(row) for row in connection.execute(sqlalchemy.text(query)).mappings()]
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError) as error:
        cause = type(getattr(error, "orig", None) or error).__name__
        raise ValueError(
            f"--reports: the database could not be read ({cause}); check URL, driver and --query"
        ) from None
    finally:
        if engine is not None:
            engine.dispose()


def _cell(value: Any) -> str:
    text = "" if value is None else str(value).strip()
    return "" if is_empty(text) else text
