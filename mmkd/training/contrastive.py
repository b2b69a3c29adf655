"""The objective of stage 1, apart from what stage 2 reads in its step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from mmkd.distributed import world_size
from mmkd.student.embed import embed
from mmkd.training.objectives import Objective, gathered, task_loss


class ContrastiveObjective(Objective):
    """Stage 1: symmetric InfoNCE over the global batch."""

    def __init__(
        self, model: nn.Module, gather_gradient: bool = True, positives: Literal["pair", "caption"] = "pair"
    ) -> None:
        """Train a model.

        Args:
            model: its output has ``image_embeds`` and ``text_embeds``, and it has a ``logit_scale``.
            gather_gradient: False to treat the features of other processes as constants, as the authors' stage 1 does
                (open_clip's ``local_loss`` without ``gather_with_grad``): on several processes about half the gradient.
            positives: of an image its own caption, or all equal ones, and of a caption all their images.
        """
        super().__init__()
        self.model, self.gather_gradient, self.positives = model, gather_gradient, positives

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Unit-norm ``image`` and ``text`` features, `(rows, dim)`."""
        return embed(self.model, batch)

    def loss(self, embeddings: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss`` and ``task``, which are the same."""
        student = gathered(embeddings)
        if not self.gather_gradient and world_size() > 1:
            student = student._replace(all_images=student.all_images.detach(), all_texts=student.all_texts.detach())
        captions = batch["caption_numbers"] if self.positives == "caption" else None
        task = task_loss(student, self.model, captions=captions)
        return {"loss": task, "task": task}
