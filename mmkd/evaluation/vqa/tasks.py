"""Visual question answering on one dataset: the splits of its questions, and the heads that answer them.

Three heads: over frozen vectors, over tokens with co-attention, and by statements without training on closed questions.
The two that train do so on every split. Some well-known datasets have test questions about images that training
questions are about, too. Their official split is kept, since it is commonly reported, and the number of shared images
is stated; a split by image is evaluated, too. The questions of a folder of pairs belong to the split of their image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmkd.data.table import SPLITS, Pair
from mmkd.evaluation.datasets.dataset import Samples
from mmkd.evaluation.datasets.source import Question
from mmkd.evaluation.tasks.task import Task, TaskOptions, task_name
from mmkd.evaluation.vqa.heads import MeterQuestions, VisualQuestions
from mmkd.evaluation.vqa.statements import StatementQuestions, choices, convert

TEST, VALIDATION = 0.2, 0.1
TRAINED: dict[str, type[VisualQuestions]] = {"vectors": VisualQuestions, "meter": MeterQuestions}
Placed = tuple[Pair, Question]


@dataclass(frozen=True)
class QuestionSplit:
    """Questions of each split with the pair that holds their image.

    Attributes:
        variant: empty for the main split, else ``disjoint``.
        questions: by split.
        metadata: how the split was made; plain JSON values.
    """

    variant: str
    questions: dict[str, list[Placed]]
    metadata: dict[str, Any]

    @property
    def is_usable(self) -> bool:
        """Whether a head can be trained and tested."""
        return len(self.questions["train"]) > 1 and bool(self.questions["test"])


def tasks(samples: Samples, options: TaskOptions) -> tuple[list[Task], dict[str, str]]:
    """The heads on every split, statements on the first alone; and why others are left out."""
    manifest = samples.manifest
    splits, reason = question_splits(samples, options.question_splits)
    if not splits:
        return [], {task_name("vqa", manifest): reason}
    found: list[Task] = []
    for split in splits:
        for head, made in TRAINED.items():
            if head in options.question_heads:
                variant = "-".join(part for part in (head.removeprefix("vectors"), split.variant) if part)
                found.append(made(manifest, split.questions, split.metadata, variant))
    if "zeroshot" not in options.question_heads:
        return found, {}
    converted, left_out = convert(splits[0].questions["test"])
    if len(converted) < 2:
        reason = f"{len(converted)} closed test questions can be converted into statements"
        return found, {task_name("vqa", manifest, "zeroshot"): reason}
    found.append(StatementQuestions(manifest, converted, left_out, {"split": splits[0].metadata["split"]}))
    return found, {}


def texts(questions: Sequence[Question], options: TaskOptions) -> set[str]:
    """The questions and, where they are answered without training, the statements that answer them."""
    found = {question.text for question in questions}
    if "zeroshot" in options.question_heads:
        allowed = [choices(question.text) for question in questions if question.closed]
        found |= {text for own in allowed if own for text in own.statements}
    return found


def question_splits(samples: Samples, kinds: Sequence[str]) -> tuple[list[QuestionSplit], str]:
    """The splits of these kinds that have training and test questions; else the reason why not.

    Args:
        samples: of a dataset whose images can be read.
        kinds: ``official``, where questions state a split; ``disjoint``, where no image is in two; ``images``.
    """
    if "images" in kinds:
        split = _of_images(samples)
        counts = {name: len(own) for name, own in split.questions.items()}
        reason = f"{counts['train']} training and {counts['test']} held-out questions have an image"
        return ([split], "") if split.is_usable else ([], reason)
    questions = samples.dataset.questions
    pairs = [*samples.train, *samples.validation, *samples.held_out]
    pair_of = {samples.digests.get(pair.id, pair.sha256): pair for pair in pairs}
    placed = [(pair_of[question.sha256], question) for question in questions if question.sha256 in pair_of]
    if len(placed) < 3:
        return [], f"{len(placed)} of its {len(questions)} questions are about an image that can be read"
    found = [_official(placed)] if "official" in kinds and any(question.split for _, question in placed) else []
    found += [_disjoint(placed)] if "disjoint" in kinds else []
    usable = [split for split in found if split.is_usable]
    return usable, "" if usable else f"no split of its {len(placed)} questions has both training and test questions"


def _of_images(samples: Samples) -> QuestionSplit:
    """Every question in the split of its image."""
    parts: dict[str, list[Placed]] = {}
    for split, pairs in (("train", samples.train), ("validation", samples.validation), ("test", samples.held_out)):
        pair_of = {samples.digests[pair.id]: pair for pair in pairs if pair.id in samples.digests}
        parts[split] = [(pair_of[q.sha256], q) for q in samples.dataset.questions if q.sha256 in pair_of]
    return QuestionSplit("", parts, {"split": "that of the image"})


def _official(placed: list[Placed]) -> QuestionSplit:
    """The stated split; a tenth of the training images validates where no question does."""
    parts: dict[str, list[Placed]] = {split: [] for split in SPLITS}
    for pair, question in placed:
        parts[question.split or "train"].append((pair, question))
    validation = "as stated"
    if not parts["validation"]:
        training = parts["train"]
        parts["train"] = [(p, q) for p, q in training if _place(p, "validation") >= VALIDATION]
        parts["validation"] = [(p, q) for p, q in training if _place(p, "validation") < VALIDATION]
        validation = f"{VALIDATION:.0%} of the training images, by hash"
    return QuestionSplit("", parts, {"split": "official", "validation": validation} | _shared(parts))


def _disjoint(placed: list[Placed]) -> QuestionSplit:
    parts: dict[str, list[Placed]] = {split: [] for split in SPLITS}
    for pair, question in placed:
        place = _place(pair, "split")
        name = "test" if place < TEST else "validation" if place < TEST + VALIDATION else "train"
        parts[name].append((pair, question))
    metadata = {"split": f"by group or image: {TEST:.0%} test, {VALIDATION:.0%} validation, by hash"}
    return QuestionSplit("disjoint", parts, metadata | _shared(parts))


def _shared(parts: dict[str, list[Placed]]) -> dict[str, Any]:
    """How many test images, and questions about them, are in training or validation, too."""
    seen = {pair.id for split in ("train", "validation") for pair, _ in parts[split]}
    shared = [pair.id for pair, _ in parts["test"] if pair.id in seen]
    return {"shared_images": len(set(shared)), "questions_about_shared_images": len(shared)}


def _place(pair: Pair, salt: str) -> float:
    """A number from 0 to 1 that depends on the group alone, or on the image where it has none."""
    key = pair.group or pair.sha256 or pair.id
    return int(hashlib.sha256(f"{salt} {key}".encode()).hexdigest()[:12], 16) / 16**12
