"""The report of an evaluation: one self-contained page and the same numbers as Markdown.

It is built from what `mmkd eval` wrote. Sections that only some results have (example images of a folder of pairs, the
training's curves, alignment and screening, learning and survival curves) appear where there is something to show. How
the student was made (loss curves, the choice on validation, alignment and screening) is read from what stages wrote.

Example images are held-out ones with the student's predictions, chosen by a fixed rule that does not use the results:
modalities in turn, inside each one by the hash of the pair's id. Thumbnails are small JPEG data URIs, so that the page
stays one file.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmkd.data.folder import PairFolder, open_pairs
from mmkd.data.images import thumbnail
from mmkd.data.splits import spread
from mmkd.evaluation.report import sections
from mmkd.evaluation.report.leaderboard import Leaderboard, caveat, claims, facts, over_control, section, title
from mmkd.evaluation.results.store import ResultStore
from mmkd.evaluation.settings import DISTILLED, ReportSettings
from mmkd.evaluation.tasks.task import Outputs
from mmkd.files import as_written, read_json
from mmkd.pages.charts import Chart, Series, lines, moving_mean
from mmkd.pages.page import Block, Fold, Grid, Page, Section, Table, counted, number, signed, write_page

SHOWN_IMAGES, SHOWN_CAPTIONS, SHOWN_ANSWERS = 16, 4, 3
LONGEST_CAPTION = 220
TASKS = ("retrieval", "zeroshot-label", "zeroshot-modality")
TEMPLATE = "evaluation/report/examples.html.j2"
GRADES = "✓ belong together, ≈ same label but another image, ✗ neither."
Grade = Literal["right", "near", "wrong"]
NOT_LOSSES = (
    *("step", "epoch", "learning_rate", "lr", "samples_per_second", "tokens_per_second", "useful_tokens"),
    *("data_time", "mfu", "memory_gb", "gradient_norm", "logit_scale", "interactive_logit_scale", "skipped"),
)
NOT_LOSSES_PREFIX = "teacher_use/"
COSINES = {
    "same_sample_cross_teacher": "same sample, two teachers",
    "different_sample_same_teacher": "two samples, same teacher",
    "image_text": "image and its caption",
}
MOST_LINES = 30
MOST_POINTS = 400


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


def training_section(logs: dict[str, Path | None]) -> Section:
    """Loss curves of the trainings whose logs are there."""
    blocks: list[Block] = []
    for stage, path in logs.items():
        curves = read_log(path) if path and path.is_file() else {}
        if "loss" not in curves:
            continue
        parts = [_curve(name, points, 130) for name, points in curves.items() if name != "loss"]
        blocks.append(Grid([_curve(f"{stage}: loss", curves["loss"], 220)]))
        blocks += [Fold(f"Parts of the loss ({len(parts)})", [Grid(parts)])] if len(parts) > 1 else []
    return section("training", blocks)


def choice_title(choice: dict[str, Any] | None) -> str:
    """The first sentence where validation kept stage 1, else an empty string.

    Args:
        choice: ``choice.json`` of `mmkd merge --pairs`; None where nothing was chosen.
    """
    if choice is None or choice["weight"]:
        return ""
    if choice["not_evaluated"]:
        return "The student is stage 1 itself: there was no validation that could show a gain from distillation."
    return f"The student is stage 1 itself: on {choice['pairs']} validation pairs, distillation did not improve it."


def choice_claims(choice: dict[str, Any] | None, board: Leaderboard) -> list[str]:
    """What the student is made of, and how the distilled student compares with it or with stage 1 on the test set."""
    if choice is None:
        return []
    weight, pairs, reason = choice["weight"], choice["pairs"], choice["not_evaluated"]
    made = {
        0: f"No validation: {reason}." if reason else "",
        1: f"Chosen on {pairs} validation pairs, the student is the distilled one and no average with stage 1.",
    }.get(
        weight,
        f"Chosen on {pairs} validation pairs, the student is an average of weights: {weight:g} of the distilled "
        f"student and {1 - weight:g} of stage 1.",
    )
    found, compared = board.mean().differences.get(DISTILLED), ""
    values = [None if found is None else found[key] for key in ("difference", "high", "low")]
    point, low, high = (None if value is None else signed(-100 * value, 1) for value in values)
    if point is not None and weight < 1:
        student = "stage 1" if weight == 0 else "the student"
        inside = "(no interval)" if low is None else f"[{low}, {high}]"
        compared = f"On the test set, the distilled student minus {student} is {point} points {inside}."
    return [sentence for sentence in (made, compared) if sentence]


def choice_section(choice: dict[str, Any] | None) -> Section:
    """Stage 1, the distilled student and their averages on validation."""
    rows = [
        [f"{own['weight']:g}", number(own["value"]), signed(own["ahead"]), number(own["error"])]
        for own in (choice["candidates"] if choice else [])
    ]
    header = ["Share of the distilled student", "mean", "minus stage 1", "standard error"]
    chosen = choice or {"rule": "", "weight": 0}
    table = Table("Candidates on validation", header, rows)
    return section("choice", [table], rule=chosen["rule"], weight=chosen["weight"])


def read_log(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Losses of a ``log.jsonl`` by name, ``(step, value)``.

    Values that are not finite and a last line that was cut off are left out.
    """
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            continue
        for name, value in entry.items():
            if name in NOT_LOSSES or name.startswith(NOT_LOSSES_PREFIX):
                continue
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves[name].append((entry["step"], float(value)))
    return dict(curves)


def teachers_section(aligned: Any, screened: Any) -> Section:
    """Cosines before and after alignment, and what screening kept."""
    tables = []
    if isinstance(aligned, dict) and isinstance(aligned.get("before"), dict) and isinstance(aligned.get("after"), dict):
        rows = [
            [name, number(before, 3), number(after, 3)]
            for (name, before), (_, after) in zip(_cosines(aligned["before"]), _cosines(aligned["after"]), strict=False)
        ]
        tables.append(Table("Mean cosines before and after alignment", ["Between", "before", "after"], rows))
    if isinstance(screened, dict) and (counts := _flatten(screened)):
        tables.append(Table("Screening: pairs that each teacher agrees with", ["Count", "value"], counts))
    return section("teachers", [Grid(tables)])


def _curve(caption: str, points: list[tuple[float, float]], height: int) -> Chart:
    stride = max(1, len(points) // MOST_POINTS)
    kept = [*range(0, len(points) - 1, stride), len(points) - 1]
    mean = moving_mean([value for _, value in points])
    series = [
        Series("", "student", [points[k] for k in kept], faint=True),
        Series("moving mean", "student", [(points[k][0], mean[k]) for k in kept]),
    ]
    return lines(caption, "step", series, height=height, ends="at the last step")


def _cosines(side: dict[str, Any]) -> list[tuple[str, float | None]]:
    """Named cosines of one side of the alignment report, in a fixed order."""
    found: list[tuple[str, float | None]] = []
    for key, between in COSINES.items():
        values = side.get(key)
        for name, value in sorted(values.items()) if isinstance(values, dict) else []:
            found.append((f"{between}: {name}", value if isinstance(value, (int, float)) else None))
    return found


def _flatten(report: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Numbers and short strings of a nested report as rows of text."""
    rows: list[list[str]] = []
    for key, value in report.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            rows += _flatten(value, f"{name}: ")
        elif isinstance(value, (int, float, str)):
            rows.append([name, f"{value:.4g}" if isinstance(value, float) else str(value)])
    return rows[:MOST_LINES]


def write_report(inputs: ReportSettings) -> None:
    """Write the page and, beside it, the same numbers as Markdown, under the page's name with another ending.

    Args:
        inputs: what `mmkd eval` wrote, logs and reports of the stages before it, and the page's file.

    Raises:
        FileNotFoundError: there is no ``summary.json``, or the pairs do not exist.
        ValueError: a JSON file is broken, or not what the stages write.
    """
    summary_file = inputs.results / "summary.json"
    if not summary_file.is_file():
        raise FileNotFoundError(f"{summary_file} is not there; run `mmkd eval --output {inputs.results}` first")
    with as_written(ValueError):
        page = report_page(Leaderboard(read_json(summary_file), inputs.results), inputs)
    for file in (inputs.output.with_suffix(".md"), inputs.output):
        write_page(file, page)


def report_page(board: Leaderboard, inputs: ReportSettings) -> Page:
    """The whole page; sections without content are left out."""
    shown: list[Section] = []
    choice = _optional(inputs.choice)
    folder = open_pairs(inputs.pairs) if inputs.pairs else None
    if board.tasks:
        shown = [
            sections.leaderboard_section(board),
            sections.means_section(board),
            sections.best_teachers_section(board),
            sections.modalities_section(board),
            sections.wins_section(board),
            sections.ranks_section(board),
            sections.results_section(board),
            sections.tasks_section(board),
            *(examples_sections(board, folder) if folder else []),
            sections.differences_section(board),
            sections.learning_section(board),
            sections.survival_section(board),
            sections.confusions_section(board),
            sections.metrics_section(board),
            sections.contamination_section(board),
        ]
    shown += [
        sections.skipped_section(board),
        sections.datasets_section(board, _datasheet(inputs.pairs)),
        training_section({"Stage 1, contrastive": inputs.stage1_log, "Stage 2, distillation": inputs.distill_log}),
        choice_section(choice),
        teachers_section(_optional(inputs.align_report), _optional(inputs.screen_report)),
        sections.provenance_section(board, _settings(inputs), _optional(inputs.stages)),
    ]
    version = board.summary.get("versions", {}).get("mmkd-clip", "")
    return Page(
        choice_title(choice) or title(board),
        [section for section in shown if section.blocks or section.content],
        [sentence for sentence in (over_control(board), *choice_claims(choice, board), *claims(board)) if sentence],
        [*facts(board), *(origin(folder, board.summary["settings"].get("split", "test")) if folder else [])],
        caveat(board),
        f"Made by mmkd report, mmkd-clip {version}. Not a medical device, no medical advice.",
    )


def origin(folder: PairFolder, split: str) -> list[tuple[str, str]]:
    """How many sources and groups of the held-out images the training images share, where sources are recorded."""
    held_out, train = ([pair for pair in folder.pairs if pair.split == part] for part in (split, "train"))
    sources, groups = {pair.source for pair in held_out}, {pair.group or pair.id for pair in held_out}
    if "" in sources or not sources:
        return []
    shared = len(sources & {pair.source for pair in train}), len(groups & {pair.group or pair.id for pair in train})
    text = (
        f"{counted(len(groups), 'group')} from {counted(len(sources), 'source')}; "
        f"training images come from {shared[0]} of these sources and {shared[1]} of these groups"
    )
    return [("Held-out images", text)]


def _datasheet(pairs: Path | None) -> str:
    sheets = [pairs / name for name in ("README.md", "ATTRIBUTION.md")] if pairs else []
    return "\n".join(sheet.read_text(encoding="utf-8") for sheet in sheets if sheet.is_file())


def _settings(inputs: ReportSettings) -> dict[str, str]:
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


def _optional(path: Path | None) -> Any:
    return read_json(path) if path is not None and path.is_file() else None
