"""The rows that losses compare, how much each teacher counts for a row, and the target that teachers make together.

There is one representation of which teacher counts where. In a batch, ``mask`` `(rows,)` of a teacher's features is
True for the pairs the teacher is available for after screening, and ``unscreened_mask`` for all pairs it has features
of. `Rows.weights` turns it, with the options of `mmkd.distillation.weighting`, into a weight per teacher and row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.data.features.lookup import MODALITIES, Modality
from mmkd.distillation.losses import TeacherSimilarity
from mmkd.distillation.options import DistillOptions
from mmkd.distillation.weighting import NegativesMask, drop_teachers, teacher_confidence, weights_by_name
from mmkd.distributed import gather
from mmkd.training.objectives import gathered

TeacherWeights = dict[str, Tensor]
"""Teacher -> `(rows,)` float32, at least 0; 0 where the teacher does not count for the row."""

OTHER: dict[Modality, Modality] = {"image": "text", "text": "image"}


class Rows:
    """Rows of this process against the columns of all processes: features of the student and its teachers' raw ones.

    Features are gathered from all processes once and normalized once, however many losses read them.

    Attributes:
        student: its features.
        batch: all that is known of the rows, the student's features too; tensors have one entry for each.
        teachers: the raw features; empty where no loss reads them.
    """

    def __init__(
        self,
        embeddings: Mapping[str, Tensor],
        batch: Mapping[str, Any],
        options: DistillOptions,
        scales: Mapping[str, float],
        seed: int | None,
    ) -> None:
        """Normalize and gather.

        Args:
            embeddings: the student's ``image`` and ``text`` features `(rows, dim)`, and its trunk where heads read it.
            batch: of this process.
            options: inverse temperatures, and what a teacher's weight depends on.
            scales: inverse temperatures that replace those of the options, see `spread_scales`.
            seed: of the dropout of teachers; None in evaluation, where none is dropped.
        """
        self.student, self.batch = gathered(embeddings), {**batch, **embeddings}
        self.options, self.scales, self.seed = options, scales, seed
        self.teachers: Mapping[str, Mapping[str, Tensor]] = batch["teachers"] if options.reasons_for_raw() else {}
        self._rows = {
            (modality, name): F.normalize(teacher[modality].float(), dim=1)
            for modality in MODALITIES
            for name, teacher in self.teachers.items()
        }
        self._columns = {key: gather(rows) for key, rows in self._rows.items()}
        self._masks = {name: gather(teacher["mask"]) for name, teacher in self.teachers.items()}
        self._unscreened_masks = {name: gather(unscreened_mask(teacher)) for name, teacher in self.teachers.items()}

    def across(self, modality: Modality, weights: TeacherWeights) -> list[TeacherSimilarity]:
        """Per teacher from one modality to the other, each at its own temperature."""
        scales, scale = self.options.teacher_scales, self.options.teacher_scale
        return [
            TeacherSimilarity(
                self._rows[modality, name],
                self._columns[OTHER[modality], name],
                weights[name],
                self._masks[name],
                scales.get(name, self.scales.get(f"across/{name}", scale)),
            )
            for name in self.teachers
            if name not in self.options.relational_only
        ]

    def within(self, modality: Modality, weights: TeacherWeights, unscreened: bool = False) -> list[TeacherSimilarity]:
        """Per teacher within a modality, among the pairs it is available for, or `unscreened` all with features."""
        scale, masks = self.options.relational_scale, self._unscreened_masks if unscreened else self._masks
        return [
            TeacherSimilarity(
                self._rows[modality, name],
                self._columns[modality, name],
                weights[name],
                masks[name],
                self.scales.get(f"{modality}/{name}", scale),
            )
            for name in self.teachers
        ]

    def weights(self, unscreened: bool = False) -> TeacherWeights:
        """How much each teacher with raw or aligned features counts for each row.

        That is its availability, or `unscreened` whether it has features, times weight by name, dropout and confidence.
        """
        batch, options = self.batch, self.options
        teachers = {**batch.get("aligned", {}), **batch.get("teachers", {})}
        names = sorted(teachers)
        masks = [unscreened_mask(teachers[name]) if unscreened else teachers[name]["mask"] for name in names]
        mask = torch.stack(masks, dim=1)
        if options.teacher_dropout and self.seed is not None:
            mask = drop_teachers(mask, options.teacher_dropout, self.seed, batch["epoch"], batch["index"])
        weights = {name: mask[:, k].float() for k, name in enumerate(names)}
        if options.teacher_weights:
            for name, weight in weights.items():
                by_name = torch.tensor(weights_by_name(options.teacher_weights, name, batch["modality"]))
                weights[name] = weight * by_name.to(weight.device, non_blocking=True)
        if options.confidence:
            weights |= {name: weights[name] * p.pow(options.confidence) for name, p in self.confidence().items()}
        return weights

    def confidence(self) -> TeacherWeights:
        """Per teacher with an image-text space the own pair's probability, mean of both directions, `(rows,)`."""
        masks = {name: teacher["mask"] for name, teacher in self.teachers.items()}
        images, texts, offset = self.across("image", masks), self.across("text", masks), self.student.row_offset
        names = [name for name in self.teachers if name not in self.options.relational_only]
        return {
            name: (teacher_confidence(one, offset) + teacher_confidence(other, offset)) / 2
            for name, one, other in zip(names, images, texts, strict=True)
        }

    def negatives_mask(self) -> NegativesMask | None:
        """Which columns are negatives of the task loss; None for all, where the options name no threshold."""
        if self.options.false_negatives is None:
            return None
        masks = {name: teacher["mask"] for name, teacher in self.teachers.items()}
        within = [self.within(modality, masks) for modality in MODALITIES]
        return NegativesMask(within, self.options.false_negatives, self.student.row_offset)


def unscreened_mask(teacher: Mapping[str, Tensor]) -> Tensor:
    """The pairs that a teacher has features of, `(rows,)` bool, available or not."""
    return teacher.get("unscreened_mask", teacher["mask"])


def combined_target(features: Tensor, weights: Tensor, form: str | None, unit: bool) -> Tensor:
    """One target from the aligned features of several teachers.

    - mean: ``M_i = sum_k w_ik t_ik / sum_k w_ik``
    - leave_one_out: the same with ``w_ik`` times ``max(0, cos(t_ik, M_i without k))``, the agreement of a teacher with
      the mean of the others. Where none agrees, or there is only one, it is the mean.

    Args:
        features: `(rows, teachers, dim)`.
        weights: `(rows, teachers)`, at least 0; 0 where a teacher has no features.
        form: leave_one_out; any other is the mean.
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
