"""What is done with finished stores: looked at, checked to the last byte, merged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkd.data.features.lookup import TeacherFeatures, store_paths
from mmkd.data.features.parts import IDENTITY
from mmkd.data.features.published import FEATURE_FILES, FeatureKind, PublishedFeatures
from mmkd.data.features.shards import FeatureType, encoded, shard_fault, write_encoded
from mmkd.data.features.store import SHARD_SIZE, ChunkedStore, FeatureStore, close_store, read_meta, shard_path
from mmkd.data.folder import PairFolder, in_chunks
from mmkd.data.images import read_image_bytes
from mmkd.data.published import META_FILE, is_folder_name
from mmkd.data.table import Pair
from mmkd.files import atomic_write_lines

COPIED_TOGETHER = 4096


def describe_store(path: Path) -> dict[str, Any]:
    """What a store is, for a list of stores."""
    store = FeatureStore(path)
    files = [path / shard["file"] for shard in store.shards] + [path / store.meta["ids"]["file"]]
    return {
        "teacher": store.name,
        "pairs": len(store.ids),
        "dim": store.dim,
        "dtype": store.dtype,
        "shards": len(store.shards),
        "bytes": sum(file.stat().st_size for file in files),
        "weights": store.provenance.get("weights", ""),
        "fingerprint": store.provenance.get("fingerprint", ""),
        "license": store.provenance.get("license", ""),
    }


def unfinished(folder: Path) -> dict[str, int]:
    """Stores that are still being extracted: name -> shards that are there."""
    found = {path.name: len(list(path.glob("shard-*.safetensors"))) for path in folder.iterdir() if path.is_dir()}
    return {
        name: count for name, count in sorted(found.items()) if count and not (folder / name / "meta.json").exists()
    }


def faults(path: Path, progress: Callable[[int], object] = lambda rows: None) -> Iterator[str]:
    """Everything that is wrong with a store, each in words; every byte of it is read.

    Args:
        path: the store.
        progress: called with the number of pairs of each shard that was read.
    """
    try:
        meta = read_meta(path)
    except (ValueError, OSError) as error:
        yield str(error)
        return
    for shard in meta["shards"]:
        file = path / shard["file"]
        fault = shard_fault(file, shard["rows"], meta["dim"], meta["dtype"], shard["header_sha256"])
        if fault:
            yield fault if str(file) in fault else f"{file}: {fault}"
        progress(shard["rows"])
    index = path / meta["ids"]["file"]
    if not index.is_file():
        yield f"{index} is missing"
    elif _sha256(index) != meta["ids"]["sha256"]:
        yield f"{index}: the ids were changed"


def merge(folders: Sequence[Path], output: Path) -> dict[str, int]:
    """Bring stores of the same teachers together, each in full shards; a pair that several hold is taken once.

    Numbers are copied bit by bit. One folder alone is packed into full shards.

    Args:
        folders: stores, or folders of stores.
        output: a new folder, which gets one store for each teacher.

    Returns:
        teacher -> pairs.

    Raises:
        FileNotFoundError: a folder holds no store.
        ValueError: two stores of a teacher have other weights, preprocessing or type.
    """
    by_teacher: dict[str, list[FeatureStore]] = {}
    for folder in folders:
        paths = store_paths(folder)
        if not paths:
            raise FileNotFoundError(f"{folder} holds no feature store; make one with `mmkd extract`")
        for store in map(FeatureStore, paths):
            by_teacher.setdefault(store.name, []).append(store)
    for stores in by_teacher.values():
        _refuse_different(stores)
    return {name: _merge_teacher(stores, output / name) for name, stores in by_teacher.items()}


def _merge_teacher(stores: Sequence[FeatureStore], output: Path) -> int:
    """Rows of the first store, then those of the next that none before it has ..."""
    indexes = [store.ids for store in stores]
    rows = [np.arange(len(indexes[0]))] + [index.missing_from(indexes[:k]) for k, index in enumerate(indexes) if k]
    total = sum(map(len, rows))
    files = [shard_path(output, k) for k in range(-(-total // SHARD_SIZE))]
    waiting = _blocks(stores, rows)
    for file in files:
        parts: list[tuple[np.ndarray, np.ndarray | None]] = []
        while sum(len(part[0]) for part in parts) < SHARD_SIZE:
            block = next(waiting, None)
            if block is None:
                break
            parts.append(block)
        stored = np.concatenate([features for features, _ in parts])
        scales = [scale for _, scale in parts if scale is not None]
        write_encoded(file, encoded(stored, np.concatenate(scales) if scales else None, stores[0].dtype))
    ids = (
        (store.ids.take(part), store.ids.fingerprints(part))
        for store, chosen in zip(stores, rows, strict=True)
        for part in np.split(chosen, range(COPIED_TOGETHER, len(chosen), COPIED_TOGETHER))
    )
    close_store(output, stores[0].name, stores[0].dtype, files, ids, stores[0].provenance)
    return total


def _blocks(
    stores: Sequence[FeatureStore], rows: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The stored bits of all rows, in blocks that end where a shard of the result ends."""
    done = 0
    for store, chosen in zip(stores, rows, strict=True):
        start = 0
        while start < len(chosen):
            end = min(len(chosen), start + COPIED_TOGETHER, start + SHARD_SIZE - done % SHARD_SIZE)
            yield store.stored(chosen[start:end])
            done, start = done + end - start, end


def _refuse_different(stores: Sequence[FeatureStore]) -> None:
    first = stores[0]
    for other in stores[1:]:
        differing = [key for key in IDENTITY if first.provenance.get(key) != other.provenance.get(key)]
        differing += ["dtype"] * (first.dtype != other.dtype) + ["dim"] * (first.dim != other.dim)
        if differing:
            raise ValueError(f"{first.path} and {other.path} differ in {', '.join(differing)}; they stay apart")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# Section: To and from the authors' folder of features: one line of ``meta.jsonl`` and one small ``.pt`` file for each
# pair.


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
