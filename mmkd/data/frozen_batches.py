"""Batches for training projections on frozen towers: pooled outputs from memory instead of images and words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmkd.data.batches import PairBatches, identity_of, pair_batches
from mmkd.data.features import TeacherFeatures
from mmkd.data.pairs import GlobalBatchSampler, available_features
from mmkd.data.records import Pair, PairFolder
from mmkd.distributed import rank, world_size
from mmkd.frozen_towers import FrozenTowers
from modeling_mmkd import MMKDClipModel

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
    """What `mmkd.loop.fit` reads: images and words, or with a `cache` what frozen towers make of them.

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
