"""Classification by sentences as a training objective: what zero-shot classification does, made to learn.

The model stays a dual encoder without a new head: a class is the unit mean of its unit prompt vectors, as in the
evaluation, so that a fine-tuned folder is used like any other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.data.prompts import label_prompts
from mmkd.data.table import Pair
from mmkd.distributed import gather, rank, world_size
from mmkd.student.embed import embed, normalized_pixels
from mmkd.training.chunked_softmax import Block, softmax_cross_entropy


class Embeddings(NamedTuple):
    """Unit-norm features of this process' rows and of all processes."""

    image: Tensor
    text: Tensor
    all_images: Tensor
    all_texts: Tensor
    row_offset: int


class Objective(nn.Module, ABC):
    """What is trained: `encode` works row by row, `loss` on the batch of all processes."""

    @abstractmethod
    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Embeddings of this process' rows, each `(rows, width)`; no row may depend on another."""

    @abstractmethod
    def loss(self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss`` and its parts, scalars, from what `encode` gave for every row of the batch."""

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss(encode(batch), batch)``."""
        return self.loss(self.encode(batch), batch)


class ContrastiveObjective(Objective):
    """Stage 1: symmetric InfoNCE over the global batch."""

    def __init__(self, model: nn.Module, gather_gradient: bool = True) -> None:
        """Train a model.

        Args:
            model: its output has ``image_embeds`` and ``text_embeds``, and it has a ``logit_scale``.
            gather_gradient: False to take what other processes compare with for constants, as the authors' stage 1 does
                (open_clip's ``local_loss`` without ``gather_with_grad``): on several processes about half the gradient.
        """
        super().__init__()
        self.model, self.gather_gradient = model, gather_gradient

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Unit-norm ``image`` and ``text`` features, `(rows, dim)`."""
        return embed(self.model, batch)

    def loss(self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss`` and ``task``, which are the same."""
        student = gathered(embeddings)
        if not self.gather_gradient and world_size() > 1:
            student = student._replace(all_images=student.all_images.detach(), all_texts=student.all_texts.detach())
        task = _task_loss(student, self.model)
        return {"loss": task, "task": task}


def gathered(embeddings: Mapping[str, Tensor]) -> Embeddings:
    """This process' image and text features with those of all processes."""
    image, text = embeddings["image"], embeddings["text"]
    return Embeddings(image, text, gather(image), gather(text), rank() * len(image))


def _task_loss(student: Embeddings, model: nn.Module, excluded: Block | None = None) -> Tensor:
    image, text, all_images, all_texts, row_offset = student
    scale = model.get_parameter("logit_scale").float().exp()
    return contrastive(image, text, all_images, all_texts, scale, row_offset, excluded)


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


# Section: Classification by sentences as a training objective: what zero-shot classification does, made to learn.
#
# The model stays a dual encoder without a new head: a class is the unit mean of its unit prompt vectors, as in the
# evaluation, so that a fine-tuned folder is used like any other.


class PromptClassification(Objective):
    """Cross-entropy of ``exp(logit_scale) cos(image, class)`` with the pairs' labels.

    Example:
        >>> objective = PromptClassification(model, processor, pairs)
        >>> objective(batch)["loss"].backward()
    """

    def __init__(self, model: nn.Module, processor: Any, pairs: Sequence[Pair]) -> None:
        """Describe the labels of the pairs.

        Args:
            model: gives ``image_embeds`` and ``text_embeds``, and has a ``logit_scale``.
            processor: tokenizes the prompts.
            pairs: in the order that a batch's ``index`` counts in; each has a label.

        Raises:
            ValueError: a pair without a label, or fewer than two labels.
        """
        super().__init__()
        self.labels = sorted({pair.label for pair in pairs})
        if "" in self.labels or len(self.labels) < 2:
            raise ValueError(
                f"classification needs at least two labels, and one for each pair; the labels are {self.labels[:9]}"
            )
        self.model = model
        seen = sorted({(pair.label, pair.modality) for pair in pairs})
        prompts = [(self.labels.index(label), text) for label, name in seen for text in label_prompts(label, name)]
        tokens = processor(text=[text for _, text in prompts], return_tensors="pt")
        numbers = torch.tensor([self.labels.index(pair.label) for pair in pairs])
        membership = F.one_hot(torch.tensor([number for number, _ in prompts]), len(self.labels)).T.float()
        for name, value in (
            ("prompt_ids", tokens["input_ids"]),
            ("prompt_mask", tokens["attention_mask"]),
            ("numbers", numbers),
            ("membership", membership / membership.sum(dim=1, keepdim=True)),
        ):
            self.register_buffer(name, value, persistent=False)

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Unit-norm ``image`` features, `(rows, dim)`."""
        pixels = batch["pixel_values"]
        if "pixel_statistics" in batch:
            pixels = normalized_pixels(pixels, batch["pixel_statistics"])
        output = self.model(pixel_values=pixels)
        return {"image": F.normalize(output.image_embeds.float(), dim=1)}

    def loss(self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss`` and ``classification``, which are the same, the mean over this process' rows."""
        output = self.model(input_ids=self.get_buffer("prompt_ids"), attention_mask=self.get_buffer("prompt_mask"))
        prompts = F.normalize(output.text_embeds.float(), dim=1)
        classes = F.normalize(self.get_buffer("membership") @ prompts, dim=1)
        scale = self.model.get_parameter("logit_scale").float().exp()
        loss = F.cross_entropy(scale * embeddings["image"] @ classes.T, self.get_buffer("numbers")[batch["index"]])
        return {"loss": loss, "classification": loss}
