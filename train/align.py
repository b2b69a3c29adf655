"""Align the features of all teachers into a shared embedding space.

Fitted on the training pairs alone, then applied to every pair that has features. The default rotates each teacher so
that teachers agree on the same sample; ``--aligner autoencoder`` is the paper's method; ``--aligner phi-s`` leaves each
teacher its own space and equalizes variances, for the heads loss. Reads ``features/``, writes one feature store for
each teacher, the aligner itself and ``report.json`` with ``report.html``: agreement of teachers before and after. Tasks
of any executor add up the training pairs and write the stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from mmkd.command.settings import check_arguments, run, setting
from mmkd.command.tasks import TaskSettings
from mmkd.training.settings import LoopSettings


@dataclass(kw_only=True)
class AlignSettings(TaskSettings, LoopSettings):
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
    epochs: int = setting(20, "passes over the pairs (autoencoder)", least=1)
    batch_size: int = setting(1024, "global batch size over all processes [pairs] (autoencoder)", least=2)
    learning_rate: float = setting(1e-3, "peak learning rate (autoencoder)", above=0)
    dropout: float = setting(0.2, "probability of dropout in the shared encoders (autoencoder)", least=0, below=1)
    noise: float = setting(0.01, "standard deviation of the noise on inputs in training (autoencoder)")


if __name__ == "__main__":
    check_arguments(AlignSettings)  # before the imports that take seconds

from typing import Any

import numpy as np
from tqdm import tqdm

from mmkd.alignment.aligner import Aligner
from mmkd.alignment.autoencoder import AlignObjective, AutoencoderAligner
from mmkd.alignment.phi_s import PhiSAligner
from mmkd.alignment.procrustes import ProcrustesAligner
from mmkd.alignment.report import alignment_page, alignment_report
from mmkd.alignment.shards import AlignmentInputs, covariances, write_stores
from mmkd.command.settings import save_settings
from mmkd.command.tasks import open_parts
from mmkd.data.features.lookup import seen_pairs
from mmkd.data.folder import manifest_sha256
from mmkd.data.table import VERSION, take_rows
from mmkd.distributed import rank
from mmkd.files import refuse_existing, remove, rename_folder, write_json
from mmkd.pages.page import write_page
from mmkd.training.batches import StoredBatches
from mmkd.training.loop import fit, start
from mmkd.training.settings import BatchSettings, check

REPORTED_PAIRS = 5000


def main(settings: AlignSettings) -> None:
    """Fit, transform, report."""
    check(settings)
    settings.check_tasks()
    inputs = AlignmentInputs(settings.pairs, settings.features, settings.teachers)
    if settings.aligner == "autoencoder":
        train(settings, inputs)
    elif rank() == 0:  # the others were started by an accelerate configuration
        solve(settings, inputs)


def solve(settings: AlignSettings, inputs: AlignmentInputs) -> None:
    """Align in closed form; parts lie in ``OUTPUT.parts`` until all are there."""
    refuse_existing(settings.output, settings.overwrite)
    parts = open_parts(settings.output, made_of(settings, inputs), settings.overwrite)
    is_phi_s, bar = settings.aligner == "phi-s", partial(tqdm, disable=settings.quiet)
    found = covariances(inputs, not is_phi_s, parts / "sums", settings, bar)
    aligner: Aligner = PhiSAligner.fit(found) if is_phi_s else ProcrustesAligner.fit(found, settings.dim)
    write(parts / "output", aligner, inputs, settings)
    save_settings(settings, parts / "output" / "settings.yaml")
    rename_folder(parts / "output", settings.output)
    remove(parts)


def train(settings: AlignSettings, inputs: AlignmentInputs) -> None:
    """Train the autoencoder; the first process then runs the tasks that write the stores, and the others end."""
    accelerator = start(settings)
    features, training = inputs.open()
    pairs = take_rows(training, np.flatnonzero(seen_pairs(features, training, settings.features)))
    if not pairs:
        raise ValueError(f"{settings.features} has features for no training pair of {settings.pairs}; extract them")
    aligner = AutoencoderAligner(features.dims, settings.dim, settings.noise, settings.dropout)
    order = BatchSettings(batch_size=settings.batch_size, seed=settings.seed)
    batches = StoredBatches(pairs, order, features={"teachers": features})
    write_output = partial(write, aligner=aligner, inputs=inputs, settings=settings)
    fit(accelerator, AlignObjective(aligner), batches, settings, write_output)


def made_of(settings: AlignSettings, inputs: AlignmentInputs) -> dict[str, Any]:
    """What sums and aligned features depend on."""
    data = {"features": inputs.open()[0].identity, "pairs": manifest_sha256(settings.pairs)}
    return {"version": VERSION, "aligner": settings.aligner, "dim": settings.dim, **data}


def write(folder: Path, aligner: Aligner, inputs: AlignmentInputs, settings: AlignSettings) -> None:
    """Write the stores, the aligner and the report on some training pairs."""
    write_stores(inputs, aligner, folder, settings, partial(tqdm, disable=settings.quiet))
    aligner.save(folder)
    report = alignment_report(inputs.sample(REPORTED_PAIRS), aligner)
    write_json(folder / "report.json", report)
    write_page(folder / "report.html", alignment_page(report))


if __name__ == "__main__":
    run(AlignSettings, main)
