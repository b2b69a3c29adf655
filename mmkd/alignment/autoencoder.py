"""The paper's aligner: an autoencoder that reconstructs every teacher's features through layers shared by teachers.

Reconstruction does not require that the spaces agree: the authors' aligned targets of one sample are nearly orthogonal
across teachers. It is kept for comparison with their recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmkd.alignment.aligner import Aligner
from mmkd.data.features.lookup import MODALITIES, Modality
from mmkd.training.objectives import Objective


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

    @classmethod
    def rebuild(cls, widths: dict[str, int], dim: int, tensors: dict[str, Tensor]) -> AutoencoderAligner:
        """See `Aligner.rebuild`; in evaluation mode."""
        aligner = cls(widths, dim)
        try:
            aligner.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"the tensors do not fit an autoencoder of {widths} and dim {dim}: {error}") from None
        return aligner.eval()

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


def _shared_encoder(dim: int, dropout: float) -> nn.Sequential:
    layer = [nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layer, nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout))


def _shared_decoder(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))


class AlignObjective(Objective):
    """The authors' aligner: every teacher's features reconstructed through shared layers."""

    def __init__(self, aligner: AutoencoderAligner) -> None:
        """Train `aligner`."""
        super().__init__()
        self.aligner = aligner

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``MODALITY/TEACHER``: the features of each as restored from the common space, `(rows, width)`."""
        return {
            f"{modality}/{name}": self.aligner(name, teacher[modality], modality)
            for modality in MODALITIES
            for name, teacher in batch["teachers"].items()
        }

    def loss(self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss``, the mean over teachers of ``image`` plus ``text`` reconstruction errors."""
        parts = {}
        for modality in MODALITIES:
            errors = [
                reconstruction(embeddings[f"{modality}/{name}"], teacher[modality], teacher["mask"])
                for name, teacher in batch["teachers"].items()
            ]
            parts[str(modality)] = torch.stack(errors).mean()
        return {"loss": parts["image"] + parts["text"], **parts}


def reconstruction(restored: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of an autoencoder's output: ``mean_i mean_d (x'_id - x_id)^2`` over samples with features.

    Args:
        restored: `(rows, width)` decoded features.
        original: `(rows, width)` features before noise.
        mask: `(rows,)` bool; a sample without features adds zero.
    """
    squared = (restored.float() - original.float()).square().mean(dim=1)
    return (squared * mask).sum() / len(restored)
