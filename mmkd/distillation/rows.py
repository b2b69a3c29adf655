"""The rows that a loss compares: all of a batch, or those with a caption.

Images without captions are most of an archive. In a training set they take part in the losses of images alone
(relational, heads and feature of images); every other loss sees the captioned rows, as if the batch held no others.
Processes may then hold different numbers of rows. Each loss is a mean over the rows of its process, and the mean over
processes of ``weight * loss`` is the mean over all captioned rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mmkd.data.features.lookup import Modality
from mmkd.distillation.targets import TeacherSimilarities
from mmkd.distributed import gather, rank, world_size
from mmkd.training.objectives import Embeddings


@dataclass(frozen=True)
class Rows:
    """Rows of this process against the columns of all processes.

    Attributes:
        student: their features.
        teachers: their similarities, None where no loss reads raw features.
        batch: what else is known of them; tensors have one entry for each row.
        columns: `(columns of the batch,)` bool, the columns compared with; None for all.
        weight: of a mean over these rows in the mean over processes.
    """

    student: Embeddings
    teachers: TeacherSimilarities | None
    batch: Mapping[str, Any]
    columns: Tensor | None = None
    weight: float = 1.0

    def features(self, modality: Modality) -> tuple[Tensor, Tensor]:
        """The student's features of a modality: these rows `(rows, dim)` and those of all processes."""
        student = self.student
        return (student.image, student.all_images) if modality == "image" else (student.text, student.all_texts)

    def gather(self, values: Tensor) -> Tensor:
        """Values of these rows, `(rows, ...)`, from all processes, `(columns, ...)`."""
        if self.columns is None:
            return gather(values)
        padded = values.new_zeros(len(self._captioned), *values.shape[1:])
        padded[self._captioned] = values
        return gather(padded)[self.columns]

    @cached_property
    def _captioned(self) -> Tensor:
        assert self.columns is not None
        return self.columns.view(world_size(), -1)[rank()]


def captioned_rows(whole: Rows) -> Rows:
    """The rows of a batch whose ``captioned`` `(rows,)` is True.

    Raises:
        ValueError: no row of a batch on a process has a caption; the message has the size of the batch.
    """
    own: Tensor = whole.batch["captioned"]
    columns = gather(own)
    if columns.all():
        return whole
    counts = columns.view(world_size(), -1).sum(dim=1)
    if not counts.all():
        raise ValueError(
            f"a batch of {len(own)} pairs on a process has no caption at all; raise --batch_size, or train on more "
            "captioned pairs"
        )
    image, text, all_images, all_texts, _ = whole.student
    offset, count = int(counts[: rank()].sum()), int(counts[rank()])
    student = Embeddings(image[own], text[own], all_images[columns], all_texts[columns], offset)
    teachers = None if whole.teachers is None else _selected(whole.teachers, own, columns, offset)
    kept = torch.nonzero(own)[:, 0].tolist()
    batch = {key: _chosen(value, own, kept) for key, value in whole.batch.items()}
    return Rows(student, teachers, batch, columns, count * world_size() / int(counts.sum()))


def _selected(teachers: TeacherSimilarities, rows: Tensor, columns: Tensor, row_offset: int) -> TeacherSimilarities:
    """The similarities of some rows `(rows,)` and columns `(columns,)` alone, both bool."""
    chosen = copy(teachers)
    chosen.row_offset = row_offset
    chosen.teachers = {n: {k: v[rows] for k, v in teacher.items()} for n, teacher in teachers.teachers.items()}
    chosen.rows = {key: features[rows] for key, features in teachers.rows.items()}
    chosen.columns = {key: features[columns] for key, features in teachers.columns.items()}
    chosen.masks = {name: mask[columns] for name, mask in teachers.masks.items()}
    chosen.unscreened_masks = {name: mask[columns] for name, mask in teachers.unscreened_masks.items()}
    return chosen


def _chosen(value: Any, rows: Tensor, kept: list[int]) -> Any:
    """A tensor, a list or nested mappings of either, of some rows alone; anything else as it is."""
    if isinstance(value, Tensor) and value.ndim and len(value) == len(rows):
        return value[rows]
    if isinstance(value, list) and len(value) == len(rows):
        return [value[row] for row in kept]
    if isinstance(value, Mapping):
        return {key: _chosen(nested, rows, kept) for key, nested in value.items()}
    return value
