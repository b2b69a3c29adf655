"""Closed questions without training: the image lies closer to one of the statements that answer the question.

Of every closed test question that `choices` can convert, the statement with the highest cosine is the answer. The AUROC
of "yes" against "no" over the difference of their cosines is also given; it does not depend on an encoder's bias
towards negations. The controls are another question's image, and the mean of all test images, which measures what
follows from the statements alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.datasets.source import Question
from mmkd.evaluation.embeddings.embed import Embedded, UndefinedMetricError
from mmkd.evaluation.statistics import metrics
from mmkd.evaluation.statistics.bootstrap import Metrics, resampling_units
from mmkd.evaluation.statistics.metrics import Floats
from mmkd.evaluation.tasks.task import Outputs, Task

WORDS_FILE = Path(__file__).with_name("words.yaml")
WORDS: dict[str, list[str]] = {
    name: words.split() for name, words in yaml.safe_load(WORDS_FILE.read_text(encoding="utf-8")).items()
}
BE, DO, HAVE, MODAL = (WORDS[name] for name in ("be", "do", "have", "modal"))
DETERMINERS, PLACES = WORDS["determiners"], WORDS["places"]
ANY = ("any", "a", "an", "some", "evidence of", "signs of")
SEE = r"(?:you\s+)?(?:see|appreciate|identify|find|observe|visualize|notice)"
EDGE = re.compile(r"[\s.?!:;]+$")
SEED = 0
NOTHING = -2.0  # below any cosine: places of questions with fewer choices than others


@dataclass(frozen=True)
class Choices:
    """What a closed question may be answered with.

    Attributes:
        answers: as a question's answer is spelled after `questions.normalise`.
        statements: that stand for them.
    """

    answers: tuple[str, ...]
    statements: tuple[str, ...]

    def index(self, answer: str) -> int:
        """Which of ``answers`` an answer is, by the words they share; -1 where it is none or several of them."""
        if answer in self.answers:
            return self.answers.index(answer)
        if self.answers == ("yes", "no"):
            return -1
        words = _content(answer)
        if not words:
            return -1
        fitting = [k for k, own in enumerate(self.answers) if _content(own) <= words or words <= _content(own)]
        return fitting[0] if len(fitting) == 1 else -1


def choices(question: str) -> Choices | None:
    """Answers that a closed question allows and a statement for each; None where the question cannot be converted."""
    words = EDGE.sub("", " ".join(question.split())).replace("Is/are", "Are").split()
    if len(words) < 2:
        return None
    words[0] = words[0].lower()
    place = next((k for k, word in enumerate(words) if word.lower() in ("or", "vs", "vs.", "versus")), 0)
    if place and not _asks_whether_any(words):
        named = _named(words, place)
        if named is not None:
            return named
    both = _both_ways(words)
    return Choices(("yes", "no"), both) if both else None


def _asks_whether_any(words: list[str]) -> bool:
    """Whether "or" joins alternatives of one question, as in "Are there masses or cysts?"."""
    first, second = words[0], words[1].lower()
    return (first in BE and second == "there") or first in ("any", "evidence", *DO, *MODAL)


def _both_ways(words: list[str]) -> tuple[str, str] | None:
    """The statement that a question answered by yes affirms, and its contrary."""
    first, rest = words[0], words[1:]
    text = " ".join(rest)
    if first in BE and rest[0].lower() == "there" and len(rest) > 1:
        return _existence(" ".join(rest[1:]), f"there {first}")
    if first in ("any", "evidence"):
        return _existence(" ".join(words), "there is")
    if first in MODAL and (seen := re.match(rf"{SEE}\s+(.+)", text, re.IGNORECASE)):
        return _existence(seen[1], "there is")
    if first in DO and (seen := re.match(r"you\s+(?:see|notice|appreciate)\s+(.+)", text, re.IGNORECASE)):
        return _existence(seen[1], "there is")
    if first not in (*BE, *DO, *HAVE, *MODAL) or len(rest) < 2:
        return None
    cut = _subject_length(rest)
    subject, predicate = " ".join(rest[:cut]), " ".join(rest[cut:])
    if first in DO:
        return f"{subject} {predicate}", f"{subject} {first} not {predicate}"
    return f"{subject} {first} {predicate}", f"{subject} {first} not {predicate}"


def _existence(thing: str, there: str) -> tuple[str, str]:
    for opening in (*ANY, *ANY):  # "any evidence of" has two of them
        thing = re.sub(rf"^{opening}\s+", "", thing, flags=re.IGNORECASE)
    if thing.lower().startswith("no "):
        return f"{there} {thing}", f"{there} {thing[3:]}"
    return f"{there} {thing}", f"{there} no {thing}"


def _subject_length(words: list[str]) -> int:
    """Number of words of the subject, before the predicate."""
    if words[0].lower() in WORDS["pronouns"] and words[1].lower() in [*DETERMINERS, *PLACES]:
        return 1
    for place in range(1 if words[0].lower() not in DETERMINERS else 2, len(words)):
        word, before = words[place].lower().strip(","), words[place - 1].lower()
        if before in ("of", "and") or before in DETERMINERS:
            continue
        begins = any(word in WORDS[name] for name in ("determiners", "places", "verbs", "states"))
        formed = word.endswith(("ed", "ing", "ible", "able")) and word not in WORDS["nouns_in_ed_ing"] and len(word) > 4
        if begins or formed:
            return place
    return max(1, len(words) - 1)


def _named(words: list[str], place: int) -> Choices | None:
    """Choices around "or", each in a sentence without the others; ``place`` is that of "or"."""
    if place == len(words) - 1:
        return None
    left, right = words[:place], words[place + 1 :]
    size = _choice_length(right)
    last = right[:size]
    start = _choice_start(left, last)
    listed = [part.split() for part in re.split(r",\s*", " ".join(left[start:])) if part.strip()]
    options = [*listed, last]
    shared = right[size:]
    before = left[:start]
    statements = [_plain_statement([*before, *option, *shared]) for option in options]
    answers = [" ".join(option).lower().strip(" .,;") for option in options]
    return Choices(tuple(answers), tuple(statements)) if len(set(answers)) == len(answers) else None


def _choice_length(right: list[str]) -> int:
    """Words of the choice after "or": up to where the sentence goes on for all choices alike."""
    opening = 1 if right[0].lower() in (*DETERMINERS, "with", "without", "in", "on") else 0
    for length in range(opening + 1, len(right)):
        if right[length].lower() in (*PLACES, "of", "than", "to", "used", "seen", "side", "is", "are"):
            return length
        if not opening:
            return length
    return len(right)


def _choice_start(left: list[str], last: list[str]) -> int:
    """Where the choices before "or" begin: at the first of a list with commas, else as the choice after it does."""
    commas = [k for k, word in enumerate(left) if word.endswith(",")]
    if commas:
        between = commas[1] - commas[0] if len(commas) > 1 else len(left) - 1 - commas[0]
        return max(1, commas[0] + 1 - max(1, between))
    if len(last) > 1:
        kind = DETERMINERS if last[0].lower() in DETERMINERS else PLACES
        starts = [k for k, word in enumerate(left) if word.lower() in kind and k > 0]
        own = [k for k in starts if k >= len(left) - len(last) - 1 and k < len(left) - (kind == DETERMINERS)]
        if own:
            return own[-1]
    return max(1, len(left) - 1)


def _plain_statement(words: list[str]) -> str:
    both = _both_ways(words)
    return both[0] if both else " ".join(words)


def _content(answer: str) -> set[str]:
    return set(re.findall(r"[\w-]+", answer.lower())) - set(WORDS["sides"])


Converted = list[tuple[Pair, Question, Choices]]


class StatementQuestions(Task):
    """Answer closed questions by statements."""

    kind = "vqa"

    def __init__(self, manifest: Manifest, converted: Converted, left_out: int, metadata: dict[str, Any]) -> None:
        """Fix the questions.

        Args:
            manifest: of the dataset.
            converted: test questions that were converted into statements.
            left_out: closed test questions that could not be converted.
            metadata: further entries of the description.
        """
        super().__init__(manifest, "Zero-shot visual question answering by statements", "zeroshot")
        self.converted = converted
        self.pairs = [pair for pair, _, _ in converted]
        self.targets = np.array([own.index(question.answer) for _, question, own in converted])
        self.yes_no = np.array([own.answers == ("yes", "no") for _, _, own in converted])
        kinds = ["yes or no" if is_yes_no else "choice" for is_yes_no in self.yes_no]
        self.units = {"image": resampling_units(kinds, [pair.group or pair.id for pair in self.pairs])}
        self.sample_pairs = {"image": self.pairs}
        sizes = np.array([len(own.answers) for _, _, own in converted])
        self.describe(
            {
                "ids": [pair.id for pair in self.pairs],
                "statements": [list(own.statements) for _, _, own in converted],
                "targets": self.targets.tolist(),
                "questions": {"test": len(converted)},
                "yes_no": int(self.yes_no.sum()),
                "left_out": left_out,
                "unanswerable": float(np.mean(self.targets < 0)),
                "chance": {"accuracy": float(np.mean((self.targets >= 0) / sizes)), "yes_no_auroc": 0.5},
                **metadata,
            }
        )

    def outputs(self, embedded: Embedded) -> Outputs:
        """``image.scores`` cosines `(n, choices)`, and those of both controls.

        Raises:
            UndefinedMetricError: the encoder has no vectors of texts.
        """
        if not embedded.texts:
            raise UndefinedMetricError("the encoder has no vectors of texts")
        images = embedded.image_matrix(self.pairs)
        mean = images.mean(axis=0, keepdims=True)
        other = np.random.default_rng(SEED).permutation(len(images))
        flat = [text for _, _, own in self.converted for text in own.statements]
        vectors = embedded.text_matrix(flat)
        owners = np.repeat(np.arange(len(self.converted)), [len(own.statements) for _, _, own in self.converted])
        places = np.concatenate([np.arange(len(own.statements)) for _, _, own in self.converted])

        def cosines(shown: Any) -> Any:
            scores = np.full((len(self.converted), places.max() + 1), NOTHING, dtype=np.float32)
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
        margin = self._margin(outputs)
        scored = self.yes_no & (self.targets >= 0)
        return {
            "accuracy": metrics.weighted_mean(right, image),
            "yes_no_accuracy": metrics.weighted_mean(right, image * self.yes_no),
            "choice_accuracy": metrics.weighted_mean(right, image * ~self.yes_no),
            "yes_no_auroc": metrics.auroc(self.targets[scored] == 0, margin[scored], image[:, scored])
            if scored.any()
            else np.full(len(image), np.nan),
            "question_only_accuracy": metrics.weighted_mean(self._right(outputs["image.mean_image"]), image),
            "shuffled_image_accuracy": metrics.weighted_mean(self._right(outputs["image.shuffled_image"]), image),
        }

    def extras(self, outputs: Outputs) -> dict[str, Any]:
        """Why there is no number of one kind of question, if that is so."""
        kinds = {"yes_no": ("yes or no", self.yes_no), "choice": ("a choice", ~self.yes_no)}
        lacking = {
            f"{key}_accuracy": f"no test question is of the kind {name}"
            for key, (name, own) in kinds.items()
            if not own.any()
        }
        answers = set(self.targets[self.yes_no & (self.targets >= 0)].tolist())
        if len(answers) < 2:
            lacking["yes_no_auroc"] = "no test questions are answered yes, or none no"
        return {"undefined_metrics": lacking} if lacking else {}

    def sample_scores(self, outputs: Outputs) -> dict[str, Floats]:
        """1 where the answer is correct."""
        return {"image": self._right(outputs["image.scores"])}

    def sample_columns(self, outputs: Outputs) -> dict[str, dict[str, Any]]:
        """Of "yes or no" questions whether yes is right, and the margin of yes over no that AUROC ranks by."""
        unknown = ~self.yes_no | (self.targets < 0)
        return {
            "image": {
                "yes": np.ma.masked_array(self.targets == 0, unknown),
                "yes_margin": np.ma.masked_array(self._margin(outputs), unknown),
            }
        }

    def _margin(self, outputs: Outputs) -> Floats:
        return (outputs["image.scores"][:, 0] - outputs["image.scores"][:, 1]).astype(np.float64)

    def _right(self, scores: Any) -> Floats:
        return (scores.argmax(axis=1) == self.targets).astype(np.float64)


def convert(questions: Sequence[tuple[Pair, Question]]) -> tuple[Converted, int]:
    """Closed questions with their statements, and how many could not be converted."""
    closed = [(pair, question, choices(question.text)) for pair, question in questions if question.closed]
    converted = [(pair, question, own) for pair, question, own in closed if own is not None]
    return converted, len(closed) - len(converted)


def _standardised(scores: Any, reference: Any) -> Any:
    """Scores without the mean and spread of what ``reference`` holds; places without a choice stay lowest."""
    held = reference[reference > NOTHING]
    return np.where(scores > NOTHING, (scores - held.mean()) / max(float(held.std()), 1e-8), -1e3).astype(np.float32)
