"""The interface of aligners: a map from each teacher's feature space to another one, saved as two small files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from mmkd.data.features.lookup import Modality
from mmkd.files import atomic_write_bytes, write_json


class Aligner(ABC):
    """A map from each teacher's space to a target space.

    Attributes:
        widths: the feature width of each teacher.
        dim: the width of the common space; 0 where every teacher keeps its own.
    """

    kind: str
    widths: dict[str, int]
    dim: int

    @abstractmethod
    def transform(self, name: str, features: Tensor, modality: Modality) -> Tensor:
        """Features `(n, width)` of one teacher and modality in the target space, `(n, dim)`, not unit-norm."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that `mmkd.alignment.folder.load_aligner` needs to rebuild the map."""

    def save(self, folder: Path) -> None:
        """Write ``aligner.safetensors`` and ``aligner.json``."""
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        atomic_write_bytes(folder / "aligner.safetensors", save(contiguous))
        write_json(folder / "aligner.json", {"kind": self.kind, "dim": self.dim, "widths": self.widths})
