"""What is trained: a model and its loss in one module, so that wrappers for several processes see every parameter.

An objective is two steps: `Objective.encode` maps each row of a batch by itself, and `Objective.loss` compares the rows
of all processes. A batch holds what `mmkd.student.embed.embed` reads, ``index`` `(rows,)`, ``ids`` and, for
distillation, ``teachers`` (raw features) and ``aligned`` (features of the student's width), each ``{teacher: {"image":
(rows, width), "text": (rows, width), "mask": (rows,) bool}}``; the loop adds ``epoch``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.distributed import full_fp32, gather, rank
from mmkd.training.chunked_loss import RowMask, pairwise_sigmoid, rows_at_once, sum_over_rows
from mmkd.training.settings import TaskLossSettings

MASKED = -1e30  # a logit whose exponential is zero, finite so that zero times it is zero


class Embeddings(NamedTuple):
    """Unit-norm features of this process' rows, `(rows, dim)`, and of all processes, `(columns, dim)`."""

    image: Tensor
    text: Tensor
    all_images: Tensor
    all_texts: Tensor
    row_offset: int

    def prefix(self, width: int) -> Embeddings:
        """Their first `width` numbers, of unit norm again."""
        image, text, all_images, all_texts = (F.normalize(features[:, :width], dim=1) for features in self[:4])
        return Embeddings(image, text, all_images, all_texts, self.row_offset)

    @property
    def chunk(self) -> int | None:
        """Rows at a time where the matrix of similarities is too large for the device."""
        return rows_at_once(len(self.image), len(self.all_images), self.image.device)


def contrastive(
    image: Tensor,
    text: Tensor,
    all_images: Tensor,
    all_texts: Tensor,
    scale: Tensor | float,
    row_offset: int = 0,
    mask: RowMask | None = None,
    chunk: int | None = None,
    captions: Tensor | None = None,
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
        mask: `(rows, columns)` bool, False where a column is excluded from the negatives; True for the own column.
        chunk: rows at a time, None for all.
        captions: `(columns,)`, equal for columns of one caption (views of one report), which then are each other's
            positives: the class of a row is the mean over them (Khosla et al. 2020, L_out). None for the own pair.
    """
    own = torch.arange(len(image), device=image.device) + row_offset

    def cross_entropy(rows: Tensor, columns: Tensor, scale: Tensor, part: slice) -> Tensor:
        logits, target = scale * (rows @ columns.T), own[part]
        included = None if mask is None else mask[part]
        if captions is not None:
            same = captions[target, None] == captions
            included = None if included is None else included | same
            target = (same / same.sum(dim=1, keepdim=True)).to(logits.dtype)
        if included is not None:
            logits = logits.masked_fill(~included, MASKED)
        return F.cross_entropy(logits, target, reduction="sum")

    to_texts = sum_over_rows(cross_entropy, image, all_texts, scale, chunk)
    to_images = sum_over_rows(cross_entropy, text, all_images, scale, chunk)
    return (to_texts + to_images) / (2 * len(image))


class Objective(nn.Module, ABC):
    """A model with its loss."""

    @abstractmethod
    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Embeddings of this process' rows, each `(rows, width)`; no row may depend on another."""

    @abstractmethod
    def loss(self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss`` and its parts, scalars, from the output of `encode` for every row of the batch."""

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss(encode(batch), batch)``."""
        return self.loss(self.encode(batch), batch)


class ObjectiveWrapper(nn.Module):
    """An objective whose every use is a call of `forward`.

    Wrappers for several processes act at that call: DDP synchronizes the gradients of what ran through it and of
    nothing else, FSDP2 gathers the sharded weights there. A loss that bypasses the wrapper
    (``ddp.module.objective.encode(...)``) silently trains unsynchronized copies.
    """

    def __init__(self, objective: Objective, device: str, precision: Literal["fp32", "bf16"]) -> None:
        """Wrap `objective`, whose model runs in `precision` on a `device` such as ``cuda``; losses are fp32."""
        super().__init__()
        self.objective = objective
        self._device, self._is_bf16 = device, precision == "bf16"
        names = {name for module in objective.modules() for name in getattr(module, "_no_split_modules", None) or ()}
        present = {type(module).__name__ for module in objective.modules()}
        self._no_split_modules = sorted(names & present)  # the layers that FSDP2 gathers one by one

    def forward(self, use: Callable[..., Any], *inputs: Any) -> Any:
        """``use(self, *inputs)``, such as ``wrapper(ObjectiveWrapper.loss_of_batch, batch)``."""
        return use(self, *inputs)

    def loss_of_batch(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss`` and its parts of a whole batch."""
        return self.loss(self.encode(batch), batch)

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`Objective.encode` in the chosen precision."""
        with torch.autocast(self._device, torch.bfloat16, enabled=self._is_bf16):
            return self.objective.encode(batch)

    def loss(self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`Objective.loss`, in full fp32; its backward pass may use TF32, as `allow_tf32` has set."""
        with full_fp32():
            return self.objective.loss(embeddings, batch)


def gathered(embeddings: Mapping[str, Tensor]) -> Embeddings:
    """This process' image and text features with those of all processes."""
    image, text = embeddings["image"], embeddings["text"]
    return Embeddings(image, text, gather(image), gather(text), rank() * len(image))


class TaskLoss(nn.Module):
    """The contrastive loss of images and captions at the model's own ``logit_scale``, in the form that settings name.

    With ``prefix_widths`` it is the mean over the whole embeddings and each prefix of theirs, normalized again. Source:
    Kusupati et al. 2022 (Matryoshka representation learning).
    """

    def __init__(self, settings: TaskLossSettings, model: Any) -> None:
        """Take the form from `settings`.

        Raises:
            ValueError: a prefix that is not narrower than the embeddings of `model`.
        """
        super().__init__()
        self.settings = settings
        for width in settings.prefix_widths:
            if not 0 < width < (whole := model.config.projection_dim):
                raise ValueError(f"--prefix_widths has {width}; embeddings have {whole} numbers: take 1 to {whole - 1}")
        if settings.task_form == "sigmoid":
            self.bias = nn.Parameter(torch.tensor([-10.0]))

    def forward(
        self, student: Embeddings, model: nn.Module, batch: Mapping[str, Any], mask: RowMask | None = None
    ) -> Tensor:
        """Scalar; ``caption_numbers`` of the batch are read where equal captions are positives."""
        captions = gather(batch["caption_numbers"]) if self.settings.positives == "caption" else None
        scale = model.get_parameter("logit_scale").float().exp()
        form = partial(pairwise_sigmoid, bias=self.bias) if self.settings.task_form == "sigmoid" else contrastive
        embeddings = [student, *map(student.prefix, self.settings.prefix_widths)]
        losses = [
            form(*own[:4], scale, row_offset=own.row_offset, mask=mask, chunk=own.chunk, captions=captions)
            for own in embeddings
        ]
        return torch.stack(losses).mean()
