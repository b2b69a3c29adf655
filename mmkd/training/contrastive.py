"""The objectives of stage 1 and of fine-tuning by labels, apart from what stage 2 reads in its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.data.prompts import label_prompts
from mmkd.data.table import Pair
from mmkd.distributed import world_size
from mmkd.student.embed import embed, image_features
from mmkd.training.objectives import Objective, TaskLoss, gathered
from mmkd.training.settings import TaskLossSettings


class ContrastiveObjective(Objective):
    """Stage 1: symmetric InfoNCE over the global batch."""

    def __init__(
        self, model: nn.Module, settings: TaskLossSettings | None = None, gather_gradient: bool = True
    ) -> None:
        """Train a model.

        Args:
            model: its output has ``image_embeds`` and ``text_embeds``, and it has a ``logit_scale``.
            settings: form of the loss; None for InfoNCE with the own pair.
            gather_gradient: False to treat the features of other processes as constants, as the authors' stage 1 does
                (open_clip's ``local_loss`` without ``gather_with_grad``): on several processes about half the gradient.
        """
        super().__init__()
        self.model, self.gather_gradient = model, gather_gradient
        self.task = TaskLoss(settings or TaskLossSettings(), model)

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Unit-norm ``image`` and ``text`` features, `(rows, dim)`."""
        return embed(self.model, batch)

    def loss(self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss`` and ``task``, which are the same."""
        student = gathered(embeddings)
        if not self.gather_gradient and world_size() > 1:
            student = student._replace(all_images=student.all_images.detach(), all_texts=student.all_texts.detach())
        task = self.task(student, self.model, batch)
        return {"loss": task, "task": task}


class PromptClassification(Objective):
    """Zero-shot classification, trained: cross-entropy of ``exp(logit_scale) cos(image, class)`` with the labels.

    The model stays a dual encoder without a new head: a class is the unit mean of its unit prompt vectors, as in the
    evaluation, so that a fine-tuned folder is used like any other.

    Example:
        >>> objective = PromptClassification(model, processor, pairs)
        >>> objective(batch)["loss"].backward()
    """

    def __init__(self, model: nn.Module, processor: Any, pairs: Sequence[Pair]) -> None:
        """Describe the labels of the pairs.

        Args:
            model: its output has ``image_embeds`` and ``text_embeds``, and it has a ``logit_scale``.
            processor: tokenizes the prompts.
            pairs: in the order of a batch's ``index``; each has a label.

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
        described = sorted({(pair.label, pair.modality) for pair in pairs})
        prompts = [(self.labels.index(label), text) for label, name in described for text in label_prompts(label, name)]
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
        return {"image": F.normalize(image_features(self.model, batch).float(), dim=1)}

    def loss(self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss`` and ``classification``, which are the same, the mean over this process' rows."""
        output = self.model(input_ids=self.get_buffer("prompt_ids"), attention_mask=self.get_buffer("prompt_mask"))
        prompts = F.normalize(output.text_embeds.float(), dim=1)
        classes = F.normalize(self.get_buffer("membership") @ prompts, dim=1)
        scale = self.model.get_parameter("logit_scale").float().exp()
        loss = F.cross_entropy(scale * embeddings["image"] @ classes.T, self.get_buffer("numbers")[batch["index"]])
        return {"loss": loss, "classification": loss}
