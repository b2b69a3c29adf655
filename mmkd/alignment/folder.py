"""Teacher feature spaces brought into one target space, or each into a standard form.

`ProcrustesAligner` rotates teachers until they agree; `AutoencoderAligner` is the paper's; `PhiSAligner` leaves every
teacher its own space and equalizes its variances, for heads that learn each teacher by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors.torch import load_file

from mmkd.alignment.aligner import Aligner
from mmkd.alignment.autoencoder import AutoencoderAligner
from mmkd.alignment.phi_s import PhiSAligner
from mmkd.alignment.procrustes import ProcrustesAligner
from mmkd.data.features.lookup import MODALITIES, Features, Modality, TeacherFeatures, available_features
from mmkd.data.features.writer import SHARD_SIZE
from mmkd.data.table import Pair
from mmkd.files import read_json

__all__ = [
    "MODALITIES",
    "Aligner",
    "AutoencoderAligner",
    "Features",
    "Modality",
    "PhiSAligner",
    "ProcrustesAligner",
    "load_aligner",
]


def load_aligner(folder: Path) -> Aligner:
    """Read what `Aligner.save` wrote.

    Raises:
        FileNotFoundError: the folder holds no aligner.
        ValueError: the kind is unknown or the tensors do not fit it.
    """
    description = read_json(folder / "aligner.json")
    kind, dim, widths = description["kind"], int(description["dim"]), dict(description["widths"])
    tensors = load_file(folder / "aligner.safetensors")
    if kind == ProcrustesAligner.kind:
        return ProcrustesAligner(widths, dim, tensors)
    if kind == AutoencoderAligner.kind:
        aligner = AutoencoderAligner(widths, dim)
        try:
            aligner.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{folder / 'aligner.safetensors'} does not fit aligner.json: {error}") from None
        return aligner.eval()
    if kind == PhiSAligner.kind:
        return PhiSAligner(widths, tensors)
    raise ValueError(f"{folder / 'aligner.json'} is of kind {kind!r}; allowed: procrustes, autoencoder, phi-s")


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
