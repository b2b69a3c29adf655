"""Convert rows and members of every form to samples: the meaning of columns and names of a collection.

Columns and keys have different names in every dataset; the names in use are tried in turn (`NAMES`). Images of lists
lie beside the list or in a usual folder beside it (`FOLDERS`), and never outside. The members of a tar are grouped by
name whatever their order; what is missing when a tar ends is passed on as fragments, so that a sample cut in two by the
end of a shard is whole again when all shards are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from mmkd.curation.dicom import keyed_hash
from mmkd.curation.samples import KINDS, Fragment, Item, RawSample, Refused
from mmkd.data.archives import ArchivedFile, DamagedArchiveError
from mmkd.data.folder import META_FILE, PublishedSample, read_published
from mmkd.data.images import read_image_bytes
from mmkd.data.pixel_rules import DICOM_SUFFIXES, form_of
from mmkd.data.readers import (
    IMAGE_SUFFIXES,
    find_file,
    is_empty,
    list_files,
    parquet_rows,
    read_csv,
    suffix_of,
    tar_members,
)
from mmkd.data.splits import meaning_of
from mmkd.files import json_lines, leads_inside, parse_json_object, read_json

LABELS_FILE = "labels.csv"
TEXT_COLUMNS = ("caption", "label", "modality")
LIST_COLUMNS = ("file", *TEXT_COLUMNS, "group", "split", "license", "source")
SHOWN_COLUMNS, SHOWN_LETTERS = 12, 40

NAMES: dict[str, tuple[str, ...]] = {
    "image": ("image", "image_path", "img", "img_path", "imgpath", "file_name", "filename", "filepath", "path", "file"),
    "caption": ("caption", "text", "txt", "title", "report", "sentence"),
    "key": ("id", "image_id", "name", "key", "uid"),
    "article": ("article_accession_id", "pmcid", "pmc_id", "PMC_ID", "article", "pmid"),
}

KEPT = (
    "modality", "label", "group", "split", "license", "source", "article_license", "image_panel_type",
    "image_primary_label", "image_secondary_label", "image_label_id", "image_cluster_id",
)  # fmt: skip

FOLDERS = ("", "images", "image", "figures", "caption_T060_filtered_top4_sep_v0_subfigures", "all_data/images")
ARTICLE = re.compile(r"PMC\d+")
MOST_FRAGMENT_BYTES = 256 << 20
LARGEST_TEXT = 64 << 20
DICOM_LISTS = ("DICOMDIR", "VERSION", "LOCKFILE")  # of a disk as PACS write it
HEAD_BYTES = 256
MEMBERS = ("image", "caption", "metadata")  # of a sample in a tar
Members = dict[str, tuple[str, ArchivedFile]]  # of one sample, by kind: suffix and place
ListRow = tuple[str, "dict[str, Any] | str"]  # place, and the values by column or why there are none


def list_file(folder: Path, table: Path | None = None) -> Path:
    """The list of the images of a folder, if it has one: a named one, ``labels.csv`` or the authors' ``meta.jsonl``."""
    return table or folder / (LABELS_FILE if os.path.lexists(folder / LABELS_FILE) else META_FILE)


def list_rows(folder: Path, table: Path | None = None, columns: str = "") -> list[ListRow]:
    """The rows of a folder with ``labels.csv`` or the authors' ``meta.jsonl``, in their order.

    Args:
        folder: the folder of the images.
        table: a list in the form of ``labels.csv`` that lies elsewhere.
        columns: names of its columns, as ``field=column`` separated by line feeds.

    Raises:
        FileNotFoundError: the table does not exist.
        ValueError: the list lacks a needed column, is broken or empty, or a link out of the folder.
    """
    path = list_file(folder, table)
    if table is None and not leads_inside(folder, path):
        raise ValueError(f"{path} is a link out of its folder; refused: put a copy in its place, or name it by --table")
    if not path.is_file():
        raise FileNotFoundError(f"--table {path}: no such file")
    status = path.stat()
    rows = _rows_of(path, columns, status.st_mtime_ns, status.st_size)
    if not rows:
        raise ValueError(f"{path} lists no images")
    return rows


def read_list(folder: Path, table: Path | None, start: int, stop: int, columns: str = "") -> Iterator[Item]:
    """The samples of rows ``start`` to ``stop``, see `list_rows`."""
    for place, values in list_rows(folder, table, columns)[start:stop]:
        if isinstance(values, str):
            yield Refused(place, values)
            continue
        if isinstance(values.get("published"), PublishedSample):
            values = _published_values(folder, values["published"])
        if not values["file"]:
            yield Refused(place, "no_file_named")
            continue
        caption = values.get("caption") or None
        yield _listed(folder, place, values["file"], values["file"], caption, values)


def read_json_lines(path: Path, start: int, stop: int, line: int) -> Iterator[Item]:
    """The samples of the lines between two bytes of a JSON-lines file, the first of which has the number ``line``."""
    for number, content in json_lines(path, start, stop, line):
        place = f"{path.name}:{number}"
        try:
            yield sample_of_row(parse_json_object(content, place), place, path.parent)
        except ValueError:
            yield Refused(place, "invalid_json")
        except TypeError:
            yield Refused(place, "wrong_type")


def read_image_folder(folder: Path, start: int, stop: int) -> Iterator[Item]:
    """Images ``start`` to ``stop`` of a tree in which a folder's name is the label; folders above it may name splits.

    A text beside an image, ``x.txt`` for ``x.jpg``, is its caption.
    """
    for path in list_files(folder)[start:stop]:
        if suffix_of(path.name) not in IMAGE_SUFFIXES:
            continue
        name = path.relative_to(folder).as_posix()
        folders = name.split("/")[:-1]
        split = next((part for part in folders if meaning_of(part)), "")
        labels = [part for part in folders if part != split]
        text = path.with_suffix(".txt")
        caption = text.read_bytes() if text.is_file() and not text.is_symlink() else None
        yield _listed(folder, name, name, name, caption, {"label": labels[-1] if labels else None, "split": split})


def read_dicom_folder(folder: Path, start: int, stop: int, salt: bytes) -> Iterator[Item]:
    """Files ``start`` to ``stop`` of a tree of DICOM files, without captions.

    Names of files and folders often are those of patients, so that a sample's key is a hash of its name, and its place
    the position among all files in the order of their names, from 1.
    """
    for number, path in enumerate(list_files(folder)[start:stop], start=start + 1):
        if path.name.upper() in DICOM_LISTS:
            continue
        place, key = f"file {number}", keyed_hash(salt, "file", path.relative_to(folder).as_posix())
        if not leads_inside(folder, path):
            yield Refused(place, "path_outside", key)
        elif path.is_file() and not is_dicom_file(path):
            yield Refused(place, "not_dicom", key)
        else:
            suffix = path.suffix[1:].lower() if path.name.lower().endswith(DICOM_SUFFIXES) else ""
            yield RawSample(key, place, None, None, partial(read_image_bytes, path), suffix, listed=False)


def is_dicom_file(path: Path) -> bool:
    """Whether a file is DICOM, by its suffix or its first bytes."""
    if path.name.lower().endswith(DICOM_SUFFIXES):
        return True
    try:
        with path.open("rb") as file:
            return form_of(file.read(HEAD_BYTES)) == "dicom"
    except OSError:
        return False


def read_parquet(path: Path) -> Iterator[Item]:
    """The samples of a Parquet file: an image column of bytes or ``{bytes, path}``, and captions by any usual name."""
    try:
        for number, (_, _, values) in enumerate(parquet_rows(path)):
            yield sample_of_row(values, f"{path.name}:{number}")
    except ValueError:
        yield Refused(path.name, "damaged_shard")


def sample_of_row(row: Mapping[str, Any], place: str, folder: Path | None = None) -> Item:
    """A row as a sample: its image is bytes or ``{bytes, path}``, or with a folder the name of a file there."""
    image, caption = _first(row, "image"), _first(row, "caption")
    name = ""
    if folder is None and isinstance(image, Mapping):
        name, image = str(image.get("path") or ""), image.get("bytes")
    elif folder is not None:
        image = name = image[0] if isinstance(image, list) and image else image
    if image is None:
        return Refused(place, "no_image" if folder is None else "no_file_named")
    kind: type[Any] = bytes if folder is None else str
    if not isinstance(image, kind) or not isinstance(caption, (str, bytes, type(None))):
        return Refused(place, "wrong_type")
    key = str(_first(row, "key") or name or place)
    metadata: dict[str, Any] = {field: row[field] for field in KEPT if field in row}
    found = ARTICLE.search(f"{key} {name}")
    metadata["article_accession_id"] = _first(row, "article") or (found[0] if found else None)
    if isinstance(metadata.get("label"), int):
        metadata["label"] = str(metadata["label"])
    if folder is not None:
        return _listed(folder, place, key, name, caption, metadata)
    return RawSample(key, place, caption, metadata, lambda: image, suffix_of(name))


def read_tar(path: Path) -> Iterator[Item]:
    """The samples of one tar in the order in which they become complete, then what is left over.

    Tars without JSON hold images and captions only; in others a sample that lacks one of three is a fragment.
    """
    waiting: dict[str, Members] = {}
    finished: set[str] = set()
    repeated: set[str] = set()
    has_metadata = False
    try:
        for member in tar_members(path):
            key, kind, place = member.key, KINDS.get(member.suffix, ""), f"{path.name}:{member.key}"
            if member.fault and (kind or member.fault != "no_key"):
                yield Refused(place, member.fault)
            elif kind and (key in finished or kind in waiting.get(key, {})):
                if key not in repeated:
                    yield Refused(place, "duplicate_key")
                repeated.add(key)
            elif kind:
                parts = waiting.setdefault(key, {})
                parts[kind] = member.suffix, member.file
                has_metadata |= kind == "metadata"
                if len(parts) == 3:
                    finished.add(key)
                    yield tar_sample(key, place, waiting.pop(key))
    except DamagedArchiveError:
        yield Refused(path.name, "damaged_shard")
    room = MOST_FRAGMENT_BYTES
    for key, parts in waiting.items():
        place = f"{path.name}:{key}"
        if not has_metadata and len(parts) == 2:
            yield tar_sample(key, place, parts)
            continue
        room -= sum(file.size for _, file in parts.values())
        if room < 0:
            missing = next(kind for kind in MEMBERS if kind not in parts)
            yield Refused(place, f"no_{missing}")
        else:
            yield Fragment(key, place, {kind: (s, file.read_bytes()) for kind, (s, file) in parts.items()})


def tar_sample(key: str, place: str, parts: Members) -> RawSample:
    """A sample of members of tars; a text that is too large for one counts as empty."""
    suffix, image = parts["image"]
    texts = (parts[kind][1] if kind in parts else None for kind in ("caption", "metadata"))
    caption, metadata = ((t.read_bytes() if t.size <= LARGEST_TEXT else b"") if t else None for t in texts)
    return RawSample(key, place, caption, metadata, image.read_bytes, suffix)


@lru_cache(maxsize=1)
def _rows_of(path: Path, columns: str, _modified: int, _size: int) -> list[ListRow]:
    """The rows of a list, cached, because several units read one list."""
    if path.name == META_FILE:
        return [(f"{META_FILE}:{n}", {"published": sample}) for n, sample in enumerate(read_published(path.parent), 1)]
    table = read_csv(path)
    names = [name.lower() for name in table.columns]
    fields = _fields_of(path, names, columns)
    _check_columns(path, [fields[name] for name in names])
    rows: list[ListRow] = []
    for row in table.rows:
        cells = ("" if is_empty(cell) else cell for cell in row.cells.values())
        values = dict(zip((fields[name.lower()] for name in row.cells), cells, strict=True))
        rows.append((f"{path.name}:{row.line}", "malformed_row" if any(row.extra) else values))
    return rows


def _fields_of(path: Path, columns: list[str], renamed: str) -> dict[str, str]:
    """The field of each column: its own name, unless another column is named for that field.

    Raises:
        ValueError: a named column is not there.
    """
    given = dict(entry.split("=", 1) for entry in renamed.splitlines())
    for field, column in given.items():
        if column.lower() not in columns:
            raise ValueError(f"--columns {field}={column}: {path} has the columns {', '.join(columns)}")
    chosen = {column.lower(): field for field, column in given.items()}
    return {column: chosen.get(column, f"own {column}" if column in given else column) for column in columns}


def _check_columns(path: Path, columns: list[str]) -> None:
    if "file" not in columns or not any(column in columns for column in TEXT_COLUMNS):
        shown = [" ".join(column.split())[:SHOWN_LETTERS] for column in columns[:SHOWN_COLUMNS]]
        raise ValueError(
            f"{path} has the columns {', '.join(shown) or '(none)'}; needed are file and at least one of "
            f"{', '.join(TEXT_COLUMNS)}, optional are group, split, license and source"
        )
    twice = sorted({column for column in columns if columns.count(column) > 1 and column in LIST_COLUMNS})
    if twice:
        raise ValueError(f"{path} has the column {', '.join(twice)} more than once")


def _published_values(folder: Path, sample: PublishedSample) -> dict[str, Any]:
    """A published sample with the modality, article and licence of the JSON beside its image, if that can be read."""
    try:
        beside = folder / Path(sample.image).with_suffix(".json")
        stated = read_json(beside) if leads_inside(folder, beside) and beside.is_file() else {}
    except (OSError, ValueError):
        stated = {}
    stated = stated if isinstance(stated, dict) else {}
    modalities = stated.get("image_secondary_label")
    article = str(stated.get("article_accession_id") or "")
    return {
        "file": sample.image,
        "caption": sample.caption,
        "modality": str(modalities[0]) if isinstance(modalities, list) and modalities else "",
        "group": article or sample.id,
        "license": str(stated.get("article_license") or ""),
        "article_accession_id": article,
        "published": sample,
    }


def _listed(
    root: Path, place: str, key: str, image: str, caption: str | bytes | None, metadata: dict[str, Any]
) -> RawSample | Refused:
    """A sample whose image is a file named by a list or a folder."""
    path = find_file(root, image, FOLDERS)
    if path is None:
        return Refused(place, "path_outside", key)
    published = metadata.pop("published", None)
    id, teachers = (published.id, published.teachers) if published else ("", None)
    suffix = suffix_of(path.name)
    return RawSample(key, place, caption, metadata, partial(read_image_bytes, path), suffix, id, teachers)


def _first(row: Mapping[str, Any], meaning: str) -> Any:
    """The value of the first known name for an image, a caption, a key or an article."""
    return next((row[name] for name in NAMES[meaning] if row.get(name) not in (None, "")), None)
