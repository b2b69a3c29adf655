"""Encode many images into shards of vectors: teacher features, embeddings of an evaluation, outputs of frozen towers.

Images are read, decoded and prepared by threads while the encoders compute, across the borders of shards; encoders that
prepare alike share the work. What a shard holds depends on its images alone: its batches are always the same ones,
however many threads and processes there are. Images that cannot be read are left out, with the reason.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from mmkd.data.images import UnreadableImageError
from mmkd.encoders.encoder import DualEncoder

BATCHES_AHEAD = 2
MOST_WORKERS = 16

Item = TypeVar("Item")
Readable = Tensor | Image.Image


class EncodingTask(ABC, Generic[Item]):
    """The output of one encoder for the images of each shard, and where it is written.

    Attributes:
        encoder: prepares the images.
    """

    def __init__(self, encoder: DualEncoder) -> None:
        """Encode with this encoder."""
        self.encoder = encoder

    @abstractmethod
    def has(self, shard: int) -> bool:
        """Whether a shard is done."""

    def refuses(self, item: Item) -> str:
        """The reason why an item is left out whatever its image; empty if there is none."""
        return ""

    @abstractmethod
    def encode(self, prepared: list[Any]) -> dict[str, Tensor]:
        """Arrays of one batch of at least one prepared image, by name; an array that is absent counts as NaN."""

    @abstractmethod
    def write(self, shard: int, items: list[Item], arrays: dict[str, Tensor], skipped: list[tuple[Item, str]]) -> None:
        """Write a shard.

        Args:
            shard: its number.
            items: whose images could be read, n of them.
            arrays: of n rows each; none if n is 0.
            skipped: the others, with the reason.
        """


def read_or_reason(read: Callable[[], Readable | str]) -> Readable | str:
    """An image, or the reason why it cannot be read."""
    try:
        return read()
    except UnreadableImageError as error:
        return error.reason
    except ValueError:
        return "outside"  # of its folder


@dataclass
class _Batch(Generic[Item]):
    """A batch of items of one shard, whose images are being read."""

    shard: int
    tasks: Sequence[EncodingTask[Item]]
    items: Sequence[Item]
    is_last: bool
    images: list[Future[dict[str, Any] | str] | str] = field(default_factory=list)


def encode_shards(
    tasks: Sequence[EncodingTask[Item]],
    shards: Iterable[tuple[int, Sequence[Item]]],
    read: Callable[[Item], Readable | str],
    batch_size: int,
    workers: int = 0,
    progress: Callable[[int], object] = lambda items: None,
) -> None:
    """Write the missing shards of all tasks.

    Args:
        tasks: which share the images, and refuse the same ones.
        shards: number and items of each shard.
        read: the image of an item as Pillow has it or (3, height, width) uint8; or, raised or returned, a reason why
            there is none. Several threads call it at once.
        batch_size: images that go through an encoder together.
        workers: threads that read and prepare images; 0 for this process' share of the cores.
        progress: called with the number of items of each batch.
    """
    workers = workers or share_of_cores()
    ahead = BATCHES_AHEAD + -(-workers // batch_size)
    items: list[Item] = []
    skipped: list[tuple[Item, str]] = []
    parts: list[list[dict[str, Tensor]]] = [[] for _ in tasks]
    with ThreadPoolExecutor(max_workers=workers) as readers:
        for batch in _read_ahead(_pending(tasks, shards, batch_size, progress), read, readers, ahead):
            images = [future if isinstance(future, str) else future.result() for future in batch.images]
            readable = [image for image in images if not isinstance(image, str)]
            for item, image in zip(batch.items, images, strict=True):
                skipped.append((item, image)) if isinstance(image, str) else items.append(item)
            for task, own in zip(batch.tasks, parts, strict=False):
                key = _preparation(task.encoder)
                own += [task.encode([image[key] for image in readable])] if readable else []
            progress(len(batch.items))
            if batch.is_last:
                for task, own in zip(batch.tasks, parts, strict=False):
                    task.write(batch.shard, items, _joined(own), skipped)
                items, skipped, parts = [], [], [[] for _ in tasks]


def _pending(
    tasks: Sequence[EncodingTask[Item]],
    shards: Iterable[tuple[int, Sequence[Item]]],
    batch_size: int,
    progress: Callable[[int], object],
) -> Iterator[_Batch[Item]]:
    """The batches of the missing shards, always the same ones for the same shard."""
    for shard, items in shards:
        pending = [task for task in tasks if not task.has(shard)]
        if not pending:
            progress(len(items))
            continue
        for start in range(0, len(items), batch_size):
            yield _Batch(shard, pending, items[start : start + batch_size], start + batch_size >= len(items))


def _read_ahead(
    batches: Iterator[_Batch[Item]], read: Callable[[Item], Readable | str], readers: ThreadPoolExecutor, ahead: int
) -> Iterator[_Batch[Item]]:
    """The same batches in the same order, while the images of the next ones are read."""
    waiting: deque[_Batch[Item]] = deque()
    for batch in batches:
        encoders = {_preparation(task.encoder): task.encoder for task in batch.tasks}
        refused = [batch.tasks[0].refuses(item) for item in batch.items]
        batch.images = [
            reason or readers.submit(_prepare, read, item, encoders)
            for item, reason in zip(batch.items, refused, strict=True)
        ]
        waiting.append(batch)
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def _prepare(
    read: Callable[[Item], Readable | str], item: Item, encoders: dict[str, DualEncoder]
) -> dict[str, Any] | str:
    """The image of an item, preprocessed for each encoder, or the reason why it cannot be read."""
    image = read_or_reason(lambda: read(item))
    return image if isinstance(image, str) else {key: own.prepare_any(image) for key, own in encoders.items()}


def _preparation(encoder: DualEncoder) -> str:
    """The name of an encoder's preprocessing; equal names give equal pixels."""
    return f"{type(encoder).__name__} {encoder.provenance.get('preprocessing', id(encoder))}"


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenated arrays of several batches; NaN where a batch lacks an array that others have."""
    found = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        tail = next(part[name].shape[1:] for part in parts if name in part)
        empty = [torch.full((len(next(iter(part.values()))), *tail), torch.nan) for part in parts if name not in part]
        found[name] = torch.cat([part[name] if name in part else empty.pop(0) for part in parts])
    return found


def share_of_cores() -> int:
    """Number of cores for each process of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
