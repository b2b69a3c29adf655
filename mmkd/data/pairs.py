"""Batches of pairs for training: the same pairs in the same order, cropped the same way, on any number of processes.

The order of an epoch is a permutation that depends on the seed and the epoch; a global batch is a run of it, and each
process takes its slice of that run. A crop depends on the seed, the epoch and the index of the pair. Nothing depends on
how many workers or processes share the work, so that two half batches train the same model as one whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from mmkd.data.features import TeacherFeatures
from mmkd.data.images import open_image
from mmkd.data.records import PairFolder

CROP_AREA = (0.9, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
DRAFT_FACTOR = 2


class PairDataset(Dataset):
    """Images cropped to a square, as uint8, with their captions.

    Images become RGB before they are resized. ``crop="center"`` is the evaluation transform (shortest side to
    ``image_size``, bicubic, centre crop), equal to the processor's PIL backend. ``crop="random"`` takes 90-100 % of the
    area at an aspect of 3:4 to 4:3 (the authors' RandomResizedCrop) and decodes large JPEG files at a reduced size
    of at least twice ``image_size``, which is several times faster.
    """

    def __init__(self, folder: PairFolder, image_size: int, crop: Literal["random", "center"], seed: int = 0) -> None:
        """Choose the crop.

        Args:
            folder: the pairs.
            image_size: side of the square in pixels.
            crop: random (training) or center (evaluation).
            seed: of the random crops.
        """
        if crop not in ("random", "center"):
            raise ValueError(f"crop is {crop!r}; allowed: random, center")
        self.folder = folder
        self.image_size = image_size
        self.crop = crop
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that outlive an epoch

    def set_epoch(self, epoch: int) -> None:
        """Draw other random crops."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.folder.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One pair.

        Returns:
            ``pixel_values`` (3, image_size, image_size) uint8, ``caption``, ``index``, ``id`` and ``teachers``.

        Raises:
            UnreadableImage: the file is missing or broken; the message names it.
        """
        pair = self.folder.pairs[index]
        path = self.folder.image_path(pair)
        if self.crop == "center":
            image = center_crop(open_image(path), self.image_size)
        else:
            generator = np.random.default_rng([self.seed, int(self._epoch), index])
            image = random_crop(open_image(path, draft_side=DRAFT_FACTOR * self.image_size), self.image_size, generator)
        pixels = torch.from_numpy(np.array(image).transpose(2, 0, 1))
        return {
            "pixel_values": pixels,
            "caption": pair.caption,
            "index": index,
            "id": pair.id,
            "teachers": pair.teachers,
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
            raise ValueError(f"batch size {batch_size} must be a positive multiple of the {world_size} processes")
        self.n = n
        self.batch_size = batch_size if n >= batch_size else n - n % world_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take another order."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self.n // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self._epoch]).permutation(self.n)
        share = self.batch_size // self.world_size
        for batch in range(len(self)):
            start = batch * self.batch_size + self.rank * share
            yield order[start : start + share].tolist()


class Collate:
    """Items of a `PairDataset` as one batch, with teacher features when there are any."""

    def __init__(
        self,
        processor: Any,
        context: int,
        features: TeacherFeatures | None = None,
        aligned: TeacherFeatures | None = None,
    ) -> None:
        """Take mean, standard deviation and tokenizer from the model's processor.

        Args:
            processor: an ``MMKDClipProcessor``: its ``image_processor`` has mean and standard deviation, and calling it
                with ``text`` cleans and tokenizes.
            context: longest number of tokens; more are cut off.
            features: teacher features in their own spaces, looked up by pair id.
            aligned: the same in the common space.
        """
        self.processor = processor
        self.context = context
        self.features = {"teachers": features, "aligned": aligned}
        self._mean = torch.tensor(processor.image_processor.image_mean).view(1, 3, 1, 1)
        self._std = torch.tensor(processor.image_processor.image_std).view(1, 3, 1, 1)

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One batch of B items.

        Returns:
            ``pixel_values`` (B, 3, size, size) float32 normalised; ``input_ids`` and ``attention_mask`` (B, longest);
            ``index`` (B,); ``ids``, a list; and as far as given ``teachers`` and ``aligned``, see `available_features`.
        """
        pixels = torch.stack([item["pixel_values"] for item in items])
        texts = self.processor(
            text=[item["caption"] for item in items],
            padding="longest",
            truncation=True,
            max_length=self.context,
            return_tensors="pt",
        )
        batch = {
            "pixel_values": (pixels.float() / 255 - self._mean) / self._std,
            "input_ids": texts["input_ids"],
            "attention_mask": texts["attention_mask"],
            "index": torch.tensor([item["index"] for item in items]),
            "ids": [item["id"] for item in items],
        }
        for key, features in self.features.items():
            if features is not None:
                batch[key] = available_features(features, batch["ids"], [item["teachers"] for item in items])
        return batch


def available_features(
    features: TeacherFeatures, ids: Sequence[str], teachers: Sequence[Sequence[str] | None]
) -> dict[str, dict[str, torch.Tensor]]:
    """Teacher features of B pairs, as far as screening allows them.

    Args:
        features: where they are looked up.
        ids: ids of the pairs.
        teachers: for each pair the teachers that screening left it, None for all.

    Returns:
        name -> ``image`` (B, dim), ``text`` (B, dim), ``mask`` (B,), true where the teacher has seen the pair and
        screening left it available.
    """
    found = features.lookup(ids)
    for name, teacher in found.items():
        teacher["mask"] &= torch.tensor([allowed is None or name in allowed for allowed in teachers])
    return found


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Shortest side to ``size`` by antialiased bicubic interpolation, then the central square."""
    width, height = image.size
    long = int(size * max(width, height) / min(width, height))
    image = image.resize((size, long) if width <= height else (long, size), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, generator: np.random.Generator) -> Image.Image:
    """A random rectangle of 90-100 % of the area, 3:4 to 4:3, resized to a square by bicubic interpolation.

    Where ten draws do not fit into the image, the largest central rectangle within the aspects is taken, as
    torchvision's RandomResizedCrop does.
    """
    left, top, width, height = _crop_box(image.width, image.height, generator)
    cropped = image.crop((left, top, left + width, top + height))
    return cropped.resize((size, size), Image.Resampling.BICUBIC)


def _crop_box(width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random crop."""
    for _ in range(10):
        area = width * height * generator.uniform(*CROP_AREA)
        aspect = math.exp(generator.uniform(math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(generator.integers(0, width - crop_width + 1))
            top = int(generator.integers(0, height - crop_height + 1))
            return left, top, crop_width, crop_height
    crop_width = min(width, round(height * CROP_ASPECT[1]))
    crop_height = min(height, round(width / CROP_ASPECT[0]))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height
