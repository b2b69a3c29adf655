"""Pairs for training: the same pairs in the same order, cropped the same way, on any number of processes.

The order of an epoch is a permutation that depends on the seed and the epoch; a global batch is a run of it, and each
process takes its slice of that run. A crop depends on the seed, the epoch and the index of the pair. Nothing depends on
how many workers or processes share the work, so that two half batches train the same model as one whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mmkd.data.features.lookup import TeacherFeatures, available_features
from mmkd.data.folder import PairFolder
from mmkd.data.images import open_image
from mmkd.data.pixels import CROP_AREA, DRAFT_FACTOR, random_crop, read_pixels, to_tensor
from mmkd.student.embed import PixelStatistics

MODEL_INPUTS = ("pixel_values", "input_ids", "attention_mask", "pooled_images", "pooled_texts")  # not read by losses
TeacherStores = Mapping[str, TeacherFeatures]
"""Teacher features by their key in a batch: ``teachers`` (raw) and ``aligned`` (in the student's width)."""


class PairDataset(Dataset):
    """Images cropped to a square, as uint8, with their captions.

    Images become RGB before they are resized. ``crop="center"`` is the evaluation transform (shortest side to
    ``image_size``, bicubic, centre crop), equal to the processor's PIL backend. ``crop="random"`` takes 90-100 % of the
    area at an aspect of 3:4 to 4:3 (the authors' RandomResizedCrop) and decodes large JPEG files at a reduced size
    of at least twice ``image_size``, which is several times faster.
    """

    def __init__(
        self,
        folder: PairFolder,
        image_size: int,
        crop: Literal["random", "center"],
        seed: int = 0,
        crop_area: float = CROP_AREA,
    ) -> None:
        """Choose the crop.

        Args:
            folder: the pairs.
            image_size: side of the square in pixels.
            crop: random (training) or center (evaluation).
            seed: of the random crops.
            crop_area: smallest share of the area of a random crop.
        """
        if crop not in ("random", "center"):
            raise ValueError(f"crop is {crop!r}; allowed: random, center")
        self.folder = folder
        self.image_size = image_size
        self.crop = crop
        self.seed = seed
        self.crop_area = crop_area
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared with workers that outlive an epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the random crops of an epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.folder.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One pair.

        Returns:
            ``pixel_values`` (3, image_size, image_size) uint8, ``caption``, ``index``, ``id``, ``teachers`` and
            ``modality``.

        Raises:
            UnreadableImageError: the file is missing or broken; the message names it.
        """
        pair = self.folder.pairs[index]
        path = self.folder.image_path(pair)
        if self.crop == "center":
            pixels = to_tensor(center_crop(open_image(path), self.image_size))
        else:
            generator = np.random.default_rng([self.seed, int(self._epoch), index])
            side = DRAFT_FACTOR * self.image_size * (CROP_AREA / self.crop_area) ** 0.5  # small crops need more pixels
            pixels = read_pixels(path, draft_side=round(side))
            pixels = random_crop(pixels, self.image_size, generator, self.crop_area)
        return {
            "pixel_values": pixels,
            "caption": pair.caption,
            "index": index,
            "id": pair.id,
            "teachers": pair.teachers,
            "modality": pair.modality,
        }


class GlobalBatchSampler(Sampler[list[int]]):
    """The batches of one process: its slice of each global batch.

    The last incomplete batch of an epoch is dropped. Fewer pairs than a batch make one batch of them all, trimmed to a
    multiple of ``world_size``.
    """

    def __init__(self, n: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        """Share batches out.

        Args:
            n: number of pairs.
            batch_size: pairs in a global batch, over all processes.
            rank: number of this process.
            world_size: number of processes.
            seed: of the order.

        Raises:
            ValueError: the batch cannot be shared out evenly, or there are fewer pairs than processes.
        """
        if n < world_size:
            raise ValueError(f"{n} pairs cannot be shared out among {world_size} processes")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"--batch_size {batch_size} cannot be shared out among {world_size} processes: take a multiple of "
                f"{world_size}, or another number of processes"
            )
        self.n = n
        self.batch_size = batch_size if n >= batch_size else n - n % world_size
        self.share = self.batch_size // world_size
        self.rank = rank
        self.seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self.n // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self._epoch]).permutation(self.n)
        for batch in range(len(self)):
            start = batch * self.batch_size + self.rank * self.share
            yield order[start : start + self.share].tolist()


class Collate:
    """Items of a `PairDataset` as one batch, with teacher features when there are any."""

    def __init__(self, processor: Any, context: int, features: TeacherStores | None = None) -> None:
        """Take mean, standard deviation and tokenizer from the model's processor.

        Args:
            processor: an ``MMKDClipProcessor``: its ``image_processor`` has mean and standard deviation, and calling it
                with ``text`` cleans and tokenizes.
            context: maximum number of tokens; the rest is cut off.
            features: looked up by pair id and added to each batch.
        """
        self.processor = processor
        self.context = context
        self.features = dict(features or {})
        images = processor.image_processor
        self.pixel_statistics = PixelStatistics(tuple(images.image_mean), tuple(images.image_std))

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One batch of B items, the longest captions first.

        Returns:
            ``pixel_values`` (B, 3, size, size) uint8 and ``pixel_statistics``, their mean and standard deviation;
            ``input_ids`` and ``attention_mask`` (B, longest) and ``text_lengths``, tokens of each row; ``index`` (B,);
            ``caption_numbers`` (B,); ``ids`` and ``modality``, lists; and the features by their keys, see
            `available_features`.
        """
        texts = self.processor(
            text=[item["caption"] for item in items],
            padding="longest",
            truncation=True,
            max_length=self.context,
            return_tensors="pt",
        )
        lengths = texts["attention_mask"].sum(dim=1)
        order = lengths.argsort(descending=True, stable=True)
        items = [items[row] for row in order.tolist()]
        batch = {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "pixel_statistics": self.pixel_statistics,
            "input_ids": texts["input_ids"][order],
            "attention_mask": texts["attention_mask"][order],
            "text_lengths": lengths[order].tolist(),
            "index": torch.tensor([item["index"] for item in items]),
            "ids": [item["id"] for item in items],
            "modality": [item["modality"] for item in items],
            "caption_numbers": caption_numbers(item["caption"] for item in items),
        }
        teachers = [item["teachers"] for item in items]
        return batch | {key: available_features(store, batch["ids"], teachers) for key, store in self.features.items()}


def caption_numbers(captions: Iterable[str]) -> Tensor:
    """Numbers of captions, (n,) int64: equal for equal ones, and practically never for others."""
    texts = (caption.encode("utf-8", "surrogatepass") for caption in captions)
    hashes = (hashlib.blake2b(text, digest_size=7).digest() for text in texts)
    return torch.tensor([int.from_bytes(digest, "big") for digest in hashes])


def micro_batches(batch: Mapping[str, Any], size: int | None) -> list[Mapping[str, Any]]:
    """The micro-batches of a batch: as its loader made them, else `size` neighbouring rows each; None takes all.

    Columns of text that are padding in a whole micro-batch are left out.
    """
    if "micro_batches" in batch or size is None:
        return batch.get("micro_batches", [batch])
    return [_without_padding(rows_of(batch, slice(k, k + size))) for k in range(0, len(batch["ids"]), size)]


def without_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What losses read of a batch: everything but the inputs of the model, which are most of its memory."""
    return {name: value for name, value in batch.items() if name not in (*MODEL_INPUTS, "micro_batches")}


def rows_of(value: Any, rows: slice) -> Any:
    """Some rows of a tensor, a list, or a mapping of either; anything else as it is."""
    if isinstance(value, Mapping):
        return {name: rows_of(item, rows) for name, item in value.items()}
    return value[rows] if isinstance(value, (Tensor, list)) else value


def joined(parts: Sequence[Any]) -> Any:
    """Batches as one: tensors and lists one after the other, matrices of tokens padded with zeros."""
    first = parts[0]
    if isinstance(first, Mapping):
        return {key: joined([part[key] for part in parts]) for key in first}
    if isinstance(first, list):
        return [item for part in parts for item in part]
    if not isinstance(first, Tensor):
        return first
    if first.ndim == 2:
        width = max(part.shape[1] for part in parts)
        parts = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
    return torch.cat(list(parts))


def _without_padding(batch: dict[str, Any]) -> dict[str, Any]:
    if "attention_mask" in batch:
        used = batch["attention_mask"].any(dim=0).nonzero()
        longest = int(used.max()) + 1 if len(used) else 1
        batch |= {name: batch[name][:, :longest] for name in ("input_ids", "attention_mask")}
    return batch


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Shortest side to ``size`` by antialiased bicubic interpolation, then the central square."""
    width, height = image.size
    long = int(size * max(width, height) / min(width, height))
    image = image.resize((size, long) if width <= height else (long, size), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
