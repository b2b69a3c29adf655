"""Pairs of an image and its caption: one JSON object a line, images in a folder beside.

A manifest names images relative to one root, so that a stage that only chooses pairs (`screen`) writes a few kilobytes
and points at the images of the stage before. Everything downstream knows pairs by ``id`` alone: features are looked up
by it, and the order of the manifest carries no meaning.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.command.values import nearest
from mmkd.data.archives import ArchivedFile, archived_file
from mmkd.data.published import META_FILE, read_published
from mmkd.data.readers import is_inside, json_lines, parse_json_object
from mmkd.data.table import SPLITS, TABLE_FILE, Pair, PairTable, check_table, in_columns, map_table, take_rows
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
        pairs = _read_lines(folder / MANIFEST_FILE)
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


def _read_lines(path: Path) -> list[Pair]:
    try:
        return [_pair(parse_json_object(text, f"{path}:{line}"), f"{path}:{line}") for line, text in json_lines(path)]
    except TypeError as error:
        raise ValueError(str(error)) from error


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


# Section: A manifest of some of the pairs of another one, written while they pass by, in the form the other has.


CHUNK = 4096

Choice = tuple[np.ndarray, list[Pair]]  # positions in the source, (n,), and the pairs with their teachers


def in_chunks(pairs: Sequence[Pair]) -> Iterator[tuple[int, list[Pair]]]:
    """All pairs, some thousands at a time, each chunk with the position it begins at."""
    for start in range(0, len(pairs), CHUNK):
        yield start, list(pairs[start : start + CHUNK])


def ids_of(pairs: Sequence[Pair]) -> list[str]:
    """The ids of all pairs; of a table only this column is read."""
    return pairs.column("id").to_pylist() if isinstance(pairs, PairTable) else [pair.id for pair in pairs]


def pairs_at(pairs: Sequence[Pair], positions: np.ndarray) -> list[Pair]:
    """The pairs at some positions, (n,)."""
    return list(pairs.take(positions)) if isinstance(pairs, PairTable) else [pairs[k] for k in positions.tolist()]


def write_choice(output: Path, source: PairFolder, choices: Iterable[Choice]) -> None:
    """Write the chosen pairs with the teachers they were given; images stay where they are.

    Args:
        output: the folder.
        source: where the pairs come from, all splits; a table (``manifest.arrow``) gives a table with all its columns.
        choices: the pairs in the order of the source.
    """
    if isinstance(source.pairs, PairTable):
        _write_table(output, source.pairs, choices)
        root = os.path.relpath(source.image_root, output)
        write_json(output / FOLDER_FILE, {"version": VERSION, "images": Path(root).as_posix()})
    else:
        write_manifest(output, (pair for _, chosen in choices for pair in chosen), images=source.image_root)


def _write_table(output: Path, table: PairTable, choices: Iterable[Choice]) -> None:
    import pyarrow as pa

    whole = map_table(table.path)
    column = whole.schema.get_field_index("teachers")
    field = pa.field("teachers", pa.list_(pa.string()))
    schema = whole.schema.set(column, field)
    with pa.OSFile(str(output / TABLE_FILE), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for positions, pairs in choices:
            if len(positions):
                teachers = pa.array([pair.teachers for pair in pairs], field.type)
                rows = whole.take(positions).set_column(column, field, teachers)
                writer.write_table(rows, max_chunksize=CHUNK)


# Section: Pairs held out of a training split, for folders that come without a validation split, such as the authors'.


def split_off(folder: PairFolder, share: float) -> tuple[PairFolder, PairFolder | None]:
    """Training pairs, and a share of them that is held out for evaluation: whole groups, chosen by hash alone.

    A pair stays on its side whatever others come or go, on any machine and for any seed.

    Args:
        folder: the training split.
        share: of the groups; 0 holds out nothing.

    Raises:
        ValueError: the folder has a validation split of its own, or the share leaves fewer than two pairs to either.
    """
    if not share:
        return folder, None
    if _has_validation_split(folder):
        raise ValueError(f"{folder.path} has a validation split, which is used; leave --hold_out {share} out")
    held = [
        _number(group or id) < share * 2**64
        for ids, groups in in_columns(folder.pairs, ("id", "group"))
        for id, group in zip(ids, groups, strict=True)
    ]
    out, rest = np.flatnonzero(held), np.flatnonzero(np.logical_not(held))
    if min(len(out), len(rest)) < 2:
        raise ValueError(
            f"--hold_out {share} takes {len(out)} of the {len(held)} training pairs of {folder.path} and leaves "
            f"{len(rest)}; either side needs two"
        )
    train, evaluation = (
        PairFolder(folder.path, folder.image_root, take_rows(folder.pairs, rows)) for rows in (rest, out)
    )
    return train, evaluation


def _has_validation_split(folder: PairFolder) -> bool:
    try:
        open_pairs(folder.path, "validation")
    except ValueError:
        return False
    return True


def _number(key: str) -> int:
    """A number below 2^64 that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(f"hold out {key}".encode("utf-8", "surrogatepass")).digest()[:8], "big")


def select(
    pairs: Sequence[Pair], modalities: list[str], labels: list[str], part: str | None, sources: Sequence[str] = ()
) -> Sequence[Pair]:
    """Pairs of some modalities, labels and collections, and of one share of the groups.

    Raises:
        ValueError: a modality, label or collection that no pair has, a part that is not like 1/3, or fewer than two
            pairs left.
    """
    share, count = _share(part)
    wanted = {"modalities": modalities, "labels": labels, "sources": list(sources)}
    if not any(wanted.values()) and count == 1:
        return _at_least_two(pairs, pairs)
    known: dict[str, set[str]] = {name: set() for name in wanted}
    fits: list[bool] = []
    for ids, groups, *columns in in_columns(pairs, ("id", "group", "modality", "label", "source")):
        for name, column in zip(wanted, columns, strict=True):
            known[name].update(column)
        for id, group, *own in zip(ids, groups, *columns, strict=True):
            chosen = all(not v or value in v for value, v in zip(own, wanted.values(), strict=True))
            fits.append(chosen and _stated_number(group or id) % count == share - 1)
    for name, values in wanted.items():
        for value in values:
            if value not in known[name]:
                raise ValueError(
                    f"--{name} {value}: no training pair has it{nearest(value, known[name])}; "
                    f"known: {', '.join(sorted(known[name] - {''}))}"
                )
    return _at_least_two(take_rows(pairs, np.flatnonzero(fits)), pairs)


def _at_least_two(kept: Sequence[Pair], pairs: Sequence[Pair]) -> Sequence[Pair]:
    if len(kept) < 2:
        raise ValueError(f"the selection leaves {len(kept)} of {len(pairs)} training pairs; at least 2 are needed")
    return kept


def _share(part: str | None) -> tuple[int, int]:
    share, _, count = (part or "1/1").partition("/")
    if not (share.isdecimal() and count.isdecimal() and 1 <= int(share) <= int(count)):
        raise ValueError(f"--part {part} must be a share such as 1/3")
    return int(share), int(count)


def _stated_number(key: str) -> int:
    """The same for all pairs of a group, whatever else the folder holds."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
