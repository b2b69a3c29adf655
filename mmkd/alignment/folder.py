"""A folder of aligned features: the aligner itself, and one feature store for each teacher.

`ProcrustesAligner` rotates teachers until they agree; `AutoencoderAligner` is the paper's; `PhiSAligner` leaves every
teacher its own space and equalizes its variances, for heads that learn each teacher by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.alignment.aligner import Aligner
from mmkd.data.features.lookup import MODALITIES, Features, TeacherFeatures, available_features
from mmkd.data.features.writer import SHARD_SIZE, FeatureWriter
from mmkd.data.table import Pair


def chunks(features: TeacherFeatures, pairs: Sequence[Pair]) -> Iterator[Features]:
    """Features of the pairs, some thousands at a time."""
    for begin in range(0, len(pairs), SHARD_SIZE):
        chosen = pairs[begin : begin + SHARD_SIZE]
        yield available_features(features, [pair.id for pair in chosen], [pair.teachers for pair in chosen])


def aligned(features: TeacherFeatures, ids: Sequence[str], aligner: Aligner) -> Features:
    """Features of some pairs in the target space."""
    return {
        name: {modality: aligner.transform(name, found[modality], modality) for modality in MODALITIES}
        | {"mask": found["mask"]}
        for name, found in features.lookup(ids).items()
    }


def write_stores(
    folder: Path, aligner: Aligner, features: TeacherFeatures, teachers: Sequence[Mapping[str, Any]]
) -> None:
    """Write aligned features of every pair that has raw ones, one store for each teacher.

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
        for name, found in aligned(features, ids, aligner).items():
            mask = found["mask"]
            own = [id for id, present in zip(ids, mask.tolist(), strict=True) if present]
            writers[name].add(own, found["image"][mask], found["text"][mask], fingerprints[name][1][mask.numpy()])
    for name, writer in writers.items():
        writer.finish({"aligner": aligner.kind, "width_before": aligner.widths[name], "raw": raw.get(name, {})})
