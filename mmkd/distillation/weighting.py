"""Options of how much a teacher or pair counts: temperatures, weights, confidence, dropout, false negatives.

Random choices depend on the seed, the epoch and the pair alone: neither on
the batch nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.data.features.lookup import MODALITIES
from mmkd.distillation.losses import TeacherSimilarity
from mmkd.training.chunked_loss import rows_at_once
from mmkd.training.objectives import MASKED

TARGET_STREAM, DROPOUT_STREAM, SURVIVOR_STREAM = range(3)


def weights_by_name(weights: Mapping[str, float], teacher: str, modalities: Sequence[str]) -> list[float]:
    """The configured weight of one teacher for each pair; the more specific name wins.

    Args:
        weights: ``TEACHER`` or ``MODALITY/TEACHER`` to a weight; 1 where not given.
        teacher: its name.
        modalities: of each pair.
    """
    return [weights.get(f"{modality}/{teacher}", weights.get(teacher, 1.0)) for modality in modalities]


def spread_scales(features: Mapping[str, Mapping[str, Tensor]], factor: float) -> dict[str, float]:
    """Inverse temperatures at which the softmax of every teacher is equally sharp, however narrow its cosines.

    ``factor / sd`` of a teacher's cosines: between images and texts of different pairs, between images, and between
    texts. For Gaussian cosines the softmax over N columns then has about ``N exp(-factor^2)`` effective neighbours.

    Args:
        features: teacher -> ``image`` and ``text`` `(n, width)` of sample pairs, and ``mask`` `(n,)` of those it has.
        factor: inverse temperature times standard deviation.

    Returns:
        ``across/TEACHER``, ``image/TEACHER`` and ``text/TEACHER`` to the inverse temperature; none of a teacher with
        fewer than three pairs, nor of one whose images and texts differ in width ``across``.
    """
    scales = {}
    for name, teacher in features.items():
        image, text = (F.normalize(teacher[side][teacher["mask"]].float(), dim=1) for side in MODALITIES)
        for key, left, right in (("across", image, text), ("image", image, image), ("text", text, text)):
            if len(left) < 3 or left.shape[1] != right.shape[1]:
                continue
            cosines = (left @ right.T)[~torch.eye(len(left), dtype=torch.bool)]
            scales[f"{key}/{name}"] = factor / max(cosines.std().item(), 1e-3)
    return scales


def teacher_confidence(teacher: TeacherSimilarity, row_offset: int) -> Tensor:
    """The probability ``p_k(i|i)`` of the own pair under a teacher's softmax over the columns of its mask.

    Args:
        teacher: its similarities from images to texts, or back.
        row_offset: column of the first row.

    Returns:
        `(rows,)` in [0, 1], zero where the teacher does not count.
    """
    count, device = len(teacher.rows), teacher.rows.device
    chunk = rows_at_once(count, len(teacher.columns), device) or count
    found = []
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for begin in range(0, count, chunk):
            rows = teacher.rows[begin : begin + chunk].float()
            logits = (teacher.scale * (rows @ teacher.columns.float().T)).masked_fill_(~teacher.mask, MASKED)
            own = torch.arange(begin, begin + len(rows), device=device)[:, None] + row_offset
            found.append((logits.gather(1, own)[:, 0] - logits.logsumexp(dim=1)).exp())
    return torch.cat(found) * (teacher.weights > 0)


class NegativesMask:
    """A bool matrix `(rows, columns)`, read by slices of rows: False for false negatives of the row.

    False where ``sum_k m_ik m_jk <a_ik, a_jk> / sum_k m_ik m_jk`` of images, or the same of texts, exceeds a threshold,
    j != i: duplicated figures and templated captions. It is the ``mask`` of `mmkd.training.objectives.contrastive`.
    """

    def __init__(self, within: Sequence[Sequence[TeacherSimilarity]], threshold: float, row_offset: int) -> None:
        """Compare within modalities.

        Args:
            within: for images and for texts the similarities of all teachers within that modality.
            threshold: a cosine.
            row_offset: column of the first row.
        """
        self.within, self.threshold, self.row_offset = within, threshold, row_offset

    def __getitem__(self, part: slice) -> Tensor:
        """`(rows of the part, columns)`."""
        row_masks = torch.stack([(teacher.weights[part] > 0).float() for teacher in self.within[0]], dim=1)
        teachers_of_both = row_masks @ torch.stack([teacher.mask.float() for teacher in self.within[0]])
        similar = torch.zeros_like(teachers_of_both, dtype=torch.bool)
        for teachers in self.within:
            total = torch.zeros_like(teachers_of_both)
            for k, teacher in enumerate(teachers):
                rows = teacher.rows[part].float() * row_masks[:, k, None]
                total.addmm_(rows, (teacher.columns.float() * teacher.mask[:, None]).T)
            similar |= (total > self.threshold * teachers_of_both) & (teachers_of_both > 0)
        own = torch.arange(part.start, part.start + len(similar), device=similar.device)[:, None] + self.row_offset
        return ~similar.scatter_(1, own, False)


def sample_teacher(mask: Tensor, seed: int, epoch: int, index: Tensor, stream: int = TARGET_STREAM) -> Tensor:
    """One available teacher for each sample, sampled uniformly from (seed, epoch, pair index) alone.

    Args:
        mask: `(rows, teachers)` bool, the available ones.
        seed: at least 0.
        epoch: number of the epoch.
        index: `(rows,)` the pairs' indices.
        stream: separates random numbers for different purposes.

    Returns:
        `(rows, teachers)` bool with one True a row, none where no teacher is available.
    """
    number = (uniform(seed, epoch, index, stream) * mask.sum(dim=1)).long()
    return mask & (mask.cumsum(dim=1) == number[:, None] + 1)


def drop_teachers(mask: Tensor, probability: float, seed: int, epoch: int, index: Tensor) -> Tensor:
    """Teacher dropout: each available teacher is dropped with some probability, but never all of a sample's.

    One of the sample's teachers, sampled uniformly, always stays. Source: teacher dropping of Sariyildiz et al. 2024
    (UNIC), which keeps the teacher of the largest loss instead; here the loss is not known when the target is made.

    Args:
        mask: `(rows, teachers)` bool, the available ones.
        probability: of dropping a teacher.
        seed: at least 0.
        epoch: number of the epoch.
        index: `(rows,)` the pairs' indices.

    Returns:
        `(rows, teachers)` bool.
    """
    survivor = sample_teacher(mask, seed, epoch, index, SURVIVOR_STREAM)
    teachers = mask.shape[1]
    draws = [uniform(seed, epoch, index * teachers + k, DROPOUT_STREAM) for k in range(teachers)]
    return mask & (survivor | (torch.stack(draws, dim=1) >= probability))


def uniform(seed: int, epoch: int, index: Tensor, stream: int) -> Tensor:
    """Numbers in [0, 1) from (seed, epoch, pair index, stream) alone, by hashing them.

    Source: the finalizer of SplitMix64 (Steele et al. 2014), once for each of the four.

    Args:
        seed: at least 0.
        epoch: number of the epoch.
        index: `(rows,)` int64, the pairs' indices.
        stream: separates random numbers for different purposes.

    Returns:
        `(rows,)` float64.
    """
    state = torch.zeros_like(index)
    for part in (seed, epoch, stream, index):
        state = state + part + _signed(0x9E3779B97F4A7C15)
        state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
        state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
        state = state ^ _shifted(state, 31)
    return _shifted(state, 11).double() / 2**53


def _shifted(state: Tensor, bits: int) -> Tensor:
    """A logical shift to the right of int64, which wraps like an unsigned number."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(unsigned: int) -> int:
    return unsigned - (1 << 64) if unsigned >> 63 else unsigned
