"""Read ``meta.jsonl``, the list of the authors' published folder.

Each line gives ``folderid``, ``id``, ``imgpath``, ``txt`` and ``available_clips``
(https://github.com/wangshansong1/MMKD-CLIP). Torch stays out of this file, so that worker processes which only read
images start fast; the features beside the images are read in `published_features`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.files import is_folder_name, json_lines, parse_json_object

META_FILE = "meta.jsonl"


@dataclass(frozen=True, slots=True)
class PublishedSample:
    """One line of ``meta.jsonl``."""

    id: str
    folder: str
    image: str
    caption: str
    teachers: tuple[str, ...]


def read_published(folder: Path) -> list[PublishedSample]:
    """All samples that ``folder/meta.jsonl`` lists, in its order.

    Raises:
        FileNotFoundError: there is no ``meta.jsonl``.
        ValueError: a line is not JSON or lacks a key (the message names it), or an id occurs twice.
    """
    path = folder / META_FILE
    samples = []
    for line, content in json_lines(path):
        place = f"{path}:{line}"
        try:
            samples.append(_sample(parse_json_object(content, place), place))
        except TypeError as error:
            raise ValueError(str(error)) from error
    if len({sample.id for sample in samples}) != len(samples):
        raise ValueError(f"{path} lists an id twice; ids must be unique")
    return samples


def _sample(row: dict[str, Any], place: str) -> PublishedSample:
    missing = [key for key in ("id", "folderid", "imgpath", "txt") if not isinstance(row.get(key), str)]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}; found: {', '.join(row)}")
    for key in ("id", "folderid"):
        if not is_folder_name(row[key]):
            raise ValueError(f"{place}: {key} {row[key]!r} is not the name of a folder; refused")
    teachers = row.get("available_clips") or []
    if not isinstance(teachers, list) or not all(map(is_folder_name, teachers)):
        raise ValueError(f"{place}: available_clips is {teachers!r}; it must be a list of teachers' names")
    return PublishedSample(row["id"], row["folderid"], row["imgpath"], row["txt"], tuple(teachers))
