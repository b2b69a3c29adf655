"""One unit's work: a shard of the source judged sample by sample and written as a part of the output.

A part is three files: a tar with the kept images, captions and facts, an Arrow table with their rows and marks, and a
JSON with all counts, written last. A unit whose JSON is there is done; a killed one leaves partial files that the next
run writes over. Parts know nothing of each other, hence any number of processes and machines writes the same ones.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmkd.curation.captions import (
    WrongCaption,
    caption_from_facts,
    clean_caption,
    decode_caption,
    language_of,
    mention_sentences,
    scrub_identifiers,
    split_panels,
)
from mmkd.curation.duplicates import SIGNATURE_BYTES, caption_signature, short_hash
from mmkd.curation.pictures import Picture, prepare_picture
from mmkd.curation.rules import StreamRules
from mmkd.curation.samples import Facts, Fragment, Item, RawSample, Refused, WrongFacts, decode_facts
from mmkd.data.archives import BLOCK, ArchiveWriter
from mmkd.data.images import UnreadableImage
from mmkd.data.splits import hashed, meaning_of
from mmkd.files import write_json

ID_LENGTH = 24
ACCEPTED_AS = {"jpg": ("jpg", "jpeg"), "png": ("png",)}


class Dropped(Exception):
    """A sample that goes, under a reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class PartWriter:
    """Judges the samples of a unit and writes its part."""

    def __init__(self, folder: Path, number: int, rules: StreamRules) -> None:
        """Write part ``number`` into ``folder``."""
        self.rules, self.number = rules, number
        self.base = folder / f"{number:06d}"
        self.reasons: Counter[str] = Counter()
        self.mended: Counter[str] = Counter()
        self.rows: list[dict[str, Any]] = []
        self.dropped: list[tuple[str, str]] = []
        self.fragments: list[Fragment] = []
        self.read = 0

    def write(self, items: Iterator[Item]) -> dict[str, Any]:
        """Write the part and return its counts.

        Raises:
            OSError: the source cannot be read or the output not written.
        """
        partial = self.base.with_suffix(".tar.partial")
        with partial.open("wb") as file:
            self._tar = ArchiveWriter(file)
            for item in items:
                self._take(item)
            self._tar.finish()
        write_rows(self.base.with_suffix(".arrow"), self.rows)
        write_fragments(self.base, self.fragments)
        partial.replace(self.base.with_suffix(".tar"))
        counts = {
            "read": self.read,
            "kept": len(self.rows),
            "samples": len({row["sample"] for row in self.rows}),
            "dropped": dict(sorted(self.reasons.items())),
            "mended": dict(sorted(self.mended.items())),
            "fragments": [[f.key, f.place, sorted(f.members)] for f in self.fragments],
            "listed": self.dropped,
        }
        write_json(self.base.with_suffix(".json"), counts)
        return counts

    def _take(self, item: Item) -> None:
        self.read += not isinstance(item, Fragment)
        if isinstance(item, Fragment):
            self.fragments.append(item)
        elif isinstance(item, Refused):
            self._drop(item.place, item.reason)
        else:
            try:
                self._keep(item)
            except (Dropped, WrongFacts, WrongCaption, UnreadableImage) as error:
                self._drop(item.place, error.reason)

    def _drop(self, place: str, reason: str) -> None:
        self.reasons[reason] += 1
        if self.rules.list_dropped:
            self.dropped.append((place, reason))

    def _keep(self, sample: RawSample) -> None:
        """Cheapest question first: an image is read only when nothing else speaks against it."""
        facts = decode_facts(sample.facts, self.rules.sample.fields)
        modality, reason = self.rules.sample.judge(sample.key, facts)
        if reason:
            raise Dropped(reason)
        captions, notes = self._captions(sample, facts, modality)
        data = sample.read_image()
        if not data:
            raise Dropped("empty_image")
        rules = self.rules
        picture = prepare_picture(data, rules.sample.minimum_side, rules.short_side, rules.jpeg_quality)
        if sample.image_suffix and sample.image_suffix not in ACCEPTED_AS.get(_suffix_of(data), (sample.image_suffix,)):
            notes["wrong_extension"] += 1
        self.mended.update(notes)
        digest = hashlib.sha256(data).hexdigest()
        for caption in captions:
            self.rows.append(self._store(sample, facts, modality, caption, picture, digest))

    def _captions(self, sample: RawSample, facts: Facts, modality: str) -> tuple[list[str], Counter[str]]:
        """The captions of a sample, one or one for each panel, and what had to be mended."""
        notes: Counter[str] = Counter()
        label = facts.text("label")
        if sample.caption is None and label:
            text, guessed = caption_from_facts(label, modality, sample.key), False
        else:
            text, guessed = decode_caption(sample.caption)
        notes["encoding_guessed"] += guessed
        cleaned = clean_caption(text)
        if not cleaned:
            raise Dropped("no_caption")
        captions = split_panels(cleaned) if self.rules.split_panels else [cleaned]
        if self.rules.mentions:
            more = mention_sentences(facts.context(), facts.text("image_cluster_id"), self.rules.mentions)
            captions = [" ".join([caption, *more]) for caption in captions]
            notes["mentions_added"] += bool(more)
        if self.rules.scrub:
            scrubbed = [scrub_identifiers(caption) for caption in captions]
            captions = [caption for caption, _ in scrubbed]
            notes["identifiers_replaced"] += sum(count for _, count in scrubbed)
        captions = list(dict.fromkeys(captions))
        notes["captions_split"] += len(captions) > 1
        self._check(captions)
        return captions, +notes

    def _check(self, captions: list[str]) -> None:
        rules = self.rules.sample
        for caption in captions:
            words = len(caption.split())
            if words < rules.minimum_words:
                raise Dropped("caption_too_short")
            if words > rules.maximum_words:
                raise Dropped("caption_too_long")
        if rules.languages and language_of(" ".join(captions), rules.languages) not in rules.languages:
            raise Dropped("language")

    def _store(
        self, sample: RawSample, facts: Facts, modality: str, caption: str, picture: Picture, digest: str
    ) -> dict[str, Any]:
        """Write one pair and return its row."""
        id = hashlib.sha256(f"{digest}\n{caption}".encode()).hexdigest()[:ID_LENGTH]
        article = facts.text("article_accession_id")
        row: dict[str, Any] = {
            "id": id,
            "caption": caption,
            "modality": modality,
            "label": facts.text("label"),
            "group": facts.text("group") or article,
            "split": "",
            "source": facts.text("source"),
            "license": facts.text("article_license") or facts.text("license"),
            "width": picture.width,
            "height": picture.height,
            "sha256": digest,
            "key": sample.key,
            "article": article,
            "panel_type": facts.text("image_panel_type"),
            "labels": facts.values("image_secondary_label"),
        }
        row["split"] = self._split(facts.text("split"), row["group"] or digest)
        text = json.dumps({name: value for name, value in row.items() if name != "caption"}, ensure_ascii=False)
        image = self._tar.add(f"{id}.{picture.suffix}", picture.content)
        self._tar.add(f"{id}.json", text.encode())
        end = self._tar.add(f"{id}.txt", caption.encode())
        return row | {
            "offset": image.offset,
            "size": image.size,
            "start": image.offset - BLOCK,
            "end": end.offset + -(-end.size // BLOCK) * BLOCK,
            "sample": self.read,
            "perceptual": picture.perceptual_hash,
            "signature": caption_signature(caption),
            "key_hash": short_hash(sample.key),
        }

    def _split(self, stated: str, group: str) -> str:
        """The source's split, else by the hash of the group."""
        if meaning_of(stated):
            return meaning_of(stated)
        place = int(hashed(self.rules.seed, f"split:{group}")[:8], 16) / 16**8
        if place < self.rules.test_share:
            return "test"
        return "validation" if place < self.rules.test_share + self.rules.validation_share else "train"


def row_schema() -> Any:
    """Columns of a part: those of the manifest, then where the pair lies in the part's tar, and its marks."""
    import pyarrow as pa

    texts = ("id", "caption", "modality", "label", "group", "split", "source", "license")
    return pa.schema([
        *((name, pa.string()) for name in texts),
        ("width", pa.int32()), ("height", pa.int32()), ("sha256", pa.string()),
        ("key", pa.string()), ("article", pa.string()), ("panel_type", pa.string()), ("labels", pa.list_(pa.string())),
        ("offset", pa.int64()), ("size", pa.int64()), ("start", pa.int64()), ("end", pa.int64()),
        ("sample", pa.int64()), ("perceptual", pa.uint64()), ("signature", pa.binary(SIGNATURE_BYTES)),
        ("key_hash", pa.int64()),
    ])  # fmt: skip


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a part's rows as an Arrow file, under its final name only when complete."""
    import pyarrow as pa

    partial = path.with_name(f"{path.name}.partial")
    schema = row_schema()
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    partial.replace(path)


def write_fragments(base: Path, fragments: list[Fragment]) -> None:
    """Write the members of incomplete samples, if there are any, named by number and kind."""
    path = base.with_suffix(".fragments.tar")
    path.unlink(missing_ok=True)
    if not fragments:
        return
    with path.open("wb") as file:
        writer = ArchiveWriter(file)
        for number, fragment in enumerate(fragments):
            for kind, (suffix, data) in sorted(fragment.members.items()):
                writer.add(f"{number}.{kind}.{suffix}", data)
        writer.finish()


def _suffix_of(data: bytes) -> str:
    if data.startswith(b"\xff\xd8"):
        return "jpg"
    return "png" if data.startswith(b"\x89PNG") else ""
