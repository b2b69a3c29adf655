"""Closed questions as statements, so that a dual encoder can answer them without training.

"Is the heart enlarged?" becomes "the heart is enlarged" and "the heart is not enlarged"; "Is this a CT or an MRI?"
becomes "this is a CT" and "this is an MRI". The image is answered with the statement it lies closest to. The rules read
the question alone, never its answer, and know a little English word order, no grammar: a statement that comes out
clumsy still holds the words that matter. What they cannot turn is left out and counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

BE = ("is", "are", "was", "were")
DO, HAVE = ("do", "does", "did"), ("has", "have", "had")
MODAL = ("can", "could", "will", "would", "should", "may", "might")
ANY = ("any", "a", "an", "some", "evidence of", "signs of")
SEE = r"(?:you\s+)?(?:see|appreciate|identify|find|observe|visualize|notice)"
WORD = re.compile(r"\w+")
DETERMINERS = WORD.findall("a an the this that these those just no")
PLACES = WORD.findall("in on at with without within under above below near from inside outside")
PRONOUNS = WORD.findall("this that it these those they you")
VERBS = WORD.findall(
    """have show demonstrate contain appear represent include involve display suggest look indicate see use extend
    cross need be suspect reveal depict cause been taken seen given shown drawn done made originate compress occur"""
)
STATES = WORD.findall(
    """normal abnormal present visible clear symmetric symmetrical homogenous homogeneous midline intact sharp patent
    male female bilateral unilateral hyperdense hypodense superior inferior more less larger smaller wider denser
    bigger brighter darker pathologic large small diffuse focal radiolucent radioopaque not also well"""
)
NOUNS_IN_ED_ING = WORD.findall("imaging staining thickening swelling bleeding narrowing finding")
EDGE = re.compile(r"[\s.?!:;]+$")
SIDES = {"side", "sides", "the", "a", "an", "in", "on", "of", "image", "patient", "scan", "film", "and", "just"}


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
    """Answers that a closed question allows and a statement for each; None where the question cannot be turned."""
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
    """Whether "or" lists what is looked for together, as in "Are there masses or cysts?"."""
    first, second = words[0], words[1].lower()
    return (first in BE and second == "there") or first in ("any", "evidence", *DO, *MODAL)


def _both_ways(words: list[str]) -> tuple[str, str] | None:
    """The statement that a question answered by yes affirms, and its contrary."""
    first, rest = words[0], words[1:]
    told = " ".join(rest)
    if first in BE and rest[0].lower() == "there" and len(rest) > 1:
        return _existence(" ".join(rest[1:]), f"there {first}")
    if first in ("any", "evidence"):
        return _existence(" ".join(words), "there is")
    if first in MODAL and (seen := re.match(rf"{SEE}\s+(.+)", told, re.IGNORECASE)):
        return _existence(seen[1], "there is")
    if first in DO and (seen := re.match(r"you\s+(?:see|notice|appreciate)\s+(.+)", told, re.IGNORECASE)):
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
    """How many words stand before what is said of the subject."""
    if words[0].lower() in PRONOUNS and words[1].lower() in [*DETERMINERS, *PLACES]:
        return 1
    for place in range(1 if words[0].lower() not in DETERMINERS else 2, len(words)):
        word, before = words[place].lower().strip(","), words[place - 1].lower()
        if before in ("of", "and") or before in DETERMINERS:
            continue
        says = word in DETERMINERS or word in PLACES or word in VERBS or word in STATES
        formed = word.endswith(("ed", "ing", "ible", "able")) and word not in NOUNS_IN_ED_ING and len(word) > 4
        if says or formed:
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
    return set(re.findall(r"[\w-]+", answer.lower())) - SIDES
