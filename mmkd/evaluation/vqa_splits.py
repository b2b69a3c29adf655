"""Who trains on which questions: as the dataset states it, and dealt out so that no image stands on both sides.

Some well-known datasets ask test questions about images that training questions are about, too. Their official split
is kept, since others report on it, and says how many images it shares; beside it stands a split by image.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from mmkd.data.records import SPLITS, Pair
from mmkd.evaluation.questions import Question
from mmkd.evaluation.task import Samples

TEST, VALIDATION = 0.2, 0.1
Asked = dict[str, list[tuple[Pair, Question]]]


@dataclass(frozen=True)
class QuestionSplit:
    """Questions of each split with the pair that holds their image.

    Attributes:
        variant: empty for the split as stated, else ``disjoint``.
        questions: by split.
        facts: what a reader has to know of it; plain JSON values.
    """

    variant: str
    questions: Asked
    facts: dict[str, Any]


def question_splits(samples: Samples) -> tuple[list[QuestionSplit], str]:
    """The official split, where questions state one, and the one by image; else the reason why not.

    Args:
        samples: of a dataset whose images can be read; its questions are those of the collection.
    """
    collection = samples.collection
    questions = collection.questions if collection is not None else []
    pairs = [*samples.train, *samples.validation, *samples.held_out]
    holders = {samples.digests.get(pair.id, pair.sha256): pair for pair in pairs}
    asked = [(holders[question.sha256], question) for question in questions if question.sha256 in holders]
    if len(asked) < 3:
        return [], f"{len(asked)} of its {len(questions)} questions are about an image that can be read"
    found = [_disjoint(asked)]
    if any(question.split for _, question in asked):
        found.insert(0, _official(asked))
    usable = [split for split in found if len(split.questions["train"]) > 1 and split.questions["test"]]
    return usable, "" if usable else f"no split of its {len(asked)} questions has both training and test questions"


def _official(asked: list[tuple[Pair, Question]]) -> QuestionSplit:
    """What questions state; a tenth of the training images validates where nothing does."""
    parts: Asked = {split: [] for split in SPLITS}
    for pair, question in asked:
        parts[question.split or "train"].append((pair, question))
    stated = bool(parts["validation"])
    if not stated:
        training = parts["train"]
        parts["train"] = [(p, q) for p, q in training if _place(p, "validation") >= VALIDATION]
        parts["validation"] = [(p, q) for p, q in training if _place(p, "validation") < VALIDATION]
    return QuestionSplit("", parts, {"split": "official", "validation": _told(stated)} | _shared(parts))


def _disjoint(asked: list[tuple[Pair, Question]]) -> QuestionSplit:
    parts: Asked = {split: [] for split in SPLITS}
    for pair, question in asked:
        place = _place(pair, "split")
        name = "test" if place < TEST else "validation" if place < TEST + VALIDATION else "train"
        parts[name].append((pair, question))
    facts = {"split": f"by group or image: {TEST:.0%} test, {VALIDATION:.0%} validation, by hash"}
    return QuestionSplit("disjoint", parts, facts | _shared(parts))


def _shared(parts: Asked) -> dict[str, Any]:
    """How many test images, and questions about them, training or validation has seen."""
    seen = {pair.id for split in ("train", "validation") for pair, _ in parts[split]}
    shared = [pair.id for pair, _ in parts["test"] if pair.id in seen]
    return {"shared_images": len(set(shared)), "questions_about_shared_images": len(shared)}


def _told(stated: bool) -> str:
    return "as stated" if stated else f"{VALIDATION:.0%} of the training images, by hash"


def _place(pair: Pair, salt: str) -> float:
    """A number from 0 to 1 that depends on the group alone, or on the image where it has none."""
    key = pair.group or pair.sha256 or pair.id
    return int(hashlib.sha256(f"{salt} {key}".encode()).hexdigest()[:12], 16) / 16**12
