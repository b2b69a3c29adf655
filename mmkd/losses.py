"""The losses between student and captions or targets, as pure functions of tensors.

Each works on the rows of one process against the columns of all (`row_offset` says where the rows lie among the
columns) and divides by its number of rows, masked rows included, so that the mean over processes of the local losses
is the loss of the whole batch, in value and in gradient, whatever the masks. Similarities and softmax are computed in
fp32 even under autocast: at a scale of 100 bf16 logits turn the gradient by a fifth of its length. The losses that copy
relations between samples are in `mmkd.affinity`, those of heads for single teachers in `mmkd.heads`.

Shapes: `rows` are this process' samples, `columns` those of all processes (equal to `rows` on one process).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.chunked import Block, softmax_cross_entropy

PAPER_INTERACTIVE_SCALE = math.log(1 / 0.07)  # the released code uses it without exponentiating it


def contrastive(
    image: Tensor,
    text: Tensor,
    all_images: Tensor,
    all_texts: Tensor,
    scale: Tensor | float,
    row_offset: int = 0,
    excluded: Block | None = None,
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
        excluded: blocks of bool `(some rows, columns)`, True where a column is no negative; never the own one.
    """
    target = torch.arange(len(image), device=image.device) + row_offset
    to_texts = softmax_cross_entropy(image, all_texts, scale, target, excluded)
    to_images = softmax_cross_entropy(text, all_images, scale, target, excluded)
    return (to_texts + to_images) / (2 * len(image))


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


def reconstruction(restored: Tensor, original: Tensor, available: Tensor) -> Tensor:
    """Mean squared error of an autoencoder's output: ``mean_i mean_d (x'_id - x_id)^2`` over available samples.

    Args:
        restored: `(rows, width)` decoded features.
        original: `(rows, width)` features before noise.
        available: `(rows,)` bool; a sample without features adds zero.
    """
    return feature_squared(restored, original, available)
