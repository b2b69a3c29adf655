"""The interface of aligners: a map from each teacher's feature space to another one, saved as two small files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TypeVar

from safetensors.torch import load_file, save
from torch import Tensor

from mmkd.data.features.lookup import MODALITIES, Features, Modality
from mmkd.files import atomic_write_bytes, read_json, write_json

Own = TypeVar("Own", bound="Aligner")
OwnLinear = TypeVar("OwnLinear", bound="LinearAligner")


class Aligner(ABC):
    """A map from each teacher's space to a target space.

    Attributes:
        kind: name of the method.
        widths: the feature width of each teacher.
        dim: the width of the common space; 0 where every teacher keeps its own.
    """

    kind: str
    widths: dict[str, int]
    dim: int

    @classmethod
    @abstractmethod
    def rebuild(cls: type[Own], widths: dict[str, int], dim: int, tensors: dict[str, Tensor]) -> Own:
        """The map that `tensors` describe.

        Raises:
            ValueError: they do not fit.
        """

    @abstractmethod
    def transform(self, name: str, features: Tensor, modality: Modality) -> Tensor:
        """Features `(n, width)` of one teacher and modality in the target space, `(n, dim)`, not unit-norm."""

    def transform_all(self, features: Features) -> Features:
        """Features of all teachers and both modalities in the target space."""
        return {
            name: {modality: self.transform(name, found[modality], modality).float() for modality in MODALITIES}
            | {"mask": found["mask"]}
            for name, found in features.items()
        }

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that `rebuild` needs."""

    def save(self, folder: Path) -> None:
        """Write ``aligner.safetensors`` and ``aligner.json``."""
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        atomic_write_bytes(folder / "aligner.safetensors", save(contiguous))
        write_json(folder / "aligner.json", {"kind": self.kind, "dim": self.dim, "widths": self.widths})

    @classmethod
    def load(cls: type[Own], folder: Path) -> Own:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: the folder holds no aligner.
            ValueError: the aligner is of another kind, or the tensors do not fit it.
        """
        described = read_json(folder / "aligner.json")
        if described["kind"] != cls.kind:
            raise ValueError(
                f"{folder} is of kind {described['kind']}; make one with `mmkd align --aligner {cls.kind}`"
            )
        tensors = load_file(folder / "aligner.safetensors")
        return cls.rebuild(dict(described["widths"]), int(described["dim"]), tensors)


class LinearAligner(Aligner):
    """``(x - mean) @ map`` for each teacher, with one mean for images and one for texts."""

    def __init__(self, widths: dict[str, int], dim: int, tensors: dict[str, Tensor]) -> None:
        """Take for each teacher ``<name>.image_mean``, ``<name>.text_mean`` `(width,)` and ``<name>.map``."""
        self.widths, self.dim, self._tensors = widths, dim, tensors

    @classmethod
    def rebuild(cls: type[OwnLinear], widths: dict[str, int], dim: int, tensors: dict[str, Tensor]) -> OwnLinear:
        """See `Aligner.rebuild`."""
        return cls(widths, dim, tensors)

    def transform(self, name: str, features: Tensor, modality: Modality) -> Tensor:
        """See `Aligner.transform`; on the device of the features."""
        matrix = self._tensors[f"{name}.map"].to(features.device)
        return (features.to(matrix) - self._tensors[f"{name}.{modality}_mean"].to(matrix)) @ matrix

    def tensors(self) -> dict[str, Tensor]:
        """See `Aligner.tensors`."""
        return self._tensors
