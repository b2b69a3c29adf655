"""Conversion between feature stores and the authors' folder of features (`mmkd.data.features.published`).

`import_published` makes feature stores of the same numbers; `export_published` writes the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from mmkd.data.features import FeatureKind, FeatureType
from mmkd.data.features.published import ENDINGS, FEATURE_FILES, PublishedFeatures
from mmkd.data.features.writer import FeatureWriter
from mmkd.data.folder import META_FILE, PairFolder, PublishedSample
from mmkd.data.images import read_image_bytes
from mmkd.data.provenance import published_teacher
from mmkd.data.table import Pair, batches
from mmkd.files import atomic_write_lines, is_folder_name

SAMPLES_AT_ONCE = 1024
Lookup = Callable[[Sequence[str]], dict[str, dict[str, Tensor]]]


def import_published(
    folder: Path, output: Path, kind: FeatureKind, dtype: FeatureType, progress: Callable[[int], object]
) -> dict[str, int]:
    """One feature store for each teacher from the authors' folder.

    Args:
        folder: with ``meta.jsonl`` and ``features/``.
        output: gets ``output/TEACHER``.
        kind: the raw features, or the authors' aligned ones.
        dtype: how numbers are stored.
        progress: called with the number of samples read.

    Returns:
        teacher -> pairs.

    Raises:
        FileNotFoundError: a file of features is missing.
        ValueError: one is damaged.
    """
    published = PublishedFeatures(folder, kind)
    writers = {name: FeatureWriter(output / name, name, dtype) for name in published.dims}
    counts = dict.fromkeys(writers, 0)
    for start in range(0, len(published.ids), SAMPLES_AT_ONCE):
        ids = published.ids[start : start + SAMPLES_AT_ONCE]
        for name, found in published.lookup(ids).items():
            mask = found["mask"]
            own = [id for id, present in zip(ids, mask.tolist(), strict=True) if present]
            writers[name].add(own, found["image"][mask], found["text"][mask], published.fingerprints(own))
            counts[name] += len(own)
        progress(len(ids))
    for name, writer in writers.items():
        unknown = dict.fromkeys(("fingerprint", "preprocessing", "tokenizer", "context", "pooling"), "as published")
        weights = f"the authors' published features ({FEATURE_FILES[kind]})"
        writer.finish({**published_teacher(name), **unknown, "weights": weights})
    return counts


def export_published(
    pairs: PairFolder,
    output: Path,
    features: dict[FeatureKind, Lookup],
    images: bool,
    progress: Callable[[int], object],
) -> tuple[int, int]:
    """Write pairs and features as the authors publish them, which their code and `PublishedFeatures` read.

    Args:
        pairs: what is exported; a pair's screened teachers become its ``available_clips``.
        output: an empty folder.
        features: raw ones, aligned ones or both, looked up by ids; teachers that all of them have are written.
        images: whether images are copied; else ``imgpath`` names what is not there.
        progress: called with the number of pairs written.

    Returns:
        pairs written, and pairs left out because no teacher has features for them.

    Raises:
        ValueError: an id is not the name of a folder.
        UnreadableImageError: an image is missing.
    """
    counts = [0, 0]

    def lines() -> Iterator[str]:
        for some in batches(pairs.pairs, SAMPLES_AT_ONCE):
            found = {kind: lookup([pair.id for pair in some]) for kind, lookup in features.items()}
            for row, pair in enumerate(some):
                sample = _sample(pair, _teachers(found, row, pair.teachers))
                counts[not sample.teachers] += 1
                if not sample.teachers:
                    continue
                yield _write_sample(output, sample, found, row)
                if images:
                    (output / sample.image).write_bytes(read_image_bytes(pairs.image_path(pair)))
            progress(len(some))

    atomic_write_lines(output / META_FILE, lines())
    return counts[0], counts[1]


def _teachers(
    found: dict[FeatureKind, dict[str, dict[str, Tensor]]], row: int, allowed: Sequence[str] | None
) -> tuple[str, ...]:
    """Teachers that have every kind of features of a sample and that screening left it, None for all."""
    kinds = list(found.values())
    return tuple(
        name
        for name in kinds[0]
        if all(name in teachers and teachers[name]["mask"][row] for teachers in kinds)
        and (allowed is None or name in allowed)
    )


def _sample(pair: Pair, teachers: tuple[str, ...]) -> PublishedSample:
    """A pair as a sample of the authors' folder, its image beside its features."""
    if not is_folder_name(pair.id):
        raise ValueError(f"pair id {pair.id!r} is not the name of a folder, which the authors' form needs")
    image = PurePosixPath("features", pair.split, pair.id, PurePosixPath(pair.image.replace("@", "/")).name)
    return PublishedSample(pair.id, pair.split, str(image), pair.caption, teachers)


def _write_sample(
    folder: Path, sample: PublishedSample, found: dict[FeatureKind, dict[str, dict[str, Tensor]]], row: int
) -> str:
    """Write a sample's files and return its line of ``meta.jsonl``."""
    for kind, teachers in found.items():
        path = folder / "features" / sample.folder / sample.id / FEATURE_FILES[kind]
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{name}_{ending}": teachers[name][modality][row].float().cpu().clone()
            for name in sample.teachers
            for modality, ending in ENDINGS
        }
        torch.save(tensors, path)
    record = {"folderid": sample.folder, "id": sample.id, "imgpath": sample.image, "txt": sample.caption}
    return json.dumps(record | {"available_clips": sample.teachers}, ensure_ascii=False) + "\n"
