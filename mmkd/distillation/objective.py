"""What is trained: a model, its losses and everything learnable about them in one module.

`forward(batch)` returns ``{"loss": ..., part: ...}``, so that wrapping the objective for several processes synchronizes
every gradient, and an optimizer built from it cannot forget a learnable scale. It is two steps: `encode` maps each row
by itself, so that a batch may be encoded in pieces and put together again, and `loss` compares the rows of all
processes. A loss of weight zero is not computed, and what only it would read need not be in the batch.

A batch holds what `mmkd.student.embed.embed` reads, ``index`` `(rows,)`, ``ids`` and, for distillation, ``teachers``
(raw
features) and ``aligned`` (features in the student's width), each ``{teacher: {"image": (rows, width), "text": (rows,
width), "mask": (rows,) bool}}``; the loop adds ``epoch``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmkd.data.features.lookup import MODALITIES
from mmkd.distillation import losses
from mmkd.distillation.heads import TeacherHeads, angular_error, mean_over_teachers, standardized_error
from mmkd.distillation.losses import affinity, relational
from mmkd.distillation.options import ALIGNED_LOSSES, DistillOptions
from mmkd.distillation.targets import TeacherViews, Weights, combined_target, drawn_teacher, teacher_weights
from mmkd.distributed import gather
from mmkd.student.embed import embed
from mmkd.training.objectives import Embeddings, Objective, _task_loss, gathered


class DistillObjective(Objective):
    """Stage 2: the student learns from captions and from stored features of many teachers.

    ``loss = sum of weights[name] * part``, with the parts

    - task: InfoNCE with the captions,
    - affinity: the student's image-text softmax against the mean of the teachers', from raw features,
    - feature: the student's features against a target made of the aligned features of the sample's teachers,
    - interactive: the student's features against those targets of the whole batch, across modalities,
    - relational: the student's neighbours within a modality against those of every teacher, from raw features,
    - heads: what a head for each teacher makes of the student's features against that teacher's raw features.
    """

    def __init__(
        self,
        model: nn.Module,
        options: DistillOptions,
        *,
        seed: int = 0,
        heads: TeacherHeads | None = None,
        dispersions: Mapping[str, float] | None = None,
    ) -> None:
        """Put the student and the losses that `options` name together.

        Args:
            model: the student. Its ``logit_scale`` is frozen when no loss with a weight uses it.
            options: weights, temperatures, targets.
            seed: of random choices, which depend on it, the epoch and the pair's index alone.
            heads: needed when the heads loss has a weight.
            dispersions: ``MODALITY/TEACHER`` to the angular dispersion, when heads learn by angle.
        """
        super().__init__()
        self.model, self.options, self.seed = model, options, seed
        self.heads, self.dispersions = heads, dict(dispersions or {})
        self.weights = options.losses
        shared = self.weights["affinity"] > 0 and options.affinity_scale == "shared"
        if self.weights["task"] == 0 and not shared:
            model.get_parameter("logit_scale").requires_grad_(False)
        self.interactive_logit_scale: nn.Parameter | None = None
        if self.weights["interactive"] > 0 and options.interactive_scale == "learnable":
            self.interactive_logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))
        self.affinity_logit_scale: nn.Parameter | None = None
        if self.weights["affinity"] > 0 and options.affinity_scale == "own":
            self.affinity_logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Unit-norm ``image`` and ``text`` features of the student, `(rows, dim)`."""
        return embed(self.model, batch)

    def loss(self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss`` and every part that has a weight, unweighted."""
        student = gathered(embeddings)
        parts: dict[str, Tensor] = {}
        raw = TeacherViews(batch, student.row_offset, self.options) if self.options.reasons_for_raw() else None
        counted = teacher_weights(batch, self.options, self.seed, raw, self.training)
        if self.weights["task"]:
            excluded = None if raw is None else raw.false_negatives()
            parts["task"] = _task_loss(student, self.model, excluded)
        if any(self.weights[name] for name in ALIGNED_LOSSES):
            parts |= self._aligned_losses(student, batch["aligned"], counted, batch)
        if raw is not None:
            parts |= self._raw_losses(student, raw, counted, batch)
        total = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return {"loss": total, **parts}

    def _aligned_losses(
        self, student: Embeddings, aligned: Mapping[str, Any], counted: Weights, batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        names, form, options = sorted(aligned), self.options.target, self.options
        weights = torch.stack([counted[name] for name in names], dim=1)
        if form == "random":
            weights = drawn_teacher(weights > 0, self.seed, batch["epoch"], batch["index"]).float()
        unit, known = options.target_norm == "unit", weights.sum(dim=1) > 0
        image, text = (
            combined_target(
                torch.stack([aligned[name][modality].float() for name in names], dim=1),
                weights,
                "leave_one_out" if form == "leave_one_out" else "mean",
                unit,
            )
            for modality in MODALITIES
        )
        parts = {}
        if self.weights["feature"]:
            error = losses.feature_cosine if options.feature_form == "cosine" else losses.feature_squared
            parts["feature"] = error(student.image, image, known) + error(student.text, text, known)
        if self.weights["interactive"]:
            learned = self.interactive_logit_scale
            scale = losses.PAPER_INTERACTIVE_SCALE if learned is None else learned.exp()
            columns = gather(image), gather(text), gather(known)
            parts["interactive"] = losses.interactive(student.image, student.text, *columns, scale, student.row_offset)
        return parts

    def _raw_losses(
        self, student: Embeddings, raw: TeacherViews, counted: Weights, batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        parts = {}
        image, text, all_images, all_texts, row_offset = student
        if self.weights["affinity"]:
            own = self.affinity_logit_scale
            scale = (self.model.get_parameter("logit_scale") if own is None else own).float().exp()
            views = raw.across("image", counted), raw.across("text", counted)
            parts["affinity"] = affinity(image, text, all_images, all_texts, *views, scale)
        if self.weights["relational"]:
            fixed, every_seen = self.options.relational_scale, self.options.relational_teachers == "all"
            if every_seen:
                counted_here = teacher_weights(batch, self.options, self.seed, raw, self.training, every_seen)
            else:
                counted_here = counted
            of_images = relational(image, all_images, raw.within("image", counted_here, every_seen), fixed, row_offset)
            of_texts = relational(text, all_texts, raw.within("text", counted_here, every_seen), fixed, row_offset)
            parts["relational"] = (of_images + of_texts) / 2
        if self.weights["heads"]:
            parts["heads"] = self._heads_loss({"image": image, "text": text}, raw.teachers, counted)
        return parts

    def _heads_loss(self, student: Mapping[str, Tensor], teachers: Mapping[str, Any], counted: Weights) -> Tensor:
        assert self.heads is not None
        total = student["image"].new_zeros(())
        for modality in MODALITIES:
            errors = {}
            for name, teacher in teachers.items():
                said = self.heads(name, student[modality], modality)
                target = self.heads.targets(name, teacher[modality], modality)
                dispersion = self.dispersions.get(f"{modality}/{name}")
                errors[name] = (
                    standardized_error(said, target) if dispersion is None else angular_error(said, target, dispersion)
                )
            total = total + mean_over_teachers(errors, counted) / 2
        return total
