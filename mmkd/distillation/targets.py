"""The teachers' similarities in a batch, how much each teacher counts for a pair, and the target they make together.

There is one representation of which teacher counts where. In a batch, ``mask`` `(rows,)` of a teacher's features is
True for the pairs the teacher is available for after screening, and ``unscreened_mask`` for all pairs it has features
of. `teacher_weights` turns it, with the options of `mmkd.distillation.weighting`, into a weight per teacher and row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.data.features.lookup import MODALITIES, Modality
from mmkd.distillation.losses import TeacherSimilarity
from mmkd.distillation.options import DistillOptions
from mmkd.distillation.weighting import NegativesMask, drop_teachers, teacher_confidence, weights_by_name
from mmkd.distributed import gather

TeacherWeights = dict[str, Tensor]
"""Teacher -> `(rows,)` float32, at least 0; 0 where the teacher does not count for the row."""

OTHER: dict[Modality, Modality] = {"image": "text", "text": "image"}


class TeacherSimilarities:
    """Every teacher's raw features of this process' rows and of all processes' columns, as similarities.

    Features are gathered from all processes once and normalized once, however many losses read them.
    """

    def __init__(
        self,
        batch: Mapping[str, Any],
        row_offset: int,
        options: DistillOptions,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        """Normalize and gather ``batch["teachers"]``.

        Args:
            batch: of this process.
            row_offset: the column of the first row.
            options: inverse temperatures.
            scales: inverse temperatures that replace those of the options, see `spread_scales`.
        """
        self.teachers: Mapping[str, Mapping[str, Tensor]] = batch["teachers"]
        self.row_offset, self.options, self.scales = row_offset, options, scales or {}
        self.rows = {
            (modality, name): F.normalize(teacher[modality].float(), dim=1)
            for modality in MODALITIES
            for name, teacher in self.teachers.items()
        }
        self.columns = {key: gather(rows) for key, rows in self.rows.items()}
        self.masks = {name: gather(teacher["mask"]) for name, teacher in self.teachers.items()}
        self.unscreened_masks = {name: gather(unscreened_mask(teacher)) for name, teacher in self.teachers.items()}

    def across(self, modality: Modality, weights: TeacherWeights) -> list[TeacherSimilarity]:
        """Per teacher from one modality to the other, each at its own temperature."""
        scales, scale = self.options.teacher_scales, self.options.teacher_scale
        return [
            TeacherSimilarity(
                self.rows[modality, name],
                self.columns[OTHER[modality], name],
                weights[name],
                self.masks[name],
                scales.get(name, self.scales.get(f"across/{name}", scale)),
            )
            for name in self.teachers
            if name not in self.options.relational_only
        ]

    def within(self, modality: Modality, weights: TeacherWeights, unscreened: bool = False) -> list[TeacherSimilarity]:
        """Per teacher within a modality, among the pairs it is available for, or `unscreened` all with features."""
        scale, masks = self.options.relational_scale, self.unscreened_masks if unscreened else self.masks
        return [
            TeacherSimilarity(
                self.rows[modality, name],
                self.columns[modality, name],
                weights[name],
                masks[name],
                self.scales.get(f"{modality}/{name}", scale),
            )
            for name in self.teachers
        ]

    def confidence(self) -> TeacherWeights:
        """Per teacher with an image-text space the own pair's probability, mean of both directions, `(rows,)`."""
        masks = {name: teacher["mask"] for name, teacher in self.teachers.items()}
        images, texts = self.across("image", masks), self.across("text", masks)
        names = [name for name in self.teachers if name not in self.options.relational_only]
        return {
            name: (teacher_confidence(one, self.row_offset) + teacher_confidence(other, self.row_offset)) / 2
            for name, one, other in zip(names, images, texts, strict=True)
        }

    def negatives_mask(self) -> NegativesMask | None:
        """Which columns are negatives of the task loss; None for all, where the options name no threshold."""
        if self.options.false_negatives is None:
            return None
        masks = {name: teacher["mask"] for name, teacher in self.teachers.items()}
        within = [self.within(modality, masks) for modality in MODALITIES]
        return NegativesMask(within, self.options.false_negatives, self.row_offset)


def unscreened_mask(teacher: Mapping[str, Tensor]) -> Tensor:
    """The pairs that a teacher has features of, `(rows,)` bool, available or not."""
    return teacher.get("unscreened_mask", teacher["mask"])


def teacher_weights(
    batch: Mapping[str, Any],
    options: DistillOptions,
    seed: int,
    similarities: TeacherSimilarities | None,
    training: bool,
    unscreened: bool = False,
) -> TeacherWeights:
    """How much each teacher counts for each row: availability, times weight by name, dropout and confidence.

    Args:
        batch: of this process, with ``teachers`` or ``aligned``.
        options: weights by name, dropout, confidence.
        seed: of the dropout.
        similarities: of raw features, for confidence.
        training: whether teachers drop out.
        unscreened: start from the pairs a teacher has features of, available or not.

    Returns:
        A weight of every teacher with raw or aligned features in the batch.
    """
    stores = [batch[key] for key in ("teachers", "aligned") if key in batch]
    masks = {
        name: unscreened_mask(teacher) if unscreened else teacher["mask"]
        for store in reversed(stores)
        for name, teacher in store.items()
    }
    if not masks:
        return {}
    names = sorted(masks)
    mask = torch.stack([masks[name] for name in names], dim=1)
    if options.teacher_dropout and training:
        mask = drop_teachers(mask, options.teacher_dropout, seed, batch["epoch"], batch["index"])
    weights = {name: mask[:, k].float() for k, name in enumerate(names)}
    if options.teacher_weights:
        for name, weight in weights.items():
            by_name = torch.tensor(weights_by_name(options.teacher_weights, name, batch["modality"]))
            weights[name] = weight * by_name.to(weight.device, non_blocking=True)
    if options.confidence and similarities is not None:
        powers = {name: p.pow(options.confidence) for name, p in similarities.confidence().items()}
        weights |= {name: weights[name] * power for name, power in powers.items()}
    return weights


def combined_target(features: Tensor, weights: Tensor, form: Literal["mean", "leave_one_out"], unit: bool) -> Tensor:
    """One target from the aligned features of several teachers.

    - mean: ``M_i = sum_k w_ik t_ik / sum_k w_ik``
    - leave_one_out: the same with ``w_ik`` times ``max(0, cos(t_ik, M_i without k))``, the agreement of a teacher with
      the mean of the others. Where none agrees, or there is only one, it is the mean.

    Args:
        features: `(rows, teachers, dim)`.
        weights: `(rows, teachers)`, at least 0; 0 where a teacher has no features.
        form: mean or leave_one_out.
        unit: take features of unit norm and return a target of unit norm; else all as stored.

    Returns:
        `(rows, dim)`, zero where no teacher counts.
    """
    directions = F.normalize(features, dim=2)
    if form == "leave_one_out":
        pulls = directions * weights[:, :, None]
        others = F.normalize(pulls.sum(dim=1, keepdim=True) - pulls, dim=2)
        agreeing = weights * (directions * others).sum(dim=2).clamp(min=0)
        weights = torch.where(agreeing.sum(dim=1, keepdim=True) > 0, agreeing, weights)
    share = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-12)
    target = ((directions if unit else features) * share[:, :, None]).sum(dim=1)
    return F.normalize(target, dim=1) if unit else target
