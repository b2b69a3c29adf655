"""One reader for each form of a collection; the caller interprets columns and names.

- CSV: `read_csv`; JSON lines: `mmkd.files.json_lines`; Parquet: `parquet_rows` and `ParquetCells`;
- tars: `tar_members`; folders: `list_files` and `find_file`;
- the Hugging Face Hub: `parse_hub_address` and `open_hub_dataset`.

Images are located here and read elsewhere (`mmkd.data.images`), so that what is not needed is never read. Names of
files come from untrusted lists: `find_file` refuses those that leave their folder.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import os
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mmkd.data.archives import ArchivedFile, members
from mmkd.files import is_folder_name, is_inside, leads_inside, note_read, read_json, read_object

NIFTI_GZ = "nii.gz"
IMAGE_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2"))
IMAGE_SUFFIXES |= {"dcm", "dicom", "ima", "nii", NIFTI_GZ}
EMPTY_CELLS = frozenset(("", "nan", "null", "none", "<na>", "#n/a", "n/a", "-"))
LONGEST_CELL = 1 << 24
KEPT_ROW_GROUPS = 2
DATA_PLACE, DATA_VARIABLE = "${DATA}", "MMKD_DATA"  # in a dataset manifest, and the environment variable it stands for
HUB_PREFIX = "hf://"
HUB_FORM = "hf://datasets/OWNER/NAME, optionally with @REVISION and a folder after it"


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table.

    Attributes:
        line: the line of the file on which the row ends.
        cells: text by column, without white space around it; empty for cells that a short row lacks.
        extra: cells beyond the columns of the header, as an unquoted comma makes them.
        missing: number of cells that the row lacks.
    """

    line: int
    cells: dict[str, str]
    extra: tuple[str, ...] = ()
    missing: int = 0


@dataclass(frozen=True, slots=True)
class Table:
    """A CSV file: its columns in their order, as spelt in the header, and its rows."""

    columns: tuple[str, ...]
    rows: list[TableRow]


def read_csv(path: Path) -> Table:
    """Read a table as spreadsheets and scripts write it.

    UTF-8 with or without a byte-order mark, UTF-16 with one and the Windows code page are accepted, any line ending,
    empty lines before the header, and commas, semicolons or tabs between cells: the most frequent of them in the
    header, or the one that Excel's first line ``sep=;`` names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a quote is opened and never closed, or a cell is longer than 16 MiB.
    """
    note_read(path)
    text = decode(path.read_bytes(), "replace")[0].replace("\0", "").lstrip()
    header = text.splitlines()[0] if text else ""
    delimiter = max(",;\t", key=header.count)
    skipped = 0
    if header.strip().strip('"').lower().startswith("sep=") and len(header.strip().strip('"')) == len("sep=") + 1:
        delimiter = header.strip().strip('"')[-1]
        text = text.partition("\n")[2]
        skipped = 1
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        _refuse_open_quote(path, text, delimiter)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        columns = tuple(name.strip() for name in next(reader, []))
        rows = [_table_row(columns, cells, reader.line_num + skipped) for cells in reader if cells]
    except csv.Error as error:
        raise ValueError(f"{path} is not readable as CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return Table(columns, rows)


def decode(data: bytes, errors: str = "strict") -> tuple[str, bool]:
    """Text in UTF-8, else in UTF-16 with a byte-order mark, else in the Windows code page; and whether it was guessed.

    Raises:
        UnicodeDecodeError: with strict errors, it is none of them.
    """
    try:
        return data.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode("utf-16" if wide else "cp1252", errors), True


def is_empty(cell: str) -> bool:
    """Whether a cell is empty, or holds a usual mark of spreadsheets or pandas for an empty one."""
    return cell.strip().lower() in EMPTY_CELLS


def parquet_columns(path: Path) -> list[str]:
    """The names of a Parquet file's columns.

    Raises:
        ValueError: it is not a Parquet file.
    """
    return list(_parquet(path).schema_arrow.names)


def parquet_rows(
    path: Path, columns: Sequence[str] | None = None, batch_rows: int = 64
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The rows of a Parquet file in their order.

    Args:
        path: the file.
        columns: those to read; by default all.
        batch_rows: rows that are held at a time.

    Yields:
        The row group, the position in it, and the values by column.

    Raises:
        ValueError: it is not a Parquet file, or damaged.
        OSError: the disk cannot be read.
    """
    import pyarrow as pa

    file = _parquet(path)
    for group in range(file.num_row_groups):
        row = 0
        try:
            for batch in file.iter_batches(batch_rows, [group], list(columns) if columns is not None else None):
                for values in batch.to_pylist():
                    yield group, row, values
                    row += 1
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error


class ParquetCells:
    """Single cells of Parquet files; the row groups read last are kept, so that rows in order are read once."""

    def __init__(self) -> None:
        """Nothing is read yet."""
        self._kept: OrderedDict[tuple[Path, int, str], Any] = OrderedDict()

    def read(self, path: Path, column: str, group: int, row: int) -> Any:
        """The value of a cell.

        Raises:
            ValueError: it is not a Parquet file, or damaged.
        """
        import pyarrow as pa

        key = path, group, column
        if key not in self._kept:
            try:
                self._kept[key] = _parquet(path).read_row_group(group, [column])[0]
            except (pa.ArrowException, OSError) as error:
                raise _damaged(path, error) from error
            while len(self._kept) > KEPT_ROW_GROUPS:
                self._kept.popitem(last=False)
        return self._kept[key][row].as_py()


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member of a WebDataset tar: key and suffix from its name, and its place.

    Attributes:
        key: folder and name without the last suffix; members of one sample share it.
        suffix: in small letters, without the dot.
        file: where its bytes lie.
        fault: ``path_outside``, ``link_in_archive`` or ``no_key`` for members that must not be used, else empty.
    """

    key: str
    suffix: str
    file: ArchivedFile
    fault: str = ""


def tar_members(path: Path) -> Iterator[TarMember]:
    """The members of a tar in order, without folders and the ``._`` files of macOS.

    Raises:
        DamagedArchiveError: the tar is cut off or damaged; what came before is good.
    """
    for member in members(path):
        name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        folder, _, base = name.rpartition("/")
        stem, dot, suffix = base.rpartition(".")
        if suffix_of(base) == NIFTI_GZ:
            stem, suffix = base[: -len(NIFTI_GZ) - 1], NIFTI_GZ
        fault = ""
        if ("/" in name or "\\" in name or ":" in name) and not is_inside(name):
            fault = "path_outside"
        elif not member.plain:
            fault = "link_in_archive"
        elif base.startswith("._"):
            continue
        elif not (stem and dot):
            fault = "no_key"
        key = (f"{folder}/{stem}" if folder else stem) if not fault else name
        yield TarMember(key, suffix.lower(), ArchivedFile(path, member.offset, member.size), fault)


def suffix_of(name: str) -> str:
    """The suffix of a file's name, in small letters and without the dot; ``nii.gz`` is one."""
    if name.lower().endswith(f".{NIFTI_GZ}"):
        return NIFTI_GZ
    return name.rpartition(".")[2].lower() if "." in name else ""


def list_files(folder: Path) -> list[Path]:
    """All files below a folder that are not hidden, in the order of their names; linked folders are not entered."""
    found = [Path(root, name) for root, _, names in os.walk(folder) for name in names if not name.startswith(".")]
    return sorted(found)


def find_file(root: Path, name: str, folders: Sequence[str] = ("",)) -> Path | None:
    """The file that a list names, in the first of some folders that has it.

    Lists and file systems spell accents in one character or in two (macOS); either spelling finds the other.

    Args:
        root: the folder that no name and no link may leave.
        name: a relative path with slashes of either kind.
        folders: below the root; the name is looked for in each.

    Returns:
        The file, or where it should lie if it is nowhere; None where the name or a link leaves the root.
    """
    name = name.replace("\\", "/")
    if not is_inside(name):
        return None
    spellings = dict.fromkeys((name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)))
    candidates = [root / folder / spelling for folder in folders for spelling in spellings]
    there = (candidate for candidate in candidates if os.path.isfile(candidate))  # noqa: PTH113  Path.is_file may raise
    path = next(there, candidates[0])
    return path if leads_inside(root, path) else None


def parse_hub_address(address: str) -> tuple[str, str | None, str]:
    """Repository, revision and folder of ``hf://datasets/OWNER/NAME[@REVISION][/FOLDER]``.

    Raises:
        ValueError: the address has another form.
    """
    parts = address.removeprefix(HUB_PREFIX).strip("/").split("/")
    if len(parts) < 3 or parts[0] != "datasets" or not all(parts):
        raise ValueError(f"{address}: write {HUB_FORM}")
    name, _, revision = parts[2].partition("@")
    return f"{parts[1]}/{name}", revision or None, "/".join(parts[3:])


def open_hub_dataset(repository: str, **options: Any) -> Any:
    """A dataset of the Hub, or a folder from ``save_to_disk``, with images as bytes; its code is never run.

    Args:
        repository: ``OWNER/NAME``, or the folder.
        options: of ``datasets.load_dataset``, such as ``split``, ``revision`` or ``streaming``.

    Raises:
        PermissionError: the repository is gated and this account has no access; the message gives the remedy.
        FileNotFoundError: there is no such repository, or the Hub cannot be reached and nothing is cached.
        ValueError: the folder is damaged, or names files outside it.
    """
    import datasets

    if Path(repository).is_dir():
        _refuse_foreign_files(Path(repository))
        try:
            return _without_decoding(datasets.load_from_disk(repository))
        except Exception as error:  # of damaged folders, datasets raises anything
            raise ValueError(f"{repository} is no complete folder of save_to_disk: {error}") from error
    try:
        with hub_errors(repository):
            return _without_decoding(datasets.load_dataset(repository, **options))
    except datasets.exceptions.DatasetsError as error:
        raise FileNotFoundError(f"{repository} could not be loaded from the Hub: {error}") from error


def _refuse_foreign_files(folder: Path) -> None:
    """Refuse a folder of ``save_to_disk`` whose ``state.json`` names tables that lie elsewhere.

    Raises:
        ValueError: the message names the file.
    """
    for state in (*folder.glob("state.json"), *folder.glob("*/state.json")):
        try:
            names = [entry["filename"] for entry in read_json(state)["_data_files"]]
            inside = all(is_inside(name) and leads_inside(folder, state.parent / name) for name in names)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{state} is damaged: {error!r}; save the data set again") from error
        if not inside:
            raise ValueError(f"{state} names a table outside {folder}; refused")
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        listed = read_object(splits).get("splits")
        if not isinstance(listed, list) or not all(map(is_folder_name, listed)):
            raise ValueError(f"{splits} names no folders of splits beside it; refused")


@contextlib.contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Errors of the Hub as one line with the remedy."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    transport_error = cast(type[Exception], HfHubHTTPError.__bases__[0])  # whichever HTTP library the client uses
    page = f"https://huggingface.co/datasets/{repository}"
    try:
        yield
    except GatedRepoError:
        raise PermissionError(
            f"{repository} is gated: open {page}, accept its terms while logged in, make a token with read access at "
            "https://huggingface.co/settings/tokens and run `hf auth login`; then run the same command again"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{repository} is not on the Hub, or is private and `hf auth login` has not been run ({page})"
        ) from None
    except (HfHubHTTPError, OfflineModeIsEnabled, transport_error, ConnectionError) as error:
        raise FileNotFoundError(
            f"the Hub could not be reached for {repository} ({type(error).__name__}); check the network and "
            "HF_HUB_OFFLINE, or download the files and give their folder"
        ) from None


def _without_decoding(data: Any) -> Any:
    """The data with images as bytes, and without columns of other files."""
    import datasets
    from datasets.features.features import require_decoding

    if isinstance(data, dict):
        return type(data)({split: _without_decoding(table) for split, table in data.items()})
    for name, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
        elif require_decoding(feature):  # sound, video, lists of images: files and URLs that a row may name
            data = data.remove_columns([name])
    return data


def _table_row(columns: Sequence[str], cells: list[str], line: int) -> TableRow:
    missing = max(0, len(columns) - len(cells))
    named = dict(zip(columns, [*(cell.strip() for cell in cells), *[""] * missing], strict=False))
    return TableRow(line, named, tuple(cells[len(columns) :]), missing)


def _refuse_open_quote(path: Path, text: str, delimiter: str) -> None:
    """Refuse a quote that is never closed, which would swallow all rows after it: an appended line must stay a line."""
    *before, last = csv.reader(io.StringIO(f"{text}\nlast line", newline=""), delimiter=delimiter)
    if last != ["last line"]:
        line = 1 + sum(1 + "".join(row).count("\n") for row in before)
        raise ValueError(f'{path}: the row at line {line} opens a quote (") that is never closed; close or double it')


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    note_read(path)
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> Exception:
    """The error itself if the disk failed, else one that names the file."""
    if isinstance(error, OSError) and error.errno:
        return error
    return ValueError(f"{path} is not a Parquet file, or damaged: {error}")
