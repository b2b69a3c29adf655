"""Held-out images with the student's predictions, chosen by a fixed rule that does not use the results.

The rule: modalities in turn, inside each one by the hash of the pair's id. Thumbnails are small JPEG data URIs, so that
the page stays one file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mmkd.data.folder import PairFolder
from mmkd.data.images import thumbnail
from mmkd.data.splits import spread
from mmkd.evaluation.report.leaderboard import Leaderboard, section
from mmkd.evaluation.results.store import ResultStore
from mmkd.evaluation.tasks.task import Outputs
from mmkd.files import read_json
from mmkd.pages.page import Section, number

SHOWN_IMAGES, SHOWN_CAPTIONS, SHOWN_ANSWERS = 16, 4, 3
LONGEST_CAPTION = 220
TASKS = ("retrieval", "zeroshot-label", "zeroshot-modality")
TEMPLATE = "evaluation/report/examples.html.j2"
GRADES = "✓ belong together, ≈ same label but another image, ✗ neither."
Grade = Literal["right", "near", "wrong"]


@dataclass(frozen=True)
class Answer:
    """A prediction of the student.

    Attributes:
        text: a caption or a class; empty for an image.
        score: its score.
        grade: whether it is correct.
        image: a data URI, empty where the image cannot be read or there is none.
    """

    text: str
    score: str
    grade: Grade
    image: str = ""


@dataclass(frozen=True)
class Example:
    """An image or a caption with the student's first predictions.

    Attributes:
        query: the caption, or the modality of the image.
        answers: best first.
        image: data URI of the image; empty for a caption or where it cannot be read.
        own: what is correct, where no answer is.
    """

    query: str
    answers: list[Answer]
    image: str = ""
    own: str = ""


class Examples:
    """Examples from one task and one folder of pairs."""

    def __init__(self, board: Leaderboard, folder: PairFolder, name: str) -> None:
        """Read the task's description and the student's outputs."""
        self.task: dict[str, Any] = read_json(board.results / "tasks" / f"{name}.json")
        self.outputs: Outputs = ResultStore(board.results, [], 0, 0).outputs(board.student, name)
        self.folder = folder
        self.pairs = {pair.id: pair for pair in folder.pairs}
        self._thumbnails: dict[str, str] = {}

    def images(self) -> list[Example]:
        """Images with the first captions or classes."""
        shown = spread(self.task["ids"], self.task["modalities"]["image"], SHOWN_IMAGES)
        return [self._image(position) for position in shown]

    def captions(self) -> list[Example]:
        """Captions of a retrieval task with the first images."""
        shown = spread(self.task["captions"], self.task["modalities"]["caption"], SHOWN_CAPTIONS)
        return [Example(shorten(self.task["captions"][k]), self._found("caption", k)) for k in shown]

    def _found(self, unit: str, position: int) -> list[Answer]:
        """The first captions of an image, or the first images of a caption."""
        task, is_image = self.task, unit == "image"
        other = "caption" if is_image else "image"
        right, label = set(task[f"right_{other}s"][position]), task["labels"][unit][position]
        ranked = zip(self.outputs[f"{unit}.top"][position], self.outputs[f"{unit}.top_scores"][position], strict=True)
        return [
            Answer(
                shorten(task["captions"][k]) if is_image else "",
                number(float(score)),
                "right" if int(k) in right else "near" if label and label == task["labels"][other][k] else "wrong",
                "" if is_image else self._thumbnail(task["ids"][k]),
            )
            for k, score in ranked
        ]

    def _image(self, position: int) -> Example:
        task, id = self.task, self.task["ids"][position]
        pair = self.pairs.get(id)
        if task["kind"] == "retrieval":
            answers, own = self._found("image", position)[:SHOWN_ANSWERS], pair.caption if pair else ""
        else:
            scores, target = self.outputs["image.scores"][position], task["targets"][position]
            best = sorted(range(len(scores)), key=lambda k: (-scores[k], k))[:SHOWN_ANSWERS]
            answers = [
                Answer(task["classes"][k], number(float(scores[k])), "right" if k == target else "wrong") for k in best
            ]
            own = task["classes"][target]
        if any(answer.grade == "right" for answer in answers):
            own = ""
        return Example(pair.modality if pair else "", answers, self._thumbnail(id), shorten(own))

    def _thumbnail(self, id: str) -> str:
        if id not in self._thumbnails:
            pair = self.pairs.get(id)
            self._thumbnails[id] = thumbnail(self.folder.image_path(pair)) if pair else ""
        return self._thumbnails[id]


def examples_sections(board: Leaderboard, folder: PairFolder) -> list[Section]:
    """Images with the student's answers, and captions with the images it finds; none without such a task."""
    name = next((name for name in TASKS if name in board.tasks), "")
    if not name or board.metric(name, board.student) is None:
        return []
    examples = Examples(board, folder, name)
    retrieval = examples.task["kind"] == "retrieval"
    what = f"{len(examples.task['captions' if retrieval else 'classes'])} {'captions' if retrieval else 'classes'}"
    grades = f" {GRADES}" if retrieval else ""
    values = {"answers": SHOWN_ANSWERS, "pool": what, "grades": grades}
    sections = [section("images", [], TEMPLATE, examples.images(), **values)]
    if retrieval:
        images = len(examples.task["ids"])
        sections.append(section("captions", [], TEMPLATE, examples.captions(), images=images, grades=GRADES))
    return sections


def shorten(caption: str) -> str:
    """At most 220 characters, cut at a word."""
    if len(caption) <= LONGEST_CAPTION:
        return caption
    return caption[:LONGEST_CAPTION].rsplit(" ", 1)[0][:LONGEST_CAPTION] + " …"
