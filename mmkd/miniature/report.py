"""What the miniature found: ``miniature.json`` or ``ablations.json``, and the table that goes into a page.

The default student against every rival: paired intervals of the mean over tasks, seeds averaged in each replicate.

A row's score is the mean over kinds of task of the mean over tasks of their headline metric. A rival trained with
several seeds has in each bootstrap replicate the mean of its seeds' scores, so that an interval speaks of the recipe
and of the held-out groups, which every row shares draw by draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from mmkd.command.settings import resolved
from mmkd.evaluation.results.summary import mean_of_kinds, versions
from mmkd.evaluation.statistics.bootstrap import difference, interval, plain
from mmkd.evaluation.statistics.metrics import Floats
from mmkd.files import atomic_write_text, read_json, write_json
from mmkd.miniature.plan import ABLATIONS, DEFAULT, ENSEMBLE, PAPER, TASK, TEACHER, UNCHANGED

METRIC = "mean over kinds of task (zero-shot, linear probe, retrieval, questions) of means over tasks"

ABOUT = ("title", "kind", "primary_metric")

PLACES = ("data", "work", "results", "readme")  # on this machine

BEATEN_EVERYWHERE = (TASK, PAPER)

ENSEMBLE_BEATEN_FROM = 0.4


@dataclass(frozen=True)
class Report:
    """Compares rows and writes what came out.

    Attributes:
        settings: of the miniature.
        folders: by share of noise, results of `mmkd eval`.
        rows: by share of noise, row -> its encoders, one for each seed.
        facts: about data and captions, for the JSON.
    """

    settings: Any
    folders: dict[float, list[Path]]
    rows: dict[float, dict[str, list[str]]]
    facts: dict[str, Any]

    def write(self, seconds: int) -> None:
        """Write JSON, table and, if asked for, the page's table; print the table."""
        name = "ablations" if self.settings.ablations else "miniature"
        rows: list[dict[str, Any]] = []
        scores: dict[str, Any] = {}
        for noise, folders in self.folders.items():
            results = Results(folders)
            own = {row: results.score(encoders) for row, encoders in self.rows[noise].items()}
            rows += (self._ablations if self.settings.ablations else self._rivals)(results, own, noise)
            scores[f"{noise:g}"] = {
                row: {**results.with_interval(score), "tasks": score.points} for row, score in own.items()
            }
        found = {
            "rows": rows,
            "scores": scores,
            "command": self.command(),
            "metric": METRIC,
            "tasks": {name: {key: task[key] for key in ABOUT} for name, task in results.tasks.items()},
            "split": self.settings.split,
            "seeds": self.settings.seeds,
            "seconds": seconds,
            "versions": versions(),
            "settings": {key: value for key, value in resolved(self.settings).items() if key not in PLACES},
            **self.facts,
        }
        write_json(self.settings.results / f"{name}.json", found)
        table = ablation_table(rows) if self.settings.ablations else rival_table(rows)
        atomic_write_text(self.settings.results / f"{name}.md", table + "\n")
        if self.settings.readme:
            short = table if self.settings.ablations else rival_table(brief(rows))
            replace_between(self.settings.readme, name, short)
        print(f"\n{table}\n\n{self.settings.results / name}.json")

    def _rivals(self, results: Results, scores: dict[str, Score], noise: float) -> list[dict[str, Any]]:
        """The default against every other row."""
        ours = scores[DEFAULT]
        return [self._row(results, name, noise, ours, theirs) for name, theirs in scores.items() if name != DEFAULT]

    def _ablations(self, results: Results, scores: dict[str, Score], noise: float) -> list[dict[str, Any]]:
        """Every variant against the default."""
        variants = {name: score for name, score in scores.items() if name.partition(": ")[0] in ABLATIONS}
        return [self._row(results, name, noise, score, scores[UNCHANGED]) for name, score in variants.items()]

    def command(self) -> str:
        """The command that made it, without the folders of this machine."""
        options = " --ablations" if self.settings.ablations else ""
        options += " --quick" if self.settings.quick else ""
        return f"mmkd miniature --data DIR{options}" + (" --split validation" if self.settings.split != "test" else "")

    def _row(self, results: Results, name: str, noise: float, ours: Score, theirs: Score) -> dict[str, Any]:
        compared = results.compare(ours, theirs)
        beaten = name in BEATEN_EVERYWHERE or name.startswith(TEACHER)
        beaten |= name == ENSEMBLE and noise >= ENSEMBLE_BEATEN_FROM
        images = {id for task in results.tasks.values() for id in task["ids"]}
        return {
            "rival": name,
            "noise": noise,
            "metric": METRIC,
            **compared,
            "n": len(images),
            "must_beat": bool(beaten) and not self.settings.ablations,
        }


def rival_table(rows: list[dict[str, Any]]) -> str:
    """One line a rival, one column a share of noise: the default's score minus the rival's, in points."""
    shares = list(dict.fromkeys(row["noise"] for row in rows))
    cells = {(row["rival"], row["noise"]): row for row in rows}
    lines = [
        "| default student minus | " + " | ".join(f"{share:.0%} wrong captions" for share in shares) + " |",
        "|---|" + "---|" * len(shares),
    ]
    for name in dict.fromkeys(row["rival"] for row in rows):
        shown = [_cell(cells[name, share]) if (name, share) in cells else "" for share in shares]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    own = {share: next(row["ours"] for row in rows if row["noise"] == share) for share in shares}
    lines.append(
        "| *score of the default student* | " + " | ".join(f"{100 * own[share]:.1f}" for share in shares) + " |"
    )
    return "\n".join(lines)


def brief(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all teachers the one that comes closest at each share of noise, and the other rows as they are."""
    found = []
    for noise in dict.fromkeys(row["noise"] for row in rows):
        own = [row for row in rows if row["noise"] == noise]
        teachers = [row for row in own if row["rival"].startswith(TEACHER)]
        if teachers:
            closest = min(teachers, key=lambda row: row["low"] if row["low"] is not None else row["delta"])
            found.append({**closest, "rival": f"the closest of {len(teachers)} teachers"})
        found += [row for row in own if row not in teachers]
    return found


def ablation_table(rows: list[dict[str, Any]]) -> str:
    """One line a variant: its score and its difference from the default."""
    lines = ["| changed | to | wrong captions | score | minus default |", "|---|---|---|---|---|"]
    for row in rows:
        group, _, name = row["rival"].partition(": ")
        lines.append(f"| {group} | {name} | {row['noise']:.0%} | {row['ours']:.3f} | {_cell(row)} |")
    return "\n".join(lines)


def replace_between(page: Path, name: str, table: str) -> None:
    """Put the table between ``<!-- NAME -->`` and ``<!-- /NAME -->``.

    Raises:
        ValueError: the page lacks the markers.
    """
    text = page.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start not in text or end not in text or text.index(start) > text.index(end):
        raise ValueError(f"{page} lacks the lines {start} and {end} between which the table goes")
    before, after = text.split(start, 1)[0], text.split(end, 1)[1]
    atomic_write_text(page, f"{before}{start}\n{table}\n{end}{after}")


def _cell(row: dict[str, Any]) -> str:
    """Difference in points with its interval, bold where the interval excludes zero."""
    if row["low"] is None:
        return f"{100 * row['delta']:+.1f}"
    text = f"{100 * row['delta']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
    return f"**{text}**" if row["low"] > 0 or row["high"] < 0 else text


@dataclass(frozen=True)
class Score:
    """A row's point values by task and their replicates ``(replicates,)`` under draws that all tasks share."""

    points: dict[str, float]
    replicates: dict[str, Floats]


class Results:
    """The cells that `mmkd eval` left in one or several folders, made on the same held-out pairs."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Read what was asked; cells are read when a row is."""
        self.folders = list(folders)
        self.tasks: dict[str, dict[str, Any]] = {}
        for folder in self.folders:
            for path in sorted((folder / "tasks").glob("*.json")):
                task = read_json(path)
                known = self.tasks.setdefault(task["name"], task)
                if known["ids"] != task["ids"]:
                    raise ValueError(f"{path}: other images than in {self.folders[0]}; evaluate on the same pairs")
        if not self.tasks:
            raise FileNotFoundError(f"{', '.join(map(str, folders))} hold no results; run `mmkd eval` first")

    def score(self, encoders: Sequence[str], tasks: Sequence[str] | None = None) -> Score:
        """The mean of several encoders (seeds of one recipe) on each task.

        Raises:
            FileNotFoundError: an encoder was not evaluated.
        """
        found = [self._single(encoder, tasks or list(self.tasks)) for encoder in encoders]
        names = set.intersection(*(set(single.points) for single in found))
        return Score(
            {name: float(np.mean([single.points[name] for single in found])) for name in sorted(names)},
            {name: np.mean([single.replicates[name] for single in found], axis=0) for name in sorted(names)},
        )

    def mean(self, score: Score, tasks: Sequence[str] | None = None) -> tuple[float, Floats]:
        """Mean over kinds of means over tasks, and its replicates."""
        names = [name for name in tasks or score.points if name in score.points]
        point = float(mean_of_kinds(self.tasks, {name: np.array(score.points[name]) for name in names}))
        return point, mean_of_kinds(self.tasks, {name: score.replicates[name] for name in names})

    def compare(self, ours: Score, theirs: Score) -> dict[str, Any]:
        """``delta = ours - theirs`` over the tasks both have, with interval, p and both scores."""
        common = [name for name in ours.points if name in theirs.points]
        (own, own_replicates), (other, other_replicates) = self.mean(ours, common), self.mean(theirs, common)
        found = difference(own, other, own_replicates, other_replicates)
        return {
            "delta": plain(found["difference"]),
            "low": plain(found["low"]),
            "high": plain(found["high"]),
            "p": plain(found["p"]),
            "ours": own,
            "theirs": other,
            "tasks": len(common),
        }

    def with_interval(self, score: Score) -> dict[str, Any]:
        """Overall score and interval of a row."""
        point, replicates = self.mean(score)
        low, high = interval(replicates)
        return {"value": point, "low": plain(low), "high": plain(high)}

    def _single(self, encoder: str, tasks: Sequence[str]) -> Score:
        points, replicates = {}, {}
        folder = next((folder for folder in self.folders if (folder / "cells" / encoder).is_dir()), None)
        if folder is None:
            raise FileNotFoundError(f"no results of {encoder} in {', '.join(map(str, self.folders))}")
        for name in tasks:
            path = folder / "cells" / encoder / f"{name}.json"
            if not path.is_file():
                continue
            cell, headline = read_json(path), self.tasks[name]["primary_metric"]
            if cell["undefined"] is None:
                points[name] = float(cell["metrics"][headline]["value"])
                replicates[name] = safetensors.numpy.load_file(path.with_suffix(".safetensors"))[f"together.{headline}"]
        return Score(points, replicates)
