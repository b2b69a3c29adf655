"""From a collection to ``pairs/``: images opened once, captions cleaned, every dropped row counted under a name.

The original bytes are kept where every reader shows them alike (upright 8-bit grey or RGB JPEG and PNG); anything else
is stored as RGB PNG, so that training and evaluation never meet a palette or a 16-bit file. Files are named by the hash
of their original bytes, which makes exact duplicates fall together; rows keep the collection's order, so that the
output is the same on any number of worker processes. All is written beside the output folder and renamed when complete.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from mmkd.curation.captions import caption_from_facts, clean_text
from mmkd.curation.datasheet import CurationReport, write_datasheet
from mmkd.curation.labels import Row, read_rows
from mmkd.data.folder import write_manifest
from mmkd.data.images import (
    JPEG_QUALITY,
    UnreadableImage,
    check_quality,
    encode,
    is_plain,
    open_image,
    read_image_bytes,
    shrink,
)
from mmkd.data.readers import is_inside
from mmkd.data.splits import assign_splits, meaning_of, subsample
from mmkd.data.table import UNKNOWN, Pair
from mmkd.files import atomic_folder

ID_LENGTH = 24
ATTRIBUTION_FILE = "ATTRIBUTION.md"
HELD_OUT_FIRST = ("test", "validation", "train", "")


@dataclass(frozen=True)
class CurationRules:
    """What is kept and how it is stored.

    Attributes:
        max_pairs: most pairs to keep, 0 for all.
        short_side: larger images are stored with this shorter side in pixels, 0 keeps sizes.
        minimum_side: images with a shorter side are dropped.
        maximum_words: longer captions are dropped.
        seed: of splits and of the choice of ``max_pairs``.
        jpeg_quality: of JPEG files that are stored smaller, see `encode`.
    """

    max_pairs: int = 0
    short_side: int = 0
    minimum_side: int = 16
    maximum_words: int = 1000
    seed: int = 42
    jpeg_quality: int = JPEG_QUALITY

    def __post_init__(self) -> None:
        """Refuse values that would drop everything."""
        if min(self.max_pairs, self.short_side) < 0 or min(self.minimum_side, self.maximum_words) < 1:
            raise ValueError(
                "max_pairs and short_side must be 0 or more, minimum_side and maximum_words 1 or more; got "
                f"{self.max_pairs}, {self.short_side}, {self.minimum_side}, {self.maximum_words}"
            )
        check_quality(self.jpeg_quality)


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in the output: its file name, its size in pixels and the hash of the original bytes."""

    name: str
    width: int
    height: int
    sha256: str


def curate(
    source: Path,
    output: Path,
    rules: CurationRules,
    workers: int = 1,
    quiet: bool = False,
    overwrite: bool = False,
    table: Path | None = None,
) -> CurationReport:
    """Turn a collection into a folder of pairs.

    Args:
        source: a folder with ``labels.csv`` or the authors' ``meta.jsonl``.
        output: the folder to write: ``manifest.jsonl``, ``pairs.json``, ``images/``, ``report.json``,
            ``dropped.jsonl`` and ``README.md``.
        rules: what is kept and how it is stored.
        workers: processes that read images.
        quiet: no progress bar.
        overwrite: replace ``output``.
        table: the list of images, by default ``source/labels.csv``.

    Raises:
        FileNotFoundError: the source is no collection.
        ValueError: its list is broken, or nothing is left of it.
        OSError: the disk is full or the output cannot be written; nothing is left behind.
    """
    listed = read_rows(source, table)
    dropped: dict[str, tuple[str, str]] = {}
    rows = [row for row in (_with_text(row, rules, dropped) for row in listed) if row]
    rows = _chosen(rows, rules, dropped)
    with atomic_folder(output, overwrite) as folder:
        (folder / "images").mkdir()
        results = _store_images(rows, source, folder / "images", rules, workers, quiet)
        kept = _without_duplicates(_readable(zip(rows, results, strict=True), dropped), dropped)
        if not kept:
            reasons = dict(Counter(reason for reason, _ in dropped.values()))
            raise ValueError(f"nothing is left of the {len(listed)} rows of {source}; dropped: {reasons}")
        pairs, split_counts = _pairs(kept, source.name, rules.seed)
        write_manifest(folder, pairs)
        report = CurationReport(len(listed), pairs, dropped, split_counts, _unknown_splits(rows))
        if (source / ATTRIBUTION_FILE).is_file():
            shutil.copyfile(source / ATTRIBUTION_FILE, folder / ATTRIBUTION_FILE)
        write_datasheet(folder, report, output.name)
    return report


def _with_text(row: Row, rules: CurationRules, dropped: dict[str, tuple[str, str]]) -> Row | None:
    """The row with a clean caption, or None and a reason in ``dropped``."""
    label, modality = clean_text(row.label), clean_text(row.modality) or UNKNOWN
    caption = clean_text(row.caption) or caption_from_facts(label, modality, row.file)
    reason = ""
    if row.malformed:
        reason = "malformed_row"
    elif not row.file:
        reason = "no_file_named"
    elif not is_inside(row.file):
        reason = "path_outside"
    elif not caption:
        reason = "no_caption"
    elif len(caption.split()) > rules.maximum_words:
        reason = "caption_too_long"
    if reason:
        dropped[row.place] = (reason, row.file)
        return None
    return replace(row, caption=caption, label=label, modality=modality, group=clean_text(row.group))


def _chosen(rows: list[Row], rules: CurationRules, dropped: dict[str, tuple[str, str]]) -> list[Row]:
    """At most ``max_pairs`` rows in proportion to split, modality and label."""
    if not rules.max_pairs or len(rows) <= rules.max_pairs:
        return rows
    strata = [(meaning_of(row.split), row.modality, row.label) for row in rows]
    chosen = set(subsample(strata, [_group_of(row) for row in rows], rules.max_pairs, rules.seed))
    for number, row in enumerate(rows):
        if number not in chosen:
            dropped[row.place] = ("over_max_pairs", row.file)
    return [row for number, row in enumerate(rows) if number in chosen]


def _store_images(
    rows: Sequence[Row], source: Path, images: Path, rules: CurationRules, workers: int, quiet: bool
) -> list[StoredImage | str]:
    """For each row the stored image, or the reason why there is none."""
    store = partial(_store_image, source.resolve(), images, rules)
    files = [row.file for row in rows]
    progress = partial(tqdm, total=len(files), desc="curate", unit="image", disable=quiet)
    if workers <= 1:
        return list(progress(map(store, files)))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        return list(progress(pool.map(store, files, chunksize=16)))


def _store_image(root: Path, images: Path, rules: CurationRules, file: str) -> StoredImage | str:
    """Check one image and write it; runs in worker processes."""
    path = root / file
    try:
        if not path.resolve().is_relative_to(root):
            return "path_outside"
        data = read_image_bytes(path)
        image = open_image(data, rules.minimum_side)
    except UnreadableImage as error:
        return error.reason
    sha256 = hashlib.sha256(data).hexdigest()
    shrunk = shrink(image, rules.short_side)
    if shrunk is image and is_plain(data):
        suffix, content = (".png" if data.startswith(b"\x89PNG") else ".jpg"), data
    else:
        quality = rules.jpeg_quality if shrunk is not image and data.startswith(b"\xff\xd8") else None
        suffix, content = encode(shrunk, quality)
    name = sha256[:ID_LENGTH] + suffix
    (images / name).write_bytes(content)
    return StoredImage(name, shrunk.width, shrunk.height, sha256)


def _readable(
    results: Iterator[tuple[Row, StoredImage | str]], dropped: dict[str, tuple[str, str]]
) -> list[tuple[Row, StoredImage]]:
    kept = []
    for row, result in results:
        if isinstance(result, str):
            dropped[row.place] = (result, row.file)
        else:
            kept.append((row, result))
    return kept


def _without_duplicates(
    rows: list[tuple[Row, StoredImage]], dropped: dict[str, tuple[str, str]]
) -> list[tuple[Row, StoredImage]]:
    """One row for each image content: a held-out one where splits differ, else the first."""
    best: dict[str, Row] = {}
    for row, image in rows:
        other = best.get(image.sha256)
        if other is None or _held_out_rank(row) < _held_out_rank(other):
            best[image.sha256] = row
    kept = []
    for row, image in rows:
        winner = best[image.sha256]
        if row is winner:
            kept.append((row, image))
        else:
            across = meaning_of(row.split) != meaning_of(winner.split)
            dropped[row.place] = ("duplicate_across_splits" if across else "duplicate", row.file)
    return kept


def _held_out_rank(row: Row) -> int:
    return HELD_OUT_FIRST.index(meaning_of(row.split))


def _pairs(kept: list[tuple[Row, StoredImage]], source: str, seed: int) -> tuple[list[Pair], dict[str, int]]:
    splits, counts = assign_splits(
        [_group_of(row) for row, _ in kept],
        [meaning_of(row.split) for row, _ in kept],
        [(row.modality, row.label) for row, _ in kept],
        seed,
    )
    pairs = [
        Pair(
            id=row.id or hashlib.sha256(f"{image.sha256}\n{row.caption}".encode()).hexdigest()[:ID_LENGTH],
            image=image.name,
            caption=row.caption,
            modality=row.modality,
            label=row.label,
            group=row.group,
            split=split,
            source=row.source or source,
            license=row.license,
            width=image.width,
            height=image.height,
            sha256=image.sha256,
            teachers=row.teachers,
        )
        for (row, image), split in zip(kept, splits, strict=True)
    ]
    return pairs, counts


def _group_of(row: Row) -> str:
    """The row's group, or the file alone where it has none."""
    return f"group:{row.group}" if row.group else f"file:{row.file}"


def _unknown_splits(rows: Sequence[Row]) -> dict[str, int]:
    """Names in the split column that mean none of train, validation and test, with their counts."""
    return dict(Counter(row.split for row in rows if row.split and not meaning_of(row.split)))
