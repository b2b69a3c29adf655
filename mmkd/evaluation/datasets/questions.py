"""Questions about images, read in the forms of VQA-RAD and of SLAKE."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.data.images import UnreadableImageError, read_image_bytes
from mmkd.data.splits import meaning_of
from mmkd.data.table import SPLITS
from mmkd.files import is_inside, leads_inside, read_json

CLOSED, ENGLISH = "CLOSED", "en"
SLAKE_FILES = {"train": ["train.json"], "validation": ["validate.json", "validation.json"], "test": ["test.json"]}

Questions = tuple[list["Question"], dict[str, str], dict[str, str]]


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image.

    Attributes:
        sha256: of the image file.
        closed: answered by yes or no, or by one of the things it names.
        split: train, validation or test as its publisher states; empty where that is not stated.
    """

    sha256: str
    text: str
    answer: str
    closed: bool
    split: str = ""


def read_vqa_rad(path: Path) -> Questions:
    """A JSON list of objects with ``image_name``, ``question``, ``answer``, ``answer_type``.

    A ``split`` is kept; VQA-RAD itself states it in ``phrase_type``, where it begins with ``test``.

    Args:
        path: of the JSON; images lie beside it, in ``images/``.

    Returns:
        Questions about the images that can be read, image name -> SHA-256 of the file (empty where it cannot be read),
        and nothing, as the split belongs to the question and not to the image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not of this form, a split is unknown, a question has no answer, or a name leaves the folder.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--questions {path}: no such file")
    rows = _rows(path, "image_name")
    digests = {name: _digest(path.parent / "images", name) for name in sorted({row["image_name"] for row in rows})}
    return _questions(rows, "image_name", digests, str(path)), digests, {}


def read_slake(folder: Path, images: Path) -> Questions:
    """English questions of SLAKE's folder; an image's split is that of its questions.

    Returns:
        As `read_vqa_rad`, with image name -> split.

    Raises:
        ValueError: a file is not of this form, a question has no answer, or a name leaves the folder.
    """
    questions: list[Question] = []
    digests: dict[str, str] = {}
    splits: dict[str, str] = {}
    for split, files in SLAKE_FILES.items():
        file = next((folder / name for name in files if (folder / name).is_file()), folder / files[0])
        rows = [row for row in _rows(file, "img_name") if row.get("q_lang", ENGLISH) == ENGLISH]
        for name in dict.fromkeys(row["img_name"] for row in rows):
            digests[name] = digests.get(name) or _digest(images, name)
            splits.setdefault(name, split)
        rows = [row | {"split": split} for row in rows]
        questions += _questions(rows, "img_name", digests, str(file))
    return questions, digests, splits


def _rows(path: Path, image: str) -> list[dict[str, Any]]:
    """The objects of a JSON list of questions, whose images lie inside their folder."""
    rows, keys = read_json(path), (image, "question", "answer", "answer_type")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(keys) <= row.keys() for row in rows):
        raise ValueError(f"{path} must be a list of objects with {', '.join(keys)}")
    rows = [row | {image: str(row[image])} for row in rows]
    outside = next((row[image] for row in rows if not is_inside(row[image])), None)
    if outside is not None:
        raise ValueError(f"{path}: image {outside!r} leaves the folder; refused")
    return rows


def _questions(rows: Sequence[dict[str, Any]], image: str, digests: dict[str, str], place: str) -> list[Question]:
    """The questions whose image can be read."""
    found = [(row, *stated(row["question"], row["answer"], place)) for row in rows]
    return [
        Question(
            digests[row[image]], text, answer, str(row["answer_type"]).strip().upper() == CLOSED, stated_split(row)
        )
        for row, text, answer in found
        if digests[row[image]]
    ]


def _digest(folder: Path, name: str) -> str:
    """SHA-256 of an image file, empty where it cannot be read or is a link out of the folder."""
    try:
        inside = leads_inside(folder, folder / name)
        return hashlib.sha256(read_image_bytes(folder / name)).hexdigest() if inside else ""
    except UnreadableImageError:
        return ""


def stated(question: Any, answer: Any, place: str) -> tuple[str, str]:
    """A question and its answer as texts, the answer as `normalise` gives it.

    Raises:
        ValueError: either is empty or missing, which would count as an answer of its own.
    """
    text = "" if question is None else " ".join(str(question).split())
    answered = "" if answer is None or answer != answer else normalise(str(answer))
    if not text or not answered:
        lacking = "answer" if text else "text"
        raise ValueError(f"{place}: question {text!r} has no {lacking}; remove it, or keep it in another file")
    return text, answered


def stated_split(row: dict[str, Any]) -> str:
    """The split that a question states: ``split``, or VQA-RAD's ``phrase_type``; empty where it states none.

    Raises:
        ValueError: ``split`` is no name of a split.
    """
    if row.get("split"):
        split = meaning_of(str(row["split"]))
        if not split:
            raise ValueError(f"question {row.get('question')!r}: split {row['split']!r}; allowed: {', '.join(SPLITS)}")
        return split
    if row.get("phrase_type"):
        return "test" if str(row["phrase_type"]).startswith("test") else "train"
    return ""


def normalise(answer: str) -> str:
    """An answer without capitals, outer punctuation and superfluous white space, so that "Yes." is "yes"."""
    return " ".join(answer.lower().split()).strip(" .,;")
