"""Every loss of the project as a pure function of tensors.

Each works on the rows of one process against the columns of all (`row_offset` says where the rows lie among the
columns) and divides by its number of rows, masked rows included, so that the mean over processes of the local losses
is the loss of the whole batch, in value and in gradient, whatever the masks. Similarities and softmax are computed in
fp32 even under autocast: at a scale of 100 bf16 logits turn the gradient by a fifth of its length.

Shapes: `rows` are this process' samples, `columns` those of all processes (equal to `rows` on one process).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PAPER_INTERACTIVE_SCALE = math.log(1 / 0.07)  # the released code uses it without exponentiating it


def similarity(rows: Tensor, columns: Tensor, scale: Tensor | float) -> Tensor:
    """``scale * rows @ columns.T`` in fp32, autocast or not.

    Args:
        rows: `(rows, dim)`.
        columns: `(columns, dim)`.
        scale: the multiplier (already exponentiated), a float or a tensor of one element.

    Returns:
        `(rows, columns)` float32.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return scale * (rows.float() @ columns.float().T)


def contrastive(
    image: Tensor, text: Tensor, all_images: Tensor, all_texts: Tensor, scale: Tensor | float, row_offset: int = 0
) -> Tensor:
    """Symmetric InfoNCE: ``1/2 [CE(scale * I T^T) + CE(scale * T I^T)]`` with the own pair as the class.

    Source: Radford et al. 2021 (CLIP); the paper's task loss.

    Args:
        image: `(rows, dim)` unit-norm image features.
        text: `(rows, dim)` unit-norm text features.
        all_images: `(columns, dim)` unit-norm image features of all processes.
        all_texts: `(columns, dim)` unit-norm text features of all processes.
        scale: ``exp(logit_scale)``.
        row_offset: column of the first row.
    """
    target = torch.arange(len(image), device=image.device) + row_offset
    to_texts = F.cross_entropy(similarity(image, all_texts, scale), target)
    to_images = F.cross_entropy(similarity(text, all_images, scale), target)
    return (to_texts + to_images) / 2


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
    target = torch.arange(len(image), device=image.device) + row_offset
    counted = available[target]
    total = image.new_zeros((), dtype=torch.float32)
    for student, teacher in ((image, teacher_texts), (text, teacher_images)):
        logits = similarity(student, teacher, scale).masked_fill(~available, -torch.inf)
        # A row without its own column would be infinite; it is set to zero before the softmax and not counted.
        logits = logits.masked_fill(~counted[:, None], 0.0)
        total = total + (F.cross_entropy(logits, target, reduction="none") * counted).sum()
    return total / (2 * len(image))


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


def relational(
    student: Tensor,
    all_students: Tensor,
    teachers: Sequence[tuple[Tensor, Tensor]],
    available: Sequence[tuple[Tensor, Tensor]],
    scale: float,
    row_offset: int = 0,
) -> Tensor:
    """Intra-modal relational distillation: the student's neighbours within one modality follow the teachers'.

    Per teacher k, ``p_k(j|i) = softmax_j(scale * <a_ik, a_jk>)`` over the other samples j that k knows; the target
    ``p(j|i)`` is the mean of p_k over the teachers that know i, taken after the softmax; the loss is
    ``mean_i KL(p(.|i) || softmax_{j != i}(scale * <s_i, s_j>))``. It needs no common space, no equal widths, and sees
    no caption through another modality. Source: relational KL of Yang et al. 2024 (CRD), averaged over teachers after
    the softmax as in Vasu et al. 2024 (MobileCLIP).

    Args:
        student: `(rows, dim)` unit-norm student features of one modality.
        all_students: `(columns, dim)` the same of all processes.
        teachers: per teacher its unit-norm features of that modality, `(rows, width)` and `(columns, width)`.
        available: per teacher which samples it knows, bool `(rows,)` and `(columns,)`.
        scale: the multiplier of both the teachers' and the student's similarities (an inverse temperature).
        row_offset: column of the first row.
    """
    own = _own_columns(len(student), len(all_students), row_offset, student.device)
    target = student.new_zeros(own.shape, dtype=torch.float32)
    votes = student.new_zeros((len(student), 1), dtype=torch.float32)
    for (rows, columns), (known_rows, known_columns) in zip(teachers, available, strict=True):
        allowed = known_columns[None, :] & ~own
        votes_here = (known_rows & allowed.any(dim=1))[:, None]
        logits = similarity(rows, columns, scale).masked_fill(~allowed, -torch.inf)
        target = target + torch.softmax(logits.masked_fill(~votes_here, 0.0), dim=1) * votes_here
        votes = votes + votes_here
    target = target / votes.clamp(min=1)
    log_student = similarity(student, all_students, scale).masked_fill(own, -torch.inf).log_softmax(dim=1)
    divergence = torch.xlogy(target, target) - target * log_student.masked_fill(own, 0.0)
    return divergence.sum() / len(student)


def reconstruction(restored: Tensor, original: Tensor, available: Tensor) -> Tensor:
    """Mean squared error of an autoencoder's output: ``mean_i mean_d (x'_id - x_id)^2`` over available samples.

    Args:
        restored: `(rows, width)` decoded features.
        original: `(rows, width)` features before noise.
        available: `(rows,)` bool; a sample without features adds zero.
    """
    return feature_squared(restored, original, available)


def _own_columns(rows: int, columns: int, row_offset: int, device: torch.device) -> Tensor:
    """`(rows, columns)` bool, True where the column is the row's own sample."""
    return (torch.arange(rows, device=device) + row_offset)[:, None] == torch.arange(columns, device=device)[None, :]
