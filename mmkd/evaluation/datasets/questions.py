"""Questions about images, and where they are read from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.data.images import read_image_bytes
from mmkd.files import is_inside, read_json

CLOSED = "CLOSED"
SPLIT_NAMES = {"train": "train", "training": "train", "val": "validation", "valid": "validation"}
SPLIT_NAMES |= {"validate": "validation", "validation": "validation", "dev": "validation", "test": "test"}


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image.

    Attributes:
        sha256: of the image file.
        closed: to be answered by yes or no, or by one of the things it names.
        split: train, validation or test as its publisher deals it out; empty where that is not stated.
    """

    sha256: str
    text: str
    answer: str
    closed: bool
    split: str = ""


def read_questions(path: Path) -> list[Question]:
    """Questions in the form of VQA-RAD: a JSON list with ``image_name``, ``question``, ``answer``, ``answer_type``.

    A ``split`` is kept; VQA-RAD itself states it in ``phrase_type``, where it begins with ``test``.

    Args:
        path: of the JSON; images lie beside it, in ``images/``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not of this form, a split is unknown, a question has no answer, or a name leaves the folder.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--questions {path}: no such file")
    rows = read_json(path)
    keys = ("image_name", "question", "answer", "answer_type")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(keys) <= row.keys() for row in rows):
        raise ValueError(f"{path} must be a list of objects with {', '.join(keys)}")
    names = {str(row["image_name"]) for row in rows}
    outside = next((name for name in names if not is_inside(name)), None)
    if outside is not None:
        raise ValueError(f"{path}: image {outside!r} leaves the folder; refused")
    images = path.parent / "images"
    digests = {
        name: hashlib.sha256(read_image_bytes(images / name)).hexdigest() for name in names if (images / name).is_file()
    }
    found = [(row, *stated(row["question"], row["answer"], str(path))) for row in rows]
    return [
        Question(
            digests[str(row["image_name"])],
            question,
            answer,
            str(row["answer_type"]).strip().upper() == CLOSED,
            stated_split(row),
        )
        for row, question, answer in found
        if str(row["image_name"]) in digests
    ]


def stated(question: Any, answer: Any, place: str) -> tuple[str, str]:
    """A question and its answer as texts, the answer as `normalise` gives it.

    Raises:
        ValueError: either is empty or not there; counted as an answer of its own it would be one that is guessed.
    """
    said = "" if question is None else " ".join(str(question).split())
    answered = "" if answer is None or answer != answer else normalise(str(answer))
    if not said or not answered:
        lacking = "answer" if said else "text"
        raise ValueError(f"{place}: question {said!r} has no {lacking}; take it out, or keep it in a file of its own")
    return said, answered


def stated_split(row: dict[str, Any]) -> str:
    """The split that a question states: ``split``, or VQA-RAD's ``phrase_type``; empty where it states none.

    Raises:
        ValueError: ``split`` is no name of a split.
    """
    if row.get("split"):
        name = str(row["split"]).strip().lower()
        if name not in SPLIT_NAMES:
            raise ValueError(f"question {row.get('question')!r}: split {name!r}; allowed: {', '.join(SPLIT_NAMES)}")
        return SPLIT_NAMES[name]
    if row.get("phrase_type"):
        return "test" if str(row["phrase_type"]).startswith("test") else "train"
    return ""


def normalise(answer: str) -> str:
    """An answer without capitals, outer punctuation and superfluous white space, so that "Yes." is "yes"."""
    return " ".join(answer.lower().split()).strip(" .,;")


def question_texts(questions: Sequence[Question]) -> list[str]:
    """Every question once."""
    return sorted({question.text for question in questions})
