"""Sources in columns: Parquet files, and data sets of the ``datasets`` library from a folder or the Hub."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmkd.data.images import UnreadableImageError
from mmkd.data.readers import ParquetCells, open_hub_dataset, parquet_columns, parquet_rows
from mmkd.data.splits import meaning_of
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.datasets.questions import Question, stated
from mmkd.evaluation.datasets.source import Files, Reading, Sample, Store, check_where, chosen, images_folder, passes
from mmkd.evaluation.datasets.tables import row_sample, table_fields

ROWS = 1024  # held at a time
CLOSED_ANSWERS = ("yes", "no")


class Cells(Store):
    """Pictures in a column of a table, read row by row through a function."""

    def __init__(self, cell: Any, files: Store | None = None) -> None:
        """Keep the function from a name to bytes, or to a path under ``files``."""
        self.cell, self.files = cell, files
        self._lock = threading.Lock()  # images are read by several threads, and tables share what they read last

    def data(self, name: str) -> bytes:
        """The bytes in a cell, or of the file it names."""
        with self._lock:
            value = self.cell(name)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and self.files is not None:
            return self.files.data(value)
        if not isinstance(value, bytes) or not value:
            raise UnreadableImageError("missing", f"{name} holds no picture")
        return value


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
    asked: list[tuple[str, str]] = []
    cells = ParquetCells()
    places: dict[str, tuple[Path, str, int, int]] = {}
    for file in files:
        columns = parquet_columns(file)
        fields = table_fields(manifest, columns, "image")
        where = check_where(manifest, columns)
        asking = [chosen(manifest, key, columns, manifest.task == "vqa") for key in ("question", "answer")]
        split = next((part for part in (file.stem.split("-")[0], file.parent.name) if meaning_of(part)), "")
        others = [name for name in columns if name != fields["image"]]
        for group, row, values in parquet_rows(file, others, ROWS):
            if not passes(values, where):
                continue
            name = f"{file.relative_to(root).as_posix()}@{group}+{row}"
            places[name] = (file, fields["image"], group, row)
            sample = row_sample(manifest, values | {fields["image"]: None}, fields, name)
            sample.split = sample.split or split
            samples.append(sample)
            if manifest.task == "vqa":
                asked.append(stated(values[asking[0]], values[asking[1]], name))
    store = Cells(lambda name: cells.read(*places[name]), Files(images_folder(manifest, root)))
    return _with_questions(samples, asked, store) if asked else Reading(samples, store)


def _with_questions(samples: list[Sample], asked: list[tuple[str, str]], store: Store) -> Reading:
    """Rows of one question each as one sample for every distinct image, and the questions."""
    first: dict[str, Sample] = {}
    questions = []
    for sample, (text, answer) in zip(samples, asked, strict=True):
        digest = store.digest(sample.name)
        sample.group = sample.group or digest
        first.setdefault(digest, sample)
        questions.append(Question(digest, text, answer, answer in CLOSED_ANSWERS, meaning_of(sample.split)))
    return Reading(list(first.values()), store, questions)


def read_hf(manifest: Manifest, paths: Sequence[Path]) -> Reading:
    """A data set that ``save_to_disk`` wrote, or one of the Hub by its name; its splits are its own.

    Code that comes with a data set is never run.

    Raises:
        FileNotFoundError: the Hub cannot be reached and the data set is not in the local cache.
        ValueError: a column that is needed is not there.
    """
    source = str(paths[0]) if paths[0].is_dir() else manifest.source["hf"]
    loaded = open_hub_dataset(source, name=manifest.source.get("config"))
    splits = loaded if isinstance(loaded, dict) else {"": loaded}
    tables: dict[str, Any] = {}
    samples: list[Sample] = []
    for split, table in splits.items():
        fields = table_fields(manifest, table.column_names, "image")
        column = fields["image"]
        tables[split] = table.select_columns([column])
        named = _class_names(table.features.get(fields["label"]) if isinstance(fields["label"], str) else None)
        for row, values in enumerate(table.remove_columns([column])):
            sample = row_sample(manifest, values | {column: None}, fields, f"{split}/{row}")
            sample.labels = [named[int(label)] if named else label for label in sample.labels]
            sample.split = sample.split or split
            samples.append(sample)

    def cell(name: str) -> Any:
        split, _, row = name.rpartition("/")
        return tables[split][int(row)][manifest.source.get("image", "image")]

    return Reading(samples, Cells(cell))


def _class_names(feature: Any) -> list[str]:
    """Names of a ``ClassLabel``, alone or in a list; empty for any other feature."""
    feature = getattr(feature, "feature", feature)
    return list(getattr(feature, "names", None) or [])
