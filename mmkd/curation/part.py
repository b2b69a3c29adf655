"""Curate one unit: check the samples of a shard of the source and write them as a part of the output.

A part is three files: a tar with the kept images, captions and metadata, an Arrow table with their rows and
fingerprints, and a JSON with all counts, written last: a unit whose JSON exists is done. Parts are independent of each
other, so that any number of processes and machines writes the same ones, even two at a time. Splits are decided for all
parts together, so they stand in the manifest and not in the tars.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmkd.curation.captions import (
    caption_from_labels,
    clean_caption,
    clean_text,
    decode_caption,
    language_of,
    mention_sentences,
    scrub_identifiers,
    split_panels,
)
from mmkd.curation.dicom import Header, read_header
from mmkd.curation.duplicates import SIGNATURE_BYTES, caption_signature, short_hash
from mmkd.curation.reports import open_reports
from mmkd.curation.rules import EACH, Rules
from mmkd.curation.samples import DroppedError, Fragment, Item, Metadata, RawSample, Refused, decode_metadata
from mmkd.data.archives import BLOCK, ArchiveWriter
from mmkd.data.images import JPEG_QUALITY, encode, finish_image, is_plain, open_header, shrink
from mmkd.data.medical import count_frames
from mmkd.data.pixel_rules import (
    DEFAULT_WINDOW,
    DICOM_SUFFIXES,
    MINIMUM_SIDE,
    UnreadableImageError,
    Window,
    form_of,
)
from mmkd.data.readers import IMAGE_SUFFIXES
from mmkd.data.splits import meaning_of
from mmkd.data.table import SPLITS, UNKNOWN
from mmkd.files import atomic_file, content_sha256, write_json

ID_LENGTH = 24
HASH_SIDE = 64  # of the reduced image that a perceptual hash is made of
STORED = (".tar", ".arrow", ".fragments.tar")  # files of a part beside its counts; the last one not of every part
ACCEPTED_AS = {"jpg": ("jpg", "jpeg"), "png": ("png",)}
OTHER_THAN_DICOM = IMAGE_SUFFIXES - {suffix[1:] for suffix in DICOM_SUFFIXES}
STATED = ("", *SPLITS)  # the split that a source states, by the number that stands for it


@dataclass(frozen=True, slots=True)
class Picture:
    """A stored image: file extension, bytes, size in pixels, and perceptual hash."""

    suffix: str
    content: bytes
    width: int
    height: int
    perceptual_hash: int


def prepare_picture(
    data: bytes,
    minimum_side: int = MINIMUM_SIDE,
    short_side: int = 0,
    jpeg_quality: int = JPEG_QUALITY,
    window: Window = DEFAULT_WINDOW,
    suffix: str = "",
) -> Picture:
    """Check an image and choose the bytes to store.

    Args:
        data: the file.
        minimum_side: images with a shorter side in pixels are refused.
        short_side: larger images are stored with this shorter side; 0 keeps sizes.
        jpeg_quality: of JPEG files that are stored smaller, see `mmkd.data.images.encode`.
        window: of DICOM and NIfTI, and which frame.
        suffix: of the file's name, for DICOM files that only it shows.

    Raises:
        UnreadableImageError: see `mmkd.data.pixel_rules.REASONS`.
    """
    image = open_header(data, f"image.{suffix}", minimum_side, window)
    shrinks = 0 < short_side < min(image.size)
    keeps_bytes = not shrinks and is_plain(data)
    if keeps_bytes and image.format == "JPEG":
        width, height = image.size
        return Picture("jpg", data, width, height, perceptual_hash(finish_image(image, "image", HASH_SIDE, "L")))
    quality = jpeg_quality if shrinks and image.format == "JPEG" else None
    decoded = shrink(finish_image(image, "image", draft_side=short_side or None), short_side)
    ending, content = (".png", data) if keeps_bytes else encode(decoded, quality)
    return Picture(ending[1:], content, decoded.width, decoded.height, perceptual_hash(decoded))


def perceptual_hash(image: Image.Image) -> int:
    """The 64-bit DCT hash of ImageHash: near images differ in few bits."""
    import imagehash

    reduced = image.reduce(max(1, min(image.size) // HASH_SIDE)) if min(image.size) >= 2 * HASH_SIDE else image
    bits = imagehash.phash(reduced).hash
    return int.from_bytes(np.packbits(bits.ravel()).tobytes(), "big")


class PartWriter:
    """Checks the samples of a unit and writes its part."""

    def __init__(self, folder: Path, number: int, rules: Rules, salt: bytes = b"") -> None:
        """Write part ``number`` into ``folder``; ``salt`` is the key of hashes of patients and studies."""
        self.reports = open_reports(folder)
        self.rules, self.number, self.salt = rules, number, salt
        self.base = folder / f"{number:06d}"
        self.reasons: Counter[str] = Counter()
        self.fixed: Counter[str] = Counter()
        self.rows: list[dict[str, Any]] = []
        self.unknown_splits: Counter[str] = Counter()
        self.dropped: list[dict[str, str]] = []
        self.fragments: list[Fragment] = []
        self.read = 0

    def write(self, items: Iterator[Item]) -> dict[str, Any]:
        """Write the part and return its counts.

        Raises:
            OSError: the source cannot be read or the output not written.
        """
        with atomic_file(self.base.with_suffix(".tar")) as file:
            self._tar = ArchiveWriter(file)
            for item in items:
                self._take(item)
            self._tar.finish()
        write_rows(self.base.with_suffix(".arrow"), self.rows)
        write_fragments(self.base, self.fragments)
        counts = {
            "read": self.read,
            "kept": len(self.rows),
            "samples": len({row["sample"] for row in self.rows}),
            "dropped": dict(sorted(self.reasons.items())),
            "fixed": dict(sorted(self.fixed.items())),
            "fragments": [[f.key, f.place, sorted(f.members)] for f in self.fragments],
            "unknown_splits": dict(sorted((+self.unknown_splits).items())),
            "listed": self.dropped,
        }
        write_json(self.base.with_suffix(".json"), counts | {"sha256": part_checksum(self.base, counts)})
        return counts

    def _take(self, item: Item) -> None:
        self.read += not isinstance(item, Fragment)
        if isinstance(item, Fragment):
            self.fragments.append(item)
        elif isinstance(item, Refused):
            self._drop(item.place, item.key, item.reason)
        else:
            try:
                self._keep(item)
            except (DroppedError, UnreadableImageError) as error:
                self._drop(item.place, item.key, error.reason)

    def _drop(self, place: str, key: str, reason: str) -> None:
        self.reasons[reason] += 1
        self.dropped.append(dropped_row(place, key, reason))

    def _keep(self, sample: RawSample) -> None:
        """Check a sample, cheapest check first: an image is read only if all other checks pass."""
        rules = self.rules
        metadata = decode_metadata(sample.metadata, rules.fields)
        data = b"" if sample.image_suffix in OTHER_THAN_DICOM else sample.read_image()
        header = self._header(sample, data)
        if header is not None:
            sample = self._with_report(sample, metadata, header)
        if header is not None and not metadata.text("modality"):
            metadata.set("modality", header.modality)
        modality, reason = rules.judge(sample.key, metadata)
        if reason:
            raise DroppedError(reason)
        modality, label = clean_text(modality) or UNKNOWN, clean_text(metadata.text("label"))
        captions, fixed = self._captions(sample, metadata, modality, label)
        data = data or sample.read_image()
        if not data:
            raise DroppedError("empty_image")
        pictures = self._pictures(data, sample.image_suffix)
        if sample.image_suffix and sample.image_suffix not in ACCEPTED_AS.get(_suffix_of(data), (sample.image_suffix,)):
            fixed["wrong_extension"] += 1
        self.fixed.update(fixed)
        split = metadata.text("split")
        self.unknown_splits[split] += bool(split) and not meaning_of(split)
        texts = {
            "group": metadata.text("group")
            or metadata.text("article_accession_id")
            or (header.patient if header is not None else ""),
            "study": metadata.text("study") or (header.study if header is not None else ""),
            "source": metadata.text("source"),
            "license": metadata.text("article_license") or metadata.text("license"),
            "key": sample.key,
            "article": metadata.text("article_accession_id"),
            "panel_type": metadata.text("image_panel_type"),
        }
        row: dict[str, Any] = {name: clean_text(text) for name, text in texts.items()}
        labels = [clean_text(text) for text in metadata.values("image_secondary_label")]
        row |= {"modality": modality, "label": label, "labels": labels}
        stated = {"stated_split": STATED.index(meaning_of(split))}
        for number, picture in enumerate(pictures, start=1):
            frame = f"frame {number}".encode() if len(pictures) > 1 else b""
            row["sha256"] = hashlib.sha256(data + frame).hexdigest()
            self.rows += [self._store(sample, row, caption, picture) | stated for caption in captions]

    def _header(self, sample: RawSample, data: bytes) -> Header | None:
        """The header of a DICOM file, None of all others; drops files of archives that may show text on a patient."""
        if not data or form_of(data, f"image.{sample.image_suffix}") != "dicom":
            return None
        header = read_header(data, "image", self.salt, self.reports.element if self.reports else "")
        if not sample.listed and header.burned_in and not self.rules.burned_in:
            raise DroppedError("burned_in_annotation")
        if not sample.listed and header.secondary_capture and not self.rules.secondary_captures:
            raise DroppedError("secondary_capture")
        return header

    def _with_report(self, sample: RawSample, metadata: Metadata, header: Header) -> RawSample:
        """The sample with the caption and fields of its report, which fill what the source leaves empty."""
        if self.reports is None:
            return sample
        fields = self.reports.rows.get(header.joined)
        if fields is None:
            raise DroppedError("no_report")
        for name, value in fields.items():
            if name != "caption" and not metadata.text(name):
                metadata.set(name, value)
        if self.reports.sections and not fields["caption"]:
            raise DroppedError("no_section")
        return sample if sample.caption else replace(sample, caption=fields.get("caption", ""))

    def _pictures(self, data: bytes, suffix: str) -> list[Picture]:
        """The image of a file, or with ``frame: each`` those of all frames of a DICOM file."""
        rules = self.rules
        frames = [0]
        if rules.frame == EACH and form_of(data, f"image.{suffix}") == "dicom":
            frames = list(range(1, count_frames(data, "image") + 1))
        sizes = rules.minimum_side, rules.short_side, rules.jpeg_quality
        return [prepare_picture(data, *sizes, rules.pixel_window(frame), suffix) for frame in frames]

    def _captions(
        self, sample: RawSample, metadata: Metadata, modality: str, label: str
    ) -> tuple[list[str], Counter[str]]:
        """The captions of a sample, one or one for each panel, and counts of what was fixed in them."""
        fixed: Counter[str] = Counter()
        if sample.caption is None and not sample.listed:
            return [""], fixed
        if sample.caption is None:
            text, guessed = caption_from_labels(label, modality, sample.key), False
        else:
            text, guessed = decode_caption(sample.caption)
            text = clean_caption(text)
        fixed["encoding_guessed"] += guessed
        if not text:
            raise DroppedError("no_caption")
        captions = split_panels(text) if self.rules.split_panels else [text]
        if self.rules.mentions:
            more = mention_sentences(metadata.context(), metadata.text("image_cluster_id"), self.rules.mentions)
            captions = [" ".join([caption, *more]) for caption in captions]
            fixed["mentions_added"] += bool(more)
        if self.rules.scrub:
            scrubbed = [scrub_identifiers(caption) for caption in captions]
            captions = [caption for caption, _ in scrubbed]
            fixed["identifiers_replaced"] += sum(count for _, count in scrubbed)
        captions = list(dict.fromkeys(captions))
        fixed["captions_split"] += len(captions) > 1
        self._check(captions)
        return captions, +fixed

    def _check(self, captions: list[str]) -> None:
        rules = self.rules
        for caption in captions:
            words = len(caption.split())
            if words < rules.minimum_words:
                raise DroppedError("caption_too_short")
            if words > rules.maximum_words:
                raise DroppedError("caption_too_long")
        if rules.languages and language_of(" ".join(captions), rules.languages) not in rules.languages:
            raise DroppedError("language")

    def _store(self, sample: RawSample, values: dict[str, Any], caption: str, picture: Picture) -> dict[str, Any]:
        """Write one pair and return its row."""
        id = sample.id or hashlib.sha256(f"{values['sha256']}\n{caption}".encode()).hexdigest()[:ID_LENGTH]
        stored = {"id": id, **values, "width": picture.width, "height": picture.height}
        image = self._tar.add(f"{id}.{picture.suffix}", picture.content)
        self._tar.add(f"{id}.json", json.dumps(stored, ensure_ascii=False).encode())
        end = self._tar.add(f"{id}.txt", caption.encode())
        return stored | {
            "caption": caption,
            "teachers": sample.teachers,
            "place": sample.place,
            "offset": image.offset,
            "size": image.size,
            "start": image.offset - BLOCK,
            "end": end.offset + -(-end.size // BLOCK) * BLOCK,
            "sample": self.read,
            "perceptual": picture.perceptual_hash,
            "signature": caption_signature(caption),
            "key_hash": short_hash(sample.key),
        }


def part_checksum(base: Path, counts: dict[str, Any]) -> str:
    """SHA-256 over the counts and the files of a part, by which a later run finds it as it was written."""
    digest = hashlib.sha256(json.dumps(counts, sort_keys=True).encode())
    for file in filter(Path.is_file, map(base.with_suffix, STORED)):
        digest.update(content_sha256(file).encode())
    return digest.hexdigest()


def dropped_row(place: str, key: str, reason: str, test_set: str = "") -> dict[str, str]:
    """One line of ``dropped.jsonl``."""
    row = {"row": place, "key": key, "reason": reason, "test_set": test_set}
    return {name: clean_text(value) for name, value in row.items() if value}


def row_schema() -> Any:
    """Columns of a part: those of the manifest, the pair's place in the part's tar, and its fingerprints."""
    import pyarrow as pa

    texts = ("id", "caption", "modality", "label", "group", "study", "source", "license", "sha256", "key", "article",
             "panel_type", "place")  # fmt: skip
    return pa.schema([
        *((name, pa.string()) for name in texts),
        ("width", pa.int32()), ("height", pa.int32()), ("teachers", pa.list_(pa.string())),
        ("labels", pa.list_(pa.string())), ("stated_split", pa.int8()),
        ("offset", pa.int64()), ("size", pa.int64()), ("start", pa.int64()), ("end", pa.int64()),
        ("sample", pa.int64()), ("perceptual", pa.uint64()), ("signature", pa.binary(SIGNATURE_BYTES)),
        ("key_hash", pa.int64()),
    ])  # fmt: skip


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a part's rows as an Arrow file, under its final name only when complete."""
    import pyarrow as pa

    schema = row_schema()
    with atomic_file(path) as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def write_fragments(base: Path, fragments: list[Fragment]) -> None:
    """Write the members of incomplete samples, if there are any, named by number and kind."""
    path = base.with_suffix(".fragments.tar")
    if not fragments:
        return
    with atomic_file(path) as file:
        writer = ArchiveWriter(file)
        for number, fragment in enumerate(fragments):
            for kind, (suffix, data) in sorted(fragment.members.items()):
                writer.add(f"{number}.{kind}.{suffix}", data)
        writer.finish()


def _suffix_of(data: bytes) -> str:
    if data.startswith(b"\xff\xd8"):
        return "jpg"
    return "png" if data.startswith(b"\x89PNG") else ""
