"""The report's sections on how the student came about: training, alignment, screening, data, versions and settings."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from mmkd.data.table import SPLITS
from mmkd.evaluation.report.charts import curve
from mmkd.evaluation.report.markup import details, number, section, table, text

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


def training_section(logs: dict[str, Path | None]) -> str:
    """Loss curves of the trainings whose logs are there."""
    charts = []
    for title, path in logs.items():
        parts = read_log(path) if path and path.is_file() else {}
        if "loss" not in parts:
            continue
        small = [curve(name, points, small=True) for name, points in parts.items() if name != "loss"]
        several = f'<div class="parts">{"".join(small)}</div>' if len(small) > 1 else ""
        charts.append(f"<article>{curve(f'{title}: loss', parts['loss'])}{several}</article>")
    lead = "Every step faint, a moving mean bold. The small curves are the parts of the loss, before their weights."
    return section("training", "Training", lead, f'<div class="pair">{"".join(charts)}</div>' if charts else "")


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


def teachers_section(aligned: Any, screened: Any) -> str:
    """Cosines before and after alignment, and what screening kept."""
    parts = []
    if isinstance(aligned, dict) and isinstance(aligned.get("before"), dict) and isinstance(aligned.get("after"), dict):
        rows = [
            [text(name), number(before, 3), number(after, 3)]
            for (name, before), (_, after) in zip(_cosines(aligned["before"]), _cosines(aligned["after"]), strict=False)
        ]
        parts.append(table("Mean cosines before and after alignment", ["Between", "before", "after"], rows))
    if isinstance(screened, dict):
        facts = _flatten(screened)
        if facts:
            parts.append(table("Screening: which pairs each teacher agrees with", ["Count", "value"], facts))
    lead = (
        "Teachers speak different spaces. Alignment should bring the same sample of two teachers together and keep "
        "different samples apart; screening keeps the pairs that a teacher itself finds fitting."
    )
    return section(
        "teachers", "Teachers brought together", lead, f'<div class="pair">{"".join(parts)}</div>' if parts else ""
    )


def data_section(summary: dict[str, Any], datasheet: str) -> str:
    """How training and held-out images are kept apart."""
    splits = summary["splits"]
    rows = [
        [
            text(name),
            str(own["pairs"]),
            str(own["groups"]),
            text(", ".join(f"{m or 'none'} {n}" for m, n in own["modalities"].items())),
        ]
        for name, own in ((split, splits["counts"][split]) for split in SPLITS)
    ]
    held_out = summary["settings"]["split"]
    shared = splits["shared_groups"]
    sentences = [
        "Images of one source (patient, case, specimen or volume) form a group. A group is trained on or held out as a "
        "whole, and the intervals draw groups, not images.",
        f"The {held_out} split shares {shared or 'no'} {'group' if shared == 1 else 'groups'} with the others"
        + (", so its scores are too high." if shared else "."),
    ]
    if splits["shared_images"] is not None:
        sentences.append(f"Identical image files on both sides: {splits['shared_images'] or 'none'}.")
    if summary["unreadable"]:
        sentences.append(f"{len(summary['unreadable'])} images could not be read and are left out.")
    sheet = details("Datasheet of the pairs", f"<pre>{text(datasheet)}</pre>") if datasheet else ""
    counts = table("Pairs by split", ["Split", "pairs", "groups", "modalities"], rows)
    return section("data", "What was held out", " ".join(map(text, sentences)), counts, sheet)


def provenance_section(summary: dict[str, Any], settings: dict[str, str], stages: Any) -> str:
    """Encoders, versions, durations, and ``settings.yaml`` by command."""
    encoders = [
        [text(name), text(own["source"]), f"<code>{text(own['fingerprint'][:12])}</code>"]
        for name, own in summary["encoders"].items()
    ]
    parts = [table("Encoders", ["Name", "loaded from", "weights"], encoders)]
    timed = [(k, v) for k, v in stages.items() if isinstance(v, dict)] if isinstance(stages, dict) else []
    if timed:
        rows = [[text(name), f"{own['seconds']:g} s" if own.get("seconds") is not None else "–"] for name, own in timed]
        parts.append(table("Time of each stage", ["Stage", "time"], rows))
    versions = [[text(name), text(version)] for name, version in summary["versions"].items()]
    parts.append(table("Versions", ["Package", "version"], versions))
    opened = "".join(
        details(f"mmkd {name} --config settings.yaml", f"<pre>{text(body)}</pre>") for name, body in settings.items()
    )
    lead = "Enough to do it again: under each command stands its settings.yaml, seeds included."
    return section("provenance", "How this was made", lead, f'<div class="three">{"".join(parts)}</div>', opened)


def _cosines(side: dict[str, Any]) -> list[tuple[str, float | None]]:
    """Named cosines of one side of the alignment report, in a fixed order."""
    found: list[tuple[str, float | None]] = []
    for key, title in COSINES.items():
        values = side.get(key)
        for name, value in sorted(values.items()) if isinstance(values, dict) else []:
            found.append((f"{title}: {name}", value if isinstance(value, (int, float)) else None))
    return found


def _flatten(report: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Numbers and short strings of a nested report as rows of text."""
    rows: list[list[str]] = []
    for key, value in report.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            rows += _flatten(value, f"{name}: ")
        elif isinstance(value, (int, float, str)):
            rows.append([text(name), text(f"{value:.4g}" if isinstance(value, float) else value)])
    return rows[:MOST_LINES]
