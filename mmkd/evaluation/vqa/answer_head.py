"""Visual question answering with a frozen encoder: a small head chooses one of the training answers.

With ``v`` and ``q`` the unit vectors of image and question, ``[v, q, v * q, |v - q|]`` goes through one hidden layer to
the answers of training and validation questions. The head trains for a fixed number of epochs; the epoch that does best
on validation questions is taken, or the last where there are none. Two controls are reported beside the accuracy: a
head that receives the question alone, and the same head with another question's image; they measure how much follows
from text. An answer that no training question had cannot be given and counts as wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.datasets.questions import Question
from mmkd.evaluation.embeddings.embed import Embedded, UndefinedMetricError
from mmkd.evaluation.statistics import metrics
from mmkd.evaluation.statistics.bootstrap import Metrics, resampling_units
from mmkd.evaluation.statistics.metrics import Floats
from mmkd.evaluation.tasks.task import Outputs, Task

HIDDEN, EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, SEED = 256, 30, 64, 1e-3, 1e-2, 0


class VisualQuestions(Task):
    """Answer questions about held-out images."""

    kind, primary_metric = "vqa", "accuracy"

    title = "Visual question answering"

    def __init__(
        self,
        manifest: Manifest,
        questions: dict[str, list[tuple[Pair, Question]]],
        metadata: dict[str, Any],
        variant: str = "",
    ) -> None:
        """Fix the questions of each split and the training answers.

        Args:
            manifest: of the dataset.
            questions: ``train``, ``validation`` and ``test`` questions with the pair that holds their image.
            metadata: further entries of the description.
            variant: which of several tasks of this kind.
        """
        super().__init__(manifest, self.title, variant)
        self.questions = questions
        known = sorted({question.answer for split in ("train", "validation") for _, question in questions[split]})
        self.answers = {answer: number for number, answer in enumerate(known)}
        test = questions["test"]
        self.pairs = [pair for pair, _ in test]
        self.targets = np.array([self.answers.get(question.answer, -1) for _, question in test])
        self.closed = np.array([question.closed for _, question in test])
        groups = [pair.group or pair.id for pair in self.pairs]  # questions about one image are resampled together
        self.units = {"image": resampling_units(["closed" if c else "open" for c in self.closed], groups)}
        self.sample_pairs = {"image": self.pairs}
        common = Counter(question.answer for _, question in questions["train"]).most_common(1)[0][0]
        guess = float(np.mean(self.targets == self.answers[common]))
        self.describe(
            {
                "ids": [pair.id for pair in self.pairs],
                "questions": {split: len(own) for split, own in questions.items()},
                "images": {split: len({pair.id for pair, _ in own}) for split, own in questions.items()},
                "answers": len(known),
                "unanswerable": float(np.mean(self.targets < 0)),
                "closed": int(self.closed.sum()),
                "chance": {"accuracy": guess},
                **metadata,
            }
        )

    def outputs(self, embedded: Embedded) -> Outputs:
        """``image.answers`` probabilities `(n, answers)`, and those of both controls.

        Raises:
            UndefinedMetricError: the encoder has no vectors of texts.
        """
        if not embedded.texts:
            raise UndefinedMetricError("the encoder has no vectors of texts")
        found = {split: self._inputs(embedded, split) for split in self.questions}
        if not all(torch.isfinite(part).all() for image, text in found.values() for part in (image, text)):
            unsound = np.full((len(self.pairs), len(self.answers)), np.nan, dtype=np.float32)
            return {f"image.{name}": unsound for name in ("answers", "question_only", "shuffled_image")}
        targets = {
            split: torch.tensor([self.answers.get(question.answer, -1) for _, question in own])
            for split, own in self.questions.items()
        }
        (image, text), question_only = found["test"], {s: (torch.zeros_like(i), t) for s, (i, t) in found.items()}
        head = train_head(found, targets, len(self.answers))
        control = train_head(question_only, targets, len(self.answers))
        other = torch.from_numpy(np.random.default_rng(SEED).permutation(len(image)))
        return {
            "image.answers": _probabilities(head, image, text),
            "image.question_only": _probabilities(control, torch.zeros_like(image), text),
            "image.shuffled_image": _probabilities(head, image[other], text),
        }

    def metrics(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """Accuracy over all, open and closed questions, and that of the controls over all."""
        image = weights["image"]
        right = self._right(outputs["image.answers"])
        controls = {name: self._right(outputs[f"image.{name}"]) for name in ("question_only", "shuffled_image")}
        return {
            "accuracy": metrics.weighted_mean(right, image),
            "closed_accuracy": metrics.weighted_mean(right, image * self.closed),
            "open_accuracy": metrics.weighted_mean(right, image * ~self.closed),
            **{f"{name}_accuracy": metrics.weighted_mean(own, image) for name, own in controls.items()},
        }

    def extras(self, outputs: Outputs) -> dict[str, Any]:
        """Why there is no accuracy over one kind of question, if that is so."""
        counts = {"closed": int(self.closed.sum()), "open": int((~self.closed).sum())}
        lacking = {f"{kind}_accuracy": f"no test question is {kind}" for kind, count in counts.items() if not count}
        return {"undefined_metrics": lacking} if lacking else {}

    def sample_scores(self, outputs: Outputs) -> dict[str, Floats]:
        """1 where the answer is correct."""
        return {"image": self._right(outputs["image.answers"])}

    def _right(self, probabilities: Any) -> Floats:
        return (probabilities.argmax(axis=1) == self.targets).astype(np.float64)

    def _inputs(self, embedded: Embedded, split: str) -> tuple[Tensor, Tensor]:
        own = self.questions[split]
        if not own:
            return torch.zeros(0, 1), torch.zeros(0, 1)
        image = embedded.image_matrix([pair for pair, _ in own])
        return torch.from_numpy(image), torch.from_numpy(embedded.text_matrix([q.text for _, q in own]))


def fused(image: Tensor, text: Tensor) -> Tensor:
    """``[v, q, v * q, |v - q|]``: `(n, dim)` twice to `(n, 4 dim)`, each block scaled to entries of about unit size."""
    scale = image.shape[1] ** 0.5
    return torch.cat([image * scale, text * scale, image * text * scale**2, (image - text).abs() * scale], dim=1)


def train_head(inputs: dict[str, tuple[Tensor, Tensor]], targets: dict[str, Tensor], answers: int) -> nn.Module:
    """Train the head.

    Args:
        inputs: per split image and question vectors `(n, dim)`.
        targets: per split the number of the answer `(n,)`, -1 where it is not among them.
        answers: how many there are.

    Returns:
        The head of the epoch that does best on validation questions, of equals the earliest; else of the last epoch.
    """
    generator = torch.Generator().manual_seed(SEED)
    train, target = fused(*inputs["train"]), targets["train"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        head = nn.Sequential(nn.Linear(train.shape[1], HIDDEN), nn.GELU(), nn.Linear(HIDDEN, answers))
    optimizer = torch.optim.AdamW(head.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    validation = fused(*inputs["validation"]) if len(targets["validation"]) else None

    def epoch() -> None:
        for rows in torch.randperm(len(train), generator=generator).split(BATCH_SIZE):
            loss = nn.functional.cross_entropy(head(train[rows]), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def score() -> float:
        with torch.no_grad():
            return (head(validation).argmax(dim=1) == targets["validation"]).float().mean().item()

    return train_epochs(head, EPOCHS, epoch, score if validation is not None else None)


def train_epochs(
    head: nn.Module, epochs: int, epoch: Callable[[], None], score: Callable[[], float] | None
) -> nn.Module:
    """Train for a number of epochs and keep the weights of the one that does best on validation questions.

    Args:
        head: is trained in place.
        epochs: how many.
        epoch: trains for one.
        score: accuracy on validation questions; None where there are none, and the last epoch is kept.
    """
    best, kept = -1.0, {}
    for _ in range(epochs):
        epoch()
        if score is not None and (value := score()) > best:  # of equals the earliest
            best, kept = value, {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head.load_state_dict(kept or head.state_dict())
    return head.eval()


@torch.no_grad()
def _probabilities(head: nn.Module, image: Tensor, text: Tensor) -> Any:
    return head(fused(image, text)).softmax(dim=1).numpy()
