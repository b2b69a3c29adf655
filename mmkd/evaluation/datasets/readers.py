"""The forms in which datasets are kept: folders, tables, Parquet, the Hub, tars, MedMNIST's arrays, slides, questions.

Every reader takes a manifest and the paths of its source, and gives samples and the store of their images. Images are
read where they lie and never unpacked beside the source.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from itertools import groupby
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmkd.data import readers
from mmkd.data.archives import ArchivedFile
from mmkd.data.images import UnreadableImageError, check_size, read_image_bytes
from mmkd.data.readers import IMAGE_SUFFIXES
from mmkd.data.splits import meaning_of
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.datasets.source import (
    Question,
    Reading,
    Sample,
    Store,
    chosen,
    file_name,
    files_under,
    images_folder,
    read_slake,
    read_vqa_rad,
    row_condition,
    row_sample,
    split_column,
    split_labels,
    stated,
    table_fields,
)

EVENT_OF_CENSORED = {"1": "0", "1.0": "0", "true": "0", "yes": "0", "0": "1", "0.0": "1", "false": "1", "no": "1"}
CLOSED_ANSWERS = ("yes", "no")
ROWS = 1024  # of Parquet, held at a time
MEDMNIST_SPLITS = {"train": "train", "val": "validation", "test": "test"}
MOST_BYTES = 64 * 1024**3
LARGEST_TEXT, COPIED_BYTES = 1 << 20, 1 << 22


def read_imagefolder(manifest: Manifest, paths: Sequence[Path]) -> Reading:
    """Images in folders named after classes, which may lie in folders named after splits.

    Raises:
        ValueError: there are no images, or some lie outside any folder of a class.
    """
    root = paths[0]
    known = {str(name).casefold() for name in (*manifest.classes, *(manifest.source.get("rename") or {}))}
    called = manifest.source.get("splits") or {}
    samples = []
    skip = manifest.source.get("skip") or []
    patterns = [skip] if isinstance(skip, str) else skip
    for path in readers.list_files(root):
        name = path.relative_to(root).as_posix()
        if readers.suffix_of(path.name) not in IMAGE_SUFFIXES or any(fnmatch(name, pattern) for pattern in patterns):
            continue
        folders = path.relative_to(root).parts[:-1]
        split = next(
            (part for part in folders if part in called or (part.casefold() not in known and meaning_of(part))), ""
        )
        rest = [part for part in folders if part != split]
        label = next((part for part in rest if part.casefold() in known), rest[0] if rest else "")
        samples.append(Sample(name, [label] if label else [], split=split))
    if not samples:
        raise ValueError(f"{root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in folders of classes")
    return Reading(samples, files_under(root))


def read_csv(manifest: Manifest, paths: Sequence[Path]) -> Reading:
    """Rows of one or several CSV or TSV files; images lie beside them, or under the folder ``images`` names.

    Raises:
        ValueError: a column that is needed is not there.
    """
    root = Path(os.path.commonpath([path.parent.resolve() for path in paths]))
    samples = []
    for path in paths:
        columns, rows = read_table(path)
        fields = table_fields(manifest, columns, "file")
        is_chosen = row_condition(manifest, columns)
        beside = images_folder(manifest, path.parent).resolve()
        if not beside.is_relative_to(root):
            raise ValueError(f"source: images {manifest.source['images']!r} leaves {root}; refused")
        prefix = beside.relative_to(root).as_posix()
        start = "" if prefix == "." else f"{prefix}/"
        tag = f"{path.parent.name}/" if len(paths) > 1 else ""
        for row in rows:
            if is_chosen(row):
                sample = row_sample(manifest, row, fields, start + file_name(row, fields["file"]))
                sample.group = sample.group and f"{tag}{sample.group}"
                samples.append(sample)
    return Reading(samples, files_under(root))


def read_bags(manifest: Manifest, paths: Sequence[Path]) -> Reading:
    """Slides of a table, by default ``labels.csv`` in the folder that holds the bags of features.

    Raises:
        ValueError: a column that is needed is not there.
    """
    folder = paths[0]
    table = folder / str(manifest.source.get("table", "labels.csv"))
    columns, rows = read_table(table)
    slide = chosen(manifest, "slide", columns, True)
    case = chosen(manifest, "case", columns, manifest.task == "survival")
    label = chosen(manifest, "label", columns, manifest.task == "diagnosis")
    split = split_column(manifest, columns)
    ending = "censored" if "censored" in manifest.source else "event"
    outcome = ("time", ending) if manifest.task == "survival" else ()
    renamed = {name: chosen(manifest, name, columns, True) for name in outcome}
    renamed |= {"site": site} if (site := chosen(manifest, "site", columns, False)) else {}
    samples = []
    for row in rows:
        metadata = row | {name: row[column] for name, column in renamed.items()}
        censored = metadata.pop("censored", None)
        if censored is not None:
            metadata["event"] = EVENT_OF_CENSORED.get(censored.strip().lower(), censored)
        labels = split_labels(manifest, row[label]) if label else []
        given = row[split] if split else ""
        samples.append(
            Sample(row[slide], labels, group=row[case] if case else row[slide], split=given, metadata=metadata)
        )

    def refuse(name: str) -> bytes:
        raise UnreadableImageError("missing", f"{name}: slides are read through their features, not as images")

    return Reading(samples, Store(refuse))


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a CSV or TSV file; see `mmkd.data.readers.read_csv`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, two columns have one name, or a row is longer or shorter than the header.
    """
    table = readers.read_csv(path)
    names = list(table.columns)
    if not table.rows:
        raise ValueError(f"{path} holds no rows")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path} has {names.count(twice)} columns {twice!r}; rename all but one")
    uneven = next((row.line for row in table.rows if row.extra or row.missing), None)
    if uneven is not None:
        raise ValueError(f"{path}, line {uneven}: not as many values as the header has columns ({len(names)})")
    return names, [row.cells for row in table.rows]


def read_parquet(manifest: Manifest, paths: Sequence[Path]) -> Reading:
    """Rows of Parquet files; the column ``image`` holds the bytes of a picture, or its path beside the files.

    Without a column of the split, a file that is called ``test-...`` holds the test images.

    Raises:
        ValueError: there is no such file, or a column that is needed is not there.
    """
    root = paths[0] if paths[0].is_dir() else paths[0].parent
    files = sorted(file for path in paths for file in (path.rglob("*.parquet") if path.is_dir() else [path]))
    if not files:
        raise ValueError(f"{paths[0]} holds no .parquet files")
    samples: list[Sample] = []
    questions: list[tuple[str, str]] = []
    cells = readers.ParquetCells()
    places: dict[str, tuple[Path, str, int, int]] = {}
    for file in files:
        columns = readers.parquet_columns(file)
        fields = table_fields(manifest, columns, "image")
        is_chosen = row_condition(manifest, columns)
        named = [chosen(manifest, key, columns, manifest.task == "vqa") for key in ("question", "answer")]
        split = next((part for part in (file.stem.split("-")[0], file.parent.name) if meaning_of(part)), "")
        others = [name for name in columns if name != fields["image"]]
        for group, row, values in readers.parquet_rows(file, others, ROWS):
            if not is_chosen(values):
                continue
            name = f"{file.relative_to(root).as_posix()}@{group}+{row}"
            places[name] = (file, fields["image"], group, row)
            sample = row_sample(manifest, values | {fields["image"]: None}, fields, name)
            sample.split = sample.split or split
            samples.append(sample)
            if manifest.task == "vqa":
                questions.append(stated(values[named[0]], values[named[1]], name))
    store = _cells(lambda name: cells.read(*places[name]), files_under(images_folder(manifest, root)))
    return _with_questions(samples, questions, store) if questions else Reading(samples, store)


def _with_questions(samples: list[Sample], stated_questions: list[tuple[str, str]], store: Store) -> Reading:
    """Rows of one question each as one sample for every distinct image, and the questions."""
    first: dict[str, Sample] = {}
    questions = []
    for sample, (text, answer) in zip(samples, stated_questions, strict=True):
        digest = store.digest(sample.name)
        sample.group = sample.group or digest
        first.setdefault(digest, sample)
        questions.append(Question(digest, text, answer, answer in CLOSED_ANSWERS, meaning_of(sample.split)))
    return Reading(list(first.values()), store, questions)


def read_hf(manifest: Manifest, paths: Sequence[Path]) -> Reading:
    """A data set that ``save_to_disk`` wrote, or one of the Hub by its name, in its own splits; its code is never run.

    Raises:
        FileNotFoundError: the Hub cannot be reached and the data set is not in the local cache.
        ValueError: a column that is needed is not there.
    """
    source = str(paths[0]) if paths[0].is_dir() else manifest.source["hf"]
    loaded = readers.open_hub_dataset(source, name=manifest.source.get("config"))
    splits = loaded if isinstance(loaded, dict) else {"": loaded}
    tables: dict[str, Any] = {}
    samples: list[Sample] = []
    for split, table in splits.items():
        fields = table_fields(manifest, table.column_names, "image")
        column = fields["image"]
        tables[split] = table.select_columns([column])
        feature = table.features.get(fields["label"]) if isinstance(fields["label"], str) else None
        named = getattr(getattr(feature, "feature", feature), "names", None)  # of a ClassLabel, alone or in a list
        for row, values in enumerate(table.remove_columns([column])):
            sample = row_sample(manifest, values | {column: None}, fields, f"{split}/{row}")
            sample.labels = [named[int(label)] if named else label for label in sample.labels]
            sample.split = sample.split or split
            samples.append(sample)

    def cell(name: str) -> Any:
        split, _, row = name.rpartition("/")
        return tables[split][int(row)][manifest.source.get("image", "image")]

    return Reading(samples, _cells(cell))


def _cells(cell: Callable[[str], Any], files: Store | None = None) -> Store:
    """Images in a column of a table; a cell holds bytes, or a path under ``files``."""
    lock = threading.Lock()  # images are read by several threads, and tables share what they read last

    def read(name: str) -> bytes:
        with lock:
            value = cell(name)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and files is not None:
            return files.data(value)
        if not isinstance(value, bytes) or not value:
            raise UnreadableImageError("missing", f"{name} holds no picture")
        return value

    return Store(read)


class Arrays(Store):
    """Pictures of an ``.npz``: arrays ``(n, height, width)`` or ``(n, height, width, 3)`` of one byte each.

    The array of a split is unpacked when its first picture is read, into a temporary file that is mapped, so that
    several gigabytes need no memory.
    """

    def __init__(self, path: Path) -> None:
        """Keep the path; nothing is unpacked yet."""
        super().__init__(lambda name: self._picture(name).tobytes())
        self.path = path
        self._arrays: dict[str, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()  # images are read by several threads, and an array is unpacked once

    def image(self, name: str) -> Image.Image:
        """The picture as RGB."""
        return Image.fromarray(self._picture(name)).convert("RGB")

    def _picture(self, name: str) -> NDArray[np.uint8]:
        part, _, row = name.partition("/")
        with self._lock:
            if part not in self._arrays:
                try:
                    with zipfile.ZipFile(self.path) as zipped:
                        self._arrays[part] = _array(zipped, f"{part}_images", self.path)
                except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
                    raise UnreadableImageError("corrupt", f"{self.path}: {part}_images: {error}") from error
        return np.asarray(self._arrays[part][int(row)])


def read_medmnist(manifest: Manifest, paths: Sequence[Path]) -> Reading:
    """A MedMNIST ``.npz``; a label is the number of a class in their order, a row of zeros and ones several.

    Raises:
        ValueError: the file is not of this form, or a label is beyond the classes.
    """
    path = paths[0]
    names = list(manifest.classes)
    samples: list[Sample] = []
    sides: set[str] = set()
    try:
        with zipfile.ZipFile(path) as zipped:
            for part, split in MEDMNIST_SPLITS.items():
                labels = _array(zipped, f"{part}_labels", path)
                member = _member(zipped, f"{part}_images", path)
                with zipped.open(member) as packed:
                    shape, _, kind = _header(packed, f"{path}: {part}_images")
                _check_pictures(shape, kind, len(labels), f"{path}: {part}_images")
                sides.add(f"{shape[2]} x {shape[1]}")
                samples += [
                    Sample(f"{part}/{row}", _numbered(value, names, manifest, path), split=split)
                    for row, value in enumerate(labels.reshape(len(labels), -1).tolist())
                ]
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no .npz file, or a damaged one: {error}") from error
    return Reading(samples, Arrays(path), notes=[f"images of {', '.join(sorted(sides))} pixels"])


def _member(zipped: zipfile.ZipFile, name: str, path: Path) -> zipfile.ZipInfo:
    try:
        member = zipped.getinfo(f"{name}.npy")
    except KeyError:
        raise ValueError(f"{path} holds no {name}; it has {', '.join(zipped.namelist())}") from None
    if member.file_size > MOST_BYTES:
        raise ValueError(f"{path}: {name} unpacks to more than {MOST_BYTES} bytes; refused")
    return member


def _array(zipped: zipfile.ZipFile, name: str, path: Path) -> NDArray[Any]:
    """An array of an ``.npz``, mapped from a temporary file that vanishes with it."""
    with tempfile.TemporaryFile() as file, zipped.open(_member(zipped, name, path)) as packed:
        shutil.copyfileobj(packed, file, COPIED_BYTES)
        file.seek(0)
        shape, by_columns, kind = _header(file, f"{path}: {name}")
        order: Literal["F", "C"] = "F" if by_columns else "C"
        return np.memmap(file, kind, "r", file.tell(), shape, order)


def _header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type of an array that begins here."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, kind = read(file)
        if kind.hasobject:
            raise ValueError("it holds Python objects")
    except ValueError as error:
        raise ValueError(f"{name} is no array of numbers: {error}") from error
    return shape, by_columns, kind


def _check_pictures(shape: tuple[int, ...], kind: np.dtype[Any], labels: int, name: str) -> None:
    is_flat = len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)
    if kind != np.uint8 or not is_flat:
        raise ValueError(f"{name} is {kind} {shape}; needed: uint8 (n, height, width[, 3])")
    if labels != shape[0]:
        raise ValueError(f"{name} has {shape[0]} rows, its labels {labels}")
    check_size((shape[2], shape[1]), name, 1)


def _numbered(values: list[int], names: list[str], manifest: Manifest, path: Path) -> list[str]:
    if manifest.task == "multilabel":
        if len(values) != len(names):
            raise ValueError(f"{path} has {len(values)} findings, the manifest {len(names)} classes")
        if not set(values) <= {0, 1}:
            raise ValueError(f"{path}: findings {values} are not zeros and ones")
        return [name for name, value in zip(names, values, strict=True) if value]
    if len(values) != 1 or values[0] not in range(len(names)):
        raise ValueError(f"{path}: label {values} is not the number of one of the manifest's {len(names)} classes")
    return [names[int(values[0])]]


def read_wds(manifest: Manifest, paths: Sequence[Path]) -> Reading:
    """WebDataset tars as clip-benchmark lays them out: picture beside ``.cls`` or ``.txt``, splits as folders.

    ``.cls`` is a name, or a number in ``classnames.txt``, else in the order of the manifest's classes. Of a ``.txt``
    each line is a caption, for retrieval.

    Raises:
        ValueError: there is no tar, one is damaged, or a number is beyond the classes.
    """
    root = paths[0]
    tars = sorted(root.rglob("*.tar")) if root.is_dir() else [root]
    if not tars:
        raise ValueError(f"{root} holds no .tar files")
    listed = root / "classnames.txt"
    names = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else list(manifest.classes)
    places: dict[str, ArchivedFile] = {}
    samples = []
    for tar in tars:
        where = tar.relative_to(root).as_posix() if root.is_dir() else tar.name
        folders = PurePosixPath(where).parts[:-1] or (tar.stem,)
        split = next((part for part in folders if meaning_of(part)), "")
        for name, picture, notes in _grouped(tar):
            key = f"{where}/{name}"
            places[key] = picture
            labels = split_labels(manifest, _class_name(notes["cls"], names, tar)) if "cls" in notes else []
            captions = notes.get("txt", "").splitlines() if manifest.task == "retrieval" else []
            for caption in captions or [""]:
                samples.append(Sample(key, labels, " ".join(caption.split()), split=split))
    return Reading(samples, Store(lambda name: read_image_bytes(places[name])))


def _grouped(tar: Path) -> Iterator[tuple[str, ArchivedFile, dict[str, str]]]:
    """Key, picture and texts of each sample whose members are adjacent."""
    used = (own for own in readers.tar_members(tar) if not own.fault and own.suffix in {*IMAGE_SUFFIXES, "cls", "txt"})
    for key, members in groupby(used, attrgetter("key")):
        picture: ArchivedFile | None = None
        notes: dict[str, str] = {}
        for member in members:
            if member.suffix in IMAGE_SUFFIXES:
                picture = member.file
            elif member.file.size <= LARGEST_TEXT:
                notes[member.suffix] = member.file.read_bytes().decode("utf-8", "replace")
        if picture is not None:
            yield key, picture, notes


def _class_name(text: str, names: Sequence[str], tar: Path) -> str:
    text = text.strip()
    if not text.isdigit() or text in names:
        return text
    if int(text) >= len(names):
        raise ValueError(f"{tar}: class number {text} is beyond the {len(names)} classes")
    return names[int(text)]


def read_question_files(manifest: Manifest, paths: Sequence[Path]) -> Reading:
    """Questions and one sample for each distinct image: VQA-RAD's file, or SLAKE's folder.

    Raises:
        ValueError: the files are of neither form.
    """
    path = paths[0]
    folder = path / str(manifest.source.get("images", "imgs")) if path.is_dir() else path.parent / "images"
    questions, digests, splits = read_slake(path, folder) if path.is_dir() else read_vqa_rad(path)
    samples: dict[str, Sample] = {}
    for name, digest in digests.items():
        samples.setdefault(digest or name, Sample(name, group=digest, split=splits.get(name, "")))
    return Reading(list(samples.values()), files_under(folder), questions)


READERS: dict[str, Callable[[Manifest, Sequence[Path]], Reading]] = {
    "imagefolder": read_imagefolder,
    "csv": read_csv,
    "parquet": read_parquet,
    "hf": read_hf,
    "wds": read_wds,
    "medmnist": read_medmnist,
    "bags": read_bags,
    "questions": read_question_files,
}
