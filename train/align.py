"""Align the features of all teachers into a shared embedding space.

Fitted on the training pairs alone, then applied to every pair that has features. The default rotates each teacher so
that teachers agree on the same sample; ``--aligner autoencoder`` is the paper's method; ``--aligner phi-s`` leaves each
teacher its own space and equalizes variances, for the heads loss. Reads ``features/``, writes one feature store for
each teacher, the aligner itself and ``report.json`` with ``report.html``: agreement of teachers before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    GROUPS: ClassVar[dict[str, str]] = {"data": "teachers batch_size", "model": "aligner form dim noise"}

    pairs: Path = setting(help="folder of pairs; its training split is what the aligner is fitted on")
    features: Path = setting(help="folder with one feature store for each teacher")
    teachers: list[str] = setting(factory=list, help="teachers to align; empty takes all")
    aligner: Literal["procrustes", "autoencoder", "phi-s"] = setting(
        "procrustes", "rotation to agreement, the paper's autoencoder, or equal variances in each teacher's own space"
    )
    form: Literal["store", "published"] = setting(
        "store", "one store for each teacher, or the authors' layout with a small file beside each sample"
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
from mmkd.alignment.folder import aligned, chunks, write_stores
from mmkd.alignment.phi_s import PhiSAligner
from mmkd.alignment.procrustes import ProcrustesAligner
from mmkd.alignment.report import alignment_page, alignment_report
from mmkd.command.settings import save_settings
from mmkd.data.features.conversion import write_published
from mmkd.data.features.lookup import TeacherFeatures, seen_pairs
from mmkd.data.folder import open_pairs
from mmkd.data.provenance import teachers_of
from mmkd.data.published import META_FILE, PublishedSample, read_published
from mmkd.data.table import Pair
from mmkd.distributed import rank, wait_for_everyone
from mmkd.files import atomic_folder, is_folder_name, write_json
from mmkd.pages.page import write_page
from mmkd.training.batches import StoredBatches
from mmkd.training.loop import fit, start
from mmkd.training.settings import BatchSettings

REPORTED_PAIRS = 5000
PUBLISHED_FOLDER = "pairs"


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
    """The aligner that needs no training, fitted by all processes together, the same on each."""
    is_phi_s = settings.aligner == "phi-s"
    covariances = Covariances.stream(chunks(features, pairs), features.dims, cross=not is_phi_s)
    return PhiSAligner.fit(covariances) if is_phi_s else ProcrustesAligner.fit(covariances, settings.dim)


def write(
    folder: Path, aligner: Aligner, features: TeacherFeatures, pairs: Sequence[Pair], settings: AlignSettings
) -> None:
    """Write aligner, aligned features of every pair that has raw ones, and the report on training pairs."""
    aligner.save(folder)
    if settings.form == "published":
        samples = published_samples(features, settings)
        write_published(folder, samples, "aligned", lambda ids: aligned(features, ids, aligner))
    else:
        write_stores(folder, aligner, features, teachers_of([settings.features]))
    sample = pairs[:: -(-len(pairs) // REPORTED_PAIRS)]
    report = alignment_report(next(chunks(features, sample)), aligner)
    write_json(folder / "report.json", report)
    write_page(folder / "report.html", alignment_page(report))


def published_samples(features: TeacherFeatures, settings: AlignSettings) -> list[PublishedSample]:
    """What the authors' layout lists: their own samples, or those pairs of ours that have features.

    Raises:
        ValueError: a pair's id cannot be the name of a folder.
    """
    if (settings.pairs / META_FILE).is_file():
        return read_published(settings.pairs)
    known = set(features.ids)
    pairs = [pair for pair in open_pairs(settings.pairs).pairs if pair.id in known]
    for pair in pairs:
        if not is_folder_name(pair.id):
            raise ValueError(f"pair {pair.id!r} cannot name a folder, as --form published needs; use --form store")
    return [PublishedSample(pair.id, PUBLISHED_FOLDER, pair.image, pair.caption, ()) for pair in pairs]


if __name__ == "__main__":
    run(AlignSettings, main)
