"""What every kind of source gives: samples as its publisher tells of them, and a store from which images are read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from PIL import Image

from mmkd.command.settings import nearest
from mmkd.data.archives import ArchivedFile
from mmkd.data.images import UnreadableImageError, finish_image, open_header, read_image_bytes
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.datasets.questions import Question
from mmkd.files import is_inside

MISSING = "missing"


@dataclass(slots=True)
class Sample:
    """An image, caption or slide in its publisher's words.

    Attributes:
        name: of the image in its store.
        labels: classes; several where it has several.
        caption: a sentence about it.
        group: patient, case or slide.
        split: as it is called there; empty where none is given.
        metadata: further columns, of slides.
    """

    name: str
    labels: Sequence[str] = ()
    caption: str = ""
    group: str = ""
    split: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


class Store:
    """Images by name."""

    def data(self, name: str) -> bytes:
        """What is stored under a name.

        Raises:
            UnreadableImageError: there is nothing, or it cannot be read.
        """
        raise UnreadableImageError(
            "missing", f"{name}: there are no images here; slides are read through their features"
        )

    def image(self, name: str) -> Image.Image:
        """The image as upright 8-bit RGB.

        Raises:
            UnreadableImageError: with the reason.
        """
        return finish_image(open_header(self.data(name), name), name)

    def digest(self, name: str) -> str:
        """SHA-256 of what is stored; ``"missing"`` where it cannot be read."""
        try:
            return hashlib.sha256(self.data(name)).hexdigest()
        except UnreadableImageError:
            return MISSING


class Files(Store):
    """Images in files under a folder that no name and no link leaves."""

    def __init__(self, root: Path) -> None:
        """Resolve the folder once."""
        self.root = root.resolve()

    def data(self, name: str) -> bytes:
        """The bytes of a file."""
        path = self.root / name
        if not is_inside(name) or not path.resolve().is_relative_to(self.root):
            raise UnreadableImageError("missing", f"{name} lies outside {self.root}; refused")
        return read_image_bytes(path)


class Members(Store):
    """Images inside tar files, read by offset."""

    def __init__(self, places: dict[str, ArchivedFile]) -> None:
        """Keep where each lies."""
        self.places = places

    def data(self, name: str) -> bytes:
        """The bytes of a member."""
        return read_image_bytes(self.places[name])


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
    """The folder of the images: that of the table, or the one that ``images`` names as seen from there.

    Raises:
        ValueError: it is not there.
    """
    name = str(manifest.source.get("images", ""))
    if not (folder / name).is_dir():
        raise ValueError(
            f"source: images {name!r} is no folder in {folder}; name it as seen from the table, which lies there"
        )
    return folder / name


def chosen(manifest: Manifest, key: str, columns: Iterable[str], needed: bool, default: str | None = None) -> str:
    """The column that the source, or by default the usual name, gives for a field; empty where there is none.

    Raises:
        ValueError: it is named or needed and the table lacks it.
    """
    columns = list(columns)
    named = getattr(manifest, key) if key in ("group", "split") else manifest.source.get(key)
    name = str(named or default or key)
    if name in columns:
        return name
    if named or needed:
        raise ValueError(f"no column {name!r} for {key}{nearest(name, columns)}; the table has {', '.join(columns)}")
    return ""


def passes(row: dict[str, Any], where: dict[str, Any]) -> bool:
    """Whether a row has one of the wanted values in every column that is asked for."""
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


def is_skipped(manifest: Manifest, name: str) -> bool:
    """Whether a file is named by one of the patterns of ``skip``."""
    skip = manifest.source.get("skip") or []
    return any(fnmatch(name, pattern) for pattern in ([skip] if isinstance(skip, str) else skip))


def cut(manifest: Manifest, text: str) -> list[str]:
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
