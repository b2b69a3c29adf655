"""Pairs of an image and its caption: one JSON object a line, images in a folder beside.

A manifest names images relative to one root, so that a stage that only chooses pairs (`screen`) writes a few kilobytes
and points at the images of the stage before. Everything downstream knows pairs by ``id`` alone: features are looked up
by it, and the order of the manifest carries no meaning.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mmkd.data.archives import ArchivedFile, archived_file
from mmkd.data.pair import SPLITS, Pair
from mmkd.data.pair_table import TABLE_FILE, PairTable, check_table
from mmkd.data.published import META_FILE, read_json_lines, read_published
from mmkd.files import atomic_write_lines, read_json, write_json

MANIFEST_FILE, FOLDER_FILE = "manifest.jsonl", "pairs.json"
VERSION = 1
REQUIRED = ("id", "image", "caption")


class PairFolder:
    """Pairs and the root their images lie under."""

    def __init__(self, path: Path, image_root: Path, pairs: Sequence[Pair]) -> None:
        self.path = path
        self.image_root = image_root
        self.pairs = pairs
        self._resolved_root = image_root.resolve()

    def image_path(self, pair: Pair) -> Path | ArchivedFile:
        """Where the image of a pair lies, for `open_image` or `read_image_bytes`.

        Raises:
            ValueError: the path, or the link it names, leaves the image root.
        """
        archived = archived_file(self._resolved_root, pair.image)
        path = archived.archive if archived else self._resolved_root / pair.image
        if not path.resolve().is_relative_to(self._resolved_root):
            raise ValueError(f"pair {pair.id}: image {pair.image!r} lies outside {self.image_root}; refused")
        return archived or path


def open_pairs(folder: Path, split: str | None = None) -> PairFolder:
    """Open a folder of pairs: ours (``manifest.jsonl`` or ``manifest.arrow``) or the authors' one (``meta.jsonl``).

    Args:
        folder: the folder.
        split: keep only train, validation or test pairs.

    Raises:
        FileNotFoundError: the folder holds neither file.
        ValueError: a line is broken, an id occurs twice, or no pair is in ``split``.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    if (folder / TABLE_FILE).is_file():
        return _open_table(folder, split)
    if (folder / MANIFEST_FILE).is_file():
        pairs = [_pair(row, place) for row, place in read_json_lines(folder / MANIFEST_FILE)]
        image_root = folder / _image_root(folder)
    elif (folder / META_FILE).is_file():
        pairs = [
            Pair(s.id, s.image, s.caption, group=s.id, source="MMKD-CLIP published data", teachers=s.teachers)
            for s in read_published(folder)
        ]
        image_root = folder
    else:
        raise FileNotFoundError(
            f"{folder} holds none of {MANIFEST_FILE}, {TABLE_FILE} and {META_FILE}; "
            f"make it with `mmkd curate --source DIR --output {folder}`"
        )
    _check(pairs, folder)
    kept = pairs if split is None else [pair for pair in pairs if pair.split == split]
    _refuse_none(kept, folder, split, len(pairs))
    return PairFolder(folder, image_root, kept)


def write_manifest(folder: Path, pairs: Iterable[Pair], images: Path | None = None) -> None:
    """Write ``manifest.jsonl`` and ``pairs.json``.

    Args:
        folder: where; created when missing.
        pairs: in the order they shall have.
        images: the image root, by default ``folder/images``; stored relative to ``folder``.
    """
    root = os.path.relpath(images, folder) if images is not None else "images"
    lines = (json.dumps(_record(pair), ensure_ascii=False) + "\n" for pair in pairs)
    atomic_write_lines(folder / MANIFEST_FILE, lines)
    write_json(folder / FOLDER_FILE, {"version": VERSION, "images": Path(root).as_posix()})


def is_inside(relative: str) -> bool:
    """Whether a relative path, read without following links, stays inside the folder it is joined to."""
    path = PurePosixPath(relative.replace("\\", "/"))
    windows_drive = len(relative) > 1 and relative[1] == ":"
    return (
        bool(relative)
        and "\0" not in relative
        and not path.is_absolute()
        and ".." not in path.parts
        and not windows_drive
    )


def _open_table(folder: Path, split: str | None) -> PairFolder:
    table = PairTable(folder / TABLE_FILE)
    check_table(table, folder)
    kept = table if split is None else table.in_split(split)
    _refuse_none(kept, folder, split, len(table))
    return PairFolder(folder, folder / _image_root(folder), kept)


def _refuse_none(kept: Sequence[Pair], folder: Path, split: str | None, total: int) -> None:
    if not kept:
        raise ValueError(f"{folder} holds no pairs" + (f" in split {split!r} (of {total})" if split else ""))


def _record(pair: Pair) -> dict[str, Any]:
    """The required fields and those that are not empty; an empty tuple of teachers says something and stays."""
    record = {field.name: getattr(pair, field.name) for field in dataclasses.fields(pair)}
    return {key: value for key, value in record.items() if key in REQUIRED or value not in ("", 0, None)}


def _pair(row: dict[str, Any], place: str) -> Pair:
    known = {field.name: field for field in dataclasses.fields(Pair)}
    unknown = [key for key in row if key not in known]
    missing = [key for key in REQUIRED if key not in row]
    if unknown or missing:
        raise ValueError(f"{place}: unknown keys {unknown}, missing keys {missing}; allowed: {', '.join(known)}")
    for key, value in row.items():
        expected = list if key == "teachers" else int if key in ("width", "height") else str
        if not isinstance(value, expected):
            raise ValueError(f"{place}: {key} is {value!r}, not of type {expected.__name__}")
    return Pair(**{**row, "teachers": tuple(row["teachers"])} if "teachers" in row else row)


def _image_root(folder: Path) -> str:
    description = read_json(folder / FOLDER_FILE)
    if not isinstance(description, dict) or description.get("version") != VERSION:
        raise ValueError(f"{folder / FOLDER_FILE} is not of version {VERSION}; curate again or upgrade mmkd-clip")
    if "images" not in description:
        raise ValueError(f"{folder / FOLDER_FILE} does not say under `images` where these lie; curate again")
    return str(description["images"])


def _check(pairs: list[Pair], folder: Path) -> None:
    seen: set[str] = set()
    for pair in pairs:
        if pair.id in seen:
            raise ValueError(f"{folder} lists id {pair.id!r} twice; ids must be unique")
        seen.add(pair.id)
        if not is_inside(pair.image):
            raise ValueError(f"{folder}: image {pair.image!r} of pair {pair.id} leaves the image root; refused")
        if pair.split not in SPLITS:
            raise ValueError(f"{folder}: pair {pair.id} is in split {pair.split!r}; allowed: {', '.join(SPLITS)}")
