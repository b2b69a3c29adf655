"""Losses that copy the teachers' relations between samples: softmax per teacher, then averaged.

A teacher's similarities need no space in common with the student and no equal width, so raw features of any teacher
serve. Each teacher's softmax has its own inverse temperature; the mean over the teachers that know a sample is taken
after the softmax, because similarities of different teachers are not on one scale. Like every loss of the project these
work on the rows of one process against the columns of all (`mmkd.losses`), some rows at a time (`mmkd.chunked`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmkd.chunked import EXCLUDED, Block, softmax_cross_entropy


class View(NamedTuple):
    """What one teacher sees when samples of one modality look at samples of one modality.

    Attributes:
        rows: `(rows, width)` its unit-norm features of this process' samples.
        columns: `(columns, width)` its unit-norm features of all processes' samples.
        weight: `(rows,)` how much it counts for each row, at least 0; 0 where it does not know the sample.
        known: `(columns,)` bool, which columns it knows; the others do not compete.
        scale: inverse temperature of its softmax.
    """

    rows: Tensor
    columns: Tensor
    weight: Tensor
    known: Tensor
    scale: float


def affinity(
    image: Tensor,
    text: Tensor,
    all_images: Tensor,
    all_texts: Tensor,
    to_texts: Sequence[View],
    to_images: Sequence[View],
    scale: Tensor | float,
) -> Tensor:
    """Affinity distillation: the student's image-text softmax follows the mean of the teachers'.

    Per teacher k, ``p_k(j|i) = softmax over {j: k knows j} of c_k <a_ik, b_jk>`` with its image features a and text
    features b; ``p = sum_k w_ik p_k / sum_k w_ik``; the loss is ``1/2 mean_i [CE(p(.|i), softmax(scale * <S_i, T_j>)) +
    the same from texts to images]``. A row that no teacher knows adds zero. Source: Vasu et al. 2024 (MobileCLIP),
    which averages teachers after the softmax; Yang et al. 2024 (CLIP-KD: contrastive relational distillation).

    Args:
        image: `(rows, dim)` unit-norm student image features.
        text: `(rows, dim)` unit-norm student text features.
        all_images: `(columns, dim)` the same of all processes.
        all_texts: `(columns, dim)` the same of all processes.
        to_texts: per teacher its view from images to texts.
        to_images: per teacher its view from texts to images.
        scale: the student's multiplier, the exponential of a logit scale.
    """
    from_images = softmax_cross_entropy(image, all_texts, scale, teacher_mean(to_texts, len(all_texts)))
    from_texts = softmax_cross_entropy(text, all_images, scale, teacher_mean(to_images, len(all_images)))
    return (from_images + from_texts) / (2 * len(image))


def relational(
    student: Tensor, all_students: Tensor, views: Sequence[View], scale: Tensor | float, row_offset: int = 0
) -> Tensor:
    """Intra-modal relational distillation: the student's neighbours within one modality follow the teachers'.

    Per teacher k, ``p_k(j|i) = softmax over {j != i: k knows j} of c_k <a_ik, a_jk>``; ``p = sum_k w_ik p_k /
    sum_k w_ik`` over the teachers that know i and another sample; the loss is ``mean_i KL(p(.|i) || softmax_{j != i}
    (scale * <s_i, s_j>))``. It sees no caption through another modality. Source: relational KL of Yang et al. 2024
    (CRD), averaged over teachers after the softmax as in Vasu et al. 2024 (MobileCLIP).

    Args:
        student: `(rows, dim)` unit-norm student features of one modality.
        all_students: `(columns, dim)` the same of all processes.
        views: per teacher its view within that modality.
        scale: multiplier of the student's similarities (an inverse temperature).
        row_offset: column of the first row.
    """
    own = OwnColumns(len(student), len(all_students), row_offset, student.device)
    target = teacher_mean(views, len(all_students), own)
    return softmax_cross_entropy(student, all_students, scale, target, own, divergence=True) / len(student)


class OwnColumns:
    """Blocks of bool, True where the column is the row's own sample."""

    def __init__(self, rows: int, columns: int, row_offset: int, device: torch.device) -> None:
        """Row i is column ``row_offset + i``."""
        self.of_row = torch.arange(rows, device=device) + row_offset
        self.columns = torch.arange(columns, device=device)

    def __call__(self, begin: int, end: int) -> Tensor:
        """`(end - begin, columns)`."""
        return self.of_row[begin:end, None] == self.columns


def teacher_mean(views: Sequence[View], columns: int, own: OwnColumns | None = None) -> Block:
    """Blocks of ``p(j|i)``, the weighted mean over teachers of their softmax; zero rows where no teacher counts.

    Args:
        views: one for each teacher.
        columns: how many there are.
        own: leaves each row's own column out.
    """
    looks = [_Look(view, own) for view in views]

    def block(begin: int, end: int) -> Tensor:
        mean = views[0].rows.new_zeros((end - begin, columns), dtype=torch.float32)
        votes = mean.new_zeros(end - begin)
        for look in looks:
            look.add(mean, votes, begin, end)
        return mean.div_(votes.clamp(min=1e-12)[:, None])

    return block


class _Look:
    """One teacher's part of the mean; what it does not know is left out of the product, not masked in it."""

    def __init__(self, view: View, own: OwnColumns | None) -> None:
        self.view, self.own = view, own
        self.all_known = bool(view.known.all())
        self.known_columns = (view.columns if self.all_known else view.columns[view.known]).float()
        # Of each column its place among the known ones; those that are not share the place after the last, a zero.
        self.position = (view.known.long().cumsum(0) - 1).masked_fill(~view.known, len(self.known_columns))
        self.weight = view.weight
        if own is not None:  # a row sees the others only, and does not count where there are none
            others = len(self.known_columns) - view.known[own.of_row].long()
            self.weight = view.weight * (others > 0)

    def add(self, mean: Tensor, votes: Tensor, begin: int, end: int) -> None:
        """Add this teacher's weighted softmax of some rows, and its weights."""
        weight = self.weight[begin:end].float()
        row = weight.nonzero()[:, 0]
        if not len(row):
            return
        known = len(self.known_columns)
        shares = mean.new_zeros(len(row), known + (not self.all_known))
        logits = shares[:, :known]
        torch.mm(self.view.rows[begin:end][row].float().mul_(self.view.scale), self.known_columns.T, out=logits)
        if self.own is not None:
            own = self.own.of_row[begin:end][row]
            inside = self.view.known[own].nonzero()[:, 0]
            logits[inside, self.position[own[inside]]] = EXCLUDED
        logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
        logits.mul_((weight[row] / logits.sum(dim=1))[:, None])
        votes += weight
        mean.index_add_(0, row, shares if self.all_known else shares.index_select(1, self.position))
