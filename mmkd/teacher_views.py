"""A batch's raw teacher features, seen by the losses that compare samples with samples.

Features are gathered from all processes once and normalized once, however many losses read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.affinity import View
from mmkd.alignment import MODALITIES, Modality
from mmkd.distill_options import DistillOptions
from mmkd.distributed import gather
from mmkd.targets import FalseNegatives, Weights, kept_teachers, own_pair_probability, weights_by_name

OTHER: dict[Modality, Modality] = {"image": "text", "text": "image"}


class TeacherViews:
    """Every teacher's features of this process' rows and of all processes' columns."""

    def __init__(self, batch: Mapping[str, Any], row_offset: int, options: DistillOptions) -> None:
        """Normalize and gather ``batch["teachers"]``."""
        self.teachers: Mapping[str, Mapping[str, Tensor]] = batch["teachers"]
        self.row_offset, self.options = row_offset, options
        self.rows = {
            (modality, name): F.normalize(teacher[modality].float(), dim=1)
            for modality in MODALITIES
            for name, teacher in self.teachers.items()
        }
        self.columns = {key: gather(rows) for key, rows in self.rows.items()}
        self.known = {name: gather(teacher["mask"]) for name, teacher in self.teachers.items()}
        self.seen = {name: gather(teacher.get("seen", teacher["mask"])) for name, teacher in self.teachers.items()}

    def across(self, modality: Modality, counted: Weights) -> list[View]:
        """Per teacher its view from one modality to the other, at its own temperature."""
        return [
            View(
                self.rows[modality, name],
                self.columns[OTHER[modality], name],
                counted[name],
                self.known[name],
                self.options.teacher_scales.get(name, self.options.teacher_scale),
            )
            for name in self.teachers
        ]

    def within(self, modality: Modality, counted: Weights, every_seen: bool = False) -> list[View]:
        """Per teacher its view within a modality, among the pairs it is available for or among all it has seen."""
        scale, known = self.options.relational_scale, self.seen if every_seen else self.known
        return [
            View(self.rows[modality, name], self.columns[modality, name], counted[name], known[name], scale)
            for name in self.teachers
        ]

    def confidence(self) -> Weights:
        """Per teacher the probability it gives the own pair, the mean of both directions, `(rows,)`."""
        masks = {name: teacher["mask"] for name, teacher in self.teachers.items()}
        images, texts = self.across("image", masks), self.across("text", masks)
        return {
            name: (own_pair_probability(one, self.row_offset) + own_pair_probability(other, self.row_offset)) / 2
            for name, one, other in zip(self.teachers, images, texts, strict=True)
        }

    def false_negatives(self) -> FalseNegatives | None:
        """What the task loss leaves out, when the options name a threshold."""
        if self.options.false_negatives is None:
            return None
        masks = {name: teacher["mask"] for name, teacher in self.teachers.items()}
        views = [self.within(modality, masks) for modality in MODALITIES]
        return FalseNegatives(views, self.options.false_negatives, self.row_offset)


def teacher_weights(
    batch: Mapping[str, Any],
    options: DistillOptions,
    seed: int,
    raw: TeacherViews | None,
    training: bool,
    every_seen: bool = False,
) -> Weights:
    """How much each teacher counts for each row: availability, times settled weight, dropout and confidence.

    Args:
        batch: of this process, with ``teachers`` or ``aligned``.
        options: weights by name, dropout, confidence.
        seed: of the dropout.
        raw: views of raw features, for confidence.
        training: whether teachers drop out.
        every_seen: start from the pairs a teacher has features of, available or not.

    Returns:
        teacher -> `(rows,)` float32, of every teacher with raw or aligned features in the batch.
    """
    stores = [batch[key] for key in ("teachers", "aligned") if key in batch]
    masks = {
        name: teacher.get("seen", teacher["mask"]) if every_seen else teacher["mask"]
        for store in reversed(stores)
        for name, teacher in store.items()
    }
    if not masks:
        return {}
    names = sorted(masks)
    mask = torch.stack([masks[name] for name in names], dim=1)
    if options.teacher_dropout and training:
        mask = kept_teachers(mask, options.teacher_dropout, seed, batch["epoch"], batch["index"])
    counted = {name: mask[:, k].float() for k, name in enumerate(names)}
    if options.teacher_weights:
        for name, weight in counted.items():
            counted[name] = weight * weight.new_tensor(
                weights_by_name(options.teacher_weights, name, batch["modality"])
            )
    if options.confidence and raw is not None:
        counted |= {name: counted[name] * p.pow(options.confidence) for name, p in raw.confidence().items()}
    return counted
