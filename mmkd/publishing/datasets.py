"""Pairs and features as Hub datasets.

Pairs are published without their images unless the licence of every image allows redistribution: with the SHA-256 of
each image in the manifest, owners of the images can check that they are the same. Every stage reads the folder that is
downloaded from the Hub.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmkd.data.features.store import FeatureStore, meta_sha256
from mmkd.data.folder import PairFolder, open_pairs, write_manifest
from mmkd.data.inspection import stored_images, write_webdataset
from mmkd.data.licenses import is_open
from mmkd.data.pixel_rules import UnreadableImageError
from mmkd.data.provenance import UNSTATED, store_teacher
from mmkd.data.table import TABLE_FILE, Pair
from mmkd.files import write_json
from mmkd.publishing import card as cards
from mmkd.publishing.publication import Draft, Publication, stage_file, stage_json, without_places
from mmkd.student.folder import describe_pairs

IMAGES_FOLDER = "images"
MOST_TARS, PAIRS_OF_A_TAR = 900, 2000
ATTRIBUTION = "ATTRIBUTION.md"
SKIPPED_FILE = "skipped.jsonl"
ALIGNER_FILES = ("aligner.json", "aligner.safetensors", "report.json")
REPLACES = [f"{place}{kind}-*.safetensors" for place in ("", "*/") for kind in ("shard", "ids")]
TEACHER_DETAILS = ("preprocessing", "tokenizer", "context", "pooling", "aligner")
SHOWN_LICENSES = 5
TABLES = {"source": "sources", "modality": "modalities", "split": "splits"}


def stage_pairs(draft: Draft, images: bool | None) -> Publication:
    """Stage a folder of pairs that curate or screen has written.

    Args:
        draft: of the publication.
        images: with or without them; None decides by their licences.

    Raises:
        FileNotFoundError: an image that would be uploaded is missing.
        ValueError: the manifest is damaged.
    """
    folder, staged = draft.folder, draft.staged
    pairs = open_pairs(folder)
    licenses = Counter(pair.license for pair in pairs.pairs)
    restricted = {name: count for name, count in licenses.items() if not is_open(name)}
    with_images = images if images is not None else not restricted
    named = _in_tars(pairs, staged / IMAGES_FOLDER) if with_images else pairs.pairs
    write_manifest(staged, named)  # not the folder's own, which states the place of the images on this machine
    if (folder / ATTRIBUTION).is_file():
        stage_file(folder / ATTRIBUTION, staged / ATTRIBUTION)
    described = describe_pairs(pairs)
    parts = [(f"{count} pairs", name or UNSTATED) for name, count in licenses.items()]
    card = cards.dataset_card(
        draft,
        parts,
        described["pairs"],
        f"{IMAGES_FOLDER}/*.tar" if with_images else TABLE_FILE,
        groups=described["groups"],
        with_images=with_images,
        licenses=cards.count_rows(described["licenses"], licensed=True),
        tables={title: cards.count_rows(described[key]) for title, key in TABLES.items()},
        datasheet=_datasheet(folder),
    )
    draft.write_card(card)
    notes = [*_image_notes(restricted, images, len(pairs.pairs)), *_conflict(parts, draft.license)]
    return Publication("dataset", staged, notes, [f"{IMAGES_FOLDER}/*"])


def stage_features(draft: Draft) -> Publication:
    """Stage one feature store, or a folder of several.

    Raises:
        FileNotFoundError: a store is unfinished or lacks a shard.
        ValueError: a store is damaged.
    """
    folder, staged = draft.folder, draft.staged
    is_one = (folder / "meta.json").is_file()
    paths = [folder] if is_one else sorted(path.parent for path in folder.glob("*/meta.json"))
    teachers, parts = [], []
    for store in map(FeatureStore, paths):
        files = [store.meta["ids"]["file"], *(file.name for file in store.files)]
        files += [SKIPPED_FILE] if (store.path / SKIPPED_FILE).is_file() else []
        target = staged if is_one else staged / store.path.name
        for name in files:
            stage_file(store.path / name, target / name)
        meta = without_places(store.meta)
        write_json(target / "meta.json", meta | {"sha256": meta_sha256(meta)})
        teacher = store_teacher(meta)
        teachers.append(_store_row(meta, teacher))
        parts.append((f"teacher {teacher['teacher']}", teacher["license"]))
    for name in ALIGNER_FILES:
        if not is_one and (folder / name).is_file():
            (stage_json if name.endswith(".json") else stage_file)(folder / name, staged / name)
    count = max(row["count"] for row in teachers)
    draft.write_card(cards.dataset_card(draft, parts, count, None, teachers=teachers, is_one=is_one))
    return Publication("dataset", staged, _conflict(parts, draft.license), REPLACES)


def _conflict(parts: list[cards.Component], license: str | None) -> list[str]:
    conflict = cards.license_conflict(parts, license)
    return [conflict] if conflict and license else []


def _in_tars(pairs: PairFolder, staged: Path) -> Iterator[Pair]:
    """The pairs, with their images in tars, of which there are never more than `MOST_TARS`.

    Raises:
        FileNotFoundError: an image is missing.
    """
    staged.mkdir()
    try:
        yield from write_webdataset(
            stored_images(pairs), staged, max(PAIRS_OF_A_TAR, -(-len(pairs.pairs) // MOST_TARS))
        )
    except UnreadableImageError as error:
        raise FileNotFoundError(f"{error}; curate again, or push with --images false") from None


def _image_notes(restricted: dict[str, int], images: bool | None, count: int) -> list[str]:
    notes = [f"the manifest is published with captions and groups of {count} pairs: check that none names a patient"]
    first = sorted(restricted.items())[:SHOWN_LICENSES]
    listed = ", ".join(f"{name or UNSTATED} ({number} pairs)" for name, number in first)
    if restricted and images is None:
        notes.append(f"images are not published, since licences restrict them or are not stated: {listed}")
    elif restricted and images:
        notes.append(f"images are published although licences restrict them or are not stated: {listed}")
    return notes


def _store_row(meta: dict[str, Any], teacher: dict[str, Any]) -> cards.Row:
    provenance = meta.get("provenance") or {}
    details = [f"{key} {cards.escape(provenance[key])}" for key in TEACHER_DETAILS if provenance.get(key)]
    numbers = {key: meta[key] for key in ("dim", "count", "dtype")}
    return {**cards.teacher_row(teacher), **numbers, "details": "; ".join(details)}


def _datasheet(folder: Path) -> str:
    """What curation wrote about the pairs, its headings one level lower."""
    path = folder / "README.md"
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join("#" + line if line.startswith("#") else line for line in lines[1:]).strip()
