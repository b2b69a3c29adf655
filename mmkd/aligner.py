"""Teacher feature spaces brought into one target space, or each into a standard form.

`ProcrustesAligner` rotates teachers until they agree; `AutoencoderAligner` is the paper's; `PhiSAligner` leaves every
teacher its own space and equalizes its variances, for heads that learn each teacher by itself.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from mmkd.alignment import MODALITIES, Aligner, Features, Modality
from mmkd.autoencoder import AutoencoderAligner
from mmkd.files import read_json
from mmkd.phi_s import PhiSAligner
from mmkd.procrustes import ProcrustesAligner

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
