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

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from mmkd.command.settings import nearest, run, setting
from mmkd.data.features.index import fingerprints_of, refuse_twice
from mmkd.data.features.parts import SKIPPED_FILE, FeatureParts
from mmkd.data.features.shards import FeatureType
from mmkd.data.folder import PairFolder, ids_of, open_pairs
from mmkd.distributed import chosen_device, rank, world_size
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.extraction import (
    BATCHES_AHEAD,
    Job,
    Shard,
    pending_batches,
    project,
    read_ahead,
    same_work,
    share_of_cores,
)
from mmkd.encoders.frozen import FrozenEncoder, with_frozen_towers
from mmkd.encoders.zoo import load_encoder, named_sources

Precision = Literal["float32", "tf32", "bfloat16"]


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


def reasons(skipped: dict[str, str]) -> str:
    """What was left out, by reason."""
    if not skipped:
        return ""
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(Counter(skipped.values()).items()))
    return f"; left out: {counts}, see {SKIPPED_FILE}"


if __name__ == "__main__":
    run(ExtractSettings, main)
