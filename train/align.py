"""Align the features of all teachers into a shared embedding space.

Fitted on the training pairs alone, then applied to every pair that has features. The default rotates each teacher so
that teachers agree on the same sample; ``--aligner autoencoder`` is the paper's method; ``--aligner phi-s`` leaves each
teacher its own space and equalizes variances, for the heads loss. Reads ``features/``, writes one feature store for
each teacher, the aligner itself and ``report.json`` with ``report.html``: agreement of teachers before and after.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

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

from mmkd.alignment.aligner import Aligner
from mmkd.alignment.autoencoder import AlignObjective, AutoencoderAligner
from mmkd.alignment.covariances import Covariances
from mmkd.alignment.phi_s import PhiSAligner
from mmkd.alignment.procrustes import ProcrustesAligner
from mmkd.alignment.report import alignment_page, alignment_report
from mmkd.command.settings import save_settings
from mmkd.data.features.lookup import Features, TeacherFeatures, available_features, seen_pairs
from mmkd.data.features.writer import SHARD_SIZE, FeatureWriter
from mmkd.data.folder import open_pairs
from mmkd.data.provenance import teachers_of
from mmkd.data.table import Pair
from mmkd.distributed import rank, wait_for_everyone
from mmkd.files import atomic_folder, write_json
from mmkd.pages.page import write_page
from mmkd.training.batches import StoredBatches
from mmkd.training.loop import fit, start
from mmkd.training.settings import BatchSettings

REPORTED_PAIRS = 5000


def main(settings: AlignSettings) -> None:
    """Fit, transform, report."""
    accelerator = start(settings)
    features = TeacherFeatures.open(settings.features, settings.teachers or None)
    training = open_pairs(settings.pairs, "train").pairs
    seen = seen_pairs(features, training, settings.features)
    pairs = [pair for pair, known in zip(training, seen.tolist(), strict=True) if known]
    if not pairs:
        raise ValueError(f"{settings.features} has features for no training pair of {settings.pairs}; extract them")
    if settings.aligner == "autoencoder":
        autoencoder = AutoencoderAligner(features.dims, settings.dim, settings.noise, settings.dropout)
        order = BatchSettings(batch_size=settings.batch_size, seed=settings.seed)
        batches = StoredBatches(pairs, order, features={"teachers": features})
        objective = AlignObjective(autoencoder)
        fit(
            accelerator,
            objective,
            batches,
            settings,
            lambda folder: write(folder, autoencoder, features, pairs, settings),
        )
        return
    aligner = closed_form(settings, features, pairs)
    if rank() == 0:
        with atomic_folder(settings.output, settings.overwrite) as folder:
            write(folder, aligner, features, pairs, settings)
            save_settings(settings, folder / "settings.yaml")
    wait_for_everyone()


def closed_form(settings: AlignSettings, features: TeacherFeatures, pairs: Sequence[Pair]) -> Aligner:
    """An aligner that needs no training, fitted by all processes together and the same on each."""
    is_phi_s = settings.aligner == "phi-s"
    covariances = Covariances.stream(chunks(features, pairs), features.dims, cross=not is_phi_s)
    return PhiSAligner.fit(covariances) if is_phi_s else ProcrustesAligner.fit(covariances, settings.dim)


def write(
    folder: Path, aligner: Aligner, features: TeacherFeatures, pairs: Sequence[Pair], settings: AlignSettings
) -> None:
    """Write the aligner, the aligned features and the report on training pairs."""
    aligner.save(folder)
    write_stores(folder, aligner, features, teachers_of([settings.features]))
    sample = pairs[:: -(-len(pairs) // REPORTED_PAIRS)]
    report = alignment_report(next(chunks(features, sample)), aligner)
    write_json(folder / "report.json", report)
    write_page(folder / "report.html", alignment_page(report))


def chunks(features: TeacherFeatures, pairs: Sequence[Pair]) -> Iterator[Features]:
    """Features of the pairs, some thousands at a time."""
    for begin in range(0, len(pairs), SHARD_SIZE):
        chosen = pairs[begin : begin + SHARD_SIZE]
        yield available_features(features, [pair.id for pair in chosen], [pair.teachers for pair in chosen])


def write_stores(
    folder: Path, aligner: Aligner, features: TeacherFeatures, teachers: Sequence[Mapping[str, Any]]
) -> None:
    """Write the aligned features of every pair that has raw ones, one store for each teacher.

    Args:
        folder: where the stores go.
        aligner: fitted on some of the pairs.
        features: raw.
        teachers: weights and licences of the raw features' teachers, which the stores keep.
    """
    raw = {teacher["teacher"]: teacher for teacher in teachers}
    writers = {name: FeatureWriter(folder / name, name) for name in features.names}
    for begin in range(0, len(features.ids), SHARD_SIZE):
        ids = features.ids[begin : begin + SHARD_SIZE]
        fingerprints = features.fingerprints(ids)
        for name, found in aligner.transform_all(features.lookup(ids)).items():
            mask = found["mask"]
            own = [id for id, present in zip(ids, mask.tolist(), strict=True) if present]
            writers[name].add(own, found["image"][mask], found["text"][mask], fingerprints[name][1][mask.numpy()])
    for name, writer in writers.items():
        writer.finish({"aligner": aligner.kind, "width_before": aligner.widths[name], "raw": raw.get(name, {})})


if __name__ == "__main__":
    run(AlignSettings, main, lambda settings: [settings.output])
