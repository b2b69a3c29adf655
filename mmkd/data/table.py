"""The manifest of a folder of pairs: an Arrow file that is memory-mapped and read row by row on demand.

2.9 million `Pair` objects are some four gigabytes in every process that holds them; the same rows in an Arrow file are
mapped memory that all processes of a machine share, and a `Pair` exists only while it is used. The root of the images
stands in the file's metadata, relative to the folder, so that a stage that only chooses pairs writes a manifest and
leaves the images where they are.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from mmkd.files import atomic_file, note_read

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "validation", "test")
UNKNOWN = "unknown"
TABLE_FILE = "manifest.arrow"
VERSION = 2
METADATA_KEY = b"mmkd"
ROWS_TOGETHER = 65536  # in a file
ROWS_IN_MEMORY = 16384  # as Python objects
LEAVES_ROOT = r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|^.:|\x00|^$"


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and its caption, with their metadata.

    Attributes:
        id: unique in its manifest.
        image: path relative to the image root, with forward slashes.
        group: patient, case or specimen; never on both sides of a split.
        split: train, validation or test.
        width: pixels of the stored image; 0 when unknown.
        sha256: of the original image file.
        teachers: names of the teachers whose features may be used for this pair; None before screening.
    """

    id: str
    image: str
    caption: str
    modality: str = ""
    label: str = ""
    group: str = ""
    split: str = "train"
    source: str = ""
    license: str = ""
    width: int = 0
    height: int = 0
    sha256: str = ""
    teachers: tuple[str, ...] | None = None


FIELDS = tuple(field.name for field in dataclasses.fields(Pair))


class PairTable(Sequence[Pair]):
    """Pairs in an Arrow table; a slice or a choice of rows shares the columns.

    Copying to another process (``spawn``) sends the file's name and the chosen rows, not the columns.
    """

    def __init__(self, path: Path, rows: np.ndarray | None = None, table: pa.Table | None = None) -> None:
        """Map the file.

        Args:
            path: an Arrow file with the columns of `Pair`; more are left alone.
            rows: (n,) the rows to show, in this order; by default all.
            table: the file, where it is mapped already.

        Raises:
            ValueError: the file is not an Arrow file or lacks a column.
            ModuleNotFoundError: pyarrow is not installed.
        """
        self.path = path
        self._rows = rows
        self._table = map_table(path) if table is None else table
        missing = [name for name in FIELDS if name not in self._table.column_names]
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}; it was written by another version")
        self._columns = [self._table.column(name) for name in FIELDS]

    def __len__(self) -> int:
        return int(self._table.num_rows) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> PairTable: ...
    def __getitem__(self, index: int | slice) -> Pair | PairTable:
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = index % len(self) if self._rows is None else int(self._rows[index])
        return _pair([column[row].as_py() for column in self._columns])

    def __iter__(self) -> Iterator[Pair]:
        for batch in self._batches():
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield _pair(list(values))

    def __reduce__(self) -> tuple[Any, ...]:
        return PairTable, (self.path, self._rows)

    def take(self, indices: np.ndarray) -> PairTable:
        """The pairs at these positions, (n,) integers, without copying a column."""
        return PairTable(self.path, indices if self._rows is None else self._rows[indices], self._table)

    def all_columns(self, indices: np.ndarray) -> pa.Table:
        """The rows at these positions, (n,), with the columns that are none of `Pair`'s, too."""
        return _taken(self._table, indices if self._rows is None else self._rows[indices])

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of the shown rows."""
        column = self._table.select([name])
        return (column if self._rows is None else _taken(column, self._rows)).column(0)

    @property
    def image_root(self) -> str:
        """The root of the images, relative to the manifest's folder.

        Raises:
            ValueError: the manifest is of another version.
        """
        try:
            described = json.loads((self._table.schema.metadata or {})[METADATA_KEY])
            known = described["version"] == VERSION and isinstance(described["images"], str)
        except (KeyError, TypeError, ValueError, RecursionError):
            known = False
        if not known:
            raise ValueError(f"{self.path} is not of version {VERSION}; curate again with this version of mmkd-clip")
        return str(described["images"])

    def check(self) -> None:
        """Refuse wrong offsets, which would crash the interpreter, wrong types, empty cells, ids twice, foreign images.

        Raises:
            ValueError: with the first wrong row.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        try:
            self._table.validate(full=True)
        except pa.ArrowException as error:
            raise ValueError(f"{self.path} is damaged ({error}); curate again or restore it") from error
        for name, expected in zip(FIELDS, table_schema({}, "").types, strict=True):
            found = self.column(name)
            if found.type != expected or (name != "teachers" and found.null_count):
                kind = f"{found.type} with {found.null_count} empty cells"
                raise ValueError(f"{self.path}: the column {name} is {kind}, not {expected} without any")
        splits = pc.is_in(self.column("split"), value_set=pa.array(SPLITS))
        images, ids = (pc.invert(pc.match_substring_regex(self.column(name), LEAVES_ROOT)) for name in ("image", "id"))
        for name, right, rule in (
            ("split", splits, f"is none of {', '.join(SPLITS)}"),
            ("image", images, "leaves the root of the images"),
            ("id", ids, "is no name of a file below a folder, as exports need it"),
        ):
            wrong = pc.index(right, False).as_py()
            if wrong >= 0:
                value = self.column(name)[wrong].as_py()
                raise ValueError(f"{self.path}, row {wrong}: {name} {value!r} {rule}; refused")
        with tempfile.TemporaryFile() as file:  # sorted in place on disk; a set of all ids takes eighty bytes each
            file.truncate(8 * max(1, len(self)))
            hashes = np.memmap(file, np.int64, "r+")[: len(self)]
            for start, (ids,) in zip(range(0, len(self), ROWS_IN_MEMORY), in_columns(self, ("id",)), strict=True):
                hashes[start : start + len(ids)] = np.fromiter(map(hash, ids), np.int64, len(ids))
            hashes.sort()
        if (hashes[1:] == hashes[:-1]).any():
            counted = pc.value_counts(self.column("id"))
            twice = counted.filter(pc.greater(counted.field("counts"), 1))
            if len(twice):  # or two ids have one hash
                raise ValueError(f"{self.path} lists id {twice[0]['values'].as_py()!r} twice; ids must be unique")

    def in_split(self, split: str) -> PairTable:
        """The pairs of one split."""
        import pyarrow.compute as pc

        return self.take(np.flatnonzero(pc.equal(self.column("split"), split).to_numpy()))

    def _batches(self, rows: int = 4096) -> Iterator[pa.RecordBatch | pa.Table]:
        shown = self._table.select(list(FIELDS))
        if self._rows is None:
            yield from shown.to_batches(max_chunksize=rows)
        else:
            for start in range(0, len(self._rows), rows):
                yield _taken(shown, self._rows[start : start + rows])


def in_columns(pairs: Sequence[Pair], names: Sequence[str]) -> Iterator[list[list[Any]]]:
    """Attributes of all pairs, one list each, some thousands of pairs at a time; only these columns are read."""
    for start in range(0, len(pairs), ROWS_IN_MEMORY):
        some = pairs[start : start + ROWS_IN_MEMORY]
        if isinstance(some, PairTable):
            columns = [some.column(name).to_pylist() for name in names]
            if "teachers" in names:
                at = list(names).index("teachers")
                columns[at] = [None if value is None else tuple(value) for value in columns[at]]
            yield columns
        else:
            yield [[getattr(pair, name) for pair in some] for name in names]


def value_counts(pairs: Sequence[Pair], names: Sequence[str]) -> dict[str, Counter[str]]:
    """How often each value of some attributes occurs; of pairs on disk only these columns are read."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    for columns in in_columns(pairs, names):
        for name, column in zip(names, columns, strict=True):
            counts[name].update(column)
    return counts


def batches(pairs: Iterable[Pair], size: int) -> Iterator[list[Pair]]:
    """Pairs in lists of ``size``."""
    rest = iter(pairs)
    while batch := list(islice(rest, size)):
        yield batch


def take_rows(pairs: Sequence[Pair], rows: np.ndarray) -> Sequence[Pair]:
    """The pairs at these positions, (n,) integers; a table for a table."""
    return pairs.take(rows) if isinstance(pairs, PairTable) else [pairs[row] for row in rows.tolist()]


def map_table(path: Path) -> pa.Table:
    """An Arrow file as a table whose columns stay in the file.

    Raises:
        ValueError: the file is damaged.
    """
    import pyarrow as pa

    note_read(path)
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{path} is not a complete Arrow file ({error}); curate again or restore it") from error
    if len(set(table.column_names)) < len(table.column_names):
        raise ValueError(f"{path} is damaged (two columns of one name); curate again or restore it")
    return table


def _taken(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """The rows (n,) of a table; pyarrow's `take` copies the texts of all rows first."""
    import pyarrow as pa

    if not len(rows):
        return table.slice(0, 0)
    first, order = int(rows.min()), np.argsort(rows, kind="stable")
    batches = table.slice(first, int(rows.max()) + 1 - first).to_batches()
    starts = first + np.cumsum([0, *(batch.num_rows for batch in batches)])
    owner = np.searchsorted(starts, rows[order], side="right") - 1
    parts = np.split(order, np.flatnonzero(np.diff(owner)) + 1)
    owners = owner[np.cumsum([0, *map(len, parts[:-1])])].tolist()
    found = pa.Table.from_batches([batches[k].take(rows[p] - starts[k]) for k, p in zip(owners, parts, strict=True)])
    return found if (np.diff(order) == 1).all() else found.take(np.argsort(order))


def table_schema(columns: dict[str, pa.DataType], image_root: str) -> pa.Schema:
    """The schema of a manifest: the fields of `Pair`, further columns, and in the metadata the root of the images."""
    import pyarrow as pa

    kinds = {"width": pa.int32(), "height": pa.int32(), "teachers": pa.list_(pa.string())}
    fields = [(name, kinds.get(name, pa.string())) for name in FIELDS]
    metadata = {METADATA_KEY: json.dumps({"version": VERSION, "images": image_root}, sort_keys=True)}
    return pa.schema([*fields, *columns.items()], metadata=metadata)


def write_table(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write a manifest atomically from tables of some rows each."""
    import pyarrow as pa

    with atomic_file(path) as file, pa.ipc.new_file(file, schema) as writer:
        for table in tables:
            writer.write_table(table.select(schema.names).cast(schema), max_chunksize=ROWS_TOGETHER)


def _pair(values: list[Any]) -> Pair:
    values[-1] = None if values[-1] is None else tuple(values[-1])
    return Pair(*values)
