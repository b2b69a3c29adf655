"""Find training pairs that occur in test sets: the same image, a near-duplicate image, or the same article.

A test set is a folder of pairs (its test and validation splits), a folder with ``labels.csv``, a list of article
numbers or SHA-256 sums (``.txt``), a dataset manifest of an evaluation catalog (``.yaml``), whose images are read
wherever its source is on this disk, or a folder of all these. Sets that are not here are reported as not compared.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.curation.duplicates import Fingerprints, bit_ranges
from mmkd.curation.part import prepare_picture
from mmkd.curation.readers import ARTICLE, LABELS_FILE, list_rows
from mmkd.data.archives import ArchivedFile
from mmkd.data.folder import META_FILE, open_pairs
from mmkd.data.images import UnreadableImageError, read_image_bytes
from mmkd.data.readers import DATA_PLACE, DATA_VARIABLE, IMAGE_SUFFIXES, find_file, suffix_of
from mmkd.data.splits import meaning_of
from mmkd.data.table import TABLE_FILE, map_table
from mmkd.files import content_sha256, read_yaml


def find_in_test_sets(
    parts: Sequence[Path], prints: Fingerprints, bounds: np.ndarray, exclusions: Exclusions, distance: int
) -> dict[int, tuple[str, str]]:
    """The pairs that occur in a test set.

    Args:
        parts: Arrow files of the parts.
        prints: of the n pairs of all parts.
        bounds: (parts + 1,) the rows of each part.
        exclusions: the test sets.
        distance: bits of 64 in which perceptual hashes of near images may differ.

    Returns:
        row -> (reason, name of the test set); an equal image goes before its article, and that before a near image.
    """
    found: dict[int, tuple[str, str]] = {}
    if not exclusions.report:
        return found
    for number, part in enumerate(parts):
        table = map_table(part)
        for column, names, reason in (
            ("sha256", exclusions.digests, "in_test_set_image"),
            ("article", exclusions.articles, "in_test_set_article"),
        ):
            for row, value in enumerate(table[column].to_pylist() if names else ()):
                if value in names:
                    found.setdefault(int(bounds[number]) + row, (reason, names[value]))
    nearest = near_test_image(prints.perceptual, exclusions.hashes, distance)
    for row in np.flatnonzero(nearest >= 0).tolist():
        found.setdefault(row, ("in_test_set_near_image", exclusions.hash_sets[nearest[row]]))
    return found


def near_test_image(hashes: np.ndarray, tests: np.ndarray, distance: int) -> np.ndarray:
    """For each of n hashes the first of m test hashes within ``distance`` bits; -1 if there is none."""
    nearest = np.full(len(hashes), -1)
    if not len(tests):
        return nearest
    unique, where = np.unique(hashes, return_inverse=True)
    found = np.full(len(unique), -1)
    for keys, test_keys in zip(bit_ranges(unique, distance), bit_ranges(tests, distance), strict=True):
        order = np.argsort(test_keys, kind="stable")
        first = np.searchsorted(test_keys[order], keys, "left")
        last = np.searchsorted(test_keys[order], keys, "right")
        for step in range(int((last - first).max(initial=0))):
            rows = np.flatnonzero((first + step < last) & (found < 0))
            images = order[first[rows] + step]
            near = np.bitwise_count(unique[rows] ^ tests[images]) <= distance
            found[rows[near]] = images[near]
    return np.asarray(found[where])


SHA256 = re.compile(r"[0-9a-f]{64}")
LISTS = (TABLE_FILE, META_FILE, LABELS_FILE)


@dataclass
class Exclusions:
    """Test images and articles.

    Attributes:
        digests: SHA-256 of image files -> the set they are in.
        hashes: (m,) uint64, perceptual hashes of readable images.
        hash_sets: the set of each.
        articles: article number -> the set it is in.
        report: set -> images, articles, unreadable ones, or why it could not be read.
    """

    digests: dict[str, str] = field(default_factory=dict)
    hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    hash_sets: list[str] = field(default_factory=list)
    articles: dict[str, str] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


def read_exclusions(manifests: Sequence[Path], readers: Executor) -> Exclusions:
    """The images and articles of the named evaluation sets.

    Args:
        manifests: what `--exclude-manifests` names.
        readers: read the images.

    Raises:
        FileNotFoundError: one of them does not exist, or a folder holds nothing of the kind.
        ValueError: a manifest is broken.
    """
    found = Exclusions()
    hashes: list[int] = []
    for name, path in _sets(manifests):
        images, articles, note = _contents(path)
        unreadable = 0
        for digest, hash in readers.map(fingerprints_of, images):
            unreadable += hash is None
            if digest:
                found.digests.setdefault(digest, name)
            if hash is not None:
                hashes.append(hash)
                found.hash_sets.append(name)
        for entry in articles:
            target = found.digests if SHA256.fullmatch(entry) else found.articles
            target.setdefault(entry, name)
        found.report[name] = {"images": len(images), "unreadable": unreadable, "listed": len(articles)}
        if note:
            found.report[name]["skipped"] = note
    found.hashes = np.array(hashes, dtype=np.uint64)
    return found


def checksums(manifests: Sequence[Path]) -> dict[str, str]:
    """A checksum of the lists of each named set, to detect changes; images are not read.

    Raises:
        FileNotFoundError: one of them does not exist.
    """
    sums = {}
    for name, path in _sets(manifests):
        lists = [path] if path.is_file() else [path / file for file in LISTS if (path / file).is_file()]
        sums[name] = content_sha256(*lists)
    return sums


def fingerprints_of(image: Path | ArchivedFile) -> tuple[str, int | None]:
    """SHA-256 and perceptual hash of an image file; empty and None if it cannot be read."""
    try:
        data = read_image_bytes(image)
    except UnreadableImageError:
        return "", None
    digest = hashlib.sha256(data).hexdigest()
    try:
        return digest, prepare_picture(data).perceptual_hash
    except UnreadableImageError:
        return digest, None


def _sets(manifests: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """The evaluation sets by unique names."""
    for given in manifests:
        if not given.exists():
            raise FileNotFoundError(f"--exclude_manifests {given}: no such file or folder")
        if given.is_file() or _is_collection(given):
            yield given.name, given
            continue
        inside = sorted(
            path for path in given.iterdir() if _is_collection(path) or path.suffix in (".yaml", ".yml", ".txt")
        )
        if not inside:
            raise FileNotFoundError(
                f"--exclude_manifests {given} holds no folders of pairs, dataset manifests (.yaml) or lists (.txt)"
            )
        yield from ((f"{given.name}/{path.name}", path) for path in inside)


def _is_collection(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in LISTS)


def _contents(path: Path) -> tuple[list[Path | ArchivedFile], list[str], str]:
    """Images, article numbers and checksums of one set, and the reason if it was left out."""
    if path.suffix == ".txt":
        text = path.read_text(encoding="utf-8", errors="replace")
        return [], sorted({*ARTICLE.findall(text), *SHA256.findall(text)}), ""
    if path.suffix in (".yaml", ".yml"):
        return _catalog_contents(path)
    if (path / LABELS_FILE).is_file() and not (path / TABLE_FILE).is_file():
        rows = [values for _, values in list_rows(path) if isinstance(values, dict)]
        held_out = [row for row in rows if row["file"] and meaning_of(row.get("split", "")) != "train"]
        found = (find_file(path, row["file"]) for row in held_out)
        texts = (text for row in held_out for text in (row.get("group", ""), row["file"]))
        return [file for file in found if file], _articles(texts), ""
    folder = open_pairs(path)
    pairs = [pair for pair in folder.pairs if pair.split != "train"] or list(folder.pairs)
    digests = [pair.sha256 for pair in pairs if pair.sha256]
    images = [folder.image_path(pair) for pair in pairs]
    return images, [*_articles(v for p in pairs for v in (p.group, p.image)), *digests], ""


def _catalog_contents(path: Path) -> tuple[list[Path | ArchivedFile], list[str], str]:
    """Images of a dataset manifest: a folder, or a list with its folder."""
    manifest = read_yaml(path)
    source = manifest.get("source") if isinstance(manifest, dict) else None
    if not isinstance(source, dict) or not source:
        raise ValueError(f"{path} has no `source: {{imagefolder: FOLDER}}`; it is not a dataset manifest")
    data = os.environ.get(DATA_VARIABLE, DATA_PLACE)  # the only variable that a manifest may name
    named = [str(value) for value in source.values() if isinstance(value, str)]
    there = [place for text in named if (place := Path(text.replace(DATA_PLACE, data))).exists()]
    if not there:
        return [], [], f"its data ({', '.join(named)}) is not on this disk"
    if _is_collection(there[0]):
        return _contents(there[0])
    root = there[0] if there[0].is_dir() else there[0].parent
    images: list[Path | ArchivedFile] = [p for p in sorted(root.rglob("*")) if suffix_of(p.name) in IMAGE_SUFFIXES]
    return images, _articles(str(image) for image in images), ""


def _articles(texts: Iterable[str]) -> list[str]:
    return sorted({number for text in texts for number in ARTICLE.findall(text)})
