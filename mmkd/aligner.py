"""Teacher feature spaces brought into one target space, for losses that need a common one.

Two ways. `ProcrustesAligner` rotates: angles between the samples of one teacher survive, and rotations are chosen so
that teachers agree on the same sample; closed form, from streamed covariances. `AutoencoderAligner` is the paper's: it
learns to reconstruct every teacher through shared layers, which does not ask the spaces to agree (the authors' aligned
targets of one sample are nearly orthogonal across teachers); it is kept for comparison with their recipe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mmkd.files import atomic_write_bytes, read_json, write_json

Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, Modality] = ("image", "text")
Features = dict[str, dict[str, Tensor]]
"""Per teacher: image `(n, width)`, text `(n, width)`, mask `(n,)` bool."""


class Aligner(ABC):
    """A map from each teacher's space to the common one.

    Attributes:
        widths: the feature width of each teacher.
        dim: the width of the common space.
    """

    kind: str
    widths: dict[str, int]
    dim: int

    @abstractmethod
    def transform(self, name: str, features: Tensor, modality: Modality) -> Tensor:
        """Features `(n, width)` of one teacher and modality in the common space, `(n, dim)`, not unit-norm."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that `load_aligner` needs to rebuild the map."""

    def save(self, folder: Path) -> None:
        """Write ``aligner.safetensors`` and ``aligner.json``."""
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        atomic_write_bytes(folder / "aligner.safetensors", save(contiguous))
        write_json(folder / "aligner.json", {"kind": self.kind, "dim": self.dim, "widths": self.widths})


class ProcrustesAligner(Aligner):
    """Generalized Procrustes analysis with missing views.

    For teacher k, with mean m_k (one for images and one for texts, which takes the modality gap away), root mean
    square norm r_k, and P_k the first `dim` principal axes (zero padding when the teacher is narrower),
    ``z_ik = (x_ik - m_k) P_k / r_k``; the orthogonal ``Q_k``, shared by images and texts, minimize
    ``sum_ik |z_ik Q_k - M_ik|^2``, with ``M_ik`` the mean of ``z_ij Q_j`` over the other teachers j that know sample i.
    Each update is the polar factor of ``sum_j C_kj Q_j``, where ``C_kj = sum_i z_ik^T z_ij / (teachers of i - 1)``.
    Source: Gower 1975; Ten Berge 1977.
    """

    kind = "procrustes"

    def __init__(self, widths: dict[str, int], dim: int, tensors: dict[str, Tensor]) -> None:
        """Rebuild from `tensors`: per teacher ``<name>.image_mean``, ``<name>.text_mean`` and ``<name>.map``."""
        self.widths, self.dim, self._tensors = widths, dim, tensors

    @classmethod
    def fit(
        cls,
        chunks: Callable[[], Iterable[Features]],
        widths: dict[str, int],
        dim: int,
        sweeps: int = 100,
        tolerance: float = 1e-9,
    ) -> ProcrustesAligner:
        """Find the maps from features streamed twice.

        Args:
            chunks: returns an iterator over chunks of samples, each with every teacher in `widths`.
            widths: the feature width of each teacher.
            dim: the width of the common space.
            sweeps: the most updates of each rotation.
            tolerance: stop when a sweep raises the agreement by less than this share.

        Raises:
            ValueError: a teacher has fewer than two samples.
        """
        names = sorted(widths)
        tensors: dict[str, Tensor] = {}
        for name, moments in _moments(chunks, widths).items():
            mean, projection = moments.center_and_axes(name, dim)
            tensors |= {f"{name}.image_mean": mean["image"], f"{name}.text_mean": mean["text"]}
            tensors[f"{name}.map"] = projection
        start = cls(widths, dim, tensors)
        agreement, counts = start._cross_covariances(chunks, names)
        rotations = _rotations(agreement, sorted(names, key=lambda name: -counts[name]), dim, sweeps, tolerance)
        for name in names:
            tensors[f"{name}.map"] = tensors[f"{name}.map"] @ rotations[name]
        return cls(widths, dim, {name: tensor.float() for name, tensor in tensors.items()})

    def transform(self, name: str, features: Tensor, modality: Modality) -> Tensor:
        """See `Aligner.transform`; the root mean square norm over the fitted samples is at most 1."""
        mean = self._tensors[f"{name}.{modality}_mean"]
        return (features.to(mean) - mean) @ self._tensors[f"{name}.map"]

    def tensors(self) -> dict[str, Tensor]:
        """See `Aligner.tensors`."""
        return self._tensors

    def _cross_covariances(
        self, chunks: Callable[[], Iterable[Features]], names: list[str]
    ) -> tuple[dict[tuple[str, str], Tensor], dict[str, int]]:
        """``C_kj`` `(dim, dim)` float64 for all k != j, and how many samples each teacher knows."""
        total = {(k, j): torch.zeros(self.dim, self.dim, dtype=torch.float64) for k in names for j in names if k < j}
        counts = dict.fromkeys(names, 0)
        for chunk in chunks():
            weight = 1 / (torch.stack([chunk[name]["mask"] for name in names]).sum(dim=0) - 1).clamp(min=1).double()
            for name in names:
                counts[name] += int(chunk[name]["mask"].sum())
            for modality in MODALITIES:
                mapped = {
                    name: self.transform(name, chunk[name][modality], modality) * chunk[name]["mask"][:, None]
                    for name in names
                }
                for k, j in total:
                    total[k, j] += (mapped[k] * weight[:, None]).T @ mapped[j]
        return total | {(j, k): matrix.T for (k, j), matrix in total.items()}, counts


class AutoencoderAligner(nn.Module, Aligner):
    """The authors' ``MultiCLIP_AE``: teachers reconstructed through layers they share.

    Per teacher one linear layer into the common space and one out of it, both shared by images and texts; across
    teachers an encoder and a decoder for images and another two for texts. The aligned target is the output of the
    teacher's in-layer alone. Source: section "alignment" of the paper's released code.
    """

    kind = "autoencoder"

    def __init__(self, widths: dict[str, int], dim: int, noise: float = 0.01, dropout: float = 0.2) -> None:
        """Make the layers with random weights.

        Args:
            widths: the feature width of each teacher.
            dim: the width of the common space.
            noise: standard deviation of the Gaussian noise added to inputs in training.
            dropout: probability in the shared encoders.
        """
        super().__init__()
        self.widths, self.dim, self.noise = dict(widths), dim, noise
        self.names = sorted(widths)
        self.into = nn.ModuleList(nn.Linear(widths[name], dim) for name in self.names)
        self.out_of = nn.ModuleList(nn.Linear(dim, widths[name]) for name in self.names)
        self.encoder = nn.ModuleDict({modality: _shared_encoder(dim, dropout) for modality in MODALITIES})
        self.decoder = nn.ModuleDict({modality: _shared_decoder(dim) for modality in MODALITIES})

    def forward(self, name: str, features: Tensor, modality: Modality) -> Tensor:
        """Reconstruct features `(n, width)` of one teacher, with noise while training."""
        noisy = features + self.noise * torch.randn_like(features) if self.training else features
        number = self.names.index(name)
        code = self.encoder[modality](self.into[number](noisy))
        return self.out_of[number](self.decoder[modality](code))

    @torch.no_grad()
    def transform(self, name: str, features: Tensor, modality: Modality) -> Tensor:
        """See `Aligner.transform`; images and texts go through the same layer."""
        layer = self.into[self.names.index(name)]
        return layer(features.to(next(layer.parameters())))

    def tensors(self) -> dict[str, Tensor]:
        """See `Aligner.tensors`."""
        return self.state_dict()


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
    raise ValueError(f"{folder / 'aligner.json'} is of kind {kind!r}; allowed: procrustes, autoencoder")


class _Moments:
    """Running count, sum and second moment of one teacher's features, per modality, in float64."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.sum = {modality: torch.zeros(width, dtype=torch.float64) for modality in MODALITIES}
        self.square = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: dict[str, Tensor]) -> None:
        self.count += int(features["mask"].sum())
        for modality in MODALITIES:
            known = features[modality][features["mask"]].double()
            self.sum[modality] += known.sum(dim=0)
            self.square += known.T @ known

    def center_and_axes(self, name: str, dim: int) -> tuple[dict[str, Tensor], Tensor]:
        """Means, and the `(width, dim)` map onto the leading axes divided by the root mean square norm."""
        if self.count < 2:
            raise ValueError(
                f"teacher {name!r} has features for {self.count} training pairs; alignment needs at least 2"
            )
        mean: dict[str, Tensor] = {modality: self.sum[modality] / self.count for modality in MODALITIES}
        spread = self.square - self.count * (mean["image"].outer(mean["image"]) + mean["text"].outer(mean["text"]))
        norm = (spread.trace() / (2 * self.count)).clamp(min=1e-12).sqrt()
        width = len(spread)
        if width > dim:
            axes = torch.linalg.eigh(spread).eigenvectors.flip(1)[:, :dim]
        else:
            axes = torch.eye(width, dim, dtype=torch.float64)
        return mean, axes / norm


def _moments(chunks: Callable[[], Iterable[Features]], widths: dict[str, int]) -> dict[str, _Moments]:
    moments = {name: _Moments(width) for name, width in widths.items()}
    for chunk in chunks():
        for name, running in moments.items():
            running.add(chunk[name])
    return moments


def _rotations(
    agreement: dict[tuple[str, str], Tensor], order: list[str], dim: int, sweeps: int, tolerance: float
) -> dict[str, Tensor]:
    """Orthogonal `(dim, dim)` matrices; the first teacher in `order` is where the others start from."""
    rotations = {order[0]: torch.eye(dim, dtype=torch.float64)}
    before = -torch.inf
    for _ in range(sweeps):
        reached = 0.0
        for name in order[1:] if len(rotations) < len(order) else order:
            pulls = [agreement[name, other] @ rotation for other, rotation in rotations.items() if other != name]
            if pulls:
                left, strength, right = torch.linalg.svd(torch.stack(pulls).sum(dim=0))
                rotations[name] = left @ right
                reached += float(strength.sum())
        if reached - before <= tolerance * abs(reached):
            break
        before = reached
    return rotations


def _shared_encoder(dim: int, dropout: float) -> nn.Sequential:
    layer = [nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layer, nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout))


def _shared_decoder(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
