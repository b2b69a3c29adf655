"""All images and texts of the experiment in memory, with the outputs of frozen towers, for models trained in seconds.

Nothing of a draw is here: which rows a model is trained on and judged by is `mmkd.miniature.tasks`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from mmkd.data.prompts import label_prompts
from mmkd.encoders.encoder import with_input_of
from mmkd.files import atomic_write_bytes
from mmkd.miniature.data import VAGUE, find_collections, near_unseen, read_collection, read_images
from mmkd.student.embed import PixelStatistics, normalized_pixels
from mmkd.student.towers import build_model

TEXT = "packaged:all-minilm-l6-v2"
TOGETHER = 64


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
