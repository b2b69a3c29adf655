"""A draw: which rows teachers and student see, and the questions that every model answers about the others.

Three endpoints: classes of held-out groups of the seen collections (zero-shot); classes of collections that no model
was trained on (zero-shot, and a linear probe on a few images of each class); captions of held-out groups (retrieval).
Every answer is right or wrong for one image, so that all models are compared image by image.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mmkd.data.splits import hashed
from mmkd.evaluation.tasks.logistic_regression import probe
from mmkd.miniature.data import PARTS, World, assign

Endpoint = Literal["seen", "unseen", "retrieval"]
SHOTS = 16
FEWEST, FEWEST_ON_VALIDATION = 10, 2  # images of a class
RECALL = 10


@dataclass(frozen=True)
class Embedded:
    """Unit-norm features of a model: of every row of the world `(n, dim)`, and of every text `(texts, dim)`."""

    image: Tensor
    text: Tensor


@dataclass(frozen=True)
class Question:
    """A task with one answer for each of some rows.

    Attributes:
        name: unique in a draw.
        endpoint: which endpoint it belongs to.
        kind: zero-shot, probe or retrieval.
        rows: `(m,)` numbers of rows; of retrieval, captions are judged after images, `(2 m,)`.
        classes: `(m,)` the class of each; all 0 for retrieval.
        labels: names of the classes.
        shots: rows that a probe is trained on, and their classes.
    """

    name: str
    endpoint: Endpoint
    kind: str
    rows: NDArray[np.int64]
    classes: NDArray[np.int64]
    labels: tuple[str, ...] = ()
    shots: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    @property
    def chance(self) -> float:
        """The score of answers at random."""
        return 1 / len(self.labels) if self.labels else RECALL / (len(self.rows) / 2)


class Draw:
    """One assignment of groups to teachers, student, validation and test."""

    def __init__(self, world: World, number: int) -> None:
        """Assign by the seed `number`."""
        self.world, self.number = world, number
        is_unseen = np.array([pair.source in world.unseen for pair in world.pairs])
        self.part = np.where(is_unseen, "test", assign(world.pairs, number))
        self.is_unseen = is_unseen

    def rows(self, part: str, sources: Sequence[str] | None = None) -> NDArray[np.int64]:
        """Rows of a part of the seen collections, of some of them where named."""
        assert part in PARTS
        chosen = (self.part == part) & ~self.is_unseen
        if sources is not None:
            chosen &= np.array([pair.source in sources for pair in self.world.pairs])
        return np.flatnonzero(chosen)

    @cached_property
    def test(self) -> list[Question]:
        """The questions of the report."""
        world, questions = self.world, self.validation("test")
        for name in world.unseen:
            rows = np.array([k for k, pair in enumerate(world.pairs) if pair.source == name and pair.label])
            shots = self._shots(rows)
            questions += self._classes(name, "unseen", rows)
            if shots is not None:
                questions += self._classes(name, "unseen", rows, shots)
        for name in world.seen:
            rows = self.rows("test", [name])
            captions = [world.pairs[row].caption for row in rows]
            if len(set(captions)) > max(RECALL * 5, len(captions) / 2):  # captions of its own, not of its labels
                twice = np.concatenate([rows, rows])
                questions.append(Question(f"{name} retrieval", "retrieval", "retrieval", twice, np.zeros_like(twice)))
        return questions

    def validation(self, part: str = "validation") -> list[Question]:
        """Zero-shot classes of the seen collections in a part: what every choice is made on."""
        found: list[Question] = []
        fewest = FEWEST_ON_VALIDATION if part == "validation" else FEWEST
        for name in self.world.seen:
            found += self._classes(name, "seen", self.rows(part, [name]), fewest=fewest)
        return found

    def _classes(
        self,
        name: str,
        endpoint: Endpoint,
        rows: NDArray[np.int64],
        shots: NDArray[np.int64] | None = None,
        fewest: int = FEWEST,
    ) -> list[Question]:
        label = {row: self.world.pairs[row].label for row in rows.tolist()}
        judged = set(rows.tolist())
        if shots is not None:  # the groups that a probe is trained on are not judged
            groups = {self.world.pairs[row].group for row in shots.tolist()}
            judged = {row for row in judged if self.world.pairs[row].group not in groups}
        counts = Counter(label[row] for row in judged)
        labels = tuple(sorted(key for key, count in counts.items() if key and count >= fewest))
        if len(labels) < 2:
            return []
        number = {key: k for k, key in enumerate(labels)}
        kept = np.array(sorted(row for row in judged if label[row] in number))
        classes = np.array([number[label[row]] for row in kept.tolist()])
        trained = None
        if shots is not None:
            chosen = np.array([row for row in shots.tolist() if label[row] in number])
            trained = chosen, np.array([number[label[row]] for row in chosen.tolist()])
        kind = "zero-shot" if shots is None else "probe"
        return [Question(f"{name} {kind}", endpoint, kind, kept, classes, labels, trained)]

    def _shots(self, rows: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """A few rows of each class, of as few groups as needed; the same in every draw. None where nothing is left."""
        groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for row in rows.tolist():
            pair = self.world.pairs[row]
            groups[pair.label][pair.group].append(row)
        chosen: list[int] = []
        for own in groups.values():
            if len(own) < 2:
                return None
            taken: list[int] = []
            for name in sorted(own, key=lambda name: hashed(0, name))[: len(own) // 2]:
                taken += sorted(own[name], key=lambda row: hashed(0, self.world.pairs[row].id))[: SHOTS - len(taken)]
            chosen += taken
        return np.array(chosen)


def answers(question: Question, world: World, embedded: Embedded) -> NDArray[np.bool_]:
    """Whether each answer of a model is right, `(rows,)`."""
    return judge(question, world, scores(question, world, embedded))


def scores(question: Question, world: World, embedded: Embedded) -> NDArray[np.float32]:
    """Scores of the classes, `(rows, classes)`; of retrieval the similarities of images and captions, `(m, m)`."""
    if question.kind == "retrieval":
        rows = question.rows[: len(question.rows) // 2]
        captions = world.text_rows([world.pairs[row].caption for row in rows])
        return (embedded.image[rows] @ embedded.text[captions].T).numpy()
    if question.shots is not None:
        rows, classes = question.shots
        empty = embedded.image[:0].numpy()
        parts = [embedded.image[rows].numpy(), empty, embedded.image[question.rows].numpy()]
        return probe(parts, classes, classes[:0], "fast")["image.scores"].astype(np.float32)
    source = world.pairs[question.rows[0]].source
    prompts = [world.text_rows(world.prompts(label, source)) for label in question.labels]
    vectors = torch.stack([F.normalize(embedded.text[own].mean(dim=0), dim=0) for own in prompts])
    return (embedded.image[question.rows] @ vectors.T).numpy()


def judge(question: Question, world: World, scores: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether the answer by these scores is right, `(rows,)`.

    An image's own caption, or an equal one, must be among its ten best, and a caption's own image among its ten best.
    """
    if question.kind != "retrieval":
        return scores.argmax(axis=1) == question.classes
    captions = np.array([world.pairs[row].caption for row in question.rows[: len(scores)]])
    right = captions[:, None] == captions[None]
    found = []
    for similarities in (scores, scores.T):
        best = np.argsort(-similarities, axis=1, kind="stable")[:, :RECALL]
        found.append(np.take_along_axis(right, best, axis=1).any(axis=1))
    return np.concatenate(found)
