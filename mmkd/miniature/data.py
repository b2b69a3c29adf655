"""The collections of the experiment: whose images teachers see, which the student sees, and which nobody sees.

A collection is a folder with a ``labels.csv`` (file, modality, label, caption, group) and its images. A row without a
caption gets one made of its label by one of several templates, none of which is a prompt of the test. A draw assigns
whole groups to the teachers, to the student, to validation and to test; no model sees the unseen collections.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from mmkd.data.images import open_image
from mmkd.data.readers import is_empty, read_csv
from mmkd.data.splits import hashed
from mmkd.data.table import Pair
from mmkd.training.dataset import center_crop

PARTS = ("teachers", "student", "validation", "test")
SHARES = (0.60, 0.06, 0.10, 0.24)  # of the groups of a label; the student's part is a tenth of the teachers'
TEMPLATES = (
    "Figure 1. {label}.",
    "{modality} of a patient with {label}.",
    "The diagnosis was {label}.",
    "{modality} demonstrates {label}, as described in the text.",
    "Case of {label} from our series.",
    "Representative {modality}; {label} was confirmed.",
    "{label} in a follow-up examination.",
    "Panel A: {label} ({modality}).",
)
VAGUE = (
    "Representative image.",
    "Figure panel, see text for details.",
    "Imaging of the patient.",
    "Findings at presentation.",
    "Typical case from our series.",
    "Image obtained during the examination.",
)
NEAR = 4  # bits of a 64-bit perceptual hash


def find_collections(folders: Sequence[Path]) -> dict[str, Path]:
    """Every folder with a ``labels.csv`` in `folders`, or that is one of them, by name; the first of equal names.

    Raises:
        FileNotFoundError: there are fewer than three.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        for path in (folder, *sorted(folder.iterdir() if folder.is_dir() else ())):
            if (path / "labels.csv").is_file():
                found.setdefault(path.name, path)
    if len(found) < 3:
        raise FileNotFoundError(
            f"{', '.join(map(str, folders))}: {len(found)} collections (folders with a labels.csv); 3 are needed, "
            "of which one stays unseen"
        )
    return found


def read_collection(folder: Path, maximum: int, seed: int) -> list[Pair]:
    """The rows of a collection as pairs, whole groups, at most `maximum`; images are named relative to the folder.

    Raises:
        ValueError: there is no column ``file``.
    """
    table = read_csv(folder / "labels.csv")
    if "file" not in table.columns:
        raise ValueError(f"{folder / 'labels.csv'} has the columns {', '.join(table.columns)}; it needs file")
    groups: dict[str, list[Pair]] = defaultdict(list)
    for row in table.rows:
        cells = {key: "" if is_empty(value) else " ".join(value.split()) for key, value in row.cells.items()}
        label, modality = cells.get("label", ""), cells.get("modality", "") or folder.name
        caption = cells.get("caption", "") or _caption(label, modality, cells["file"])
        group = cells.get("group", "") or cells["file"]
        groups[group].append(
            Pair(
                id=f"{folder.name}/{cells['file']}",
                image=cells["file"],
                caption=caption,
                modality=modality,
                label=label,
                group=f"{folder.name}/{group}",
                source=folder.name,
            )
        )
    chosen: list[Pair] = []
    for name in sorted(groups, key=lambda name: hashed(seed, name)):
        if len(chosen) + len(groups[name]) <= maximum:
            chosen += groups[name]
    return chosen


def _caption(label: str, modality: str, file: str) -> str:
    """One of the templates, chosen by the file's name; empty where there is no label."""
    if not label:
        return ""
    number = int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], "big")
    sentence = TEMPLATES[number % len(TEMPLATES)].format(label=label, modality=modality)
    return sentence[0].upper() + sentence[1:]


def read_images(
    pairs: Sequence[Pair], folders: dict[str, Path], size: int, cache: Path, quiet: bool
) -> NDArray[np.uint8]:
    """The central square of every image, `(n, size, size, 3)`, kept in a file of the folder `cache` and mapped from it.

    Raises:
        UnreadableImageError: an image is missing or broken; the message names it.
    """
    digest = hashlib.sha256("\n".join([str(size), *(pair.id for pair in pairs)]).encode()).hexdigest()[:16]
    path = cache / f"images-{digest}.npy"
    if not path.is_file():
        pixels = np.empty((len(pairs), size, size, 3), dtype=np.uint8)
        for row, pair in enumerate(tqdm(pairs, "images", disable=quiet, unit="image")):
            pixels[row] = np.asarray(center_crop(open_image(folders[pair.source] / pair.image), size))
        partial = path.with_suffix(".partial.npy")
        cache.mkdir(parents=True, exist_ok=True)
        np.save(partial, pixels)
        partial.replace(path)
    return np.load(path, mmap_mode="r")


def near_unseen(pixels: NDArray[np.uint8], unseen: np.ndarray) -> np.ndarray:
    """Which images `(n,)` are nearly equal to an unseen one by their perceptual hash, the unseen ones themselves not.

    Args:
        pixels: `(n, size, size, 3)`.
        unseen: `(n,)` bool.
    """
    import imagehash

    bits = np.stack([imagehash.phash(Image.fromarray(image)).hash.ravel() for image in pixels])
    hashes = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
    near = np.zeros(len(hashes), dtype=bool)
    for own in np.unique(hashes[unseen]):
        near |= np.bitwise_count(hashes ^ own) <= NEAR
    return near & ~unseen


def assign(pairs: Sequence[Pair], seed: int) -> np.ndarray:
    """A name of `PARTS` for each of n pairs `(n,)`: whole groups, each label of each collection in the same shares."""
    strata: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    known: set[str] = set()
    for pair in pairs:
        if pair.group not in known:
            known.add(pair.group)
            strata[pair.source, pair.label][pair.group] = None
    part_of: dict[str, str] = {}
    for groups in strata.values():
        bounds = np.cumsum(SHARES) * len(groups)
        for position, name in enumerate(sorted(groups, key=lambda name: hashed(seed, name))):
            part_of[name] = PARTS[min(int(np.searchsorted(bounds, position + 0.5)), len(PARTS) - 1)]
    return np.array([part_of[pair.group] for pair in pairs])


@dataclass(frozen=True)
class Noise:
    """Pairs of which some captions are wrong.

    Attributes:
        pairs: n pairs.
        kind: `(n,)` ``right``, ``within`` (the caption of another label of the same collection), ``other`` (of another
            collection) or ``vague`` (a sentence that says nothing).
    """

    pairs: list[Pair]
    kind: np.ndarray


def with_noise(pairs: Sequence[Pair], share: float, seed: int) -> Noise:
    """The same pairs with a share of the captions replaced: half within the collection, a quarter each other and vague.

    Args:
        pairs: the student's.
        share: of the pairs.
        seed: of the draw; a larger share keeps the replacements of a smaller one.
    """
    generator = np.random.default_rng(seed)
    order, donors = generator.permutation(len(pairs)), generator.permutation(len(pairs))
    changed, kinds = list(pairs), np.full(len(pairs), "right", dtype="<U6")
    for turn, row in enumerate(order[: round(share * len(pairs))].tolist()):
        pair, kind = pairs[row], ("within", "other", "within", "vague")[turn % 4]
        caption = VAGUE[turn // 4 % len(VAGUE)]
        if kind != "vague":
            rolled = (pairs[donor] for donor in np.roll(donors, -row).tolist())
            found = next((other for other in rolled if _differs(pair, other, kind == "within")), None)
            if found is None:  # a collection with one label alone
                kind = "vague"
            else:
                caption = found.caption
        changed[row], kinds[row] = replace(pair, caption=caption), kind
    return Noise(changed, kinds)


def _differs(pair: Pair, other: Pair, within: bool) -> bool:
    if not within:
        return other.source != pair.source and other.caption != ""
    same = other.label == pair.label if pair.label else other.caption == pair.caption
    return other.source == pair.source and not same and other.group != pair.group
