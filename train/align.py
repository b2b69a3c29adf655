"""Align the features of all teachers into a shared embedding space.

Fitted on the training pairs alone, then applied to every pair that has features. The default rotates each teacher so
that teachers agree on the same sample; ``--aligner autoencoder`` is the paper's method; ``--aligner phi-s`` leaves each
teacher its own space and equalizes variances, for the heads loss. Reads ``features/``, writes one feature store for
each teacher, the aligner itself and ``report.json`` with ``report.html``: agreement of teachers before and after.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mmkd.command.settings import check_arguments, run, setting
from mmkd.training.settings import LoopSettings


@dataclass(kw_only=True)
class AlignSettings(LoopSettings):
    """Align the features of all teachers into a shared embedding space (settings of training: autoencoder only).

    Example:
        mmkd align --pairs screened --features features --output aligned
    """

    GROUPS: ClassVar[dict[str, str]] = {"data": "teachers batch_size", "model": "aligner dim noise"}

    pairs: Path = setting(help="folder of pairs; its training split is what the aligner is fitted on")
    features: Path = setting(help="folder with one feature store for each teacher")
    teachers: list[str] = setting(factory=list, help="teachers to align; empty takes all")
    aligner: Literal["procrustes", "autoencoder", "phi-s"] = setting(
        "procrustes", "rotation to agreement, the paper's autoencoder, or equal variances in each teacher's own space"
    )
    dim: int = setting(512, "width of the shared space: the student's projection_dim (phi-s keeps each teacher's)")
    epochs: int = setting(20, "passes over the pairs (autoencoder)")
    batch_size: int = setting(1024, "global batch size over all processes [pairs] (autoencoder)")
    learning_rate: float = setting(1e-3, "peak learning rate (autoencoder)")
    dropout: float = setting(0.2, "probability of dropout in the shared encoders (autoencoder)")
    noise: float = setting(0.01, "standard deviation of the noise on inputs in training (autoencoder)")


if __name__ == "__main__":
    check_arguments(AlignSettings)  # before the imports that take seconds

import numpy as np
import torch

from mmkd.alignment.aligner import Aligner
from mmkd.alignment.autoencoder import AlignObjective, AutoencoderAligner
from mmkd.alignment.covariances import Covariances
from mmkd.alignment.phi_s import PhiSAligner
from mmkd.alignment.procrustes import ProcrustesAligner
from mmkd.alignment.report import alignment_page, alignment_report
from mmkd.command.settings import save_settings
from mmkd.data.features.lookup import Features, TeacherFeatures, available_features, seen_pairs
from mmkd.data.features.writer import SHARD_SIZE, FeatureWriter, finish_store
from mmkd.data.folder import open_pairs
from mmkd.data.provenance import teachers_of
from mmkd.data.table import Pair, in_columns, take_rows
from mmkd.distributed import gather_lists, join_group, rank, sum_over_processes, wait_for_everyone, world_size
from mmkd.files import atomic_folder, refuse_existing, write_json
from mmkd.pages.page import write_page
from mmkd.training.batches import StoredBatches
from mmkd.training.loop import fit, start
from mmkd.training.settings import BatchSettings, check

REPORTED_PAIRS = 5000
ROWS_AT_ONCE = 4096  # of nine teachers some 300 MB in float32


def main(settings: AlignSettings) -> None:
    """Fit, transform, report."""
    if settings.aligner == "autoencoder":
        train(settings)
        return
    check(settings)
    refuse_existing(settings.output, settings.overwrite)
    join_group()  # over gloo: one process may wait for another's shard
    features, training = opened(settings)
    share = np.arange(len(training) * rank() // world_size(), len(training) * (rank() + 1) // world_size())
    own = share[seen_pairs(features, take_rows(training, share), settings.features)]
    total = int(sum_over_processes(torch.tensor(len(own))))
    require_features(total, settings)
    aligner = closed_form(settings, features, take_rows(training, own))
    chosen = gather_lists([str(row) for row in own[:: -(-total // REPORTED_PAIRS)].tolist()])
    with atomic_folder(settings.output, settings.overwrite) if rank() == 0 else nullcontext(None) as mine:
        folder = Path(gather_lists([] if mine is None else [str(mine)])[0])
        write_stores(folder, aligner, features, settings, rank(), world_size())
        if rank() == 0:
            write_report(folder, aligner, features, take_rows(training, np.array(chosen, dtype=np.int64)))
            save_settings(settings, folder / "settings.yaml")
        wait_for_everyone()


def train(settings: AlignSettings) -> None:
    """Train the autoencoder; the first process alone writes."""
    accelerator = start(settings)
    features, training = opened(settings)
    pairs = take_rows(training, np.flatnonzero(seen_pairs(features, training, settings.features)))
    require_features(len(pairs), settings)
    aligner = AutoencoderAligner(features.dims, settings.dim, settings.noise, settings.dropout)
    order = BatchSettings(batch_size=settings.batch_size, seed=settings.seed)
    batches = StoredBatches(pairs, order, features={"teachers": features})

    def write(folder: Path) -> None:
        write_stores(folder, aligner, features, settings, 0, 1)
        write_report(folder, aligner, features, pairs[:: -(-len(pairs) // REPORTED_PAIRS)])

    fit(accelerator, AlignObjective(aligner), batches, settings, write)


def opened(settings: AlignSettings) -> tuple[TeacherFeatures, Sequence[Pair]]:
    """The features, and the training pairs."""
    features = TeacherFeatures.open(settings.features, settings.teachers or None)
    return features, open_pairs(settings.pairs, "train").pairs


def require_features(pairs: int, settings: AlignSettings) -> None:
    """Refuse to fit on nothing."""
    if not pairs:
        raise ValueError(f"{settings.features} has features for no training pair of {settings.pairs}; extract them")


def closed_form(settings: AlignSettings, features: TeacherFeatures, pairs: Sequence[Pair]) -> Aligner:
    """An aligner without training, fitted by all processes together, each on its own `pairs`."""
    is_phi_s = settings.aligner == "phi-s"
    covariances = Covariances.stream(chunks(features, pairs), features.dims, cross=not is_phi_s)
    return PhiSAligner.fit(covariances) if is_phi_s else ProcrustesAligner.fit(covariances, settings.dim)


def chunks(features: TeacherFeatures, pairs: Sequence[Pair]) -> Iterator[Features]:
    """Features of the pairs, some thousands at a time."""
    for ids, teachers in in_columns(pairs, ("id", "teachers")):
        for begin in range(0, len(ids), ROWS_AT_ONCE):
            part = slice(begin, begin + ROWS_AT_ONCE)
            yield available_features(features, ids[part], teachers[part])


def write_stores(
    folder: Path, aligner: Aligner, features: TeacherFeatures, settings: AlignSettings, part: int, parts: int
) -> None:
    """Write the aligned features of every pair that has raw ones, one store for each teacher.

    Args:
        folder: where the stores go.
        aligner: fitted on some of the pairs.
        features: raw.
        settings: with the folder of raw features, whose weights and licences the stores keep.
        part: which of the `parts` this process writes: every so many shards, and finally every so many stores.
        parts: number of processes that write.
    """
    for number in range(part, -(-len(features.ids) // SHARD_SIZE), parts):
        writers = {name: FeatureWriter(folder / name, name, first_shard=number) for name in features.names}
        for begin in range(number * SHARD_SIZE, min((number + 1) * SHARD_SIZE, len(features.ids)), ROWS_AT_ONCE):
            ids = features.ids[begin : min(begin + ROWS_AT_ONCE, (number + 1) * SHARD_SIZE)]
            fingerprints = features.fingerprints(ids)
            for name, found in aligner.transform_all(features.lookup(ids)).items():
                mask = found["mask"]
                own = [id for id, present in zip(ids, mask.tolist(), strict=True) if present]
                writers[name].add(own, found["image"][mask], found["text"][mask], fingerprints[name][1][mask.numpy()])
        for writer in writers.values():
            writer.flush()
    if parts > 1:
        wait_for_everyone()
    raw = {teacher["teacher"]: teacher for teacher in teachers_of([settings.features])}
    for name in features.names[part::parts]:
        origin = {"aligner": aligner.kind, "width_before": aligner.widths[name], "raw": raw.get(name, {})}
        finish_store(folder / name, name, "float16", sorted((folder / name).glob("shard-*")), origin)


def write_report(folder: Path, aligner: Aligner, features: TeacherFeatures, sample: Sequence[Pair]) -> None:
    """Write the aligner and the report on some training pairs."""
    aligner.save(folder)
    found = available_features(features, [pair.id for pair in sample], [pair.teachers for pair in sample])
    report = alignment_report(found, aligner)
    write_json(folder / "report.json", report)
    write_page(folder / "report.html", alignment_page(report))


if __name__ == "__main__":
    run(AlignSettings, main)
