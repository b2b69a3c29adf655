"""Epochs of batches that can start in the middle, for the training loop.

A fresh loader is made for each epoch, so that one started at batch k reads nothing of the k before it: a resumed run
costs no replay, and sees each sample exactly once.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmkd.data.features.lookup import TeacherFeatures, available_features
from mmkd.data.folder import PairFolder
from mmkd.data.table import Pair, in_columns
from mmkd.distributed import rank, world_size
from mmkd.encoders.frozen import FrozenTowers
from mmkd.training.dataset import Collate, GlobalBatchSampler, PairDataset
from modeling_mmkd import MMKDClipModel


class Batches(Protocol):
    """What the loop reads from: this process' share of every global batch."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, skip: int = 0) -> Iterable[dict[str, Any]]:
        """The batches of an epoch from number `skip` on; each has ``ids``, a list."""

    def identity(self) -> dict[str, Any]:
        """What the order and content of the batches depend on, as JSON values: a run goes on with the same alone."""


def pair_batches(
    folder: PairFolder,
    processor: Any,
    *,
    batch_size: int,
    crop: Literal["random", "center"],
    workers: int,
    seed: int,
    features: TeacherFeatures | None = None,
    aligned: TeacherFeatures | None = None,
) -> PairBatches:
    """This process' batches of a folder of pairs, sized and normalized as a model's processor says.

    Args:
        folder: the pairs to train on.
        processor: the model's, with ``image_processor`` and ``tokenizer``.
        batch_size: pairs in a global batch.
        crop: random or center.
        workers: processes that read images, 0 for this one.
        seed: of order and crops.
        features: raw teacher features to add as ``teachers``.
        aligned: teacher features in the common space to add as ``aligned``.
    """
    dataset = PairDataset(folder, processor.image_processor.crop_size["height"], crop, seed)
    sampler = GlobalBatchSampler(len(dataset), batch_size, rank(), world_size(), seed)
    collate = Collate(processor, processor.tokenizer.model_max_length, features, aligned)
    return PairBatches(dataset, sampler, collate, workers)


class PairBatches:
    """Batches of images, captions and teacher features."""

    def __init__(self, dataset: PairDataset, sampler: GlobalBatchSampler, collate: Collate, workers: int) -> None:
        """Read with `workers` processes beside this one, 0 to read in this one."""
        self.dataset, self.sampler, self.collate, self.workers = dataset, sampler, collate, workers

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.sampler)

    def identity(self) -> dict[str, Any]:
        """Pairs, teachers and share of the batch, see `identity_of`."""
        features = {key: found.identity for key, found in self.collate.features.items() if found is not None}
        return identity_of(self.dataset.folder.pairs, self.sampler) | features

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of an epoch from number `skip` on.

        Raises:
            ValueError: an image or a feature file cannot be read; the message names it.
        """
        self.sampler.set_epoch(epoch)
        self.dataset.set_epoch(epoch)
        loader = DataLoader(
            _Collated(self.dataset, self.collate),
            batch_size=None,
            sampler=islice(self.sampler, skip, None),  # an iterator, used once
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else making a loader would draw from the global one
            worker_init_fn=_leave_interrupts_to_the_parent,
        )
        for batch in loader:
            if isinstance(batch, str):
                raise ValueError(batch)
            yield batch


class _Collated(Dataset):
    """A batch for a list of indices, or what is wrong with it: an error raised in a worker arrives as a traceback."""

    def __init__(self, dataset: PairDataset, collate: Collate) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, indices: list[int]) -> dict[str, Any] | str:
        try:
            return self.collate([self.dataset[index] for index in indices])
        except (ValueError, OSError) as error:
            return str(error)


class FeatureBatches:
    """Batches of teacher features alone."""

    def __init__(self, pairs: Sequence[Pair], features: TeacherFeatures, sampler: GlobalBatchSampler) -> None:
        """Look the pairs up in `features`, in the sampler's order."""
        self.pairs, self.features, self.sampler = pairs, features, sampler

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.sampler)

    def identity(self) -> dict[str, Any]:
        """Pairs, teachers and share of the batch, see `identity_of`."""
        return identity_of(self.pairs, self.sampler) | {"teachers": self.features.identity}

    def epoch(self, epoch: int, skip: int = 0) -> Iterable[dict[str, Any]]:
        """The batches of an epoch from number `skip` on."""
        self.sampler.set_epoch(epoch)
        for indices in islice(self.sampler, skip, None):
            chosen = [self.pairs[index] for index in indices]
            ids = [pair.id for pair in chosen]
            teachers = available_features(self.features, ids, [pair.teachers for pair in chosen])
            yield {"ids": ids, "index": torch.tensor(indices), "teachers": teachers}


def identity_of(pairs: Sequence[Pair], sampler: GlobalBatchSampler) -> dict[str, Any]:
    """Number and SHA-256 of the pairs in their order (id, image, caption, teachers), and size of a global batch."""
    digest = hashlib.sha256()
    for columns in in_columns(pairs, ("id", "image", "sha256", "caption", "teachers")):
        digest.update("".join(map(repr, zip(*columns, strict=True))).encode())
    return {"pairs": len(pairs), "pairs_sha256": digest.hexdigest(), "batch_size": sampler.batch_size}


def _leave_interrupts_to_the_parent(_worker: int) -> None:
    """^C reaches every process of a terminal: a worker that died of it would be reported as a crash."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# Section: Batches for training projections on frozen towers: pooled outputs from memory instead of images and words.


SHOWN = 5


class FrozenBatches:
    """This process' share of every global batch, in the order in which `PairBatches` would read it."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        images: Tensor,
        texts: Tensor,
        sampler: GlobalBatchSampler,
        features: TeacherFeatures | None = None,
        aligned: TeacherFeatures | None = None,
    ) -> None:
        """Take what the towers gave.

        Args:
            pairs: n pairs.
            images: (n, width) pooled outputs of their images.
            texts: (n, width) pooled outputs of their captions.
            sampler: over n pairs.
            features: raw teacher features to add as ``teachers``.
            aligned: teacher features in the common space to add as ``aligned``.
        """
        self.pairs, self.images, self.texts, self.sampler = pairs, images, texts, sampler
        self.features = {"teachers": features, "aligned": aligned}

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.sampler)

    def identity(self) -> dict[str, Any]:
        """Pairs, teachers and share of the batch, see `identity_of`."""
        features = {key: found.identity for key, found in self.features.items() if found is not None}
        return identity_of(self.pairs, self.sampler) | features

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of an epoch from number `skip` on."""
        self.sampler.set_epoch(epoch)
        for indices in islice(self.sampler, skip, None):
            chosen = [self.pairs[index] for index in indices]
            rows = torch.tensor(indices)
            batch: dict[str, Any] = {
                "pooled_images": self.images[rows],
                "pooled_texts": self.texts[rows],
                "index": rows,
                "ids": [pair.id for pair in chosen],
                "modality": [pair.modality for pair in chosen],
            }
            for key, features in self.features.items():
                if features is not None:
                    batch[key] = available_features(features, batch["ids"], [pair.teachers for pair in chosen])
            yield batch


def training_batches(
    cache: Path | None,
    folder: PairFolder,
    model: MMKDClipModel,
    processor: Any,
    *,
    batch_size: int,
    crop: Literal["random", "center"],
    workers: int,
    seed: int,
    features: TeacherFeatures | None = None,
    aligned: TeacherFeatures | None = None,
    quiet: bool = False,
) -> FrozenBatches | PairBatches:
    """What `mmkd.training.loop.fit` reads: images and words, or with a `cache` what frozen towers make of them.

    Both give the same pairs in the same order. See `pair_batches` for the arguments.

    Raises:
        ValueError: with a cache, a tower learns, crops are random, or an image cannot be read.
    """
    if cache is None:
        return pair_batches(
            folder,
            processor,
            batch_size=batch_size,
            crop=crop,
            workers=workers,
            seed=seed,
            features=features,
            aligned=aligned,
        )
    require_frozen(model, crop)
    images, texts = tower_outputs(FrozenTowers(cache, model, processor, quiet), folder)
    sampler = GlobalBatchSampler(len(folder.pairs), batch_size, rank(), world_size(), seed)
    return FrozenBatches(folder.pairs, images, texts, sampler, features, aligned)


def require_frozen(model: MMKDClipModel, crop: str) -> None:
    """Refuse what could not be kept.

    Raises:
        ValueError: a tower learns, or crops are random.
    """
    for name in ("vision_model", "text_model"):
        if any(parameter.requires_grad for parameter in model.get_submodule(name).parameters()):
            raise ValueError(f"--cache_frozen_towers needs towers that do not learn: add {name} to --freeze")
    if crop != "center":
        raise ValueError("--cache_frozen_towers needs --crop center: a random crop has no output that could be kept")


def tower_outputs(towers: FrozenTowers, folder: PairFolder) -> tuple[Tensor, Tensor]:
    """Pooled outputs of all images and captions of a folder, (n, width) each, shared out among the processes.

    Raises:
        ValueError: an image cannot be read; the message names it.
    """
    images, unreadable = towers.image_outputs(folder, folder.pairs, share=True)
    if unreadable:
        listed = ", ".join(f"{id} ({reason})" for id, reason in list(unreadable.items())[:SHOWN])
        raise ValueError(f"{len(unreadable)} images of {folder.path} cannot be read: {listed}; curate them again")
    return images, towers.text_outputs([pair.caption for pair in folder.pairs], share=True)
