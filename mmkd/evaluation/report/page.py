"""The report of a suite: one self-contained page and the same numbers as Markdown, from what an evaluation wrote.

Nothing is fetched. One small script of ours sorts and filters; the page says by its hash that no other may run, and
without it everything is still there to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mmkd.evaluation.report.board import Board, caveat, claim, skipped_sets, verdict
from mmkd.evaluation.report.figures import (
    confusions_section,
    differences_section,
    learning_section,
    modalities_section,
    survival_section,
)
from mmkd.evaluation.report.markdown import markdown
from mmkd.evaluation.report.markup import details, page, section, table, text
from mmkd.evaluation.report.pairs_page import ReportInputs, pipeline_sections, read_summary, settings_of
from mmkd.evaluation.report.pairs_results import label
from mmkd.evaluation.report.tables import (
    best_teachers_section,
    leaderboard_section,
    metrics_section,
    results_section,
    wins_section,
)
from mmkd.files import atomic_write_text

LOCK = "repro.lock"


def is_suite(summary: dict[str, Any]) -> bool:
    """Whether tasks follow datasets' manifests, rather than one folder of pairs."""
    return any(task.get("dataset") for task in summary["tasks"].values()) or "skipped_datasets" in summary


def write_leaderboard(inputs: ReportInputs, file: Path) -> Path:
    """Write the page and, beside it, the same numbers as Markdown, under the page's name with another ending.

    Args:
        inputs: what `mmkd eval` wrote, and logs and reports of the stages before it; no pairs.
        file: the page.

    Returns:
        The Markdown file.

    Raises:
        FileNotFoundError: there is no ``summary.json``.
        ValueError: it is broken, or pairs are named.
    """
    if inputs.pairs is not None:
        raise ValueError("--pairs: these results are of datasets, not of a folder of pairs; leave it out")
    board = Board(read_summary(inputs.results), inputs.results)
    atomic_write_text(file.with_suffix(".md"), markdown(board, lock_text(inputs.results)))
    atomic_write_text(file, build_page(board, pipeline_sections(inputs), settings_of(inputs)))
    return file.with_suffix(".md")


def build_page(board: Board, pipeline: Sequence[str] = (), settings: dict[str, str] | None = None) -> str:
    """The whole page.

    Args:
        board: the results.
        pipeline: sections on how the student came about.
        settings: ``settings.yaml`` by command.
    """
    every = (
        leaderboard_section,
        best_teachers_section,
        modalities_section,
        wins_section,
        differences_section,
        results_section,
        learning_section,
        survival_section,
        metrics_section,
        confusions_section,
        contamination_section,
    )
    sections = [
        *([make(board) for make in every] if board.tasks else []),
        skipped_section(board),
        datasets_section(board),
        *pipeline,
        provenance_section(board, settings or {}),
    ]
    head = (
        '<header><p class="brand">MMKD-CLIP</p>'
        f'<h1>{text(verdict(board))}</h1>\n<p class="claim">{claim(board)}</p>\n'
        f'<p class="caveat">{caveat(board)}</p></header>'
    )
    version = text(board.summary.get("versions", {}).get("mmkd-clip", ""))
    foot = (
        f"<footer>Made by <code>mmkd report</code>, mmkd-clip {version}. No medical device, no medical advice.</footer>"
    )
    body = "\n".join([head, "<main>", *(part for part in sections if part), "</main>", foot])
    script = resources.files("mmkd.evaluation.report").joinpath("leaderboard.js").read_text(encoding="utf-8")
    style = resources.files("mmkd.evaluation.report").joinpath("leaderboard.css").read_text(encoding="utf-8")
    return page(f"MMKD-CLIP: {verdict(board)}", body, style, script)


def contamination_section(board: Board) -> str:
    """Which encoder was trained on data of which dataset, as far as is known."""
    rows = [
        [text(label(row, board.student)), text(dataset), text(reason)]
        for row, dataset, reason in board.marked_datasets()
    ]
    lead = (
        "Marked with † above. A mark says that training data and test set share a source, not that test images were "
        "seen; a missing mark says only that no overlap is known."
    )
    return section("contamination", "Trained on the test's source", lead,
                   table("Marks of contamination", ["Encoder", "Dataset", "Why"], rows) if rows else "")  # fmt: skip


def skipped_section(board: Board) -> str:
    """Datasets and tasks without results, and why."""
    rows = [[text(name), text(reason)] for name, reason in skipped_sets(board.summary).items()]
    return section("skipped", "Not evaluated", "What is not among the numbers above, and why.",
                   table("Skipped datasets and tasks", ["Left out", "Reason"], rows) if rows else "")  # fmt: skip


def datasets_section(board: Board) -> str:
    """What each dataset is, who may use it and what its splits share."""
    rows = []
    for name, own in board.summary.get("datasets", {}).items():
        splits = own["splits"]
        held_out = splits["counts"][board.summary["settings"].get("split", "test")]
        shared = [f"{splits['shared_groups']} groups"] if splits["shared_groups"] else []
        shared += [f"{splits['shared_images']} identical images"] if splits["shared_images"] else []
        rows.append([
            f"{text(name)} <small>{text(own['title'])}</small>",
            *(text(own[key]) for key in ("modality", "task", "license", "tier")),
            f"{held_out['pairs']} <small>from {held_out['groups']} sources</small>",
            text(", ".join(shared) or "nothing"),
        ])  # fmt: skip
    lead = (
        "Tier A is open, B needs a registration, C credentials and an agreement. Sources are patients, slides or what "
        "else the dataset names as group; images without one count for themselves."
    )
    columns = ["Dataset", "modality", "asked as", "licence", "tier", "held out", "shared with training"]
    return section("data", "Datasets", lead, table("Datasets evaluated on", columns, rows) if rows else "")


def provenance_section(board: Board, settings: dict[str, str]) -> str:
    """Encoders, versions, the lock file and the settings of each command."""
    summary = board.summary
    encoders = [
        [text(name), text(own.get("source", "")), f"<code>{text(str(own.get('fingerprint', ''))[:12])}</code>"]
        for name, own in summary.get("encoders", {}).items()
    ]
    versions = [[text(name), text(version)] for name, version in summary.get("versions", {}).items()]
    failures = [
        f"{name}: {line}" for name, own in summary.get("encoders", {}).items() for line in own.get("failures", [])
    ]
    failed = "".join(f"<li>{text(line)}</li>" for line in failures)
    lock = lock_text(board.results)
    parts = [
        f'<div class="three">{table("Encoders", ["Name", "loaded from", "weights"], encoders)}'
        f"{table('Versions', ['Package', 'version'], versions)}</div>",
        f'<p class="quiet">What failed:</p><ul class="quiet">{failed}</ul>' if failed else "",
        details(LOCK, f"<pre>{text(lock)}</pre>") if lock else "",
        *(details(f"mmkd {name} --config settings.yaml", f"<pre>{text(own)}</pre>") for name, own in settings.items()),
    ]
    lead = f"Weights, data, settings and versions behind every number stand in <code>{LOCK}</code> among the results."
    if not lock:
        lead = "Weights and versions behind every number."
    return section("provenance", "How this was made", lead, *parts)


def lock_text(results: Path) -> str:
    """The lock file among the results; empty if there is none."""
    file = results / LOCK
    return file.read_text(encoding="utf-8") if file.is_file() else ""
