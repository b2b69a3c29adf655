"""Samples of a source, the store that their images are read from, and how a manifest names columns, rows and labels."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from mmkd.command.settings import nearest
from mmkd.data.images import finish_image, open_header, read_image_bytes
from mmkd.data.pixel_rules import DEFAULT_WINDOW, UnreadableImageError, Window
from mmkd.evaluation.datasets.manifest import ASSIGNED, HELD_OUT, Manifest
from mmkd.evaluation.datasets.questions import Question
from mmkd.files import is_inside, leads_inside

MISSING = "missing"

IN_BRACES = re.compile(r"\{([^{}]+)\}")

TRUE, FALSE = ("1", "1.0", "true", "yes"), ("", "0", "0.0", "false", "no")


@dataclass(slots=True)
class Sample:
    """An image, caption or slide as its publisher describes it.

    Attributes:
        name: of the image in its store.
        labels: classes; several where it has several.
        caption: a sentence about it.
        group: patient, case or slide.
        split: name that the publisher uses; empty where none is given.
        metadata: further columns, of slides.
    """

    name: str
    labels: Sequence[str] = ()
    caption: str = ""
    group: str = ""
    split: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


class Store:
    """Images by name.

    Attributes:
        window: of DICOM and NIfTI.
    """

    def __init__(self, read: Callable[[str], bytes]) -> None:
        """Keep what gives the bytes stored under a name, or raises `UnreadableImageError`."""
        self.data = read
        self.window: Window = DEFAULT_WINDOW

    def image(self, name: str) -> Image.Image:
        """The image as upright 8-bit RGB.

        Raises:
            UnreadableImageError: with the reason.
        """
        return finish_image(open_header(self.data(name), name, window=self.window), name)

    def digest(self, name: str) -> str:
        """SHA-256 of what is stored, and of a window that is not the default; ``"missing"`` if it cannot be read."""
        window = b"" if self.window == DEFAULT_WINDOW else str(self.window).encode()
        try:
            return hashlib.sha256(self.data(name) + window).hexdigest()
        except UnreadableImageError:
            return MISSING


def files_under(folder: Path) -> Store:
    """Images in files under a folder; a name or link that leaves it is refused."""
    root = folder.resolve()

    def read(name: str) -> bytes:
        path = root / name
        if not is_inside(name) or not leads_inside(root, path):
            raise UnreadableImageError("missing", f"{name} lies outside {root}; refused")
        return read_image_bytes(path)

    return Store(read)


@dataclass
class Reading:
    """What was read of a source.

    Attributes:
        samples: one for each image, caption or slide.
        store: of the images.
        questions: about the images.
        root: the folder of a bag's features.
        notes: what a reader of the results should know of it.
    """

    samples: list[Sample]
    store: Store
    questions: list[Question] = field(default_factory=list)
    root: Path | None = None
    notes: list[str] = field(default_factory=list)


def images_folder(manifest: Manifest, folder: Path) -> Path:
    """The folder of the images: that of the table, or the one that ``images`` names relative to it.

    Raises:
        ValueError: it is not there.
    """
    name = str(manifest.source.get("images", ""))
    if not (folder / name).is_dir():
        raise ValueError(
            f"source: images {name!r} is no folder in {folder}; name it relative to the folder of the table"
        )
    return folder / name


def chosen(manifest: Manifest, key: str, columns: Iterable[str], needed: bool) -> str:
    """The column that the source, or by default the usual name, gives for a field; empty where there is none.

    Raises:
        ValueError: it is named or needed and the table lacks it.
    """
    columns = list(columns)
    named = getattr(manifest, key) if key in ("group", "split") else manifest.source.get(key)
    name = str(named or key)
    if name in columns:
        return name
    if named or needed:
        raise ValueError(f"no column {name!r} for {key}{nearest(name, columns)}; the table has {', '.join(columns)}")
    return ""


def passes(row: dict[str, Any], where: dict[str, Any]) -> bool:
    """Whether a row has one of the wanted values in every column of the conditions."""
    return all(
        str(row.get(column)) in [str(value) for value in (wanted if isinstance(wanted, list) else [wanted])]
        for column, wanted in where.items()
    )


def check_where(manifest: Manifest, columns: Sequence[str]) -> dict[str, Any]:
    """The conditions on rows.

    Raises:
        ValueError: they are no mapping or name a column that is not there.
    """
    where = manifest.source.get("where") or {}
    if not isinstance(where, dict):
        raise ValueError(f"source: where must be a mapping such as {{modality: X-ray}}, not {where!r}")
    unknown = next((column for column in where if column not in columns), None)
    if unknown is not None:
        near = nearest(str(unknown), columns)
        raise ValueError(f"source: where names a column {unknown!r}{near} that the table lacks: {', '.join(columns)}")
    return where


def split_labels(manifest: Manifest, text: str) -> list[str]:
    """The labels that a text holds: one, or for multi-label data those between separators."""
    if manifest.task != "multilabel":
        return [text.strip()] if text.strip() else []
    return [part.strip() for part in text.split(str(manifest.source.get("separator", "|"))) if part.strip()]


def group_of(manifest: Manifest, name: str, given: str) -> str:
    """The group of an image: that of its row, or what ``group_pattern`` finds in its name.

    Raises:
        ValueError: the pattern is wrong, or finds nothing in a name.
    """
    pattern = manifest.source.get("group_pattern")
    if not pattern:
        return given
    try:
        found = re.search(str(pattern), name)
    except re.error as error:
        raise ValueError(f"source: group_pattern {pattern!r} is no regular expression: {error}") from None
    if found is None:
        raise ValueError(f"source: group_pattern {pattern!r} finds no group in {name!r}")
    return found[1] if found.groups() else found[0]


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
    return "" if manifest.split in (HELD_OUT, ASSIGNED) else chosen(manifest, "split", columns, False)


def row_sample(manifest: Manifest, row: dict[str, Any], fields: dict[str, Any], name: str) -> Sample:
    """A row as a sample; empty cells are empty texts."""
    label = fields["label"]
    if isinstance(label, list):
        labels = [column for column in label if _is_set(row[column], column, name)]
    elif label and isinstance(row[label], (list, tuple)):
        labels = [str(value) for value in row[label]]
    else:
        labels = split_labels(manifest, _text(row[label])) if label else []
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


def file_name(row: dict[str, str], field: str) -> str:
    """The file of a row; an ending that a pattern adds is not doubled where the column has it."""
    if "{" not in field:
        return row[field]
    name = IN_BRACES.sub(lambda found: row[found[1]], field)
    ending = PurePosixPath(field).suffix
    return name.removesuffix(ending) if ending and name.lower().endswith(2 * ending.lower()) else name


def _is_set(value: Any, column: str, name: str) -> bool:
    """Whether a cell of a column of zeros and ones is 1; an empty cell counts as 0.

    Raises:
        ValueError: it holds something else, such as -1 for an uncertain finding.
    """
    text = _text(value).strip().lower()
    if text not in (*TRUE, *FALSE):
        raise ValueError(f"{name}: {column!r} holds {value!r}, neither 0 nor 1; leave such rows out with `where`")
    return text in TRUE


def _text(value: Any) -> str:
    return "" if value is None else str(value)
