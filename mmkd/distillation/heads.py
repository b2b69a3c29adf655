"""One small head per teacher: from the student's embedding or trunk it predicts that teacher's features.

Heads shape what they read without requiring that teachers agree. They are trained with it and saved beside the model's
weights as ``teacher_heads.safetensors``, which ``from_pretrained`` does not read: the model is the same without them,
and with them the student emulates a teacher, in that teacher's own space.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mmkd.alignment.phi_s import PhiSAligner
from mmkd.data.features.lookup import MODALITIES, Features, Modality
from mmkd.files import atomic_write_bytes, read_json, write_json

HEADS_FILE, HEADS_DESCRIPTION = "teacher_heads.safetensors", "teacher_heads.json"


def standardized_error(predicted: Tensor, target: Tensor) -> Tensor:
    """``1/2 (1 - cos(y, t)) + 1/2 mean_d smooth_l1(y_d - t_d)`` for each row.

    Source: Sariyildiz et al. 2024 (UNIC), on targets standardized as in Ranzinger et al. 2024 (PHI-S).

    Args:
        predicted: `(rows, width)` output of a head.
        target: `(rows, width)` standardized teacher features.

    Returns:
        `(rows,)`.
    """
    predicted, target = predicted.float(), target.float()
    smooth = F.smooth_l1_loss(predicted, target, reduction="none").mean(dim=1)
    return (1 - F.cosine_similarity(predicted, target, dim=1)) / 2 + smooth / 2


def angular_error(predicted: Tensor, target: Tensor, dispersion: float) -> Tensor:
    """``angle(y, t)^2 / dispersion^2`` for each row, so that a teacher of widely spread features does not dominate.

    Source: the balanced summary loss of C-RADIOv4 (Ranzinger et al. 2026).

    Args:
        predicted: `(rows, width)` output of a head, of any norm.
        target: `(rows, width)` raw teacher features, of any norm.
        dispersion: the teacher's `angular_dispersion`, in radians.

    Returns:
        `(rows,)`.
    """
    y, t = F.normalize(predicted.float(), dim=1), F.normalize(target.float(), dim=1)
    # The angle from the chord, 2 asin(|y - t| / 2), keeps its gradient where the cosine's arc would lose it.
    half_chord = ((y - t).square().sum(dim=1) / 4).clamp(1e-12, 1 - 1e-6).sqrt()
    return (2 * torch.asin(half_chord) / dispersion).square()


def angular_dispersion(features: Tensor) -> float:
    """Root mean square angle between a teacher's features and their mean direction, in radians.

    Args:
        features: `(n, width)` of any norm, n at least 2.
    """
    unit = F.normalize(features.double(), dim=1)
    angles = torch.acos((unit @ F.normalize(unit.mean(dim=0), dim=0)).clamp(-1, 1))
    return max(angles.square().mean().sqrt().item(), 1e-6)


def mean_over_teachers(errors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """``mean_i (sum_k w_ik e_ik / sum_k w_ik)``; a row without a teacher adds zero.

    Args:
        errors: per teacher `(rows,)`.
        weights: per teacher `(rows,)`, at least 0.
    """
    names = list(errors)
    share = torch.stack([weights[name].float() for name in names], dim=1)
    share = share / share.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return (torch.stack([errors[name] for name in names], dim=1) * share).sum() / len(share)


class TeacherHeads(nn.Module):
    """A layer norm and two linear layers per teacher and modality, from student features to the teacher's width."""

    def __init__(
        self, dims: Mapping[Modality, int], widths: Mapping[str, int], standardizer: PhiSAligner | None = None
    ) -> None:
        """Make the heads.

        Args:
            dims: width of the student's features that they read, of each modality: of its embedding, which all share,
                or of the trunk, the towers' pooled outputs.
            widths: of each teacher's features.
            standardizer: how targets were standardized; None when heads predict raw directions.
        """
        super().__init__()
        self.dims, self.widths, self.standardizer = dict(dims), dict(widths), standardizer
        self.layers = nn.ModuleDict(
            {own: nn.ModuleList(_head(dims[own], width) for width in widths.values()) for own in MODALITIES}
        )

    def forward(self, name: str, features: Tensor, modality: Modality) -> Tensor:
        """Output of a teacher's head for features `(rows, dim)`: `(rows, width)`, standardized if targets are.

        Raises:
            KeyError: there is no head of that teacher.
        """
        number = {teacher: k for k, teacher in enumerate(self.widths)}[name]
        heads = self.layers[modality]
        assert isinstance(heads, nn.ModuleList)
        return heads[number](features.float())

    def targets(self, name: str, features: Tensor, modality: Modality) -> Tensor:
        """Target of a head: the teacher's features `(rows, width)`, standardized or raw."""
        if self.standardizer is None:
            return features
        return self.standardizer.transform(name, features, modality)

    def loss(
        self,
        student: Tensor,
        modality: Modality,
        teachers: Mapping[str, Mapping[str, Tensor]],
        weights: Mapping[str, Tensor],
        dispersions: Mapping[str, float],
    ) -> Tensor:
        """Mean over samples and their teachers of the error of each teacher's head, in one modality.

        Args:
            student: `(rows, dim)` student features.
            modality: of the features.
            teachers: teacher -> modality -> `(rows, width)` raw features.
            weights: per teacher `(rows,)`, at least 0.
            dispersions: ``MODALITY/TEACHER`` to the angular dispersion where the error is `angular_error`; without
                one it is `standardized_error`.
        """
        errors = {}
        for name, teacher in teachers.items():
            predicted = self(name, student, modality)
            target = self.targets(name, teacher[modality], modality)
            dispersion = dispersions.get(f"{modality}/{name}")
            if dispersion is None:
                errors[name] = standardized_error(predicted, target)
            else:
                errors[name] = angular_error(predicted, target, dispersion)
        return mean_over_teachers(errors, weights)

    @torch.no_grad()
    def emulate(self, name: str, features: Tensor, modality: Modality) -> Tensor:
        """The student in a teacher's own space: unit-norm `(rows, width)` from what the heads read, `(rows, dim)`."""
        predicted = self(name, features, modality)
        if self.standardizer is not None:
            predicted = self.standardizer.restore(name, predicted, modality)
        return F.normalize(predicted, dim=1)

    def save(self, folder: Path) -> None:
        """Write the heads beside a model."""
        tensors = {f"layers.{key}": tensor for key, tensor in self.layers.state_dict().items()}
        if self.standardizer is not None:
            tensors |= {f"standardizer.{key}": tensor for key, tensor in self.standardizer.tensors().items()}
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        atomic_write_bytes(folder / HEADS_FILE, save(contiguous))
        write_json(folder / HEADS_DESCRIPTION, {"dims": self.dims, "widths": self.widths})

    @classmethod
    def load(cls, folder: Path) -> TeacherHeads:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: the folder has no heads: it was distilled without them.
        """
        if not (folder / HEADS_FILE).is_file():
            raise FileNotFoundError(f"{folder} has no {HEADS_FILE}; distil with --losses.heads above 0 to get heads")
        described, tensors = read_json(folder / HEADS_DESCRIPTION), load_file(folder / HEADS_FILE)
        parts: dict[str, dict[str, Tensor]] = {"layers": {}, "standardizer": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = tensor
        widths = {str(name): int(width) for name, width in described["widths"].items()}
        standardizer = PhiSAligner(widths, 0, parts["standardizer"]) if parts["standardizer"] else None
        heads = cls({own: int(described["dims"][own]) for own in MODALITIES}, widths, standardizer)
        heads.layers.load_state_dict(parts["layers"])
        return heads.eval()


def open_standardizer(folder: Path | None, widths: Mapping[str, int]) -> PhiSAligner:
    """The aligner that standardizes the targets of heads.

    Raises:
        ValueError: no folder, not a PHI-S aligner, or one without a teacher or with another width of it.
    """
    if folder is None:
        raise ValueError(
            "the loss heads needs --standardizer FOLDER, made by `mmkd align --aligner phi-s`; give it, set "
            "--head_form angular, or set --losses.heads 0"
        )
    try:
        aligner = PhiSAligner.load(folder)
    except ValueError as error:
        raise ValueError(f"--standardizer {error}") from None
    unfit = [name for name, width in widths.items() if aligner.widths.get(name) != width]
    if unfit:
        raise ValueError(f"--standardizer {folder} does not fit the features of {', '.join(unfit)}; align them again")
    return aligner


def dispersions_of(features: Features) -> dict[str, float]:
    """``MODALITY/TEACHER`` to the `angular_dispersion` over the pairs that each teacher has at least two of."""
    return {
        f"{modality}/{name}": angular_dispersion(teacher[modality][teacher["mask"]])
        for modality in MODALITIES
        for name, teacher in features.items()
        if teacher["mask"].sum() > 1
    }


def _head(dim: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width))
