"""A folder of pairs: ``manifest.arrow`` with a row for each image and its caption, and the images it names.

Images are files under one root or members of tars below it. A manifest names the root relative to its own folder, so
that a stage that only chooses pairs (`screen`) writes a manifest and points at the images of the stage before. Later
stages identify pairs by ``id`` only: features are looked up by it, and the order of the manifest has no meaning.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmkd.command.settings import nearest
from mmkd.data.archives import ArchivedFile, archived_file
from mmkd.data.table import (
    FIELDS,
    SPLITS,
    TABLE_FILE,
    Pair,
    PairTable,
    batches,
    in_columns,
    map_table,
    table_schema,
    take_rows,
    write_table,
)
from mmkd.files import content_sha256, is_folder_name, is_inside, json_lines, leads_inside, parse_json_object

if TYPE_CHECKING:
    import pyarrow as pa

META_FILE = "meta.jsonl"
CHUNK = 4096


@dataclass(frozen=True, slots=True)
class PublishedSample:
    """One line of the authors' ``meta.jsonl`` (https://github.com/wangshansong1/MMKD-CLIP)."""

    id: str
    folder: str
    image: str
    caption: str
    teachers: tuple[str, ...]


class PairFolder:
    """Pairs and the root of their images."""

    def __init__(self, path: Path, image_root: Path, pairs: Sequence[Pair]) -> None:
        self.path = path
        self.image_root = image_root
        self.pairs = pairs
        self._resolved_root = image_root.resolve()

    def image_path(self, pair: Pair) -> Path | ArchivedFile:
        """Place of the image of a pair, for `open_image` or `read_image_bytes`.

        Raises:
            ValueError: the path, or the link it names, leaves the image root.
        """
        archived = archived_file(self._resolved_root, pair.image)
        path = archived.archive if archived else self._resolved_root / pair.image
        if not leads_inside(self._resolved_root, path):
            raise ValueError(f"pair {pair.id}: image {pair.image!r} lies outside {self.image_root}; refused")
        return archived or path


def open_pairs(folder: Path, split: str | None = None) -> PairFolder:
    """Open a folder of pairs, or the authors' published folder (``meta.jsonl``).

    Args:
        folder: the folder.
        split: keep only train, validation or test pairs.

    Raises:
        FileNotFoundError: the folder holds neither file.
        ValueError: the manifest is damaged, an id occurs twice, or no pair is in ``split``.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    pairs: Sequence[Pair]
    if (folder / TABLE_FILE).is_file():
        table = PairTable(folder / TABLE_FILE)
        root = folder / table.image_root
        _refuse_foreign_root(folder, root)
        table.check()
        pairs = table if split is None else table.in_split(split)
        total = len(table)
    elif (folder / META_FILE).is_file():
        root = folder
        published = _published_pairs(folder)
        pairs = published if split is None else [pair for pair in published if pair.split == split]
        total = len(published)
    else:
        raise FileNotFoundError(
            f"{folder} holds neither {TABLE_FILE} nor {META_FILE}; "
            f"make it with `mmkd curate --source DIR --output {folder}`"
        )
    if not pairs:
        raise ValueError(f"{folder} holds no pairs" + (f" in split {split!r} (of {total})" if split else ""))
    return PairFolder(folder, root, pairs)


def _refuse_foreign_root(folder: Path, root: Path) -> None:
    """Refuse a manifest whose images lie neither below it nor in another folder of pairs: any file might be named.

    Raises:
        ValueError: the message names both folders.
    """
    if leads_inside(folder, root):
        return
    if not any((place / name).is_file() for place in (root, root.parent) for name in (TABLE_FILE, META_FILE)):
        raise ValueError(
            f"{folder / TABLE_FILE} names images in {root}, which is no folder of pairs; refused. Move the folders of "
            "pairs together, so that the one with the images stays where it was beside this one"
        )


def write_manifest(folder: Path, pairs: Iterable[Pair], images: Path | None = None) -> None:
    """Write ``manifest.arrow``.

    Args:
        folder: where; created when missing.
        pairs: in the order to write.
        images: the root of the images, by default ``folder/images``; stored relative to ``folder``.
    """
    import pyarrow as pa

    folder.mkdir(parents=True, exist_ok=True)
    schema = table_schema({}, _relative(images, folder) if images is not None else "images")
    rows = ([{name: getattr(pair, name) for name in FIELDS} for pair in some] for some in batches(pairs, CHUNK))
    write_table(folder / TABLE_FILE, schema, (pa.Table.from_pylist(some, schema=schema) for some in rows))


def chosen_rows(source: PairFolder, positions: np.ndarray, teachers: Sequence[Sequence[str]]) -> pa.Table:
    """Rows of a manifest with their available teachers.

    Args:
        source: where the pairs come from; further columns of its manifest are kept.
        positions: of the chosen pairs, (n,).
        teachers: of each.
    """
    import pyarrow as pa

    if isinstance(source.pairs, PairTable):
        table = source.pairs.all_columns(positions)
    else:
        rows = [dataclasses.asdict(pair) for pair in take_rows(source.pairs, positions)]
        table = pa.Table.from_pylist(rows, schema=table_schema({}, ""))
    column = pa.array(teachers, pa.list_(pa.string()))
    return table.set_column(table.schema.get_field_index("teachers"), "teachers", column)


def join_parts(output: Path, parts: Sequence[Path], images: Path) -> None:
    """Write a manifest of the rows of several tables, mapped one after another; images stay where they are.

    Args:
        output: the folder.
        parts: files of `chosen_rows`, at least one.
        images: the root of the images.
    """
    more = {field.name: field.type for field in map_table(parts[0]).schema if field.name not in FIELDS}
    write_table(output / TABLE_FILE, table_schema(more, _relative(images, output)), map(map_table, parts))


def _relative(images: Path, folder: Path) -> str:
    return Path(os.path.relpath(images, folder)).as_posix()


def manifest_sha256(folder: Path) -> str:
    """SHA-256 of the manifest of a folder of pairs."""
    return content_sha256(*(folder / name for name in (TABLE_FILE, META_FILE) if (folder / name).is_file()))


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
            samples.append(_published_sample(parse_json_object(content, place), place))
        except TypeError as error:
            raise ValueError(str(error)) from error
    if len({sample.id for sample in samples}) != len(samples):
        raise ValueError(f"{path} lists an id twice; ids must be unique")
    return samples


def _published_sample(row: dict[str, Any], place: str) -> PublishedSample:
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


def _published_pairs(folder: Path) -> list[Pair]:
    pairs = [
        Pair(s.id, s.image, s.caption, group=s.id, source="MMKD-CLIP published data", teachers=s.teachers)
        for s in read_published(folder)
    ]
    leaving = next((pair for pair in pairs if not is_inside(pair.image)), None)
    if leaving is not None:
        raise ValueError(f"{folder}: image {leaving.image!r} of pair {leaving.id} leaves the folder; refused")
    return pairs


def hold_out_split(folder: PairFolder, share: float) -> tuple[PairFolder, PairFolder | None]:
    """Split training pairs into those to train on and a share that is held out: whole groups, chosen by hash.

    The side of a pair does not depend on other pairs, the machine or the seed.

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
        _number(f"hold out {group or id}") < share * 2**64
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
    """A number below 2^64 that depends on the key only."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def select(
    pairs: Sequence[Pair], modalities: list[str], labels: list[str], part: str | None, sources: Sequence[str] = ()
) -> Sequence[Pair]:
    """Pairs of some modalities, labels and collections, and of one share of the groups.

    Raises:
        ValueError: a modality, label or collection that no pair has, a part that is not like 1/3, or fewer than two
            pairs left.
    """
    share, count = _numbered_share(part or "1/1")
    chosen_values = {"modalities": modalities, "labels": labels, "sources": list(sources)}
    if not any(chosen_values.values()) and count == 1:
        return _at_least_two(pairs, pairs)
    known: dict[str, set[str]] = {name: set() for name in chosen_values}
    fits: list[bool] = []
    for ids, groups, *columns in in_columns(pairs, ("id", "group", "modality", "label", "source")):
        for name, column in zip(chosen_values, columns, strict=True):
            known[name].update(column)
        for id, group, *own in zip(ids, groups, *columns, strict=True):
            chosen = all(not v or value in v for value, v in zip(own, chosen_values.values(), strict=True))
            fits.append(chosen and _number(group or id) % count == share - 1)
    for name, values in chosen_values.items():
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


def _numbered_share(text: str) -> tuple[int, int]:
    """The numbers of ``i/n``, such as 3/8."""
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise ValueError(f"--part {text} must be i/n with 1 <= i <= n, for example 3/8")
    return int(number), int(total)
