"""One self-contained page from an evaluation: a claim computed from the numbers, the numbers, and examples.

Nothing is fetched and no script runs. The headline is written by the intervals, also when the student loses.
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

import safetensors.numpy
from PIL import Image

from mmkd.data.archives import ArchivedFile
from mmkd.data.folder import PairFolder, open_pairs
from mmkd.data.images import UnreadableImage, open_image
from mmkd.evaluation.report.markup import number, page, section, text
from mmkd.evaluation.report.pairs_results import (
    caveat,
    claim,
    differences_section,
    modalities_section,
    overall_section,
    tasks_section,
    verdict,
)
from mmkd.evaluation.report.pipeline import data_section, provenance_section, teachers_section, training_section
from mmkd.evaluation.tasks.task import Outputs
from mmkd.files import read_json

SHOWN_IMAGES, SHOWN_CAPTIONS = 16, 4

GRADES = "✓ belong together, ≈ same label but another image, ✗ neither."

EXAMPLE_TASKS = ("retrieval", "zeroshot-label", "zeroshot-modality")


@dataclass(frozen=True)
class ReportInputs:
    """Where the report finds what the stages left; only results are needed, and the pairs if these were evaluated."""

    results: Path
    pairs: Path | None = None
    stage1_log: Path | None = None
    distill_log: Path | None = None
    screen_report: Path | None = None
    align_report: Path | None = None
    stages: Path | None = None


def read_summary(results: Path) -> dict[str, Any]:
    """``summary.json`` of an evaluation.

    Raises:
        FileNotFoundError: there is none among the results.
        ValueError: it is broken.
    """
    summary_file = results / "summary.json"
    if not summary_file.is_file():
        raise FileNotFoundError(f"{summary_file} is not there; run `mmkd eval --output {results}` first")
    summary: dict[str, Any] = read_json(summary_file)
    return summary


def build_report(inputs: ReportInputs) -> str:
    """The whole page of an evaluation on pairs.

    Raises:
        FileNotFoundError: there is no ``summary.json`` among the results, or there are no pairs.
        ValueError: a JSON file is broken, or the pairs are not named.
    """
    summary = read_summary(inputs.results)
    if inputs.pairs is None:
        raise ValueError("these results are of a folder of pairs; name it with --pairs, for the example images")
    folder = open_pairs(inputs.pairs)
    sheets = [inputs.pairs / name for name in ("README.md", "ATTRIBUTION.md")]
    datasheet = "\n".join(sheet.read_text(encoding="utf-8") for sheet in sheets if sheet.is_file())
    sections = [
        overall_section(summary),
        images_section(summary, inputs.results, folder),
        captions_section(summary, inputs.results, folder),
        tasks_section(summary),
        modalities_section(summary),
        differences_section(summary),
        *pipeline_sections(inputs),
        data_section(summary, datasheet),
        provenance_section(summary, settings_of(inputs), _optional(inputs.stages)),
    ]
    body = "\n".join([header(summary), "<main>", *(part for part in sections if part), "</main>", footer(summary)])
    return page(f"MMKD-CLIP: {verdict(summary)}", body)


def pipeline_sections(inputs: ReportInputs) -> list[str]:
    """How the student came about, as far as logs and reports are given."""
    return [
        training_section({"Stage 1, captions": inputs.stage1_log, "Stage 2, distillation": inputs.distill_log}),
        teachers_section(_optional(inputs.align_report), _optional(inputs.screen_report)),
    ]


def header(summary: dict[str, Any]) -> str:
    """The claim, its numbers and what they are not."""
    return (
        '<header><p class="brand">MMKD-CLIP</p>'
        f'<h1>{text(verdict(summary))}</h1>\n<p class="claim">{claim(summary)}</p>\n'
        f'<p class="caveat">{caveat(summary)}</p></header>'
    )


def footer(summary: dict[str, Any]) -> str:
    """Which program made the page."""
    version = summary["versions"].get("mmkd-clip", "")
    made = f"Made by <code>mmkd report</code>, mmkd-clip {text(version)}."
    return f"<footer>{made} No medical device, no medical advice.</footer>"


def images_section(summary: dict[str, Any], results: Path, folder: PairFolder) -> str:
    """Held-out images with the student's first answers."""
    name = next((name for name in EXAMPLE_TASKS if name in summary["tasks"]), None)
    if name is None or summary["tasks"][name]["rows"][summary["student"]]["undefined"]:
        return ""
    task, outputs = _load(results, summary["student"], name)
    thumbnails = Thumbnails(folder)
    cards = []
    for position in spread(task["ids"], task["modalities"]["image"], SHOWN_IMAGES):
        id = task["ids"][position]
        pair = thumbnails.pairs.get(id)
        modality = pair.modality if pair else ""
        if task["kind"] == "retrieval":
            answers, own = caption_answers(task, outputs, position), pair.caption if pair else ""
        else:
            answers, own = class_answers(task, outputs, position), task["classes"][task["targets"][position]]
        cards.append(image_card(thumbnails.tag(id, f"held-out image, {modality}"), modality, own, answers))
    what, grades = ("captions", GRADES) if task["kind"] == "retrieval" else ("classes", "")
    lead = (
        f"The student's first three of {len(task[what])} {what} for images it has not seen, chosen by a fixed "
        f"rule that knows no result. {grades}"
    )
    return section("images", "What the student sees", lead, f'<div class="cards">{"".join(cards)}</div>')


def captions_section(summary: dict[str, Any], results: Path, folder: PairFolder) -> str:
    """Captions with the images the student finds for them."""
    if "retrieval" not in summary["tasks"] or summary["tasks"]["retrieval"]["rows"][summary["student"]]["undefined"]:
        return ""
    task, outputs = _load(results, summary["student"], "retrieval")
    thumbnails = Thumbnails(folder)
    cards = []
    for position in spread(task["captions"], task["modalities"]["caption"], SHOWN_CAPTIONS):
        found = image_answers(task, outputs, position)
        images = [
            (thumbnails.tag(a.value, f"image found in place {place}"), a) for place, a in enumerate(found, start=1)
        ]
        cards.append(caption_card(task["captions"][position], images))
    lead = (
        f"A sentence in, images out: the first five of {len(task['ids'])} held-out images, with their cosines. {GRADES}"
    )
    return section("captions", "Search by sentence", lead, f'<div class="queries">{"".join(cards)}</div>')


def _load(results: Path, encoder: str, name: str) -> tuple[dict[str, Any], Outputs]:
    stored = safetensors.numpy.load_file(results / "cells" / encoder / f"{name}.safetensors")
    prefix = "outputs."
    outputs = {key[len(prefix) :]: array for key, array in stored.items() if key.startswith(prefix)}
    return read_json(results / "tasks" / f"{name}.json"), outputs


def _optional(path: Path | None) -> Any:
    return read_json(path) if path is not None and path.is_file() else None


def settings_of(inputs: ReportInputs) -> dict[str, str]:
    """The resolved settings that stages left beside what they wrote, by command."""
    outputs = {
        "curate": inputs.pairs / "manifest.arrow" if inputs.pairs else None,
        "pretrain": inputs.stage1_log,
        "screen": inputs.screen_report,
        "align": inputs.align_report,
        "distill": inputs.distill_log,
        "eval": inputs.results / "summary.json",
    }
    files = {name: path.parent / "settings.yaml" for name, path in outputs.items() if path is not None}
    return {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}


# Section: Examples for the report: held-out images with what the student said of them, chosen by a rule that knows no
# result.
#
# The rule: modalities in turn, inside each one by the hash of the pair's id. Thumbnails are small JPEG data URIs, so
# that
# the page stays one file.


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
