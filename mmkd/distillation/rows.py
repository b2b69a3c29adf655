"""The rows that a loss compares: all of a batch, or those with a caption, which come first.

Images without captions are most of an archive. In a training set they take part in the losses of images alone
(relational, heads and feature of images); every other loss sees the captioned rows, as if the batch held no others.
Every process has equally many of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmkd.data.features.lookup import Modality
from mmkd.distillation.targets import TeacherSimilarities
from mmkd.distributed import rank
from mmkd.training.dataset import rows_of
from mmkd.training.objectives import Embeddings


@dataclass(frozen=True)
class Rows:
    """Rows of this process against the columns of all processes.

    Attributes:
        student: their features.
        teachers: their similarities, None where no loss reads raw features.
        batch: what else is known of them; tensors have one entry for each row.
    """

    student: Embeddings
    teachers: TeacherSimilarities | None
    batch: Mapping[str, Any]

    def features(self, modality: Modality) -> tuple[Tensor, Tensor]:
        """The student's features of a modality: these rows `(rows, dim)` and those of all processes."""
        student = self.student
        return (student.image, student.all_images) if modality == "image" else (student.text, student.all_texts)


def captioned_rows(whole: Rows, count: int) -> Rows:
    """The first `count` rows of each process' batch.

    Raises:
        ValueError: there is none; the message has the size of the batch.
    """
    image, text, all_images, all_texts, _ = whole.student
    size = len(image)
    if count < 1:
        raise ValueError(
            f"a batch of {size} pairs on a process has no caption at all; raise --batch_size, or train on more "
            "captioned pairs"
        )

    def first(columns: Tensor) -> Tensor:
        return columns.unflatten(0, (-1, size))[:, :count].flatten(0, 1)

    offset = rank() * count
    student = Embeddings(image[:count], text[:count], first(all_images), first(all_texts), offset)
    teachers = copy(whole.teachers)
    if teachers is not None:
        teachers.row_offset = offset
        teachers.teachers = rows_of(teachers.teachers, slice(count))
        teachers.rows = rows_of(teachers.rows, slice(count))
        teachers.columns = {key: first(features) for key, features in teachers.columns.items()}
        teachers.masks = {name: first(mask) for name, mask in teachers.masks.items()}
        teachers.unscreened_masks = {name: first(mask) for name, mask in teachers.unscreened_masks.items()}
    return Rows(student, teachers, rows_of(whole.batch, slice(count)))
