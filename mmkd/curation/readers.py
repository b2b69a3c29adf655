"""WebDataset tars read by offsets: only what a sample turns out to need is read, images of dropped ones never are.

Members are grouped by name whatever their order. What is missing when a tar ends is handed on as fragments, so that a
sample cut in two by a shard's end is whole again when all shards have been read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mmkd.curation.labels import read_rows
from mmkd.curation.samples import IMAGE_SUFFIXES, Fragment, Item, RawSample, Refused, kind_of
from mmkd.data.archives import ArchivedFile, DamagedArchive, Member, members
from mmkd.data.images import read_image_bytes
from mmkd.data.readers import is_inside
from mmkd.data.splits import meaning_of

MOST_FRAGMENT_BYTES = 256 << 20

LARGEST_TEXT = 64 << 20

Parts = dict[str, tuple[str, Member]]


def read_tar(path: Path) -> Iterator[Item]:
    """The samples of one tar in the order in which they become complete, then what is left over."""
    reader = _TarReader(path)
    try:
        for member in members(path):
            yield from reader.take(member)
    except DamagedArchive:
        yield Refused(path.name, "damaged_shard")
    yield from reader.leftovers()


class _TarReader:
    """Members waiting for the rest of their sample."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: dict[str, Parts] = {}
        self.finished: set[str] = set()
        self.repeated: set[str] = set()
        self.has_facts = False

    def take(self, member: Member) -> Iterator[Item]:
        name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        place = f"{self.path.name}:{name}"
        folder, _, base = name.rpartition("/")
        stem, dot, suffix = base.rpartition(".")
        suffix = suffix.lower()
        kind = kind_of(suffix)
        if ("/" in name or "\\" in name or ":" in name) and not is_inside(name):
            yield Refused(place, "path_outside")
        elif not member.plain:
            yield Refused(place, "link_in_archive")
        elif kind and not (stem and dot):
            yield Refused(place, "no_key")
        elif kind and not base.startswith("._"):  # macOS puts such beside every file
            key = f"{folder}/{stem}" if folder else stem
            yield from self._add(key, kind, suffix, member)

    def _add(self, key: str, kind: str, suffix: str, member: Member) -> Iterator[Item]:
        parts = self.waiting.setdefault(key, {})
        if key in self.finished or kind in parts:
            if key not in self.repeated:
                self.repeated.add(key)
                yield Refused(f"{self.path.name}:{key}", "duplicate_key")
            if not parts:
                del self.waiting[key]
            return
        parts[kind] = suffix, member
        self.has_facts = self.has_facts or kind == "facts"
        if len(parts) == 3:
            self.finished.add(key)
            yield self._sample(key, self.waiting.pop(key))

    def leftovers(self) -> Iterator[Item]:
        """Tars without any JSON hold images and captions alone; elsewhere a sample without all three is a fragment."""
        room = MOST_FRAGMENT_BYTES
        for key, parts in self.waiting.items():
            if not self.has_facts and len(parts) == 2:
                yield self._sample(key, parts)
                continue
            room -= sum(member.size for _, member in parts.values())
            place = f"{self.path.name}:{key}"
            if room < 0:
                missing = next(kind for kind in ("image", "caption", "facts") if kind not in parts)
                yield Refused(place, f"no_{missing}")
            else:
                yield Fragment(key, place, {kind: (s, self._read(m)) for kind, (s, m) in parts.items()})

    def _sample(self, key: str, parts: Parts) -> RawSample:
        suffix, image = parts["image"]
        return RawSample(
            key=key,
            place=f"{self.path.name}:{key}",
            caption=self._text(parts.get("caption")),
            facts=self._text(parts.get("facts")),
            read_image=partial(self._read, image),
            image_suffix=suffix,
        )

    def _text(self, part: tuple[str, Member] | None) -> bytes | None:
        if part is None:
            return None
        return self._read(part[1]) if part[1].size <= LARGEST_TEXT else b""

    def _read(self, member: Member) -> bytes:
        return ArchivedFile(self.path, member.offset, member.size).read_bytes()


# Section: Parquet files with image bytes, as the Hub's image datasets store them, and rows of any dataset in that form.


BATCH_ROWS = 64


def read_parquet(path: Path) -> Iterator[Item]:
    """The samples of a Parquet file: an image column of bytes or ``{bytes, path}``, and captions by any usual name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        for number, batch in enumerate(file.iter_batches(BATCH_ROWS)):
            for row, values in enumerate(batch.to_pylist()):
                yield sample_of_row(values, f"{path.name}:{number * BATCH_ROWS + row}")
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk, not the file
            raise
        yield Refused(path.name, "damaged_shard")


def sample_of_row(row: Mapping[str, Any], place: str) -> Item:
    """A row with image bytes as a sample."""
    image, caption = first_of(row, "image"), first_of(row, "caption")
    name = ""
    if isinstance(image, Mapping):
        name, image = str(image.get("path") or ""), image.get("bytes")
    if image is None:
        return Refused(place, "no_image")
    if not isinstance(image, bytes) or not isinstance(caption, (str, bytes, type(None))):
        return Refused(place, "wrong_type")
    key = str(first_of(row, "key") or name or place)
    facts = facts_of(row, f"{key} {name}")
    if isinstance(facts.get("label"), int):
        facts["label"] = str(facts["label"])
    suffix = name.rpartition(".")[2].lower() if "." in name else ""
    return RawSample(key, place, caption, facts, lambda: image, suffix)


# Section: Collections that list images in text: JSON lines as PMC-OA and ROCO have them, ``labels.csv``, folders of
# classes.
#
# JSON lines name things differently everywhere; the names in use are tried in turn. Images lie beside the list or in a
# folder beside it, and never outside.


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
