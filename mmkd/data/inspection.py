"""Check every image of a folder of pairs, count pairs, show some of them, and write them in other forms."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path, PurePosixPath
from statistics import median
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from mmkd.data.archives import ArchivedFile, ArchiveWriter
from mmkd.data.folder import PairFolder
from mmkd.data.images import UnreadableImageError, open_image, read_image_bytes, thumbnail
from mmkd.data.pixels import random_crop, read_pixels, to_image
from mmkd.data.splits import spread
from mmkd.data.table import Pair, batches, in_columns, table_schema, value_counts
from mmkd.pages.page import Page, Section, counted, write_page

BATCH = 256


def faults(folder: PairFolder, workers: int, advance: Callable[[int], Any]) -> tuple[list[str], int]:
    """Faults of a folder's pairs: images that cannot be read or have another size.

    Args:
        folder: the pairs.
        workers: threads that decode.
        advance: called with the number of pairs done.

    Returns:
        One line for each fault, and how many images are the original files byte for byte.
    """
    found: list[str] = []
    originals = 0
    seen: set[str] = set()
    with ThreadPoolExecutor(workers) as pool:
        for batch in batches(folder.pairs, BATCH):
            for pair, (fault, original) in zip(batch, pool.map(partial(_check, folder), batch), strict=True):
                originals += original
                if pair.id in seen:
                    fault = "its id is given twice"
                seen.add(pair.id)
                if fault:
                    found.append(f"{pair.id}: {fault}")
            advance(len(batch))
    return found, originals


def count_pairs(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Counts by split, modality, licence, source and label, and the usual lengths of captions and sides."""
    counts = value_counts(pairs, ("split", "modality", "license", "source", "label"))
    for found in counts.values():
        found["not stated"] += found.pop("", 0)
    words: list[int] = []
    sides: list[int] = []
    groups: set[str] = set()
    for captions, widths, heights, ids, own in in_columns(pairs, ("caption", "width", "height", "id", "group")):
        words += [len(caption.split()) for caption in captions]
        sides += map(min, widths, heights)
        groups |= {group or id for group, id in zip(own, ids, strict=True)}
    ordered = {name: dict(sorted((+c).items(), key=lambda item: (-item[1], item[0]))) for name, c in counts.items()}
    usual = {"caption_words": median(words), "shorter_side": median(sides)} if words else {}
    return {"pairs": len(words), "groups": len(groups), **usual, **ordered}


def write_webdataset(samples: Iterable[tuple[Pair, bytes]], output: Path, shard_pairs: int) -> Iterator[Pair]:
    """Write pairs as tars of ``NUMBER.jpg``, ``NUMBER.txt`` and ``NUMBER.json``.

    webdataset and `datasets` read them. Both take what follows the first dot of a name for its column, and `datasets`
    requires the same columns of all samples: so names are numbers, and all images have the suffix of the first one.
    Readers recognise an image by its content.

    Args:
        samples: pairs with the bytes of their images, `stored_images` or `random_views`.
        output: an empty folder.
        shard_pairs: pairs in a tar.

    Yields:
        Each pair after it is written, with the place of its image in the tars.
    """
    suffix, keys, left = "", count(), iter(samples)
    for number in count():
        shard = islice(left, shard_pairs)
        first = next(shard, None)
        if first is None:
            return
        archive = f"{number:06d}.tar"
        with (output / archive).open("wb") as file:
            writer = ArchiveWriter(file)
            for pair, data in chain([first], shard):
                key, suffix = f"{next(keys):09d}", suffix or _suffix(data, pair.image)
                metadata = {k: v for k, v in asdict(pair).items() if k not in ("image", "caption")}
                stored = writer.add(f"{key}.{suffix}", data)
                writer.add(f"{key}.json", json.dumps(metadata, ensure_ascii=False).encode())
                writer.add(f"{key}.txt", pair.caption.encode())
                yield replace(pair, image=str(ArchivedFile(Path(archive), stored.offset, stored.size)))
            writer.finish()


def stored_images(folder: PairFolder) -> Iterator[tuple[Pair, bytes]]:
    """Every pair with the file of its image.

    Raises:
        UnreadableImageError: an image is missing.
    """
    return ((pair, read_image_bytes(folder.image_path(pair))) for pair in folder.pairs)


def random_views(
    folder: PairFolder, number: int, side: int, area: float, seed: int, workers: int
) -> Iterator[tuple[Pair, bytes]]:
    """Random crops of the training pairs, stored once so that teachers and student see the same pixels.

    Other splits keep their files. Source: dataset reinforcement, Vasu et al. 2024 (MobileCLIP), which stores the
    parameters of its augmentations in place of the images.

    Args:
        folder: the pairs.
        number: of crops of each training image; the id of the k-th ends in ``.k``.
        side: of the crops in pixels.
        area: smallest share of the image's area.
        seed: of the crops, which depend on it and the pair's id alone.
        workers: threads that decode.

    Raises:
        UnreadableImageError: an image is missing or broken.
    """

    def views(pair: Pair) -> list[tuple[Pair, bytes]]:
        path = folder.image_path(pair)
        if pair.split != "train":
            return [(pair, read_image_bytes(path))]
        pixels, made = read_pixels(path), []
        for k in range(1, number + 1):
            key = hashlib.sha256(f"{seed} {k} {pair.id}".encode("utf-8", "surrogatepass")).digest()
            generator = np.random.default_rng(int.from_bytes(key[:8], "big"))
            file = io.BytesIO()
            to_image(random_crop(pixels, side, generator, area)).save(file, "JPEG", quality=95)
            sha256 = hashlib.sha256(data := file.getvalue()).hexdigest()
            view = replace(pair, id=f"{pair.id}.{k}", group=pair.group or pair.id, sha256=sha256)
            made.append((replace(view, width=side, height=side), data))
        return made

    with ThreadPoolExecutor(workers) as pool:
        for some in batches(folder.pairs, BATCH):
            yield from chain.from_iterable(pool.map(views, some))


def write_preview(folder: PairFolder, file: Path, number: int) -> int:
    """Write a contact sheet of some pairs, one HTML file: every modality in turn, chosen by the hash of the id.

    Args:
        folder: the pairs.
        file: the page.
        number: of pairs that are shown, if there are as many.

    Returns:
        The number of pairs that are shown.
    """
    ids: list[str] = []
    modalities: list[str] = []
    for some_ids, some_modalities in in_columns(folder.pairs, ("id", "modality")):
        ids += some_ids
        modalities += some_modalities
    shown = [folder.pairs[row] for row in spread(ids, modalities, number)]
    cards = [
        {
            "id": pair.id,
            "image": thumbnail(folder.image_path(pair)),
            "caption": pair.caption,
            "facts": " · ".join(filter(None, (pair.modality, pair.label, pair.split, f"{pair.width} x {pair.height}"))),
        }
        for pair in shown
    ]
    lead = "Look for text about patients, captions of other images, wrong labels, and rows of the same image."
    section = Section("pairs", "Pairs", lead, template="data/preview.html.j2", content=cards)
    write_page(file, Page(f"{folder.path.name}: {len(shown)} of {counted(len(ids), 'pair')}", [section]))
    return len(shown)


def write_parquet(folder: PairFolder, file: BinaryIO, advance: Callable[[int], Any]) -> None:
    """Write the rows of pairs without their images, for redistribution if licences forbid that of the images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([field for field in table_schema({}, "") if field.name != "image"])
    names = schema.names
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in batches(folder.pairs, 1 << 14):
            rows = [{name: getattr(pair, name) for name in names} for pair in batch]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            advance(len(batch))


def _check(folder: PairFolder, pair: Pair) -> tuple[str, bool]:
    try:
        data = read_image_bytes(folder.image_path(pair))
        size = open_image(data, minimum_side=1).size
    except UnreadableImageError as error:
        return f"its image is {error.reason}", False
    if pair.width and size != (pair.width, pair.height):
        return f"its image has {size[0]} x {size[1]} pixels, not {pair.width} x {pair.height}", False
    return "", hashlib.sha256(data).hexdigest() == pair.sha256


def _suffix(data: bytes, image: str) -> str:
    """How the name of an image ends: its form where Pillow recognises it, else the suffix that it has."""
    with contextlib.suppress(OSError, Image.DecompressionBombError), Image.open(io.BytesIO(data)) as opened:
        return str(opened.format).lower().replace("jpeg", "jpg")
    return PurePosixPath(image).suffix[1:].lower() or "img"
