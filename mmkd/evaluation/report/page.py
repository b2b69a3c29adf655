"""The report of an evaluation: one self-contained page and the same numbers as Markdown.

It is built from what `mmkd eval` wrote. Sections that only some results have (example images of a folder of pairs, the
training's curves, alignment and screening, learning and survival curves) appear where there is something to show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmkd.data.folder import PairFolder, open_pairs
from mmkd.evaluation.report import figures, tables
from mmkd.evaluation.report.examples import examples_sections
from mmkd.evaluation.report.leaderboard import Leaderboard, caveat, claims, facts, over_control, title
from mmkd.evaluation.report.lineage import (
    choice_claims,
    choice_section,
    choice_title,
    teachers_section,
    training_section,
)
from mmkd.evaluation.settings import ReportSettings
from mmkd.files import read_json
from mmkd.pages.page import Page, Section, counted, write_page


def write_report(inputs: ReportSettings) -> None:
    """Write the page and, beside it, the same numbers as Markdown, under the page's name with another ending.

    Args:
        inputs: what `mmkd eval` wrote, logs and reports of the stages before it, and the page's file.

    Raises:
        FileNotFoundError: there is no ``summary.json``, or the pairs do not exist.
        ValueError: a JSON file is broken.
    """
    summary_file = inputs.results / "summary.json"
    if not summary_file.is_file():
        raise FileNotFoundError(f"{summary_file} is not there; run `mmkd eval --output {inputs.results}` first")
    page = report_page(Leaderboard(read_json(summary_file), inputs.results), inputs)
    for file in (inputs.output.with_suffix(".md"), inputs.output):
        write_page(file, page)


def report_page(board: Leaderboard, inputs: ReportSettings) -> Page:
    """The whole page; sections without content are left out."""
    sections: list[Section] = []
    choice = _optional(inputs.choice)
    folder = open_pairs(inputs.pairs) if inputs.pairs else None
    if board.tasks:
        sections = [
            tables.leaderboard_section(board),
            figures.means_section(board),
            tables.best_teachers_section(board),
            figures.modalities_section(board),
            tables.wins_section(board),
            tables.ranks_section(board),
            tables.results_section(board),
            figures.tasks_section(board),
            *(examples_sections(board, folder) if folder else []),
            figures.differences_section(board),
            figures.learning_section(board),
            figures.survival_section(board),
            figures.confusions_section(board),
            tables.metrics_section(board),
            tables.contamination_section(board),
        ]
    sections += [
        tables.skipped_section(board),
        tables.datasets_section(board, _datasheet(inputs.pairs)),
        training_section({"Stage 1, contrastive": inputs.stage1_log, "Stage 2, distillation": inputs.distill_log}),
        choice_section(choice),
        teachers_section(_optional(inputs.align_report), _optional(inputs.screen_report)),
        tables.provenance_section(board, _settings(inputs), _optional(inputs.stages)),
    ]
    version = board.summary.get("versions", {}).get("mmkd-clip", "")
    return Page(
        choice_title(choice) or title(board),
        [section for section in sections if section.blocks or section.content],
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
