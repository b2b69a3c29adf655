"""TODO-DOC."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from mmkd.data.features.parts import FeatureParts
from mmkd.data.folder import PairFolder, pairs_at
from mmkd.data.images import UnreadableImage
from mmkd.data.pixels import read_pixels
from mmkd.data.table import Pair
from mmkd.distributed import rank, world_size
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.frozen import FrozenEncoder


@dataclass
class Job:
    """A teacher and what it has still to do."""

    encoder: DualEncoder
    parts: FeatureParts


@dataclass
class Batch:
    """Pairs of one shard that go through the teachers together, their images being read meanwhile."""

    part: int
    jobs: Sequence[Job]
    pairs: Sequence[Pair]
    last: bool
    images: list[Future[dict[str, Any] | str]] = field(default_factory=list)


def same_work(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs grouped by the pairs they still have to do, so that each group decodes them once."""
    groups: list[list[Job]] = []
    for job in jobs:
        alike = [group for group in groups if group[0].parts.same_work(job.parts)]
        alike[0].append(job) if alike else groups.append([job])
    return groups


def project(job: Job, folder: PairFolder) -> None:
    """Do this process' share of the shards of a teacher whose towers' outputs are kept."""
    assert isinstance(job.encoder, FrozenEncoder)
    for part in range(rank(), len(job.parts), world_size()):
        if job.parts.has(part):
            continue
        pairs = [folder.pairs[position] for position in job.parts.positions(part).tolist()]
        skipped = {pair.id: "caption" for pair in pairs if not is_text(pair.caption)}
        images, unreadable = job.encoder.encode_pairs(folder, [pair for pair in pairs if pair.id not in skipped])
        skipped |= unreadable
        captions = [pair.caption for pair in pairs if pair.id not in skipped]
        job.parts.write(part, images, job.encoder.encode_texts(captions), skipped)


class Shard:
    """One shard in the making: the pairs that could be read, and each teacher's image features of them."""

    def __init__(self) -> None:
        """Start empty."""
        self.captions: list[str] = []
        self.skipped: dict[str, str] = {}
        self.features: list[list[torch.Tensor]] = []

    def add(self, batch: Batch) -> None:
        """Encode the images of a batch with each teacher."""
        found = [future.result() for future in batch.images]
        readable = [prepared for prepared in found if not isinstance(prepared, str)]
        self.features = self.features or [[] for _ in batch.jobs]
        for job, features in zip(batch.jobs, self.features, strict=True):
            key = preparation(job.encoder)
            features.append(job.encoder.encode_prepared([prepared[key] for prepared in readable]))
        for pair, prepared in zip(batch.pairs, found, strict=True):
            if isinstance(prepared, str):
                self.skipped[pair.id] = prepared
            else:
                self.captions.append(pair.caption)

    def write(self, batch: Batch) -> None:
        """Encode the captions with each teacher and write the shard of each."""
        for job, features in zip(batch.jobs, self.features, strict=True):
            job.parts.write(batch.part, torch.cat(features), job.encoder.encode_texts(self.captions), self.skipped)


def pending_batches(
    jobs: Sequence[Job], folder: PairFolder, own: Sequence[int], batch_size: int, bar: tqdm
) -> Iterator[Batch]:
    """The batches of those shards that a teacher has not done yet, always the same ones for the same shard."""
    for part in own:
        pairs = pairs_at(folder.pairs, jobs[0].parts.positions(part))
        pending = [job for job in jobs if not job.parts.has(part)]
        if not pending:
            bar.update(len(pairs))
            continue
        for start in range(0, len(pairs), batch_size):
            yield Batch(part, pending, pairs[start : start + batch_size], start + batch_size >= len(pairs))


def read_ahead(
    batches: Iterator[Batch], folder: PairFolder, readers: ThreadPoolExecutor, ahead: int
) -> Iterator[Batch]:
    """The same batches in the same order, with the images of the next ones being read."""
    waiting: deque[Batch] = deque()
    for batch in batches:
        encoders = {preparation(job.encoder): job.encoder for job in batch.jobs}
        batch.images = [readers.submit(prepare, folder, pair, encoders) for pair in batch.pairs]
        waiting.append(batch)
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def prepare(folder: PairFolder, pair: Pair, encoders: dict[str, DualEncoder]) -> dict[str, Any] | str:
    """The image of a pair as each of the encoders takes it, or why the pair cannot be used."""
    if not is_text(pair.caption):
        return "caption"
    try:
        pixels = read_pixels(folder.image_path(pair))
    except UnreadableImage as error:
        return error.reason
    except ValueError:
        return "outside"
    return {key: encoder.prepare_pixels(pixels) for key, encoder in encoders.items()}


def preparation(encoder: DualEncoder) -> str:
    """Names what an encoder does to an image before its model sees it; equal names, equal pixels."""
    return f"{type(encoder).__name__} {encoder.provenance['preprocessing']}"


def is_text(caption: str) -> bool:
    """Whether a caption is text that can be encoded: JSON can hold halves of characters, tokenizers cannot."""
    try:
        caption.encode()
        return True
    except UnicodeEncodeError:
        return False


def share_of_cores() -> int:
    """Cores of this machine for each process on it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


BATCHES_AHEAD = 2

MOST_WORKERS = 16
