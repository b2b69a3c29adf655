"""Examples for the report: held-out images with what the student said of them, chosen by a rule that knows no result.

The rule: modalities in turn, inside each one by the hash of the pair's id. Thumbnails are small JPEG data URIs, so that
the page stays one file.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mmkd.data.archives import ArchivedFile
from mmkd.data.images import UnreadableImage, open_image
from mmkd.data.records import PairFolder
from mmkd.evaluation.markup import number, text
from mmkd.evaluation.task import Outputs

Grade = Literal["right", "near", "wrong"]
MARKS = {"right": "✓", "near": "≈", "wrong": "✗"}
THUMBNAIL_SIDE, JPEG_QUALITY = 224, 78
LONGEST_CAPTION = 220


@dataclass(frozen=True)
class Answer:
    """One answer of the student: a caption, a class or the id of an image, its score and how good it is."""

    value: str
    score: float
    grade: Grade


def spread(keys: Sequence[str], modalities: Sequence[str], count: int) -> list[int]:
    """Positions of up to ``count`` keys: modalities in turn, inside each by hash; no result is looked at."""
    by_modality: dict[str, list[int]] = defaultdict(list)
    for position in sorted(range(len(keys)), key=lambda k: hashlib.sha256(keys[k].encode()).hexdigest()):
        by_modality[modalities[position]].append(position)
    queues = [by_modality[modality] for modality in sorted(by_modality)]
    turns = [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
    return turns[:count]


def caption_answers(task: dict[str, Any], outputs: Outputs, position: int, count: int = 3) -> list[Answer]:
    """The student's first captions for an image of the retrieval task; near are captions of images of its label."""
    right, label = set(task["right_captions"][position]), task["labels"]["image"][position]
    pairs = list(zip(outputs["image.top"][position], outputs["image.top_scores"][position], strict=True))
    return [
        Answer(task["captions"][k], float(score), _grade(int(k) in right, label, task["labels"]["caption"][k]))
        for k, score in pairs[:count]
    ]


def class_answers(task: dict[str, Any], outputs: Outputs, position: int, count: int = 3) -> list[Answer]:
    """The student's first classes for an image of a zero-shot task."""
    scores = outputs["image.scores"][position]
    best = sorted(range(len(scores)), key=lambda k: (-scores[k], k))[:count]
    target = task["targets"][position]
    return [Answer(task["classes"][k], float(scores[k]), "right" if k == target else "wrong") for k in best]


def image_answers(task: dict[str, Any], outputs: Outputs, position: int) -> list[Answer]:
    """The student's first images for a caption of the retrieval task; near are images of its label."""
    right, label = set(task["right_images"][position]), task["labels"]["caption"][position]
    pairs = zip(outputs["caption.top"][position], outputs["caption.top_scores"][position], strict=True)
    return [
        Answer(task["ids"][k], float(score), _grade(int(k) in right, label, task["labels"]["image"][k]))
        for k, score in pairs
    ]


class Thumbnails:
    """Images of a pairs folder as data URIs, each made once."""

    def __init__(self, folder: PairFolder) -> None:
        """Index the pairs by id; no image is opened yet."""
        self.folder = folder
        self.pairs = {pair.id: pair for pair in folder.pairs}
        self._made: dict[str, str] = {}

    def tag(self, id: str, alt: str) -> str:
        """An ``<img>``, or a plain box where the image is gone."""
        if id not in self._made:
            pair = self.pairs.get(id)
            self._made[id] = thumbnail(self.folder.image_path(pair)) if pair else ""
        if not self._made[id]:
            return f'<span class="missing">{text(alt)}</span>'
        return f'<img src="{self._made[id]}" alt="{text(alt)}" loading="lazy">'


def thumbnail(path: Path | ArchivedFile) -> str:
    """A JPEG data URI of at most 224 pixels a side; empty if the image cannot be read."""
    try:
        image = open_image(path)
    except UnreadableImage:
        return ""
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def image_card(image: str, modality: str, own: str, answers: Sequence[Answer]) -> str:
    """An image with the student's first answers; its own caption where none of them is right."""
    items = "".join(
        f"<li>{_mark(answer.grade)}<span>{text(shorten(answer.value))}</span><em>{number(answer.score)}</em></li>"
        for answer in answers
    )
    missed = (
        ""
        if any(answer.grade == "right" for answer in answers)
        else f'<p class="own">Its own: {text(shorten(own))}</p>'
    )
    heading = f"<h3>{text(modality or 'image')}</h3>"
    return f'<article class="card">{image}<div>{heading}<ol>{items}</ol>{missed}</div></article>'


def caption_card(caption: str, images: Sequence[tuple[str, Answer]]) -> str:
    """A caption with the images found for it."""
    items = "".join(
        f"<li>{image}<span>{_mark(answer.grade)}<em>{number(answer.score)}</em></span></li>" for image, answer in images
    )
    return f'<article class="query"><h3>“{text(shorten(caption))}”</h3><ol>{items}</ol></article>'


def shorten(caption: str) -> str:
    """At most 220 characters, cut at a word."""
    if len(caption) <= LONGEST_CAPTION:
        return caption
    return caption[:LONGEST_CAPTION].rsplit(" ", 1)[0][:LONGEST_CAPTION] + " …"


def _grade(right: bool, label: str, other: str) -> Grade:
    if right:
        return "right"
    return "near" if label and label == other else "wrong"


def _mark(grade: Grade) -> str:
    return f'<b class="{grade}" role="img" aria-label="{grade}">{MARKS[grade]}</b>'
