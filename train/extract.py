"""Extract: every image and caption of a folder of pairs through one or more teachers, once and for all.

    mmkd extract --teacher biomedclip,plip --pairs pairs --output features
    mmkd extract --num_processes 8 --teacher biomedclip --pairs pairs --output features

Teachers named together share the decoding of images, and the preprocessing where theirs is the same; both run in
threads beside the encoding. Processes share the shards of the work and do not talk: they may run on different machines
with ``RANK`` and ``WORLD_SIZE`` set, start at different times and be killed; the same command goes on. Pairs added
later are the only ones extracted when it is started again. A pair whose image or caption cannot be read is left out,
counted, and listed in the store's ``skipped.jsonl``.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from mmkd.data.choice import ids_of, pairs_at
from mmkd.data.feature_ids import refuse_twice
from mmkd.data.feature_parts import SKIPPED_FILE, FeatureParts
from mmkd.data.feature_shards import FeatureType
from mmkd.data.images import UnreadableImage
from mmkd.data.pair_fingerprints import fingerprints_of
from mmkd.data.pixels import read_pixels
from mmkd.data.records import Pair, PairFolder, open_pairs
from mmkd.device import chosen_device
from mmkd.distributed import rank, world_size
from mmkd.encoder import DualEncoder
from mmkd.frozen_towers import FrozenEncoder, with_frozen_towers
from mmkd.settings import nearest, run, setting
from mmkd.teachers.zoo import load_encoder, named_sources

Precision = Literal["float32", "tf32", "bfloat16"]
MOST_WORKERS = 16
BATCHES_AHEAD = 2


@dataclass
class ExtractSettings:
    """Extract the features of one or more teachers for every pair."""

    teacher: list[str] = setting(help="names, folders, Hub ids or YAML rows, each may be given as NAME=SOURCE")
    pairs: Path = setting(help="folder of pairs")
    output: Path = setting(help="folder that gets one store for each teacher; what is there already is kept")
    weights: dict[str, str] = setting(factory=dict, help="teacher -> local folder of its weights")
    dtype: FeatureType = setting("float16", "how numbers are stored; int8 takes half the space, cosine above 0.9999")
    precision: Precision = setting("float32", "in which teachers compute; tf32 and bfloat16 are faster on GPUs")
    resize: Literal["exact", "fast"] = setting(
        "exact", "as the teacher's own code, or (usual preprocessing only) within one grey level in a fifth of the time"
    )
    batch_size: int = setting(32, "images that go through a model together")
    shard_size: int = setting(0, "pairs written together: what a kill loses at most; 0 = 256 to 16384 by their number")
    workers: int = setting(0, "threads that read and prepare images; 0 = this process' share of the cores")
    device: str = setting("auto", "cpu, cuda, cuda:1 ...; auto = a GPU if there is one, another for each process")
    cache_frozen_towers: Path | None = setting(
        None, "folder for tower outputs of models of ours; those that share towers encode with them once"
    )
    quiet: bool = setting(False, "no progress bar")


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


def main(settings: ExtractSettings) -> None:
    """Extract this process' shards, and close every store whose shards are all there.

    Raises:
        FileNotFoundError: pairs or weights are not there.
        ValueError: an unknown teacher, weights that do not fit, a store of other weights, or no readable image.
    """
    sources = check(settings)
    folder = open_pairs(settings.pairs)
    torch.set_float32_matmul_precision("high" if settings.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = settings.precision == "tf32"
    ids, fingerprints = ids_of(folder.pairs), fingerprints_of(folder.pairs)
    refuse_twice(ids)
    jobs = []
    for name, source in sources.items():
        encoder = load_teacher(name, source, settings)
        path = settings.output / name
        parts = FeatureParts(path, name, ids, fingerprints, encoder.provenance, settings.dtype, settings.shard_size)
        jobs.append(Job(encoder, parts))
    for job in jobs:
        if isinstance(job.encoder, FrozenEncoder):
            project(job, folder)
    for group in same_work([job for job in jobs if not isinstance(job.encoder, FrozenEncoder)]):
        extract(group, folder, settings)
    for job in jobs:
        skipped = job.parts.close()
        if skipped is not None and not settings.quiet:
            count = len(ids) - len(skipped)
            print(f"{job.parts.path}: {count} of {len(ids)} pairs{reasons(skipped)}")


def check(settings: ExtractSettings) -> dict[str, str]:
    """Sources by name; raises on settings that cannot work before anything is loaded."""
    sources = named_sources(settings.teacher)
    for name in settings.weights:
        if name not in sources:
            raise ValueError(f"--weights.{name}{nearest(name, sources)}: no such teacher here; {', '.join(sources)}")
    if settings.batch_size < 1 or settings.shard_size < 0 or settings.workers < 0:
        raise ValueError(
            f"--batch_size {settings.batch_size} must be at least 1, --shard_size {settings.shard_size} and --workers "
            f"{settings.workers} at least 0"
        )
    if settings.cache_frozen_towers and (settings.precision != "float32" or settings.resize == "fast"):
        raise ValueError(
            "--cache_frozen_towers keeps exact outputs: leave out --precision and --resize fast, or the cache"
        )
    return sources


def load_teacher(name: str, source: str, settings: ExtractSettings) -> DualEncoder:
    """The teacher on this process' device, under the name of its store."""
    weights = settings.weights.get(name)
    device = chosen_device(settings.device)
    encoder = load_encoder(source, device, Path(weights) if weights else None)
    encoder.batch_size = settings.batch_size
    encoder.autocast = (device.partition(":")[0], torch.bfloat16) if settings.precision == "bfloat16" else None
    encoder.provenance["precision"] = settings.precision
    if settings.resize == "fast" and encoder.fast_prepare is not None:
        encoder.fast = True
        encoder.provenance["preprocessing"] += ", resized as uint8 by torch"
    encoder = with_frozen_towers(encoder, settings.cache_frozen_towers, settings.quiet)
    if rank() == 0 and not settings.quiet:
        shown = ("preprocessing", "tokenizer", "context", "pooling", "license")
        facts = "; ".join(f"{key} {encoder.provenance[key]}" for key in shown)
        print(f"{name}: {encoder.dim} wide; {facts}")
    return encoder


def same_work(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs grouped by the pairs they still have to do, so that each group decodes them once."""
    groups: list[list[Job]] = []
    for job in jobs:
        alike = [group for group in groups if group[0].parts.same_work(job.parts)]
        alike[0].append(job) if alike else groups.append([job])
    return groups


def extract(jobs: Sequence[Job], folder: PairFolder, settings: ExtractSettings) -> None:
    """Do this process' share of the shards that are missing."""
    parts = jobs[0].parts
    own = range(rank(), len(parts), world_size())
    hidden = settings.quiet or rank() > 0
    title = ", ".join(job.parts.name for job in jobs)
    workers = settings.workers or share_of_cores()
    ahead = BATCHES_AHEAD + -(-workers // settings.batch_size)
    with (
        tqdm(total=sum(len(parts.positions(k)) for k in own), desc=title, unit="pair", disable=hidden) as bar,
        ThreadPoolExecutor(max_workers=workers) as readers,
    ):
        shard = Shard()
        for batch in read_ahead(pending_batches(jobs, folder, own, settings.batch_size, bar), folder, readers, ahead):
            shard.add(batch)
            bar.update(len(batch.pairs))
            if batch.last:
                shard.write(batch)
                shard = Shard()


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


def reasons(skipped: dict[str, str]) -> str:
    """What was left out, by reason."""
    if not skipped:
        return ""
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(Counter(skipped.values()).items()))
    return f"; left out: {counts}, see {SKIPPED_FILE}"


if __name__ == "__main__":
    run(ExtractSettings, main)
