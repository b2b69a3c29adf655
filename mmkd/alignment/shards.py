"""The parts of an alignment that tasks write: sums over runs of training pairs, and shards of aligned features.

A part depends on its rows alone, so that an alignment is the same bytes for any number of tasks and processes.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from mmkd.alignment.aligner import Aligner
from mmkd.alignment.covariances import Covariances, Sums, moment_sums
from mmkd.command.tasks import Progress, TaskSettings, resident, run_tasks
from mmkd.data.features.lookup import Features, TeacherFeatures, available_features, seen_pairs
from mmkd.data.features.shards import read_header, write_shard
from mmkd.data.features.writer import SHARD_SIZE, finish_store, stored
from mmkd.data.folder import open_pairs
from mmkd.data.provenance import teachers_of
from mmkd.data.table import Pair, in_columns, take_rows
from mmkd.files import atomic_write_bytes

RUNS, SHORTEST_RUN = 64, 65_536  # of training pairs, whose sums are one file: 100 MB of nine teachers
ROWS_AT_ONCE = 4096  # of nine teachers some 300 MB in float32


@dataclass(frozen=True)
class AlignmentInputs:
    """Training pairs and raw features, which a process opens for its first part.

    Attributes:
        pairs: folder of pairs.
        features: folder of feature stores.
        teachers: to align; empty for all.
        run: distinguishes runs of one process.
    """

    pairs: Path
    features: Path
    teachers: Sequence[str]
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    def open(self) -> tuple[TeacherFeatures, Sequence[Pair]]:
        """The features, and the training pairs."""
        return resident(self.run, self._opened)

    def _opened(self) -> tuple[TeacherFeatures, Sequence[Pair]]:
        return TeacherFeatures.open(self.features, self.teachers or None), open_pairs(self.pairs, "train").pairs

    def sample(self, size: int) -> Features:
        """Features of at most `size` training pairs at equal distances."""
        features, training = self.open()
        rows = np.arange(0, len(training), -(-len(training) // size))
        ((ids, teachers),) = in_columns(take_rows(training, rows), ("id", "teachers"))
        return available_features(features, ids, teachers)


def covariances(
    inputs: AlignmentInputs, cross: bool, folder: Path, tasks: TaskSettings, bar: Callable[..., tqdm]
) -> Covariances:
    """Moments of the training pairs, added up from files of runs of them.

    Args:
        inputs: pairs and features.
        cross: whether moments across teachers are needed.
        folder: where the files of sums lie; those that are there are used.
        tasks: where they are made.
        bar: see `run_tasks`.
    """
    features, training = inputs.open()
    runs = {folder / f"{rows.start}.safetensors": rows for rows in _runs(len(training), _run_length(len(training)))}
    run_tasks(
        partial(write_sums, inputs, cross),
        runs.items(),
        lambda item: item[0].exists(),
        tasks,
        folder,
        partial(bar, desc="sums", unit="pair"),
        lambda item: len(item[1]),
    )
    total: dict[str, Tensor] = {}
    for file in runs:
        total = {key: sums + total[key] if total else sums for key, sums in load_file(file).items()}
    names = sorted(features.dims)
    sums: Sums = {(k, j): total[f"{k}/{j}"] for k in names for j in names if f"{k}/{j}" in total}
    return Covariances(sums, features.dims)


def write_sums(inputs: AlignmentInputs, cross: bool, runs: Sequence[tuple[Path, range]], progress: Progress) -> None:
    """A task of `mmkd.command.tasks`: sums over runs of training pairs.

    Raises:
        ValueError: captions or images have changed since the features were made.
    """
    features, training = inputs.open()
    for file, rows in runs:
        pairs = take_rows(training, np.array(rows))
        pairs = take_rows(pairs, np.flatnonzero(seen_pairs(features, pairs, inputs.features)))
        sums = moment_sums(_chunks(features, pairs), features.dims, cross)
        atomic_write_bytes(file, save({f"{k}/{j}": tensor for (k, j), tensor in sums.items()}))
        progress(len(rows))


def write_stores(
    inputs: AlignmentInputs, aligner: Aligner, folder: Path, tasks: TaskSettings, bar: Callable[..., tqdm]
) -> None:
    """Write the aligned features of every pair that has raw ones, one store for each teacher.

    Args:
        inputs: with the raw features, whose weights and licences the stores keep.
        aligner: fitted.
        folder: where the stores go; shards that are there are kept.
        tasks: where they are made.
        bar: see `run_tasks`.
    """
    features, _ = inputs.open()
    shards = list(enumerate(_runs(len(features.ids), SHARD_SIZE)))
    run_tasks(
        partial(write_aligned, inputs, aligner, folder),
        shards,
        lambda shard: all(_shard(folder, name, shard[0]).exists() for name in features.names),
        tasks,
        folder,
        partial(bar, desc="aligned", unit="pair"),
        lambda shard: len(shard[1]),
    )
    raw = {teacher["teacher"]: teacher for teacher in teachers_of([inputs.features])}
    for name in features.names:
        origin = {"aligner": aligner.kind, "width_before": aligner.widths[name], "raw": raw.get(name, {})}
        files = [_shard(folder, name, number) for number, _ in shards]
        filled = [file for file in files if read_header(file).rows]
        for empty in set(files) - set(filled):
            empty.unlink()
        finish_store(folder / name, name, "float16", filled, origin)


def write_aligned(
    inputs: AlignmentInputs, aligner: Aligner, folder: Path, shards: Sequence[tuple[int, range]], progress: Progress
) -> None:
    """A task of `mmkd.command.tasks`: shards of aligned features, of all teachers."""
    features, _ = inputs.open()
    for number, rows in shards:
        parts: dict[str, list[tuple[list[str], Tensor, np.ndarray]]] = {name: [] for name in features.names}
        for some in _runs(len(rows), ROWS_AT_ONCE):
            ids = features.ids[rows[some.start] : rows[some.start] + len(some)]
            fingerprints = features.fingerprints(ids)
            for name, found in aligner.transform_all(features.lookup(ids)).items():
                mask = found["mask"]
                own = [id for id, present in zip(ids, mask.tolist(), strict=True) if present]
                aligned = stored(found["image"][mask], found["text"][mask], "float16", folder / name)
                parts[name].append((own, aligned, fingerprints[name][1][mask.numpy()]))
        for name, pieces in parts.items():
            names, tensors, prints = zip(*pieces, strict=True)
            file = _shard(folder, name, number)
            write_shard(file, [*chain(*names)], {"features": torch.cat(tensors)}, np.concatenate(prints))
        progress(len(rows))


def _runs(count: int, length: int) -> list[range]:
    return [range(start, min(start + length, count)) for start in range(0, count, length)]


def _run_length(pairs: int) -> int:
    """At most `RUNS` runs, since each has a file of sums."""
    return max(SHORTEST_RUN, -(-pairs // RUNS))


def _shard(folder: Path, name: str, number: int) -> Path:
    return folder / name / f"shard-{number:05d}.safetensors"


def _chunks(features: TeacherFeatures, pairs: Sequence[Pair]) -> Iterator[Features]:
    """Features of the pairs, some thousands at a time."""
    for ids, teachers in in_columns(pairs, ("id", "teachers")):
        for begin in range(0, len(ids), ROWS_AT_ONCE):
            part = slice(begin, begin + ROWS_AT_ONCE)
            yield available_features(features, ids[part], teachers[part])
