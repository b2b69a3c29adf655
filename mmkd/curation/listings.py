"""Collections that list images in text: JSON lines as PMC-OA and ROCO have them, ``labels.csv``, folders of classes.

JSON lines name things differently everywhere; the names in use are tried in turn. Images lie beside the list or in a
folder beside it, and never outside.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mmkd.curation.samples import IMAGE_SUFFIXES, Item, RawSample, Refused
from mmkd.data.images import read_image_bytes
from mmkd.data.records import is_inside
from mmkd.data.sources import read_rows
from mmkd.data.splits import meaning_of

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


def read_json_listing(path: Path, start: int, stop: int) -> Iterator[Item]:
    """The samples of the lines between two bytes of a JSON-lines file."""
    with path.open("rb") as file:
        file.seek(start)
        while file.tell() < stop:
            position = file.tell()
            line = file.readline()
            if line.strip():
                yield _from_line(path, f"{path.name}@{position}", line)


def read_labels_listing(folder: Path, start: int, stop: int) -> Iterator[Item]:
    """Rows ``start`` to ``stop`` of a folder with ``labels.csv`` or the authors' ``meta.jsonl``."""
    for row in read_rows(folder)[start:stop]:
        if row.malformed or not row.file:
            yield Refused(row.place, "malformed_row" if row.malformed else "no_file_named")
            continue
        names = ("modality", "label", "group", "split", "license", "source")
        facts = {name: getattr(row, name) or None for name in names}
        yield _listed(folder, row.place, row.id or row.file, row.file, row.caption or None, facts)


def read_image_folder(folder: Path, start: int, stop: int) -> Iterator[Item]:
    """Images ``start`` to ``stop`` of a tree in which a folder's name is the label, below train and test or not.

    A text beside an image, ``x.txt`` for ``x.jpg``, is its caption.
    """
    files = list_files(folder)
    for path in files[start:stop]:
        if path.suffix.lower()[1:] not in IMAGE_SUFFIXES:
            continue
        relative = path.relative_to(folder)
        parts = list(relative.parts[:-1])
        split = next((part for part in parts if meaning_of(part)), "")
        labels = [part for part in parts if part != split]
        text = path.with_suffix(".txt")
        caption = text.read_bytes() if text.is_file() and not text.is_symlink() else None
        facts = {"label": labels[-1] if labels else None, "split": split or None}
        yield _listed(folder, relative.as_posix(), relative.as_posix(), relative.as_posix(), caption, facts)


def list_files(folder: Path) -> list[Path]:
    """All files below a folder that are not hidden, in the order of their names; linked folders are not entered."""
    found = [Path(root, name) for root, _, names in os.walk(folder) for name in names if not name.startswith(".")]
    return sorted(found)


def first_of(row: Mapping[str, Any], meaning: str) -> Any:
    """The value under the first name in use for an image, a caption, a key or an article."""
    return next((row[name] for name in NAMES[meaning] if row.get(name) not in (None, "")), None)


def facts_of(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What a row says beside image and caption; an article's number is looked for in the key where none is given."""
    facts = {name: row[name] for name in KEPT if name in row}
    found = ARTICLE.search(key)
    return facts | {"article_accession_id": first_of(row, "article") or (found[0] if found else None)}


def _from_line(path: Path, place: str, line: bytes) -> Item:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return Refused(place, "invalid_json")
    if not isinstance(row, dict):
        return Refused(place, "wrong_type")
    image, caption = first_of(row, "image"), first_of(row, "caption")
    if isinstance(image, list) and image:
        image = image[0]
    if image is None:
        return Refused(place, "no_file_named")
    if not isinstance(image, str) or not isinstance(caption, (str, type(None))):
        return Refused(place, "wrong_type")
    key = str(first_of(row, "key") or image)
    return _listed(path.parent, place, key, image, caption, facts_of(row, f"{key} {image}"))


def _listed(
    root: Path, place: str, key: str, image: str, caption: str | bytes | None, facts: dict[str, Any]
) -> RawSample | Refused:
    image = image.replace("\\", "/")
    if not is_inside(image):
        return Refused(place, "path_outside")
    candidates = [root / folder / image for folder in FOLDERS]
    path = next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
    if not path.resolve().is_relative_to(root.resolve()):
        return Refused(place, "path_outside")
    suffix = path.suffix.lower()[1:]
    return RawSample(key, place, caption, facts, partial(read_image_bytes, path), suffix)
