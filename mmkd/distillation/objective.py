"""The objective of stage 2: the student, its losses towards captions and teachers, and everything learnable about them.

`DistillObjective.loss` returns ``{"loss": ..., part: ...}``, so that an optimizer built from the objective cannot miss
a learnable scale. A loss of weight zero is not computed, and features that only it needs may be missing in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmkd.data.features.lookup import Modality
from mmkd.distillation import losses
from mmkd.distillation.heads import TeacherHeads
from mmkd.distillation.options import ALIGNED_LOSSES, DistillOptions
from mmkd.distillation.targets import Rows, combined_target
from mmkd.distillation.weighting import sample_teacher
from mmkd.distributed import gather
from mmkd.student.embed import embed
from mmkd.training.dataset import rows_of
from mmkd.training.objectives import Objective, TaskLoss


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
        scales: Mapping[str, float] | None = None,
    ) -> None:
        """Put the student and the losses that `options` name together.

        Args:
            model: the student. Its ``logit_scale`` is frozen when no loss with a weight uses it.
            options: weights, temperatures, targets.
            seed: of random choices, which depend on it, the epoch and the pair's index alone.
            heads: needed when the heads loss has a weight.
            dispersions: ``MODALITY/TEACHER`` to the angular dispersion, when heads learn by angle.
            scales: inverse temperatures of teachers that replace those of `options`, see `spread_scales`.
        """
        super().__init__()
        self.model, self.options, self.seed = model, options, seed
        self.heads, self.dispersions, self.scales = heads, dict(dispersions or {}), dict(scales or {})
        self.weights = options.losses
        self.task = TaskLoss(options, model) if self.weights["task"] else None
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
        """Unit-norm ``image`` and ``text`` features of the student, `(rows, dim)`; its trunk where heads read it."""
        return embed(self.model, batch, self.heads is not None and self.options.head_input == "trunk")

    def loss(self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss`` and every part that has a weight, unweighted.

        ``captioned``, where the batch has it, is the number of rows with a caption, which come first and are equally
        many on all processes. The other images take part in the losses of images alone (relational, heads and feature
        of images); every other loss sees the captioned rows, as if the batch held no others.

        Raises:
            ValueError: no row has a caption; the message has the size of the batch.
        """
        rows = partial(Rows, options=self.options, scales=self.scales, seed=self.seed if self.training else None)
        whole = pairs = rows(embeddings, batch)
        if "captioned" in batch:
            captioned = slice(batch["captioned"])
            if captioned.stop < 1:
                raise ValueError(
                    f"a batch of {len(embeddings['image'])} pairs on a process has no caption at all; raise "
                    "--batch_size, or train on more captioned pairs"
                )
            pairs = rows(rows_of(embeddings, captioned), rows_of(batch, captioned))
        parts = {"task": self.task(pairs.student, self.model, pairs.batch, pairs.negatives_mask())} if self.task else {}
        if any(self.weights[name] for name in ALIGNED_LOSSES):
            parts |= self._aligned_losses(whole, pairs)
        if whole.teachers:
            parts |= self._raw_losses(whole, pairs)
        total = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return {"loss": total, **parts}

    def _aligned_losses(self, whole: Rows, pairs: Rows) -> dict[str, Tensor]:
        parts, (image, image_mask) = {}, self._target("image", whole)
        text, mask = self._target("text", pairs)
        if self.weights["feature"]:
            error = losses.feature_cosine if self.options.feature_form == "cosine" else losses.feature_squared
            parts["feature"] = error(whole.student.image, image, image_mask) + error(pairs.student.text, text, mask)
        if self.weights["interactive"]:
            if pairs is not whole:
                image = self._target("image", pairs)[0]
            learned = self.interactive_logit_scale
            scale = losses.PAPER_INTERACTIVE_SCALE if learned is None else learned.exp()
            own, (images, texts, masks) = pairs.student, map(gather, (image, text, mask))
            parts["interactive"] = losses.interactive(*own[:2], images, texts, masks, scale, *own[4:], own.chunk)
        return parts

    def _target(self, modality: Modality, rows: Rows) -> tuple[Tensor, Tensor]:
        """What the rows' aligned teachers make together in a modality, `(rows, dim)`, and which rows have any."""
        aligned, options, batch = rows.batch["aligned"], self.options, rows.batch
        names, weights = sorted(aligned), rows.weights()
        share = torch.stack([weights[name] for name in names], dim=1)
        if options.target == "random":
            share = sample_teacher(share > 0, self.seed, batch["epoch"], batch["index"]).float()
        features = torch.stack([aligned[name][modality].float() for name in names], dim=1)
        return combined_target(features, share, options.target, options.target_norm == "unit"), share.sum(dim=1) > 0

    def _raw_losses(self, whole: Rows, pairs: Rows) -> dict[str, Tensor]:
        parts, student = {}, pairs.student
        if self.weights["affinity"]:
            own, weights = self.affinity_logit_scale, pairs.weights()
            scale = (self.model.get_parameter("logit_scale") if own is None else own).float().exp()
            both = pairs.across("image", weights), pairs.across("text", weights)
            parts["affinity"] = losses.affinity(*student[:4], *both, scale, student.chunk)
        if self.weights["heads"]:
            parts["heads"] = (self._heads("image", whole) + self._heads("text", pairs)) / 2
        if self.weights["relational"]:
            parts["relational"] = (self._relational("image", whole) + self._relational("text", pairs)) / 2
        return parts

    def _heads(self, modality: Modality, rows: Rows) -> Tensor:
        assert self.heads is not None
        features = rows.batch.get(f"{modality}_trunk", rows.batch[modality])
        return self.heads.loss(features, modality, rows.teachers, rows.weights(), self.dispersions)

    def _relational(self, modality: Modality, rows: Rows) -> Tensor:
        unscreened, scale = self.options.relational_teachers == "all", self.options.relational_scale
        teachers = rows.within(modality, rows.weights(unscreened), unscreened)
        others = rows.student.all_images if modality == "image" else rows.student.all_texts
        return losses.relational(rows.batch[modality], others, teachers, scale, *rows.student[4:], rows.student.chunk)
