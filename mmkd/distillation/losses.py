"""The losses between student and teachers, as pure functions of tensors.

Each works on the rows of one process against the columns of all (`row_offset` is the column of the first row) and
divides by its number of rows, masked rows included, so that the mean over processes of the local losses is the loss of
the whole batch, in value and in gradient, whatever the masks. Similarities and softmax are computed in fp32 even under
autocast: at a scale of 100 bf16 logits turn the gradient by a fifth of its length.

The losses that copy relations between samples (`affinity`, `relational`) need no space in common with the student and
no equal width, so raw features of any teacher serve. The mean over teachers is taken after the softmax, because
similarities of different teachers are not on one scale.

A mask is True where a sample takes part. `chunk` computes that many rows of similarities at a time, with the same
result to rounding (`mmkd.training.chunked_loss`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.training.chunked_loss import sum_over_rows
from mmkd.training.objectives import MASKED

PAPER_INTERACTIVE_SCALE = math.log(1 / 0.07)  # the released code uses it without exponentiating it


def interactive(
    image: Tensor,
    text: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    mask: Tensor,
    scale: Tensor | float = PAPER_INTERACTIVE_SCALE,
    row_offset: int = 0,
    chunk: int | None = None,
) -> Tensor:
    """Interactive contrastive learning (ICL): ``1/2 [CE(scale * S_i T_t^T) + CE(scale * S_t T_i^T)]``.

    The student's image is classified among the teacher texts of all pairs, and its text among the teacher images.
    Source: Yang et al. 2024 (CLIP-KD). The paper's code uses the constant ``ln(1/0.07)`` as `scale` and teacher
    features as stored; the corrected form has an exponentiated learnable scale and unit-norm features.

    Args:
        image: `(rows, dim)` unit-norm student image features.
        text: `(rows, dim)` unit-norm student text features.
        teacher_images: `(columns, dim)` teacher image features.
        teacher_texts: `(columns, dim)` teacher text features.
        mask: `(columns,)` bool, the pairs with a teacher; the others are neither rows nor negatives.
        scale: the multiplier of the similarities.
        row_offset: column of the first row.
        chunk: rows at a time, None for all.
    """
    own = torch.arange(len(image), device=image.device) + row_offset
    target = torch.where(mask[own], own, -1)

    def cross_entropy(rows: Tensor, columns: Tensor, scale: Tensor, part: slice) -> Tensor:
        logits = (scale * (rows @ columns.T)).masked_fill(~mask, MASKED)
        return F.cross_entropy(logits, target[part], ignore_index=-1, reduction="sum")

    to_texts = sum_over_rows(cross_entropy, image, teacher_texts, scale, chunk)
    to_images = sum_over_rows(cross_entropy, text, teacher_images, scale, chunk)
    return (to_texts + to_images) / (2 * len(image))


def feature_squared(student: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Feature distillation as in the paper: ``mean_i mean_d (s_id - t_id)^2`` over samples with a target.

    Args:
        student: `(rows, dim)` unit-norm student features.
        target: `(rows, dim)` teacher targets, as stored (paper) or unit-norm.
        mask: `(rows,)` bool; a sample without a target adds zero.
    """
    squared = (student.float() - target.float()).square().mean(dim=1)
    return (squared * mask).sum() / len(student)


def feature_cosine(student: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Feature distillation by direction: ``mean_i (1 - cos(s_i, t_i))`` over samples with a target.

    For unit-norm targets this is ``dim / 2`` times `feature_squared`, a weight that does not depend on the width.

    Args:
        student: `(rows, dim)` student features.
        target: `(rows, dim)` teacher targets of any norm.
        mask: `(rows,)` bool; a sample without a target adds zero.
    """
    cosine = F.cosine_similarity(student.float(), target.float(), dim=1)
    return ((1 - cosine) * mask).sum() / len(student)


@dataclass(frozen=True)
class TeacherSimilarity:
    """One teacher's similarities between this process' samples and those of all processes.

    Attributes:
        rows: `(rows, width)` unit-norm features of this process' samples, in one modality.
        columns: `(columns, width)` unit-norm features of all samples, in the same modality or the other.
        weights: `(rows,)` how much the teacher counts for each row, at least 0; 0 where it has no features.
        mask: `(columns,)` bool, the columns that its softmax runs over.
        scale: inverse temperature of its softmax.
    """

    rows: Tensor
    columns: Tensor
    weights: Tensor
    mask: Tensor
    scale: float


def teacher_mean(teachers: Sequence[TeacherSimilarity], part: slice, row_offset: int | None = None) -> Tensor:
    """Mean of the teachers' softmax: ``p(j|i) = sum_k w_ik p_k(j|i) / sum_k w_ik``.

    ``p_k(j|i) = softmax_j c_k <a_ik, b_jk>`` over the columns of teacher k's mask. No step depends on the values of a
    mask: choosing rows or columns by one would make the processor wait for the device.

    Args:
        teachers: one for each teacher.
        part: the rows to compute.
        row_offset: column of the first row of all, to leave each row's own column out; None keeps it.

    Returns:
        `(rows of the part, columns)`, a zero row where no teacher counts.
    """
    rows = teachers[0].rows[part]
    mean, total = rows.new_zeros(len(rows), len(teachers[0].columns)).float(), rows.new_zeros(len(rows)).float()
    for teacher in teachers:
        weights = teacher.weights[part].float()
        logits = (teacher.rows[part].float() * teacher.scale) @ teacher.columns.float().T
        logits.masked_fill_(~teacher.mask, MASKED)
        if row_offset is not None:
            own = torch.arange(part.start, part.start + len(mean), device=mean.device) + row_offset
            logits.scatter_(1, own[:, None], MASKED)
            weights = weights * (teacher.mask.sum() > teacher.mask[own])  # a row without another column does not count
        logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
        mean.addcmul_(logits, (weights / logits.sum(dim=1))[:, None])
        total += weights
    return mean.div_(total.clamp(min=1e-12)[:, None])


def affinity(
    image: Tensor,
    text: Tensor,
    all_images: Tensor,
    all_texts: Tensor,
    to_texts: Sequence[TeacherSimilarity],
    to_images: Sequence[TeacherSimilarity],
    scale: Tensor | float,
    chunk: int | None = None,
) -> Tensor:
    """Affinity distillation: the student's image-text softmax follows the mean of the teachers'.

    ``1/2 mean_i [CE(p(.|i), softmax(scale * <S_i, T_j>)) + the same from texts to images]`` with p the `teacher_mean`.
    A row without a teacher adds zero. Source: Vasu et al. 2024 (MobileCLIP), which averages teachers after the softmax;
    Yang et al. 2024 (CLIP-KD: contrastive relational distillation).

    Args:
        image: `(rows, dim)` unit-norm student image features.
        text: `(rows, dim)` unit-norm student text features.
        all_images: `(columns, dim)` the same of all processes.
        all_texts: `(columns, dim)` the same of all processes.
        to_texts: per teacher its similarities of images with texts.
        to_images: per teacher its similarities of texts with images.
        scale: the student's multiplier, the exponential of a logit scale.
        chunk: rows at a time, None for all.
    """

    def one_way(own: Tensor, others: Tensor, teachers: Sequence[TeacherSimilarity]) -> Tensor:
        def cross_entropy(rows: Tensor, columns: Tensor, scale: Tensor, part: slice) -> Tensor:
            log_student = F.log_softmax(scale * (rows @ columns.T), dim=1)
            return -(teacher_mean(teachers, part) * log_student).sum()

        return sum_over_rows(cross_entropy, own, others, scale, chunk)

    return (one_way(image, all_texts, to_texts) + one_way(text, all_images, to_images)) / (2 * len(image))


def relational(
    student: Tensor,
    all_students: Tensor,
    teachers: Sequence[TeacherSimilarity],
    scale: Tensor | float,
    row_offset: int = 0,
    chunk: int | None = None,
) -> Tensor:
    """Intra-modal relational distillation: the student's neighbours within one modality follow the teachers'.

    ``mean_i KL(p(.|i) || softmax_{j != i} (scale * <s_i, s_j>))`` with p the `teacher_mean` without the own column. It
    does not depend on captions through another modality. Source: relational KL of Yang et al. 2024 (CRD), averaged
    over teachers after the softmax as in Vasu et al. 2024 (MobileCLIP).

    Args:
        student: `(rows, dim)` unit-norm student features of one modality.
        all_students: `(columns, dim)` the same of all processes.
        teachers: per teacher its similarities within that modality.
        scale: multiplier of the student's similarities (an inverse temperature).
        row_offset: column of the first row.
        chunk: rows at a time, None for all.
    """
    own = (torch.arange(len(student), device=student.device) + row_offset)[:, None]

    def kl(rows: Tensor, columns: Tensor, scale: Tensor, part: slice) -> Tensor:
        logits = (scale * (rows @ columns.T)).scatter(1, own[part], MASKED)
        return F.kl_div(F.log_softmax(logits, dim=1), teacher_mean(teachers, part, row_offset), reduction="sum")

    return sum_over_rows(kl, student, all_students, scale, chunk) / len(student)
