"""The objective of stage 2: the student, its losses towards captions and teachers, and everything learnable about them.

`DistillObjective.loss` returns ``{"loss": ..., part: ...}``, so that an optimizer built from the objective cannot miss
a learnable scale. A loss of weight zero is not computed, and features that only it needs may be missing in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmkd.data.features.lookup import MODALITIES, Modality
from mmkd.distillation import losses
from mmkd.distillation.heads import TeacherHeads, heads_loss
from mmkd.distillation.options import ALIGNED_LOSSES, DistillOptions
from mmkd.distillation.targets import TeacherSimilarities, TeacherWeights, combined_target, teacher_weights
from mmkd.distillation.weighting import sample_teacher
from mmkd.distributed import gather
from mmkd.student.embed import embed
from mmkd.training.objectives import Embeddings, Objective, gathered, task_loss


class DistillObjective(Objective):
    """Stage 2: the student learns from captions and from stored features of many teachers.

    ``loss = sum of weights[name] * part``, with the parts

    - task: InfoNCE with the captions,
    - affinity: the student's image-text softmax against the mean of the teachers', from raw features,
    - feature: the student's features against a target made of the aligned features of the sample's teachers,
    - interactive: the student's features against those targets of the whole batch, across modalities,
    - relational: the student's neighbours within a modality against those of every teacher, from raw features,
    - heads: the output of a head for each teacher against that teacher's raw features.
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
        student, options = gathered(embeddings), self.options
        teachers = TeacherSimilarities(batch, student.row_offset, options) if options.reasons_for_raw() else None
        weights = teacher_weights(batch, options, self.seed, teachers, self.training)
        parts: dict[str, Tensor] = {}
        if self.weights["task"]:
            mask = None if teachers is None else teachers.negatives_mask()
            parts["task"] = task_loss(student, self.model, mask)
        if any(self.weights[name] for name in ALIGNED_LOSSES):
            parts |= self._aligned_losses(student, batch["aligned"], weights, batch)
        if teachers is not None:
            parts |= self._raw_losses(student, teachers, weights, batch)
        total = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return {"loss": total, **parts}

    def _aligned_losses(
        self, student: Embeddings, aligned: Mapping[str, Any], weights: TeacherWeights, batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        names, options = sorted(aligned), self.options
        share = torch.stack([weights[name] for name in names], dim=1)
        if options.target == "random":
            share = sample_teacher(share > 0, self.seed, batch["epoch"], batch["index"]).float()
        form: Literal["mean", "leave_one_out"] = "leave_one_out" if options.target == "leave_one_out" else "mean"
        image, text = (
            combined_target(
                torch.stack([aligned[name][modality].float() for name in names], dim=1),
                share,
                form,
                options.target_norm == "unit",
            )
            for modality in MODALITIES
        )
        mask = share.sum(dim=1) > 0
        parts = {}
        if self.weights["feature"]:
            error = losses.feature_cosine if options.feature_form == "cosine" else losses.feature_squared
            parts["feature"] = error(student.image, image, mask) + error(student.text, text, mask)
        if self.weights["interactive"]:
            learned = self.interactive_logit_scale
            scale = losses.PAPER_INTERACTIVE_SCALE if learned is None else learned.exp()
            columns = gather(image), gather(text), gather(mask)
            offset, chunk = student.row_offset, student.chunk
            parts["interactive"] = losses.interactive(student.image, student.text, *columns, scale, offset, chunk)
        return parts

    def _raw_losses(
        self, student: Embeddings, teachers: TeacherSimilarities, weights: TeacherWeights, batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        parts = {}
        image, text, all_images, all_texts, row_offset = student
        if self.weights["affinity"]:
            own = self.affinity_logit_scale
            scale = (self.model.get_parameter("logit_scale") if own is None else own).float().exp()
            both = teachers.across("image", weights), teachers.across("text", weights)
            parts["affinity"] = losses.affinity(image, text, all_images, all_texts, *both, scale, student.chunk)
        if self.weights["heads"]:
            assert self.heads is not None
            own_features: dict[Modality, Tensor] = {"image": image, "text": text}
            parts["heads"] = heads_loss(self.heads, own_features, teachers.teachers, weights, self.dispersions)
        if self.weights["relational"]:
            unscreened, fixed = self.options.relational_teachers == "all", self.options.relational_scale
            if unscreened:
                weights = teacher_weights(batch, self.options, self.seed, teachers, self.training, unscreened)
            images = teachers.within("image", weights, unscreened)
            texts = teachers.within("text", weights, unscreened)
            of_images = losses.relational(image, all_images, images, fixed, row_offset, student.chunk)
            of_texts = losses.relational(text, all_texts, texts, fixed, row_offset, student.chunk)
            parts["relational"] = (of_images + of_texts) / 2
        return parts
