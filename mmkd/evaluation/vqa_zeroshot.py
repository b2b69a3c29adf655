"""Closed questions without training: the image lies closer to one of the statements that answer the question.

Of every closed test question that `statements.choices` can turn, the statement with the highest cosine is the answer.
Beside the accuracy stands the AUROC of "yes" against "no" over the difference of their cosines, which does not depend
on where an encoder's bias towards negations lies. The controls are another question's image, and the mean of all test
images, which is what the statements alone give away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmkd.data.records import Pair
from mmkd.evaluation import metrics
from mmkd.evaluation.bootstrap import Metrics, frame
from mmkd.evaluation.embedding import Embedded
from mmkd.evaluation.metrics import Floats
from mmkd.evaluation.questions import Question
from mmkd.evaluation.statements import Choices, choices
from mmkd.evaluation.task import Outputs, Task, Undefined

SEED = 0
NOTHING = -2.0  # below any cosine: places of questions with fewer choices than others
Turned = list[tuple[Pair, Question, Choices]]


class StatementQuestions(Task):
    """Answer closed questions by statements."""

    kind, headline = "vqa", "accuracy"
    title = "Which statement answers the closed question, without training?"

    def __init__(self, turned: Turned, left_out: int, facts: dict[str, Any]) -> None:
        """Fix the questions.

        Args:
            turned: test questions that could be turned into statements.
            left_out: closed test questions that could not.
            facts: what else its description shall say.
        """
        self.turned = turned
        self.pairs = [pair for pair, _, _ in turned]
        self.targets = np.array([own.index(question.answer) for _, question, own in turned])
        self.yes_no = np.array([own.answers == ("yes", "no") for _, _, own in turned])
        kinds = ["yes or no" if is_yes_no else "choice" for is_yes_no in self.yes_no]
        self.frames = {"image": frame(kinds, [pair.group or pair.id for pair in self.pairs])}
        self.holders = {"image": self.pairs}
        sizes = np.array([len(own.answers) for _, _, own in turned])
        self.description: dict[str, Any] = {
            "ids": [pair.id for pair in self.pairs],
            "statements": [list(own.statements) for _, _, own in turned],
            "targets": self.targets.tolist(),
            "questions": {"test": len(turned)},
            "yes_no": int(self.yes_no.sum()),
            "left_out": left_out,
            "unanswerable": float(np.mean(self.targets < 0)),
            "chance": {"accuracy": float(np.mean((self.targets >= 0) / sizes)), "yes_no_auroc": 0.5},
            **facts,
        }

    def outputs(self, embedded: Embedded) -> Outputs:
        """``image.scores`` cosines `(n, choices)`, and those of both controls.

        Raises:
            Undefined: the encoder has no vectors of texts.
        """
        if not embedded.texts:
            raise Undefined("the encoder has no vectors of texts")
        images = embedded.image_matrix(self.pairs)
        mean = images.mean(axis=0, keepdims=True)
        other = np.random.default_rng(SEED).permutation(len(images))
        flat = [text for _, _, own in self.turned for text in own.statements]
        vectors = embedded.text_matrix(flat)
        owners = np.repeat(np.arange(len(self.turned)), [len(own.statements) for _, _, own in self.turned])
        places = np.concatenate([np.arange(len(own.statements)) for _, _, own in self.turned])

        def cosines(shown: Any) -> Any:
            scores = np.full((len(self.turned), places.max() + 1), NOTHING, dtype=np.float32)
            scores[owners, places] = (shown * vectors).sum(axis=1)
            return scores

        return {
            "image.scores": cosines(images[owners]),
            "image.mean_image": cosines(mean),
            "image.shuffled_image": cosines(images[other][owners]),
        }

    def ensemble(self, members: Sequence[Embedded], outputs: Sequence[Outputs]) -> Outputs:
        """Mean of the members' cosines, each brought to unit spread over questions first."""
        return {
            key: np.mean([_standardised(own[key], own["image.scores"]) for own in outputs], axis=0)
            for key in outputs[0]
        }

    def metrics(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """Accuracy over all, "yes or no" and choices, AUROC of "yes", and both controls."""
        image = weights["image"]
        right = self._right(outputs["image.scores"])
        margin = (outputs["image.scores"][:, 0] - outputs["image.scores"][:, 1]).astype(np.float64)
        judged = self.yes_no & (self.targets >= 0)
        return {
            "accuracy": metrics.weighted_mean(right, image),
            "yes_no_accuracy": metrics.weighted_mean(right, image * self.yes_no),
            "choice_accuracy": metrics.weighted_mean(right, image * ~self.yes_no),
            "yes_no_auroc": metrics.auroc(self.targets[judged] == 0, margin[judged], image[:, judged])
            if judged.any()
            else np.full(len(image), np.nan),
            "question_only_accuracy": metrics.weighted_mean(self._right(outputs["image.mean_image"]), image),
            "shuffled_image_accuracy": metrics.weighted_mean(self._right(outputs["image.shuffled_image"]), image),
        }

    def extras(self, outputs: Outputs) -> dict[str, Any]:
        """Why there is no number of one kind of question, if that is so."""
        kinds = {"yes_no": ("yes or no", self.yes_no), "choice": ("a choice", ~self.yes_no)}
        lacking = {
            f"{key}_accuracy": f"no test question asks for {name}"
            for key, (name, own) in kinds.items()
            if not own.any()
        }
        answers = set(self.targets[self.yes_no & (self.targets >= 0)].tolist())
        if len(answers) < 2:
            lacking["yes_no_auroc"] = "no test questions are answered yes, or none no"
        return {"undefined_metrics": lacking} if lacking else {}

    def sample_scores(self, outputs: Outputs) -> dict[str, Floats]:
        """1 where the answer is right."""
        return {"image": self._right(outputs["image.scores"])}

    def _right(self, scores: Any) -> Floats:
        return (scores.argmax(axis=1) == self.targets).astype(np.float64)


def turn(asked: Sequence[tuple[Pair, Question]]) -> tuple[Turned, int]:
    """Closed questions with their statements, and how many could not be turned."""
    closed = [(pair, question, choices(question.text)) for pair, question in asked if question.closed]
    turned = [(pair, question, own) for pair, question, own in closed if own is not None]
    return turned, len(closed) - len(turned)


def _standardised(scores: Any, reference: Any) -> Any:
    """Scores without the mean and spread of what ``reference`` holds; places without a choice stay lowest."""
    held = reference[reference > NOTHING]
    return np.where(scores > NOTHING, (scores - held.mean()) / max(float(held.std()), 1e-8), -1e3).astype(np.float32)
