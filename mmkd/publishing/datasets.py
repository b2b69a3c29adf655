"""Pairs and features as Hub datasets, each with a card that says what may be done with it.

Pairs go without their images unless every image is under a licence that lets it be passed on: a manifest with the
SHA-256 of each image lets whoever has the images check that they are the same. What comes down again from the Hub is a
folder that every stage reads.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from mmkd.data.archives import ArchivedFile
from mmkd.data.folder import PairFolder, open_pairs, write_manifest
from mmkd.data.licenses import OTHERS, hub_id, is_open, terms
from mmkd.data.table import TABLE_FILE, Pair
from mmkd.encoders.zoo import store_teacher
from mmkd.publishing import card as card_facts
from mmkd.publishing.publication import Item, Publication, existing, not_taken
from mmkd.student.folder import describe_pairs

IMAGES_FOLDER = "images"
ATTRIBUTION = "ATTRIBUTION.md"
SKIPPED_FILE = "skipped.jsonl"
ALIGNER_FILES = ("aligner.json", "aligner.safetensors", "report.json")
OWNED_FILES = [f"{place}{kind}-*.safetensors" for place in ("", "*/") for kind in ("shard", "ids")]
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
IDS = "Ids of pairs are as the publisher wrote them: look that they name no patient."
PRIVACY = "Captions and groups are as the publisher wrote them: look that they name no patient."
EMBEDDINGS = (
    "Features can give away what they were made from, and whether an image was among it; guard those of private images "
    "like the images themselves."
)


def pairs_publication(folder: Path, repo: str, template: str, license: str | None, images: bool | None) -> Publication:
    """Everything that is uploaded of a folder of pairs.

    Args:
        folder: written by curate or screen.
        repo: ``user/name``.
        template: of the card.
        license: under which the publisher offers the dataset, or None.
        images: with or without them; None decides by their licences.

    Raises:
        FileNotFoundError: an image that would be uploaded is missing.
        ValueError: the manifest is broken.
    """
    pairs = open_pairs(folder)
    licenses = Counter(pair.license for pair in pairs.pairs)
    closed = {name: count for name, count in licenses.items() if not is_open(name)}
    with_images = images if images is not None else not closed
    items = {TABLE_FILE: _manifest_item(pairs, with_images)}
    if (folder / ATTRIBUTION).is_file():
        items[ATTRIBUTION] = existing(folder / ATTRIBUTION)
    if with_images:
        items |= _image_items(pairs)
    notes = _image_notes(closed, images, len(pairs.pairs))
    parts = [(f"{count} pairs", name or "not stated") for name, count in licenses.items()]
    conflict = card_facts.license_conflict(parts, license)
    notes += [conflict] if conflict and license else []
    card = _pairs_card(pairs, repo, template, parts, license, with_images)
    return Publication("dataset", card, items, not_taken(folder, items), notes, [f"{IMAGES_FOLDER}/*"])


def features_publication(folder: Path, repo: str, template: str, license: str | None) -> Publication:
    """Everything that is uploaded of one feature store, or of a folder of several.

    Raises:
        FileNotFoundError: a store is unfinished or lacks a shard.
        ValueError: a store is damaged.
    """
    from mmkd.data.features.store import FeatureStore  # here, because it loads torch, which nothing else here needs

    is_one = (folder / "meta.json").is_file()
    paths = [folder] if is_one else sorted(path.parent for path in folder.glob("*/meta.json"))
    items: dict[str, Item] = {}
    rows = []
    for store in map(FeatureStore, paths):
        prefix = "" if is_one else f"{store.path.name}/"
        files = ["meta.json", store.meta["ids"]["file"], *(shard["file"] for shard in store.shards)]
        files += [SKIPPED_FILE] if (store.path / SKIPPED_FILE).is_file() else []
        items |= {prefix + name: existing(store.path / name) for name in files}
        rows.append(_store_row(store.meta))
    items |= {name: existing(folder / name) for name in ALIGNER_FILES if not is_one and (folder / name).is_file()}
    parts = [(f"teacher {row['name']}", row["raw"]) for row in rows]
    conflict = card_facts.license_conflict(parts, license)
    notes = [conflict] if conflict and license else []
    card = _features_card(repo, template, rows, parts, license, is_one)
    return Publication("dataset", card, items, not_taken(folder, items), notes, OWNED_FILES)


def _manifest_item(pairs: PairFolder, with_images: bool) -> Item:
    """The manifest of the repository; images out of archives under the names they get."""
    named = (replace(pair, image=_name(pairs, pair)) if with_images else pair for pair in pairs.pairs)
    size = (pairs.path / TABLE_FILE).stat().st_size
    return Item(size, lambda target: write_manifest(target.parent, named))


def _name(pairs: PairFolder, pair: Pair) -> str:
    """Where an image lies below ``images/``; one inside an archive by the archive and its place in it."""
    place = pairs.image_path(pair)
    if isinstance(place, ArchivedFile):
        return f"{pair.image.partition('@')[0].removesuffix('.tar')}/{place.offset}"
    return pair.image


def _image_items(pairs: PairFolder) -> dict[str, Item]:
    items: dict[str, Item] = {}
    for pair in pairs.pairs:
        place, name = pairs.image_path(pair), f"{IMAGES_FOLDER}/{_name(pairs, pair)}"
        if isinstance(place, ArchivedFile) and place.archive.is_file():
            items[name] = Item(place.size, partial(_unpack, place))
        elif isinstance(place, Path) and place.is_file():
            items[name] = existing(place)
        else:
            raise FileNotFoundError(f"pair {pair.id}: {place} is missing; curate again, or push with --images false")
    return items


def _unpack(place: ArchivedFile, target: Path) -> None:
    target.write_bytes(place.read_bytes())


def _image_notes(closed: dict[str, int], images: bool | None, count: int) -> list[str]:
    notes = [f"the manifest is published with the captions and groups of {count} pairs: look that none names a patient"]
    listed = ", ".join(f"{name or 'not stated'} ({count} pairs)" for name, count in sorted(closed.items())[:5])
    if closed and images is None:
        notes.append(f"images stay here, since their licences restrict or say nothing: {listed}")
    elif closed and images:
        notes.append(f"images are published although their licences restrict or say nothing: {listed}")
    return notes


def _pairs_card(
    pairs: PairFolder, repo: str, template: str, parts: list[tuple[str, str]], license: str | None, with_images: bool
) -> str:
    described = describe_pairs(pairs)
    without = "" if with_images else " The images themselves are not here; `sha256` tells whether yours are the same."
    tables = []
    for title, counts in ((key, described[key]) for key in ("licenses", "sources", "modalities", "splits")):
        rows = [{"name": card_facts.cell(name), "count": count} for name, count in counts.items()]
        if title == "licenses":
            rows = [row | {"forbids": _forbids(name)} for row, name in zip(rows, counts, strict=True)]
        singular = {"licenses": "licence", "modalities": "modality"}.get(title, title.removesuffix("s"))
        tables.append({"title": singular, "rows": rows, "forbids": title == "licenses"})
    return _card(
        template,
        repo,
        _metadata(repo, license, parts, described["pairs"], {"split": "all", "path": TABLE_FILE}),
        summary=f"{described['pairs']} biomedical image-text pairs in {described['groups']} groups.{without}",
        local="pairs",
        command="mmkd eval --encoders MODEL --pairs pairs" if with_images else "ls pairs",
        loading=f'from datasets import load_dataset\n\npairs = load_dataset("{repo}", split="all")',
        contents=f"`{TABLE_FILE}`: one row a pair with id, image, caption, modality, label, group, split, "
        "source, licence, size and the SHA-256 of the original file. A group (patient, case, article) is never on both "
        "sides of a split; the split of each pair stands in its row.",
        tables=tables,
        license_statement=card_facts.license_statement(parts, license).replace("the weights", "this dataset"),
        limits=[PRIVACY, "Labels and captions are those of the sources; they were not reviewed by clinicians here."],
        datasheet=_datasheet(pairs.path),
    )


def _features_card(
    repo: str, template: str, rows: list[card_facts.Row], parts: list[tuple[str, str]], license: str | None, one: bool
) -> str:
    names = ", ".join(row["name"] for row in rows)
    local = f"features/{rows[0]['name']}" if one else "features"
    shards = "`shard-*.safetensors` hold `features`, (pairs, 2, width): image and text"
    return _card(
        template,
        repo,
        _metadata(repo, license, parts, max(row["count"] for row in rows), None),
        summary=f"Image and text features of {names}, one row for each image-text pair, to distil a student from.",
        teachers=rows,
        local=local,
        command="mmkd align --pairs pairs --features features --output aligned",
        contents=f"{shards}; `ids-*.safetensors` the pairs' ids; `meta.json` width, type and what is known of the "
        "teacher: weights and their fingerprint, preprocessing, tokenizer, pooling, licence.",
        license_statement=card_facts.license_statement(parts, license).replace("the weights", "these features"),
        limits=[EMBEDDINGS, IDS, "Features are bound to the teacher's preprocessing; see `meta.json`."],
    )


def _store_row(meta: dict[str, Any]) -> card_facts.Row:
    teacher, provenance = store_teacher(meta), meta.get("provenance") or {}
    facts = [key for key in ("preprocessing", "tokenizer", "context", "pooling", "aligner") if provenance.get(key)]
    return {
        "name": card_facts.cell(teacher["teacher"]),
        "weights": card_facts.cell(teacher.get("weights", "not stated")),
        "dim": meta["dim"],
        "count": meta["count"],
        "dtype": meta["dtype"],
        "raw": teacher["license"],
        "license": card_facts.cell(teacher["license"]),
        "forbids": terms(teacher["license"]).forbids,
        "facts": "; ".join(f"{key} {card_facts.cell(provenance[key])}" for key in facts),
    }


def _metadata(
    repo: str, license: str | None, parts: list[tuple[str, str]], count: int, data: dict[str, str] | None
) -> DatasetCardData:
    shared = {hub_id(name) for _, name in parts}
    alike = next(iter(shared)) if len(shared) == 1 and data else None
    more = {"configs": [{"config_name": "default", "data_files": [data]}]} if data else {"viewer": False}
    return DatasetCardData(
        language="en",
        license=card_facts.card_license(license) or alike,
        pretty_name=repo.split("/")[1],
        task_categories=["zero-shot-image-classification"],
        size_categories=next((label for limit, label in SIZES if count < limit), "n>10M"),
        tags=["mmkd-clip", "biomedical", "image-text-pairs" if data else "feature-extraction"],
        **more,
    )


def _card(template: str, repo: str, data: DatasetCardData, **facts: Any) -> str:
    card = DatasetCard.from_template(data, template_str=template, name=repo.split("/")[1], repo=repo, **facts)
    return str(card.content)


def _datasheet(folder: Path) -> str:
    """What curation wrote about the pairs, its headings one level lower."""
    path = folder / "README.md"
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join("#" + line if line.startswith("#") else line for line in lines[1:]).strip()


def _forbids(license: str) -> str:
    return "" if license == OTHERS else terms(license).forbids
