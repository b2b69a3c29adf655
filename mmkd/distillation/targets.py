"""Which teachers count for a pair, how much, and the target they make together.

Weights are a dictionary from teacher to `(rows,)`, zero where the teacher does not know the pair, for raw and aligned
features alike. Random choices depend on the seed, the epoch and the pair alone: neither on the batch nor on the number
of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.data.features.lookup import MODALITIES, Modality
from mmkd.distillation.losses import View
from mmkd.distillation.options import DistillOptions
from mmkd.distributed import gather
from mmkd.training.chunked_softmax import EXCLUDED, chunk_rows

Weights = dict[str, Tensor]

DRAW_OF_TARGET, DRAW_OF_DROPOUT, DRAW_OF_SURVIVOR = range(3)


def uniform(seed: int, epoch: int, index: Tensor, stream: int) -> Tensor:
    """Numbers in [0, 1) from (seed, epoch, pair index, stream) alone, by hashing them.

    Source: the finalizer of SplitMix64 (Steele et al. 2014), once for each of the four.

    Args:
        seed: at least 0.
        epoch: number of the epoch.
        index: `(rows,)` int64, the pairs' indices.
        stream: tells draws for different purposes apart.

    Returns:
        `(rows,)` float64.
    """
    state = torch.zeros_like(index)
    for part in (seed, epoch, stream, index):
        state = _mixed(state + part + _constant(0x9E3779B97F4A7C15))
    return _shifted(state, 11).double() / 2**53


def drawn_teacher(mask: Tensor, seed: int, epoch: int, index: Tensor, stream: int = DRAW_OF_TARGET) -> Tensor:
    """One available teacher for each sample, drawn uniformly from (seed, epoch, pair index) alone.

    Args:
        mask: `(rows, teachers)` bool, the available ones.
        seed: at least 0.
        epoch: number of the epoch.
        index: `(rows,)` the pairs' indices.
        stream: tells draws for different purposes apart.

    Returns:
        `(rows, teachers)` bool with one True a row, none where no teacher is available.
    """
    number = (uniform(seed, epoch, index, stream) * mask.sum(dim=1)).long()
    return mask & (mask.cumsum(dim=1) == number[:, None] + 1)


def kept_teachers(mask: Tensor, probability: float, seed: int, epoch: int, index: Tensor) -> Tensor:
    """Teacher dropout: each available teacher is left out with some probability, but never all of a sample's.

    One of the sample's teachers, drawn uniformly, stays in any case. Source: teacher dropping of Sariyildiz et al. 2024
    (UNIC), which keeps the teacher of the largest loss instead; here no loss is at hand when the target is made.

    Args:
        mask: `(rows, teachers)` bool, the available ones.
        probability: of leaving a teacher out.
        seed: at least 0.
        epoch: number of the epoch.
        index: `(rows,)` the pairs' indices.

    Returns:
        `(rows, teachers)` bool.
    """
    survivor = drawn_teacher(mask, seed, epoch, index, DRAW_OF_SURVIVOR)
    teachers = mask.shape[1]
    draws = [uniform(seed, epoch, index * teachers + k, DRAW_OF_DROPOUT) for k in range(teachers)]
    return mask & (survivor | (torch.stack(draws, dim=1) >= probability))


def own_pair_probability(view: View, row_offset: int) -> Tensor:
    """A teacher's confidence in a pair: the probability ``p_k(i|i)`` of its own caption among those it knows.

    Args:
        view: from images to texts, or back.
        row_offset: column of the first row.

    Returns:
        `(rows,)` in [0, 1], zero where the teacher does not know the pair.
    """
    result = view.rows.new_zeros(len(view.rows), dtype=torch.float32)
    size = chunk_rows(len(view.rows), len(view.columns), view.rows.device)
    with torch.no_grad(), torch.autocast(view.rows.device.type, enabled=False):
        for begin in range(0, len(result), size):
            end = min(begin + size, len(result))
            logits = view.scale * (view.rows[begin:end].float() @ view.columns.float().T)
            logits.masked_fill_(~view.known, EXCLUDED)
            own = torch.arange(begin, end, device=logits.device)[:, None] + row_offset
            result[begin:end] = (logits.gather(1, own)[:, 0] - logits.logsumexp(dim=1)).exp()
    return result * (view.weight > 0)


class FalseNegatives:
    """Blocks of bool: other samples so like the row's own, in the teachers' eyes, that they are no negatives.

    True where ``sum_k m_ik m_jk <a_ik, a_jk> / sum_k m_ik m_jk`` of images, or the same of texts, exceeds a threshold,
    j != i. Duplicated figures and templated captions are the common case. Use it as ``excluded`` of
    `mmkd.distillation.losses.contrastive`.
    """

    def __init__(self, modalities: Sequence[Sequence[View]], threshold: float, row_offset: int) -> None:
        """Compare within modalities.

        Args:
            modalities: for images and for texts the views of all teachers within that modality.
            threshold: a cosine.
            row_offset: column of the first row.
        """
        self.modalities, self.threshold, self.row_offset = modalities, threshold, row_offset

    def __call__(self, begin: int, end: int) -> Tensor:
        """`(end - begin, columns)`."""
        first = self.modalities[0]
        known_rows = torch.stack([(view.weight[begin:end] > 0).float() for view in first], dim=1)
        shared = known_rows @ torch.stack([view.known.float() for view in first])
        found = torch.zeros_like(shared, dtype=torch.bool)
        for views in self.modalities:
            total = torch.zeros_like(shared)
            for k, view in enumerate(views):
                rows = view.rows[begin:end].float() * known_rows[:, k, None]
                total.addmm_(rows, (view.columns.float() * view.known[:, None]).T)
            found |= (total > self.threshold * shared) & (shared > 0)
        own = torch.arange(begin, end, device=found.device)[:, None] + self.row_offset
        return found.scatter_(1, own, False)


def combined_target(features: Tensor, weights: Tensor, form: Literal["mean", "leave_one_out"], unit: bool) -> Tensor:
    """One target from the aligned features of several teachers.

    - mean: ``M_i = sum_k w_ik t_ik / sum_k w_ik``
    - leave_one_out: the same with ``w_ik`` times ``max(0, cos(t_ik, M_i without k))``: a teacher counts as far as the
      mean of the others agrees with it. Where none agrees, or there is only one, it is the mean.

    Args:
        features: `(rows, teachers, dim)`.
        weights: `(rows, teachers)`, at least 0; 0 where a teacher does not know the sample.
        form: mean or leave_one_out.
        unit: take features of unit norm and return a target of unit norm; else all as stored.

    Returns:
        `(rows, dim)`, zero where no teacher counts.
    """
    directions = F.normalize(features, dim=2)
    if form == "leave_one_out":
        pulls = directions * weights[:, :, None]
        others = F.normalize(pulls.sum(dim=1, keepdim=True) - pulls, dim=2)
        agreeing = weights * (directions * others).sum(dim=2).clamp(min=0)
        weights = torch.where(agreeing.sum(dim=1, keepdim=True) > 0, agreeing, weights)
    share = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-12)
    target = ((directions if unit else features) * share[:, :, None]).sum(dim=1)
    return F.normalize(target, dim=1) if unit else target


def weights_by_name(weights: Mapping[str, float], teacher: str, modalities: Sequence[str]) -> list[float]:
    """The settled weight of one teacher for each pair; the more specific name wins.

    Args:
        weights: ``TEACHER`` or ``MODALITY/TEACHER`` to a weight; 1 where not given.
        teacher: its name.
        modalities: of each pair.
    """
    return [weights.get(f"{modality}/{teacher}", weights.get(teacher, 1.0)) for modality in modalities]


def _mixed(state: Tensor) -> Tensor:
    state = (state ^ _shifted(state, 30)) * _constant(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _constant(0x94D049BB133111EB)
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """A logical shift to the right of int64, which wraps like an unsigned number."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _constant(unsigned: int) -> int:
    return unsigned - (1 << 64) if unsigned >> 63 else unsigned


# Section: A batch's raw teacher features, seen by the losses that compare samples with samples.
#
# Features are gathered from all processes once and normalized once, however many losses read them.


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
