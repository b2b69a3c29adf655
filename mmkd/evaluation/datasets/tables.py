"""Sources that are plain files: folders of classes, CSV tables beside images, tables of slides, lists of questions."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mmkd.command.settings import nearest
from mmkd.data import readers
from mmkd.data.images import UnreadableImageError, read_image_bytes
from mmkd.data.splits import meaning_of
from mmkd.evaluation.datasets.manifest import DEALT, HELD_OUT, Manifest
from mmkd.evaluation.datasets.questions import CLOSED, Question, read_questions, stated
from mmkd.evaluation.datasets.source import (
    Files,
    Reading,
    Sample,
    Store,
    check_where,
    chosen,
    cut,
    images_folder,
    is_skipped,
    passes,
)
from mmkd.files import is_inside, read_json

ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".jp2")

IN_BRACES = re.compile(r"\{([^{}]+)\}")

EVENT_OF_CENSORED = {"1": "0", "1.0": "0", "true": "0", "yes": "0", "0": "1", "0.0": "1", "false": "1", "no": "1"}

TRUE, FALSE = ("1", "1.0", "true", "yes"), ("", "0", "0.0", "false", "no")


def read_imagefolder(manifest: Manifest, paths: Sequence[Path]) -> Reading:
    """Images under folders that bear the names of classes, these perhaps under folders that bear those of splits.

    Raises:
        ValueError: there are no images, or some lie outside any folder of a class.
    """
    root = paths[0]
    known = {str(name).casefold() for name in (*manifest.classes, *(manifest.source.get("rename") or {}))}
    called = manifest.source.get("splits") or {}
    samples = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.suffix.lower() not in ENDINGS or is_skipped(manifest, name) or path.name.startswith("."):
            continue
        folders = path.relative_to(root).parts[:-1]
        split = next(
            (part for part in folders if part in called or (part.casefold() not in known and meaning_of(part))), ""
        )
        rest = [part for part in folders if part != split]
        label = next((part for part in rest if part.casefold() in known), rest[0] if rest else "")
        samples.append(Sample(name, [label] if label else [], split=split))
    if not samples:
        raise ValueError(f"{root} holds no images ({', '.join(ENDINGS)}) in folders of classes")
    return Reading(samples, Files(root))


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
        where = check_where(manifest, columns)
        beside = images_folder(manifest, path.parent).resolve()
        if not beside.is_relative_to(root):
            raise ValueError(f"source: images {manifest.source['images']!r} leaves {root}; refused")
        prefix = beside.relative_to(root).as_posix()
        start = "" if prefix == "." else f"{prefix}/"
        tag = f"{path.parent.name}/" if len(paths) > 1 else ""
        for row in rows:
            if passes(row, where):
                sample = row_sample(manifest, row, fields, start + _file_name(row, fields["file"]))
                sample.group = sample.group and f"{tag}{sample.group}"
                samples.append(sample)
    return Reading(samples, Files(root))


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
    renamed = {} if manifest.task != "survival" else _survival_columns(manifest, columns)
    renamed |= {"site": site} if (site := chosen(manifest, "site", columns, False)) else {}
    samples = []
    for row in rows:
        metadata = row | {name: row[column] for name, column in renamed.items()}
        censored = metadata.pop("censored", None)
        if censored is not None:
            metadata["event"] = EVENT_OF_CENSORED.get(censored.strip().lower(), censored)
        labels = cut(manifest, row[label]) if label else []
        given = row[split] if split else ""
        samples.append(
            Sample(row[slide], labels, group=row[case] if case else row[slide], split=given, metadata=metadata)
        )
    return Reading(samples, Store(), root=folder)


def _survival_columns(manifest: Manifest, columns: Sequence[str]) -> dict[str, str]:
    """Where time and event, or censoring, stand."""
    ending = "censored" if "censored" in manifest.source else "event"
    return {name: chosen(manifest, name, columns, True) for name in ("time", ending)}


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


def table_fields(manifest: Manifest, columns: Sequence[str], image: str) -> dict[str, Any]:
    """The column of each field of a table with images; ``label`` may be several, one for each class.

    Raises:
        ValueError: one that is named or needed is not there.
    """
    label = manifest.source.get("label")
    if isinstance(label, list):
        absent = next((name for name in label if name not in columns), None)
        if absent is not None:
            raise ValueError(f"source: no column {absent!r} for label; the table has {', '.join(columns)}")
    else:
        label = chosen(manifest, "label", columns, manifest.task in ("classification", "multilabel", "ordinal"))
    return {
        image: _file_field(manifest, image, columns),
        "label": label,
        "caption": chosen(manifest, "caption", columns, manifest.task == "retrieval"),
        "group": chosen(manifest, "group", columns, False),
        "split": split_column(manifest, columns),
    }


def split_column(manifest: Manifest, columns: Sequence[str]) -> str:
    """The column of the split; empty where none is to be read."""
    return "" if manifest.split in (HELD_OUT, DEALT) else chosen(manifest, "split", columns, False)


def row_sample(manifest: Manifest, row: dict[str, Any], fields: dict[str, Any], name: str) -> Sample:
    """A row as a sample; empty cells are empty texts."""
    label = fields["label"]
    if isinstance(label, list):
        labels = [column for column in label if _is_set(row[column], column, name)]
    elif label and isinstance(row[label], (list, tuple)):
        labels = [str(value) for value in row[label]]
    else:
        labels = cut(manifest, _text(row[label])) if label else []
    texts = {key: _text(row[fields[key]]) if fields[key] else "" for key in ("caption", "group", "split")}
    return Sample(name, labels, " ".join(texts["caption"].split()), texts["group"], texts["split"])


def _file_field(manifest: Manifest, image: str, columns: Sequence[str]) -> str:
    """The column of the image, or a pattern of columns in braces such as ``{class}/{name}.jpg``."""
    pattern = str(manifest.source.get(image) or "")
    used = IN_BRACES.findall(pattern)
    absent = next((name for name in used if name not in columns), None)
    if absent is not None:
        near = nearest(absent, columns)
        raise ValueError(f"source: {image} names a column {absent!r}{near}; the table has {', '.join(columns)}")
    return pattern if used else chosen(manifest, image, columns, True)


def _file_name(row: dict[str, str], field: str) -> str:
    """The file of a row; an ending that a pattern adds is not doubled where the column has it."""
    if "{" not in field:
        return row[field]
    name = IN_BRACES.sub(lambda found: row[found[1]], field)
    ending = PurePosixPath(field).suffix
    return name.removesuffix(ending) if ending and name.lower().endswith(2 * ending.lower()) else name


def _is_set(value: Any, column: str, name: str) -> bool:
    """Whether a column of zeros and ones says that an image shows something; an empty cell says that it does not.

    Raises:
        ValueError: it says something else, such as -1 for what nobody is sure of.
    """
    said = _text(value).strip().lower()
    if said not in (*TRUE, *FALSE):
        raise ValueError(f"{name}: column {column!r} says {value!r}, neither 0 nor 1; leave out such rows with `where`")
    return said in TRUE


def _text(value: Any) -> str:
    return "" if value is None else str(value)


SLAKE_FILES = {"train": ["train.json"], "validation": ["validate.json", "validation.json"], "test": ["test.json"]}

ENGLISH = "en"


def read_question_files(manifest: Manifest, paths: Sequence[Path]) -> Reading:
    """Questions and one sample for each distinct image; which form it is shows in whether the source is a folder.

    Raises:
        ValueError: the files are of neither form.
    """
    path = paths[0]
    if path.is_dir():
        return _read_slake(path, str(manifest.source.get("images", "imgs")))
    rows = read_json(path)
    questions = read_questions(path)
    names = sorted({str(row["image_name"]) for row in rows})
    images = path.parent / "images"
    samples: dict[str, Sample] = {}
    for name in names:
        digest = _digest(images / name)
        samples.setdefault(digest or name, Sample(name, group=digest))
    return Reading(list(samples.values()), Files(images), questions)


def _read_slake(folder: Path, images: str) -> Reading:
    """English questions; an image's split is that of its questions."""
    root = folder / images
    samples: dict[str, Sample] = {}
    digests: dict[str, str] = {}
    questions: list[Question] = []
    for split, files in SLAKE_FILES.items():
        file = next((name for name in files if (folder / name).is_file()), files[0])
        rows: Any = read_json(folder / file)
        keys = {"img_name", "question", "answer", "answer_type"}
        if not isinstance(rows, list) or not all(isinstance(row, dict) and keys <= row.keys() for row in rows):
            raise ValueError(f"{folder / file} must be a list of objects with {', '.join(sorted(keys))}")
        for row in rows:
            if row.get("q_lang", ENGLISH) != ENGLISH:
                continue
            name = str(row["img_name"])
            if not is_inside(name):
                raise ValueError(f"{folder / file}: image {name!r} leaves the folder; refused")
            if name not in digests:
                digests[name] = _digest(root / name)
            samples.setdefault(digests[name] or name, Sample(name, group=digests[name], split=split))
            is_closed = str(row["answer_type"]).strip().upper() == CLOSED
            text, answer = stated(row["question"], row["answer"], str(folder / file))
            questions.append(Question(digests[name], text, answer, is_closed, meaning_of(split)))
    return Reading(list(samples.values()), Files(root), [question for question in questions if question.sha256])


def _digest(path: Path) -> str:
    """SHA-256 of an image file, empty where it cannot be read."""
    try:
        return hashlib.sha256(read_image_bytes(path)).hexdigest()
    except UnreadableImageError:
        return ""
