"""What is done with finished stores: looked at, checked to the last byte, merged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.data.feature_parts import IDENTITY
from mmkd.data.feature_shards import encoded, shard_fault, write_encoded
from mmkd.data.feature_store import FeatureStore, close_store, read_meta
from mmkd.data.features import SHARD_SIZE, shard_path, store_paths

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
