"""What is trained: a model, its losses and everything learnable about them in one module.

`forward(batch)` returns ``{"loss": ..., part: ...}``, so that wrapping the objective for several processes synchronizes
every gradient, and an optimizer built from it cannot forget a learnable scale. It is two steps: `encode` maps each row
by itself, so that a batch may be encoded in pieces and put together again, and `loss` compares the rows of all
processes. A loss of weight zero is not computed, and what only it would read need not be in the batch.

A batch holds what `mmkd.embed.embed` reads, ``index`` `(rows,)`, ``ids`` and, for distillation, ``teachers`` (raw
features) and ``aligned`` (features in the student's width), each ``{teacher: {"image": (rows, width), "text": (rows,
width), "mask": (rows,) bool}}``; the loop adds ``epoch``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd import losses
from mmkd.aligner import MODALITIES, AutoencoderAligner
from mmkd.distributed import gather, rank
from mmkd.embed import embed
from mmkd.settings import nearest

DISTILL_LOSSES = ("task", "feature", "interactive", "relational")
ALIGNED_LOSSES = ("feature", "interactive")


class Embeddings(NamedTuple):
    """Unit-norm features of this process' rows and of all processes."""

    image: Tensor
    text: Tensor
    all_images: Tensor
    all_texts: Tensor
    row_offset: int


class Objective(nn.Module, ABC):
    """What is trained: `encode` works row by row, `loss` on the batch of all processes."""

    @abstractmethod
    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Embeddings of this process' rows, each `(rows, width)`; no row may depend on another."""

    @abstractmethod
    def loss(self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss`` and its parts, scalars, from what `encode` gave for every row of the batch."""

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss(encode(batch), batch)``."""
        return self.loss(self.encode(batch), batch)


class ContrastiveObjective(Objective):
    """Stage 1: symmetric InfoNCE over the global batch."""

    def __init__(self, model: nn.Module) -> None:
        """Train `model`, whose output has ``image_embeds`` and ``text_embeds`` and which has a ``logit_scale``."""
        super().__init__()
        self.model = model

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Unit-norm ``image`` and ``text`` features, `(rows, dim)`."""
        return embed(self.model, batch)

    def loss(self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss`` and ``task``, which are the same."""
        task = _task_loss(gathered(embeddings), self.model)
        return {"loss": task, "task": task}


class DistillObjective(Objective):
    """Stage 2: the student learns from captions and from stored features of many teachers.

    ``loss = sum of weights[name] * part``, with the parts

    - task: InfoNCE with the captions,
    - feature: the student's features against a target made of the aligned features of the sample's teachers,
    - interactive: the student's features against those targets of the whole batch, across modalities,
    - relational: the student's neighbours within a modality against those of every teacher, from raw features.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, float],
        *,
        target: Literal["mean", "random"] = "mean",
        target_norm: Literal["unit", "stored"] = "unit",
        feature_form: Literal["cosine", "squared"] = "cosine",
        interactive_scale: Literal["learnable", "constant"] = "learnable",
        relational_scale: float = 20.0,
        seed: int = 0,
    ) -> None:
        """Choose the losses; the paper's recipe is random, stored, squared and constant.

        Args:
            model: the student. Its ``logit_scale`` is frozen when the task loss has no weight.
            weights: weight of each loss; those not named are zero.
            target: the mean of the sample's available teachers, or one of them drawn anew each epoch.
            target_norm: targets of unit norm, or as stored.
            feature_form: ``1 - cos`` or the mean squared difference.
            interactive_scale: exponentiated and learned from 1/0.07, or the constant ln(1/0.07).
            relational_scale: inverse temperature of the relational loss.
            seed: of the draw of teachers, which depends on it, the epoch and the pair's index alone.

        Raises:
            ValueError: an unknown loss, a negative weight, or no weight above zero.
        """
        super().__init__()
        self.weights = checked_weights(weights)
        self.model = model
        self.target, self.target_norm, self.feature_form = target, target_norm, feature_form
        self.relational_scale, self.seed = relational_scale, seed
        if self.weights["task"] == 0:
            model.get_parameter("logit_scale").requires_grad_(False)
        self.interactive_logit_scale: nn.Parameter | None = None
        if self.weights["interactive"] > 0 and interactive_scale == "learnable":
            self.interactive_logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Unit-norm ``image`` and ``text`` features of the student, `(rows, dim)`."""
        return embed(self.model, batch)

    def loss(self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss`` and every part that has a weight, unweighted."""
        student = gathered(embeddings)
        parts: dict[str, Tensor] = {}
        if self.weights["task"]:
            parts["task"] = _task_loss(student, self.model)
        if any(self.weights[name] for name in ALIGNED_LOSSES):
            parts |= self._aligned_losses(student, batch)
        if self.weights["relational"]:
            parts["relational"] = self._relational_loss(student, batch["teachers"])
        total = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return {"loss": total, **parts}

    def _aligned_losses(self, student: Embeddings, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        image, text, available = self._targets(batch)
        parts = {}
        if self.weights["feature"]:
            form = losses.feature_cosine if self.feature_form == "cosine" else losses.feature_squared
            parts["feature"] = form(student.image, image, available) + form(student.text, text, available)
        if self.weights["interactive"]:
            learned = self.interactive_logit_scale
            scale = losses.PAPER_INTERACTIVE_SCALE if learned is None else learned.exp()
            columns = gather(image), gather(text), gather(available)
            parts["interactive"] = losses.interactive(student.image, student.text, *columns, scale, student.row_offset)
        return parts

    def _targets(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Image and text targets `(rows, dim)` and whether there is one `(rows,)`."""
        aligned = batch["aligned"]
        names = sorted(aligned)
        mask = torch.stack([aligned[name]["mask"] for name in names], dim=1)
        share = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
        if self.target == "random":
            share = drawn_teacher(mask, self.seed, batch["epoch"], batch["index"]).float()
        targets = []
        for modality in MODALITIES:
            features = torch.stack([aligned[name][modality].float() for name in names], dim=1)
            if self.target_norm == "unit":
                target = (F.normalize(features, dim=2) * share[:, :, None]).sum(dim=1)
                targets.append(F.normalize(target, dim=1))
            else:
                targets.append((features * share[:, :, None]).sum(dim=1))
        return targets[0], targets[1], mask.any(dim=1)

    def _relational_loss(self, student: Embeddings, teachers: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        known = [(teacher["mask"], gather(teacher["mask"])) for teacher in teachers.values()]
        total = student.image.new_zeros(())
        for modality, rows, columns in (
            ("image", student.image, student.all_images),
            ("text", student.text, student.all_texts),
        ):
            features = [F.normalize(teacher[modality].float(), dim=1) for teacher in teachers.values()]
            both = [(feature, gather(feature)) for feature in features]
            total = total + losses.relational(rows, columns, both, known, self.relational_scale, student.row_offset) / 2
        return total


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
                losses.reconstruction(embeddings[f"{modality}/{name}"], teacher[modality], teacher["mask"])
                for name, teacher in batch["teachers"].items()
            ]
            parts[str(modality)] = torch.stack(errors).mean()
        return {"loss": parts["image"] + parts["text"], **parts}


def gathered(embeddings: Mapping[str, Tensor]) -> Embeddings:
    """This process' image and text features with those of all processes."""
    image, text = embeddings["image"], embeddings["text"]
    return Embeddings(image, text, gather(image), gather(text), rank() * len(image))


def checked_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """A weight for each of `DISTILL_LOSSES`, zero where none is given.

    Raises:
        ValueError: an unknown loss, a negative weight, or no weight above zero.
    """
    for name, weight in weights.items():
        if name not in DISTILL_LOSSES:
            raise ValueError(
                f"unknown loss {name!r}{nearest(name, DISTILL_LOSSES)}; allowed: {', '.join(DISTILL_LOSSES)}"
            )
        if not 0 <= weight < math.inf:
            raise ValueError(f"the weight of {name} is {weight}; it must be finite and at least 0")
    if not any(weights.values()):
        raise ValueError(f"no loss has a weight above 0; give one of {', '.join(DISTILL_LOSSES)}")
    return {name: float(weights.get(name, 0.0)) for name in DISTILL_LOSSES}


def require_width(widths: Mapping[str, int], dim: int) -> None:
    """Refuse targets that the student's features cannot be compared with.

    Raises:
        ValueError: a teacher's features are not `dim` wide; the message names it.
    """
    wrong = {name: width for name, width in widths.items() if width != dim}
    if wrong:
        listed = ", ".join(f"{name} {width}" for name, width in wrong.items())
        raise ValueError(
            f"the losses {' and '.join(ALIGNED_LOSSES)} need targets as wide as the student's features ({dim}), "
            f"but these teachers are not: {listed}; align them with `mmkd align --dim {dim}`, or set both weights to 0"
        )


def drawn_teacher(mask: Tensor, seed: int, epoch: int, index: Tensor) -> Tensor:
    """One available teacher for each sample, drawn uniformly from (seed, epoch, pair index) alone.

    Args:
        mask: `(rows, teachers)` bool, the available ones.
        seed: at least 0.
        epoch: number of the epoch.
        index: `(rows,)` the pairs' indices.

    Returns:
        `(rows, teachers)` bool with one True a row, none where no teacher is available.
    """
    draws = [np.random.default_rng([seed, epoch, pair]).random() for pair in index.tolist()]
    number = (torch.tensor(draws, device=mask.device) * mask.sum(dim=1)).long()
    return mask & (mask.cumsum(dim=1) == number[:, None] + 1)


def _task_loss(student: Embeddings, model: nn.Module) -> Tensor:
    image, text, all_images, all_texts, row_offset = student
    return losses.contrastive(
        image, text, all_images, all_texts, model.get_parameter("logit_scale").float().exp(), row_offset
    )
