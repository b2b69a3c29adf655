"""The losses between student and captions or targets, as pure functions of tensors.

Each works on the rows of one process against the columns of all (`row_offset` says where the rows lie among the
columns) and divides by its number of rows, masked rows included, so that the mean over processes of the local losses
is the loss of the whole batch, in value and in gradient, whatever the masks. Similarities and softmax are computed in
fp32 even under autocast: at a scale of 100 bf16 logits turn the gradient by a fifth of its length. The losses that copy
relations between samples are in `mmkd.distillation.losses`, those of heads for single teachers in
`mmkd.distillation.heads`.

Shapes: `rows` are this process' samples, `columns` those of all processes (equal to `rows` on one process).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.training.chunked_softmax import EXCLUDED, Block, softmax_cross_entropy

PAPER_INTERACTIVE_SCALE = math.log(1 / 0.07)  # the released code uses it without exponentiating it


def interactive(
    image: Tensor,
    text: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    available: Tensor,
    scale: Tensor | float = PAPER_INTERACTIVE_SCALE,
    row_offset: int = 0,
) -> Tensor:
    """Interactive contrastive learning (ICL): ``1/2 [CE(scale * S_i T_t^T) + CE(scale * S_t T_i^T)]``.

    The student's image must find the teacher's text of its own pair among all teacher texts, and its text the
    teacher's image. Source: Yang et al. 2024 (CLIP-KD). The paper's code uses the constant ``ln(1/0.07)`` as `scale`
    and teacher features as stored; the corrected form has an exponentiated learnable scale and unit-norm features.

    Args:
        image: `(rows, dim)` unit-norm student image features.
        text: `(rows, dim)` unit-norm student text features.
        teacher_images: `(columns, dim)` teacher image features.
        teacher_texts: `(columns, dim)` teacher text features.
        available: `(columns,)` bool, False where no teacher knows the pair: it neither counts nor competes.
        scale: the multiplier of the similarities.
        row_offset: column of the first row.
    """
    own = torch.arange(len(image), device=image.device) + row_offset
    target = torch.where(available[own], own, -1)
    unknown = ~available[None]

    def excluded(begin: int, end: int) -> Tensor:
        return unknown.expand(end - begin, -1)

    to_texts = softmax_cross_entropy(image, teacher_texts, scale, target, excluded)
    to_images = softmax_cross_entropy(text, teacher_images, scale, target, excluded)
    return (to_texts + to_images) / (2 * len(image))


def feature_squared(student: Tensor, target: Tensor, available: Tensor) -> Tensor:
    """Feature distillation as in the paper: ``mean_i mean_d (s_id - t_id)^2`` over available samples.

    Args:
        student: `(rows, dim)` unit-norm student features.
        target: `(rows, dim)` teacher targets, as stored (paper) or unit-norm.
        available: `(rows,)` bool; a sample without a target adds zero.
    """
    squared = (student.float() - target.float()).square().mean(dim=1)
    return (squared * available).sum() / len(student)


def feature_cosine(student: Tensor, target: Tensor, available: Tensor) -> Tensor:
    """Feature distillation by direction: ``mean_i (1 - cos(s_i, t_i))`` over available samples.

    For unit-norm targets this is ``dim / 2`` times `feature_squared`, a weight that does not depend on the width.

    Args:
        student: `(rows, dim)` student features.
        target: `(rows, dim)` teacher targets of any norm.
        available: `(rows,)` bool; a sample without a target adds zero.
    """
    cosine = F.cosine_similarity(student.float(), target.float(), dim=1)
    return ((1 - cosine) * available).sum() / len(student)


# Section: Losses that copy the teachers' relations between samples: softmax per teacher, then averaged.
#
# A teacher's similarities need no space in common with the student and no equal width, so raw features of any teacher
# serve. Each teacher's softmax has its own inverse temperature; the mean over the teachers that know a sample is taken
# after the softmax, because similarities of different teachers are not on one scale. Like every loss of the project
# these
# work on the rows of one process against the columns of all (`mmkd.distillation.losses`), some rows at a time
# (`mmkd.training.chunked_softmax`).


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
