"""Extract the features of every image and caption of a folder of pairs with one or more teachers, once.

Teachers named together share the decoding of images, and the preprocessing where theirs is the same; both run in
threads beside the encoding. Processes share the shards and do not communicate: they may run on different machines with
``RANK`` and ``WORLD_SIZE`` set, start at different times and be killed; run the same command again to resume. If pairs
have been added since, only these are extracted. A pair whose image or caption cannot be read is left out, counted, and
listed in the store's ``skipped.jsonl``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from mmkd.command.settings import check_arguments, run, setting
from mmkd.data.features import FeatureType

Precision = Literal["float32", "tf32", "bfloat16"]


@dataclass
class ExtractSettings:
    """Extract the features of one or more teachers for every pair.

    Example:
        mmkd extract --teacher biomedclip,plip --pairs pairs --output features
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "model": "weights precision resize",
        "data": "dtype shard_size",
        "computing": "batch_size workers device cache_frozen_towers quiet",
    }

    teacher: list[str] = setting(
        help="names, folders, Hub ids or YAML files, also as NAME=SOURCE; ungated and commercial filter them"
    )
    pairs: Path = setting(help="folder of pairs")
    output: Path = setting(help="folder to write: one feature store for each teacher; existing features are kept")
    weights: dict[str, str] = setting(factory=dict, help="local folder of the weights, by teacher")
    dtype: FeatureType = setting("float16", "stored number format")
    precision: Precision = setting("float32", "precision of the forward pass; tf32 and bfloat16 are faster on GPUs")
    resize: Literal["exact", "fast"] = setting(
        "exact",
        "the teacher's own, or five times as fast and within one grey level (usual preprocessing only)",
    )
    batch_size: int = setting(32, "images per batch of a teacher")
    shard_size: int = setting(0, "pairs per shard, the most a killed run loses; 0 chooses 256 to 16384")
    workers: int = setting(0, "threads that read and prepare images; 0 takes this process' share of the cores")
    device: str = setting("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one, another for each process")
    cache_frozen_towers: Path | None = setting(
        None, "folder for the outputs of frozen towers; models of this package that share towers encode with them once"
    )
    quiet: bool = setting(False, "no progress bar")


if __name__ == "__main__":
    check_arguments(ExtractSettings)  # before the imports that take seconds

import torch
from tqdm import tqdm

from mmkd.command.settings import nearest
from mmkd.data.features.index import Ids, fingerprints_of
from mmkd.data.features.writer import SKIPPED_FILE, FeatureExtraction
from mmkd.data.folder import PairFolder, ids_at, open_pairs, pairs_at
from mmkd.data.pixels import read_pixels
from mmkd.data.table import Pair
from mmkd.distributed import allow_tf32, chosen_device, rank, world_size
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.extraction import FeatureTask, Readable, encode_shards, group_tasks, read_or_reason
from mmkd.encoders.frozen_encoder import FrozenEncoder, with_frozen_towers
from mmkd.encoders.zoo import load_encoder, named_sources


def main(settings: ExtractSettings) -> None:
    """Extract this process' shards, and finish every store whose shards are all there.

    Raises:
        FileNotFoundError: pairs or weights are not there.
        ValueError: an unknown teacher, weights that do not fit, a store of other weights, or no readable image.
    """
    sources = check(settings)
    folder = open_pairs(settings.pairs)
    allow_tf32(settings.precision == "tf32")
    ids = Ids(len(folder.pairs), partial(ids_at, folder.pairs))  # twenty million as a list are two gigabytes
    fingerprints = fingerprints_of(folder.pairs)
    tasks = []
    for name, source in sources.items():
        encoder = load_teacher(name, source, settings)
        path = settings.output / name
        own = FeatureExtraction(path, name, ids, fingerprints, encoder.provenance, settings.dtype, settings.shard_size)
        tasks.append(FeatureTask(encoder, own))
    cached = [task for task in tasks if isinstance(task.encoder, FrozenEncoder)]
    for group in [*([task] for task in cached), *group_tasks([task for task in tasks if task not in cached])]:
        extract(group, folder, settings)
    for task in tasks:
        skipped = task.extraction.close()
        if skipped is not None and not settings.quiet:
            count = len(ids) - len(skipped)
            print(f"{task.extraction.path}: {count} of {len(ids)} pairs{reasons(skipped)}")


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
    """The teacher on this process' device, under the name of its feature store."""
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
        details = "; ".join(f"{key} {encoder.provenance[key]}" for key in shown)
        print(f"{name}: {encoder.dim} wide; {details}")
    return encoder


def extract(tasks: Sequence[FeatureTask], folder: PairFolder, settings: ExtractSettings) -> None:
    """Do this process' share of the shards that are missing."""
    extraction = tasks[0].extraction
    own = range(rank(), len(extraction), world_size())
    shards = ((shard, pairs_at(folder.pairs, extraction.positions(shard))) for shard in own)
    total = sum(len(extraction.positions(shard)) for shard in own)
    title = ", ".join(task.extraction.name for task in tasks)
    with tqdm(total=total, desc=title, unit="pair", disable=settings.quiet or rank() > 0) as bar:
        encoder = tasks[0].encoder
        if isinstance(encoder, FrozenEncoder):
            encoder.encode_shards(tasks[0], folder, shards, lambda joint, _: {"image": joint}, bar.update)
        else:
            read = partial(read_image, folder)
            encode_shards(tasks, shards, read, settings.batch_size, settings.workers, bar.update)


def held(settings: ExtractSettings) -> list[Path]:
    """The feature stores of this run; others of the folder may be written meanwhile."""
    output = settings.output
    return [output.with_name(f"{output.name}.{name}") for name in named_sources(settings.teacher)]


def read_image(folder: PairFolder, pair: Pair) -> Readable | str:
    """The pixels of a pair's image, or why it cannot be read."""
    return read_or_reason(lambda: read_pixels(folder.image_path(pair)))


def reasons(skipped: dict[str, str]) -> str:
    """What was left out, by reason."""
    if not skipped:
        return ""
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(Counter(skipped.values()).items()))
    return f"; left out: {counts}, see {SKIPPED_FILE}"


if __name__ == "__main__":
    run(ExtractSettings, main, held)
