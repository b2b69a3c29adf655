"""Bring the features of all teachers into one space.

Fitted on the training pairs alone, then applied to every pair that has features. The default rotates each teacher so
that teachers agree on the same sample; ``--aligner autoencoder`` is the paper's way; ``--aligner phi-s`` leaves each
teacher its own space and equalizes variances, for the heads loss. Reads ``features/``, writes one feature store for
each teacher, the aligner itself and ``report.json`` with ``report.html``: how far teachers agree before and after.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmkd.alignment.aligner import Aligner
from mmkd.alignment.autoencoder import AlignObjective, AutoencoderAligner
from mmkd.alignment.folder import aligned, chunks
from mmkd.alignment.phi_s import PhiSAligner
from mmkd.alignment.procrustes import ProcrustesAligner
from mmkd.alignment.report import alignment_page, alignment_report
from mmkd.command.settings import run, save_settings, setting
from mmkd.data.features.lookup import Features, TeacherFeatures, seen_pairs
from mmkd.data.features.published import write_published
from mmkd.data.features.writer import SHARD_SIZE, FeatureWriter
from mmkd.data.folder import open_pairs
from mmkd.data.published import META_FILE, PublishedSample, is_folder_name, read_published
from mmkd.data.table import Pair
from mmkd.distributed import rank, wait_for_everyone, world_size
from mmkd.encoders.zoo import teachers_of
from mmkd.files import atomic_folder, write_json
from mmkd.pages.page import write_page
from mmkd.training.batches import FeatureBatches
from mmkd.training.dataset import GlobalBatchSampler
from mmkd.training.loop import fit, start
from mmkd.training.settings import LoopSettings

REPORTED_PAIRS = 5000

PUBLISHED_FOLDER = "pairs"


@dataclass(kw_only=True)
class AlignSettings(LoopSettings):
    """Bring the features of all teachers into one space. Settings of training belong to the autoencoder."""

    pairs: Path = setting(help="folder of pairs; its training split is what the aligner is fitted on")
    features: Path = setting(help="folder with one feature store for each teacher")
    teachers: list[str] = setting(factory=list, help="teachers to align, by default all")
    aligner: Literal["procrustes", "autoencoder", "phi-s"] = setting(
        "procrustes", "rotation to agreement, the paper's autoencoder, or equal variances in each teacher's own space"
    )
    form: Literal["store", "published"] = setting(
        "store", "one store for each teacher, or the authors' layout with a small file beside each sample"
    )
    dim: int = setting(512, "width of the common space: the student's projection_dim (phi-s keeps each teacher's)")
    epochs: int = setting(20, "passes over the pairs (autoencoder)")
    batch_size: int = setting(1024, "pairs in a global batch (autoencoder)")
    learning_rate: float = setting(1e-3, "peak (autoencoder)")
    dropout: float = setting(0.2, "in the shared encoders (autoencoder)")
    noise: float = setting(0.01, "standard deviation added to inputs in training (autoencoder)")


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
        sampler = GlobalBatchSampler(len(pairs), settings.batch_size, rank(), world_size(), settings.seed)
        batches = FeatureBatches(pairs, features, sampler)
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

    def all_chunks() -> Iterator[Features]:
        return chunks(features, pairs)

    if settings.aligner == "phi-s":
        return PhiSAligner.fit(all_chunks, features.dims)
    return ProcrustesAligner.fit(all_chunks, features.dims, settings.dim)


def write(
    folder: Path, aligner: Aligner, features: TeacherFeatures, pairs: Sequence[Pair], settings: AlignSettings
) -> None:
    """Write aligner, aligned features of every pair that has been seen, and the report on training pairs."""
    aligner.save(folder)
    if settings.form == "published":
        write_published(
            folder, published_samples(features, settings), "aligned", lambda ids: aligned(features, ids, aligner)
        )
    else:
        write_stores(folder, aligner, features, settings)
    sample = pairs[:: -(-len(pairs) // REPORTED_PAIRS)]
    report = alignment_report(next(chunks(features, sample)), aligner)
    write_json(folder / "report.json", report)
    write_page(folder / "report.html", alignment_page(report))


def write_stores(folder: Path, aligner: Aligner, features: TeacherFeatures, settings: AlignSettings) -> None:
    """One store for each teacher, with the weights and licences of the raw features carried on."""
    raw = {origin["teacher"]: origin for origin in teachers_of([settings.features])}
    writers = {name: FeatureWriter(folder / name, name) for name in features.names}
    for begin in range(0, len(features.ids), SHARD_SIZE):
        ids = features.ids[begin : begin + SHARD_SIZE]
        fingerprints = features.fingerprints(ids)
        for name, found in aligned(features, ids, aligner).items():
            mask = found["mask"]
            own = [id for id, present in zip(ids, mask.tolist(), strict=True) if present]
            writers[name].add(own, found["image"][mask], found["text"][mask], fingerprints[name][1][mask.numpy()])
    for name, writer in writers.items():
        writer.finish({"aligner": aligner.kind, "width_before": aligner.widths[name], "raw": raw.get(name, {})})


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
