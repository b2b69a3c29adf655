"""Extract: every image and caption of a folder of pairs through one or more teachers, once and for all.

    mmkd extract --teacher biomedclip,plip --pairs pairs --output features
    mmkd extract --num_processes 8 --teacher biomedclip --pairs pairs --output features

Teachers named together share the decoding of images. Processes share the parts of the work and do not talk: they may
run on different machines with ``RANK`` and ``WORLD_SIZE`` set, start at different times and be killed; the same command
goes on. Pairs added later are the only ones extracted when it is started again. An image that cannot be read is left
out, counted, and listed in the store's ``skipped.jsonl``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from mmkd.data.feature_parts import SKIPPED_FILE, FeatureParts
from mmkd.data.features import FeatureType
from mmkd.data.images import UnreadableImage, open_image
from mmkd.data.records import Pair, PairFolder, open_pairs
from mmkd.device import chosen_device
from mmkd.distributed import rank, world_size
from mmkd.encoder import DualEncoder
from mmkd.settings import nearest, run, setting
from mmkd.teachers.zoo import load_encoder, named_sources

Batch = tuple[Sequence[Pair], list[Image.Image | str]]


@dataclass
class ExtractSettings:
    """Extract the features of one or more teachers for every pair."""

    teacher: list[str] = setting(help="names, folders, Hub ids or YAML rows, each may be given as NAME=SOURCE")
    pairs: Path = setting(help="folder of pairs")
    output: Path = setting(help="folder that gets one store for each teacher; what is there already is kept")
    weights: dict[str, str] = setting(factory=dict, help="teacher -> local folder of its weights")
    dtype: FeatureType = setting("float16", "how numbers are stored")
    batch_size: int = setting(32, "images that go through a model together")
    part_size: int = setting(1024, "pairs written together: what a kill loses at most, and what processes share")
    device: str = setting("auto", "cpu, cuda, cuda:1 ...; auto = a GPU if there is one, another for each process")
    quiet: bool = setting(False, "no progress bar")


@dataclass
class Job:
    """A teacher and what it has still to do."""

    encoder: DualEncoder
    parts: FeatureParts


def main(settings: ExtractSettings) -> None:
    """Extract this process' parts, and close every store whose parts are all there.

    Raises:
        FileNotFoundError: pairs or weights are not there.
        ValueError: an unknown teacher, weights that do not fit, a store of other weights, or no readable image.
    """
    sources = check(settings)
    folder = open_pairs(settings.pairs)
    ids = [pair.id for pair in folder.pairs]
    jobs = []
    for name, source in sources.items():
        encoder = load_teacher(name, source, settings)
        path = settings.output / name
        parts = FeatureParts(path, name, ids, encoder.provenance, settings.dtype, settings.part_size)
        jobs.append(Job(encoder, parts))
    for group in same_work(jobs):
        extract(group, folder, settings)
    for job in jobs:
        skipped = job.parts.close()
        if skipped is not None and not settings.quiet:
            print(f"{job.parts.path}: {len(ids) - len(skipped)} of {len(ids)} pairs{reasons(skipped)}")
        elif not job.parts.parts and rank() == 0 and not settings.quiet:
            print(f"{job.parts.path}: holds all {len(ids)} pairs already")


def check(settings: ExtractSettings) -> dict[str, str]:
    """Sources by name; raises on settings that cannot work before anything is loaded."""
    sources = named_sources(settings.teacher)
    for name in settings.weights:
        if name not in sources:
            raise ValueError(f"--weights.{name}{nearest(name, sources)}: no such teacher here; {', '.join(sources)}")
    if settings.batch_size < 1 or settings.part_size < 1:
        raise ValueError(f"--batch_size {settings.batch_size} and --part_size {settings.part_size} must be at least 1")
    return sources


def load_teacher(name: str, source: str, settings: ExtractSettings) -> DualEncoder:
    """The teacher on this process' device, under the name of its store."""
    weights = settings.weights.get(name)
    encoder = load_encoder(source, chosen_device(settings.device), Path(weights) if weights else None)
    encoder.batch_size = settings.batch_size
    if rank() == 0 and not settings.quiet:
        shown = ("preprocessing", "tokenizer", "context", "pooling", "license")
        facts = "; ".join(f"{key} {encoder.provenance[key]}" for key in shown)
        print(f"{name}: {encoder.dim} wide; {facts}")
    return encoder


def same_work(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs grouped by the pairs they still have to do, so that each group decodes them once."""
    groups: dict[tuple[tuple[str, ...], ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(tuple(map(tuple, job.parts.parts)), []).append(job)
    return list(groups.values())


def extract(jobs: Sequence[Job], folder: PairFolder, settings: ExtractSettings) -> None:
    """Do this process' share of the parts that are missing."""
    by_id = {pair.id: pair for pair in folder.pairs}
    parts = jobs[0].parts.parts
    own = range(rank(), len(parts), world_size())
    hidden = settings.quiet or rank() > 0
    title = ", ".join(job.parts.name for job in jobs)
    with (
        tqdm(total=sum(len(parts[k]) for k in own), desc=title, unit="pair", disable=hidden) as bar,
        ThreadPoolExecutor(max_workers=1) as decoder,
    ):
        for part in own:
            pairs = [by_id[id] for id in parts[part]]
            pending = [job for job in jobs if not job.parts.has(part)]
            if pending:
                extract_part(pending, part, decoded(pairs, folder, settings.batch_size, decoder), bar)
            else:
                bar.update(len(pairs))


def extract_part(jobs: Sequence[Job], part: int, batches: Iterable[Batch], bar: tqdm) -> None:
    """Encode one part with each of the teachers, in fixed batches, and write it."""
    kept: list[Pair] = []
    skipped: dict[str, str] = {}
    features = [[torch.zeros(0, job.encoder.dim)] for job in jobs]
    for pairs, images in batches:
        readable = [found for found in images if not isinstance(found, str)]
        for job, found in zip(jobs, features, strict=True):
            found.append(job.encoder.encode_images(readable))
        skipped |= {pair.id: found for pair, found in zip(pairs, images, strict=True) if isinstance(found, str)}
        kept += [pair for pair in pairs if pair.id not in skipped]
        bar.update(len(pairs))
    ids, captions = [pair.id for pair in kept], [pair.caption for pair in kept]
    for job, found in zip(jobs, features, strict=True):
        job.parts.write(part, ids, torch.cat(found), job.encoder.encode_texts(captions), skipped)


def decoded(pairs: Sequence[Pair], folder: PairFolder, batch_size: int, decoder: ThreadPoolExecutor) -> Iterator[Batch]:
    """Batches of pairs with their images, or the reason why there is none; the next batch is decoded meanwhile."""

    def decode(batch: Sequence[Pair]) -> list[Image.Image | str]:
        return [readable_image(folder, pair) for pair in batch]

    waiting: tuple[Sequence[Pair], Future[list[Image.Image | str]]] | None = None
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        following = (batch, decoder.submit(decode, batch))
        if waiting is not None:
            yield waiting[0], waiting[1].result()
        waiting = following
    if waiting is not None:
        yield waiting[0], waiting[1].result()


def readable_image(folder: PairFolder, pair: Pair) -> Image.Image | str:
    """The image of a pair, or why it cannot be used."""
    try:
        return open_image(folder.image_path(pair))
    except UnreadableImage as error:
        return error.reason
    except ValueError:
        return "outside"


def reasons(skipped: dict[str, str]) -> str:
    """What was left out, by reason."""
    if not skipped:
        return ""
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(Counter(skipped.values()).items()))
    return f"; left out: {counts}, see {SKIPPED_FILE}"


if __name__ == "__main__":
    run(ExtractSettings, main)
