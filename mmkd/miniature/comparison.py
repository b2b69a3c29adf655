"""The default student against every rival: paired intervals of the mean over tasks, seeds averaged in each replicate.

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

from mmkd.evaluation.bootstrap import difference, interval
from mmkd.evaluation.cells import plain
from mmkd.evaluation.means import mean_of_kinds
from mmkd.evaluation.metrics import Floats
from mmkd.files import read_json


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
            cell, headline = read_json(path), self.tasks[name]["headline"]
            if cell["undefined"] is None:
                points[name] = float(cell["metrics"][headline]["value"])
                replicates[name] = safetensors.numpy.load_file(path.with_suffix(".safetensors"))[f"together.{headline}"]
        return Score(points, replicates)
