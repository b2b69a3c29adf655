"""This process' share of every global batch: images and captions, or what was stored of them.

Batches of pairs read images and captions in worker processes; batches of stored tensors take the outputs of frozen
towers, or teacher features alone, from memory. Both give the same pairs in the same order.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmkd.data.features.lookup import TeacherFeatures, available_features
from mmkd.data.folder import PairFolder
from mmkd.data.table import Pair, in_columns
from mmkd.distributed import rank, world_size
from mmkd.training.dataset import (
    Collate,
    GlobalBatchSampler,
    PairDataset,
    TeacherStores,
    caption_numbers,
    joined,
    micro_batches,
    without_inputs,
)
from mmkd.training.settings import BatchSettings
from modeling_mmkd import MMKDClipModel


class Batches(Protocol):
    """This process' share of every global batch, as the loop reads it."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, skip: int = 0) -> Iterable[dict[str, Any]]:
        """The batches of an epoch from number `skip` on; each has ``ids``, a list."""

    def identity(self) -> dict[str, Any]:
        """What order and content of the batches depend on, as JSON values; a run resumes only with the same."""


def batches_from(batches: Batches, step: int, total: int) -> Iterator[dict[str, Any]]:
    """The batches of a run of `total` steps from number `step` on, with their ``epoch``."""
    while step < total:
        epoch, skip = divmod(step, len(batches))
        for batch in islice(batches.epoch(epoch, skip), total - step):
            yield {**batch, "epoch": epoch}
            step += 1


def training_batches(
    folder: PairFolder,
    model: MMKDClipModel,
    processor: Any,
    settings: BatchSettings,
    features: TeacherStores | None = None,
    images: PairFolder | None = None,
) -> Batches:
    """Batches for `mmkd.training.loop.fit`: of images and captions, or with a cache of the outputs of frozen towers.

    Args:
        folder: the pairs to train on.
        model: the student.
        processor: the model's.
        settings: size, order, crops, cache.
        features: teacher features to add to each batch, by key.
        images: whose images join every batch without their captions, as many as there are pairs.

    Raises:
        ValueError: with a cache, a tower is trainable, crops are random, or an image cannot be read.
    """
    if settings.cache_frozen_towers is None:
        batches: list[Batches] = [pair_batches(own, processor, settings, features) for own in (folder, images) if own]
    else:
        from mmkd.encoders.frozen import FrozenTowers  # here, because most trainings read images

        require_frozen(model, settings.crop)
        towers = FrozenTowers(settings.cache_frozen_towers, model, processor, settings.quiet)
        batches = []
        for own in (folder, images):
            if own is not None:
                batches.append(StoredBatches(own.pairs, settings, towers.outputs_of(own), features))
    return batches[0] if images is None else JoinedBatches(batches[0], batches[1], len(folder.pairs))


def pair_batches(
    folder: PairFolder,
    processor: Any,
    settings: BatchSettings,
    features: TeacherStores | None = None,
    crop: Literal["random", "center"] | None = None,
) -> PairBatches:
    """Batches of a folder of pairs, with the image size, normalization and tokens of a model's processor.

    Args:
        folder: the pairs.
        processor: the model's, with ``image_processor`` and ``tokenizer``.
        settings: size, order and crops.
        features: teacher features to add to each batch, by key.
        crop: instead of the settings'.
    """
    size = processor.image_processor.crop_size["height"]
    dataset = PairDataset(folder, size, crop or settings.crop, settings.seed, settings.crop_area)
    sampler = global_sampler(len(dataset), settings)
    collate = Collate(processor, processor.tokenizer.model_max_length, features)
    return PairBatches(dataset, sampler, collate, settings.workers, settings.micro_batch_size)


def global_sampler(pairs: int, settings: BatchSettings) -> GlobalBatchSampler:
    """This process' slice of each global batch of a number of pairs."""
    return GlobalBatchSampler(pairs, settings.batch_size, rank(), world_size(), settings.seed)


class PairBatches:
    """Batches of images, captions and teacher features; a batch of several micro-batches has them as ``micro_batches``.

    Worker processes assemble micro-batches: a large batch never is one piece of shared memory, nor copied as a whole.
    """

    def __init__(
        self,
        dataset: PairDataset,
        sampler: GlobalBatchSampler,
        collate: Collate,
        workers: int,
        micro_batch_size: int | None = None,
    ) -> None:
        """Read with `workers` processes beside this one, 0 to read in this one."""
        self.dataset, self.sampler, self.collate, self.workers = dataset, sampler, collate, workers
        self.micro_batch_size = min(micro_batch_size or sampler.share, sampler.share)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.sampler)

    def identity(self) -> dict[str, Any]:
        """See `identity_of`."""
        return identity_of(self.dataset.folder.pairs, self.sampler, self.collate.features)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of an epoch from number `skip` on.

        Raises:
            ValueError: an image or a feature file cannot be read; the message names it.
        """
        self.sampler.set_epoch(epoch)
        self.dataset.set_epoch(epoch)
        size = self.micro_batch_size
        together = -(-self.sampler.share // size)
        pieces = (rows[k : k + size] for rows in islice(self.sampler, skip, None) for k in range(0, len(rows), size))
        loader = DataLoader(
            _Collated(self.dataset, self.collate),
            batch_size=None,
            sampler=pieces,  # an iterator, used once
            num_workers=self.workers,
            prefetch_factor=max(2, -(-together // self.workers)) if self.workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else making a loader would draw from the global one
            worker_init_fn=_ignore_interrupts,
        )
        waiting: list[dict[str, Any]] = []
        for piece in loader:
            if isinstance(piece, str):
                raise ValueError(piece)
            if together == 1:
                yield piece
                continue
            waiting.append(piece)
            if len(waiting) == together:
                yield joined([without_inputs(piece) for piece in waiting]) | {"micro_batches": waiting}
                waiting = []


class _Collated(Dataset):
    """A batch for a list of indices, or an error message: an error raised in a worker would arrive as a traceback."""

    def __init__(self, dataset: PairDataset, collate: Collate) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, indices: list[int]) -> dict[str, Any] | str:
        try:
            return self.collate([self.dataset[index] for index in indices])
        except (ValueError, OSError) as error:
            return str(error)


class StoredBatches:
    """Batches of tensors in memory and of teacher features, without images and captions."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        settings: BatchSettings,
        tensors: Mapping[str, Tensor] | None = None,
        features: TeacherStores | None = None,
    ) -> None:
        """Batch rows of `tensors`, and look the pairs up in `features`.

        Args:
            pairs: n pairs.
            settings: size and order.
            tensors: each `(n, ...)`, such as the pooled outputs of frozen towers.
            features: teacher features to add to each batch, by key.
        """
        self.pairs, self.tensors, self.features = pairs, dict(tensors or {}), dict(features or {})
        self.sampler = global_sampler(len(pairs), settings)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.sampler)

    def identity(self) -> dict[str, Any]:
        """See `identity_of`."""
        return identity_of(self.pairs, self.sampler, self.features)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of an epoch from number `skip` on."""
        self.sampler.set_epoch(epoch)
        for indices in islice(self.sampler, skip, None):
            chosen, rows = [self.pairs[index] for index in indices], torch.tensor(indices)
            ids, teachers = [pair.id for pair in chosen], [pair.teachers for pair in chosen]
            yield {
                "index": rows,
                "ids": ids,
                "modality": [pair.modality for pair in chosen],
                "caption_numbers": caption_numbers(pair.caption for pair in chosen),
                **{name: tensor[rows] for name, tensor in self.tensors.items()},
                **{key: available_features(store, ids, teachers) for key, store in self.features.items()},
            }


class JoinedBatches:
    """Every batch of pairs joined by a batch of images whose captions are not used; the images recur as needed."""

    def __init__(self, pairs: Batches, images: Batches, first_index: int) -> None:
        """Number the images from `first_index` on, so that their ``index`` is that of no pair.

        Raises:
            ValueError: there are fewer images than processes or none.
        """
        if not len(images):
            raise ValueError("there are no images to join the pairs' batches; leave --images out")
        self.pairs, self.images, self.first_index = pairs, images, first_index

    def __len__(self) -> int:
        """Batches of an epoch of the pairs."""
        return len(self.pairs)

    def identity(self) -> dict[str, Any]:
        """Identity of the pairs and, as ``images``, that of the images."""
        return {**self.pairs.identity(), "images": self.images.identity()}

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of an epoch of the pairs, the images last; ``captioned`` is the number of pairs."""
        images = self._images(epoch * len(self.pairs) + skip)
        for batch in self.pairs.epoch(epoch, skip):
            more: dict[str, Any] = {"captioned": len(batch["ids"])}
            parts = [batch, next(images)]
            if any("micro_batches" in part for part in parts):
                more["micro_batches"] = [piece for part in parts for piece in micro_batches(part, None)]
                parts = [without_inputs(part) for part in parts]
            yield joined(parts) | more

    def _images(self, step: int) -> Iterator[dict[str, Any]]:
        while True:
            epoch, skip = divmod(step, len(self.images))
            for batch in self.images.epoch(epoch, skip):
                for piece in (batch, *batch.get("micro_batches", [])):
                    piece["index"] = piece["index"] + self.first_index
                yield batch
                step += 1


def identity_of(
    pairs: Sequence[Pair], sampler: GlobalBatchSampler, features: Mapping[str, TeacherFeatures] | None = None
) -> dict[str, Any]:
    """Number and SHA-256 of the pairs in order (id, image, caption, teachers), size of a global batch, teachers."""
    digest = hashlib.sha256()
    for columns in in_columns(pairs, ("id", "image", "sha256", "caption", "teachers")):
        digest.update("".join(map(repr, zip(*columns, strict=True))).encode())
    stores = {key: store.identity for key, store in (features or {}).items()}
    return {"pairs": len(pairs), "pairs_sha256": digest.hexdigest(), "batch_size": sampler.batch_size, **stores}


def require_frozen(model: MMKDClipModel, crop: str) -> None:
    """Refuse towers whose outputs cannot be cached.

    Raises:
        ValueError: a tower is trainable, or crops are random.
    """
    for name in ("vision_model", "text_model"):
        if any(parameter.requires_grad for parameter in model.get_submodule(name).parameters()):
            raise ValueError(f"--cache_frozen_towers needs frozen towers, but {name} is trainable: add it to --freeze")
    if crop != "center":
        raise ValueError("--cache_frozen_towers needs --crop center: the output for a random crop cannot be cached")


def _ignore_interrupts(_worker: int) -> None:
    """^C reaches every process of a terminal: a worker that died of it would be reported as a crash."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
