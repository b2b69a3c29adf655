"""The collections of the experiment: whose images teachers see, which the student sees, and which nobody sees.

A collection is a folder with a ``labels.csv`` (file, modality, label, caption, group) and its images. A row without a
caption gets one made of its label by one of several templates, none of which is a prompt of the test. A draw assigns
whole groups to the teachers, to the student, to validation and to test; no model sees the unseen collections.

`World` holds all images and texts in memory, with the outputs of frozen towers, for models trained in seconds. Nothing
of a draw is in it: which rows a model is trained on and judged by is `mmkd.miniature.tasks`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from mmkd.data.images import open_image
from mmkd.data.prompts import label_prompts
from mmkd.data.readers import is_empty, read_csv
from mmkd.data.splits import hashed
from mmkd.data.table import Pair
from mmkd.encoders.hooks import with_input_of
from mmkd.files import atomic_write_bytes
from mmkd.student.embed import PixelStatistics, normalized_pixels
from mmkd.student.towers import build_model
from mmkd.training.dataset import center_crop

PARTS = ("teachers", "student", "validation", "test")
SHARES = (0.60, 0.06, 0.10, 0.24)  # of the groups of a label; the student's part is a tenth of the teachers'
CAPTIONS: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_name("captions.yaml").read_text(encoding="utf-8"))
TEMPLATES, VAGUE = CAPTIONS["templates"], CAPTIONS["vague"]
NEAR = 4  # bits of a 64-bit perceptual hash
TEXT = "packaged:all-minilm-l6-v2"
TOGETHER = 64


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


@dataclass(frozen=True)
class WorldSettings:
    """What the world is made of.

    Attributes:
        data: folders of collections.
        collections: names of those that models are trained on; empty takes all that are not unseen.
        unseen: names of those that no model is trained on; empty takes every third with two labels.
        cache: folder for decoded images and outputs of towers.
        image_size: side of the stored squares in pixels.
        maximum: images of a collection.
        quiet: no progress bars.
    """

    data: tuple[Path, ...]
    collections: tuple[str, ...]
    unseen: tuple[str, ...]
    cache: Path
    image_size: int
    maximum: int
    quiet: bool


class World:
    """Rows, one for each image, in the order of the collections.

    Attributes:
        pairs: the rows, each with its own caption.
        seen: names of the collections that models are trained on.
        unseen: names of the others.
        texts: number of every caption and prompt.
    """

    def __init__(self, settings: WorldSettings) -> None:
        """Read lists and images; rows that are nearly equal to an unseen image are left out.

        Raises:
            FileNotFoundError: there are too few collections.
            ValueError: a collection is not there, or too few are left to train on.
        """
        self.settings = settings
        found = find_collections(settings.data)
        asked = [*settings.collections, *settings.unseen]
        missing = [name for name in asked if name not in found]
        if missing:
            raise ValueError(f"collections {', '.join(missing)} are not there; found: {', '.join(found)}")
        read = {
            name: read_collection(found[name], settings.maximum, 0)
            for name in found
            if not settings.collections or name in asked
        }
        read = {name: pairs for name, pairs in read.items() if pairs}
        labelled = [name for name, pairs in read.items() if len({p.label for p in pairs if p.label}) > 1]
        self.unseen = list(settings.unseen) or labelled[::3]
        self.seen = [name for name in read if name not in self.unseen]
        if len(self.seen) < 2 or not self.unseen:
            raise ValueError(
                f"{len(self.seen)} collections are left to train on ({', '.join(self.seen)}) and {len(self.unseen)} "
                "stay unseen; at least two and one are needed, the latter with two labels"
            )
        pairs = [pair for name in (*self.seen, *self.unseen) for pair in read[name]]
        pixels = read_images(pairs, found, settings.image_size, settings.cache, settings.quiet)
        is_unseen = np.array([pair.source in self.unseen for pair in pairs])
        digest = hashlib.sha256("\n".join([str(settings.image_size), *self.unseen, *(p.id for p in pairs)]).encode())
        near = _cached(
            settings.cache / f"near-{digest.hexdigest()[:24]}.safetensors",
            lambda: torch.from_numpy(near_unseen(pixels, is_unseen)),
        )
        kept = np.flatnonzero(~near.numpy())
        self.pairs = [pairs[row] for row in kept.tolist()]
        self._pixels, self._kept = pixels, kept
        self.texts = {text: row for row, text in enumerate(dict.fromkeys(self._all_texts()))}

    @property
    def key(self) -> str:
        """Hash of the images, texts and collections; models of one world do not fit another."""
        content = [str(self.settings.image_size), *self.unseen, *(pair.id for pair in self.pairs), *self.texts]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()

    def pixels(self, rows: Tensor) -> Tensor:
        """`(rows, 3, size, size)` uint8."""
        return torch.from_numpy(self._pixels[self._kept[rows.numpy()]]).permute(0, 3, 1, 2)

    def pooled_images(self, vision: str) -> Tensor:
        """Outputs of a frozen vision tower for every row, `(n, width)` float32."""

        def encode() -> Tensor:
            model, processor = build_model(vision, TEXT, image_size=self.settings.image_size)
            model.eval().to(memory_format=torch.channels_last)
            mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
            statistics, parts = PixelStatistics(tuple(mean), tuple(std)), []
            rows = torch.arange(len(self.pairs)).split(TOGETHER)
            for some in tqdm(rows, vision, disable=self.settings.quiet, unit_scale=TOGETHER, unit="image"):
                pixels = normalized_pixels(self.pixels(some), statistics)
                run = lambda pixels=pixels: model.get_image_features(pixel_values=pixels).pooler_output  # noqa: E731
                parts.append(with_input_of(model.visual_projection, run)[1])
            return torch.cat(parts)

        return self._cached(f"vision {vision}", encode)

    @cached_property
    def pooled_texts(self) -> Tensor:
        """Outputs of the frozen text tower for every text, `(texts, width)` float32."""

        def encode() -> Tensor:
            model, processor = build_model("random:tiny", TEXT)
            model.eval()
            parts = []
            for some in np.array_split(list(self.texts), max(1, len(self.texts) // TOGETHER)):
                tokens = processor(text=some.tolist(), padding="longest", truncation=True, return_tensors="pt")
                run = lambda tokens=tokens: model.get_text_features(**tokens).pooler_output  # noqa: E731
                parts.append(with_input_of(model.text_projection, run)[1])
            return torch.cat(parts)

        return self._cached("text", encode)

    def text_rows(self, texts: Sequence[str]) -> Tensor:
        """Number of each text, `(texts,)`."""
        return torch.tensor([self.texts[text] for text in texts])

    def prompts(self, label: str, source: str) -> list[str]:
        """What stands for a label of a collection when it is asked for without training."""
        modalities = [pair.modality for pair in self.pairs if pair.source == source and pair.label == label]
        return label_prompts(label, max(set(modalities), key=modalities.count))

    def _all_texts(self) -> list[str]:
        labels = dict.fromkeys((pair.label, pair.source) for pair in self.pairs if pair.label)
        prompts = [prompt for label, source in labels for prompt in self.prompts(label, source)]
        return [*(pair.caption for pair in self.pairs), *VAGUE, *prompts]

    def _cached(self, what: str, encode: Callable[[], Tensor]) -> Tensor:
        content = "\n".join([what, str(self.settings.image_size), *(pair.id for pair in self.pairs), *self.texts])
        return _cached(self.settings.cache / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.safetensors", encode)


def _cached(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """The tensor in a file, made where there is none."""
    if not path.is_file():
        with torch.inference_mode():
            atomic_write_bytes(path, save({"outputs": make().contiguous()}))
    return load_file(path)["outputs"]
