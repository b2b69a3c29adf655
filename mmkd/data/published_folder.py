"""To and from the authors' folder of features: one line of ``meta.jsonl`` and one small ``.pt`` file for each pair."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from mmkd.data.choice import in_chunks
from mmkd.data.chunked_store import ChunkedStore
from mmkd.data.feature_shards import FeatureType
from mmkd.data.features import TeacherFeatures
from mmkd.data.images import read_image_bytes
from mmkd.data.pair import Pair
from mmkd.data.published import META_FILE, is_folder_name
from mmkd.data.published_features import FEATURE_FILES, FeatureKind, PublishedFeatures
from mmkd.data.records import PairFolder
from mmkd.files import atomic_write_lines

LOOKED_UP_TOGETHER = 1024
Progress = Callable[[int], object]


def import_published(
    folder: Path, output: Path, kind: FeatureKind, dtype: FeatureType, progress: Progress = lambda rows: None
) -> dict[str, int]:
    """One store for each teacher from the authors' folder.

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
    stores = {name: ChunkedStore(output / name, name, dim, dtype) for name, dim in published.dims.items()}
    for start in range(0, len(published.ids), LOOKED_UP_TOGETHER):
        ids = published.ids[start : start + LOOKED_UP_TOGETHER]
        for name, found in published.lookup(ids).items():
            mask = found["mask"]
            seen = [id for id, known in zip(ids, mask.tolist(), strict=True) if known]
            stores[name].add(seen, published.fingerprints(seen), found["image"][mask], found["text"][mask])
        progress(len(ids))
    for name, store in stores.items():
        about = {"teacher": name, "weights": f"the authors' published features ({FEATURE_FILES[kind]})"}
        unknown = dict.fromkeys(("fingerprint", "preprocessing", "tokenizer", "context", "pooling"), "as published")
        store.finish({**about, **unknown, "license": "not declared"})
    return {name: len(store.ids) for name, store in stores.items()}


def export_published(
    pairs: PairFolder,
    output: Path,
    raw: TeacherFeatures | None,
    aligned: TeacherFeatures | None,
    images: bool,
    progress: Progress = lambda rows: None,
) -> tuple[int, int]:
    """Write pairs and features as the authors publish them, which their code and ours read.

    Args:
        pairs: what is exported; a pair's screened teachers become its ``available_clips``.
        output: an empty folder.
        raw: becomes ``clips_output.pt``.
        aligned: becomes ``clips_project_output.pt``.
        images: whether images are copied; else ``imgpath`` names what is not there.
        progress: called with the number of pairs written.

    Returns:
        pairs written, and pairs left out because no teacher has features for them.

    Raises:
        ValueError: an id is no name for a folder, or there are no features.
        UnreadableImage: an image is missing.
    """
    kinds: dict[FeatureKind, TeacherFeatures] = {}
    kinds |= {"raw": raw} if raw is not None else {}
    kinds |= {"aligned": aligned} if aligned is not None else {}
    if not kinds:
        raise ValueError("there are no features to export: give raw ones, aligned ones, or both")
    counts = [0, 0]

    def lines() -> Iterator[str]:
        for _, chunk in in_chunks(pairs.pairs):
            for start in range(0, len(chunk), LOOKED_UP_TOGETHER):
                some = chunk[start : start + LOOKED_UP_TOGETHER]
                for pair, samples in zip(some, _samples(some, kinds), strict=True):
                    counts[not samples] += 1
                    if samples:
                        yield _write_sample(pair, samples, pairs, output, images)
                progress(len(some))

    atomic_write_lines(output / META_FILE, lines())
    return counts[0], counts[1]


def _samples(
    pairs: Sequence[Pair], kinds: dict[FeatureKind, TeacherFeatures]
) -> list[dict[FeatureKind, dict[str, Tensor]]]:
    """For each pair by kind its ``<Teacher>_img`` and ``<Teacher>_txt``, of available teachers that all kinds have."""
    found = {kind: features.lookup([pair.id for pair in pairs]) for kind, features in kinds.items()}
    shared = [name for name in next(iter(found.values())) if all(name in teachers for teachers in found.values())]
    samples = []
    for row, pair in enumerate(pairs):
        names = [
            name
            for name in shared
            if all(teachers[name]["mask"][row] for teachers in found.values())
            and (pair.teachers is None or name in pair.teachers)
        ]
        sample = {
            kind: {
                f"{name}_{ending}": teachers[name][side][row].clone()
                for name in names
                for side, ending in (("image", "img"), ("text", "txt"))
            }
            for kind, teachers in found.items()
        }
        samples.append(sample if names else {})
    return samples


def _write_sample(
    pair: Pair, sample: dict[FeatureKind, dict[str, Tensor]], pairs: PairFolder, output: Path, images: bool
) -> str:
    """Write a pair's files and give its line of ``meta.jsonl``."""
    if not is_folder_name(pair.id):
        raise ValueError(f"pair id {pair.id!r} is not the name of a folder, which the authors' form needs")
    folder = PurePosixPath("features") / pair.split / pair.id
    (output / folder).mkdir(parents=True)
    for kind, tensors in sample.items():
        torch.save(tensors, output / folder / FEATURE_FILES[kind])
    image = folder / PurePosixPath(pair.image.replace("@", "/")).name
    if images:
        (output / image).write_bytes(read_image_bytes(pairs.image_path(pair)))
    names = [key.removesuffix("_img") for key in next(iter(sample.values())) if key.endswith("_img")]
    row = {"folderid": pair.split, "id": pair.id, "imgpath": str(image), "txt": pair.caption, "available_clips": names}
    return json.dumps(row, ensure_ascii=False) + "\n"
