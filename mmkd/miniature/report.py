"""What the experiment found: paired differences of arms with intervals, one primary contrast, and the tables.

In a bootstrap replicate the groups of every question, the draws and, within a draw, the seeds are drawn with
replacement, the same for all arms: an interval covers test images, assignment of groups and training seeds. A score is
the mean over an endpoint's questions of balanced accuracy (of retrieval: recall at ten, both ways).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.evaluation.statistics.bootstrap import (
    above_chance,
    average_ranks,
    difference,
    holm,
    interval,
    replicate_weights,
    resampling_units,
)
from mmkd.evaluation.statistics.metrics import Floats
from mmkd.files import atomic_write_text
from mmkd.miniature.tasks import Draw, Question
from mmkd.miniature.training import CONTROLS, DEFAULT

Answers = Mapping[str, NDArray[np.bool_]]
"""Right answers of one model by question."""

ENDPOINTS = ("seen", "unseen", "retrieval")
PRIMARY_ENDPOINTS, PRIMARY_NOISE = ("seen", "unseen"), (0.2, 0.4)
REPLICATES = 20000
MARKERS = "<!-- claim -->", "<!-- /claim -->"


@dataclass(frozen=True)
class Row:
    """An arm, a teacher or a combination of teachers at one share of wrong captions.

    Attributes:
        answers: by draw those of each seed; teachers have one.
    """

    name: str
    noise: float
    answers: Mapping[int, Sequence[Answers]]


class Scores:
    """Scores of all rows, each with replicates; rows of one noise are compared under the same draws."""

    def __init__(self, draws: Sequence[Draw], rows: Sequence[Row], seed: int = 0) -> None:
        """Score every row on every question of every draw, `REPLICATES` times and once as it is."""
        generator = np.random.default_rng(seed)
        self.draws = {draw.number: draw for draw in draws}
        chosen = generator.integers(0, len(draws), (REPLICATES, len(draws)))
        self._draws = np.concatenate([np.arange(len(draws))[None], chosen])
        self._seeds = generator.random((REPLICATES + 1, len(draws), 64))
        self.questions = {question.name: question for question in draws[0].test}
        self._scores: dict[tuple[str, float, str], Floats] = {}
        for name in self.questions:
            judges = {draw.number: self._judge(next(q for q in draw.test if q.name == name), draw) for draw in draws}
            for row in rows:
                scored = [np.stack([judges[n](own[name]) for own in row.answers[n]]) for n in judges]
                self._scores[row.name, row.noise, name] = self._over_draws(scored)
        self._chances = {name: question.chance for name, question in self.questions.items()}

    def of(self, name: str, noise: float, question: str) -> Floats:
        """Score of a row on a question, `(1 + replicates,)`, the first without resampling."""
        return self._scores[name, noise, question]

    def mean(self, name: str, noise: float, endpoints: Sequence[str], chance: bool = False) -> Floats:
        """Mean over endpoints of the mean over their questions, `(1 + replicates,)`; optionally relative to chance."""
        means = []
        for endpoint in endpoints:
            own = [q for q in self.questions.values() if q.endpoint == endpoint]
            values = [self.of(name, noise, question.name) for question in own]
            if chance:
                values = [above_chance(v, self._chances[q.name]) for v, q in zip(values, own, strict=True)]
            if values:
                means.append(np.mean(values, axis=0))
        return np.mean(means, axis=0)

    def present(self) -> list[str]:
        """Endpoints that have questions."""
        return [name for name in ENDPOINTS if any(q.endpoint == name for q in self.questions.values())]

    def _judge(self, question: Question, draw: Draw) -> Callable[[NDArray[np.bool_]], Floats]:
        """From right answers `(rows,)` to the score, `(1 + replicates,)`."""
        groups = [draw.world.pairs[row].group for row in question.rows]
        classes = question.classes
        if question.kind == "retrieval":  # images and captions are two halves of one score
            classes = np.repeat([0, 1], len(question.rows) // 2)
        units = resampling_units([str(k) for k in question.classes], groups)
        seed = zlib.crc32(question.name.encode()) + (0 if question.endpoint == "unseen" else draw.number)
        weights = np.concatenate([np.ones((1, len(groups))), *replicate_weights(units, REPLICATES, seed)])
        one_hot = np.eye(int(classes.max()) + 1)[classes]
        support = weights @ one_hot

        def score(right: NDArray[np.bool_]) -> Floats:
            with np.errstate(invalid="ignore"):
                return np.nanmean((weights @ (one_hot * right[:, None])) / support, axis=1)

        return score

    def _over_draws(self, scored: Sequence[Floats]) -> Floats:
        """Mean over resampled draws and seeds of `(seeds, 1 + replicates)` of each draw."""
        total = np.zeros(REPLICATES + 1)
        everything = np.arange(REPLICATES + 1)
        for turn in range(len(scored)):
            for number, own in enumerate(scored):
                picked = self._draws[:, turn] == number
                seeds = (self._seeds[:, turn, : len(own)] * len(own)).astype(int)
                seeds[0] = np.arange(len(own))
                means = np.mean([own[seeds[:, k], everything] for k in range(len(own))], axis=0)
                total += np.where(picked, means, 0)
        return total / len(scored)


def contrasts(scores: Scores, arms: Sequence[str], baselines: Sequence[str], noises: Sequence[float]) -> dict[str, Any]:
    """Every difference of the default from another row, Holm-adjusted over all of them.

    Args:
        scores: of all rows.
        arms: all arms that were run, the default among them.
        baselines: teachers and their combinations, which are not trained on the student's pairs.
        noises: shares of wrong captions.

    Returns:
        ``rows``, one for each other row, endpoint and noise; the primary contrast is not among them, see `primary`.
    """
    counts = {e: sum(len(q.rows) for q in scores.questions.values() if q.endpoint == e) for e in ENDPOINTS}
    found = []
    for noise in noises:
        for endpoint in scores.present():
            for other in (*arms, *baselines):
                if other != DEFAULT:
                    ours, theirs = (scores.mean(name, noise, [endpoint]) for name in (DEFAULT, other))
                    found.append(_contrast(ours, theirs, other, noise, endpoint, counts[endpoint]))
    adjusted = holm({str(k): row["p"] for k, row in enumerate(found)})
    for k, row in enumerate(found):
        row["holm_p"] = adjusted[str(k)]
    return {"rows": found}


def primary(scores: Scores, control: str) -> dict[str, Any]:
    """The one contrast of the protocol: default minus the best control, over both endpoints and both shares."""
    both = [
        np.mean([scores.mean(name, noise, PRIMARY_ENDPOINTS) for noise in PRIMARY_NOISE], axis=0)
        for name in (DEFAULT, control)
    ]
    n = sum(len(q.rows) for q in scores.questions.values() if q.endpoint in PRIMARY_ENDPOINTS)
    return _contrast(both[0], both[1], control, None, "seen and unseen", n)


def _contrast(ours: Floats, theirs: Floats, other: str, noise: float | None, endpoint: str, n: int) -> dict[str, Any]:
    found = difference(ours[0], theirs[0], ours[1:], theirs[1:])
    return {
        "contrast": f"{DEFAULT} - {other}",
        "endpoint": endpoint,
        "noise": noise,
        "delta": 100 * found["difference"],
        "low": 100 * found["low"],
        "high": 100 * found["high"],
        "p": found["p"],
        "n": n,
    }


def best_control(validation: Mapping[str, float]) -> str:
    """The control with the highest validation score."""
    return max((name for name in CONTROLS if name in validation), key=lambda name: validation[name])


def table(scores: Scores, names: Sequence[str], noises: Sequence[float], endpoint: str) -> str:
    """Scores of an endpoint with 95 % intervals in Markdown, chance-normalised means at the end of each cell."""
    lines = ["| " + " | ".join([endpoint, *(f"{noise:.0%} wrong" for noise in noises)]) + " |"]
    lines.append("|---" * (len(noises) + 1) + "|")
    for name in names:
        cells = []
        for noise in noises:
            values, normalised = (scores.mean(name, noise, [endpoint], chance) for chance in (False, True))
            low, high = interval(values[1:])
            cells.append(f"{100 * values[0]:.1f} [{100 * low:.1f}, {100 * high:.1f}] ({100 * normalised[0]:.1f})")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def summary(found: Mapping[str, Any]) -> str:
    """The contrasts as a table in Markdown, one row for each other arm or teacher; bold where Holm's p is below .05."""
    columns = list(dict.fromkeys((row["endpoint"], row["noise"]) for row in found["rows"]))
    cells: dict[str, dict[tuple[str, float], str]] = {}
    for row in found["rows"]:
        text = f"{row['delta']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"
        shown = f"**{text}**" if row["holm_p"] < 0.05 else text
        cells.setdefault(row["contrast"].rpartition(" - ")[2], {})[row["endpoint"], row["noise"]] = shown
    lines = [f"| *{DEFAULT}* minus | " + " | ".join(f"{name}, {noise:.0%} wrong" for name, noise in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, own in cells.items():
        control = name in CONTROLS
        lines.append(
            "| " + " | ".join([f"control: {name}" if control else name, *(own[key] for key in columns)]) + " |"
        )
    if found["primary"] is not None:
        one = found["primary"]
        lines += [
            "",
            f"Primary contrast ({one['contrast']}; {one['endpoint']}, 20 and 40 % wrong captions together): "
            f"{one['delta']:+.1f} [{one['low']:+.1f}, {one['high']:+.1f}], p = {one['p']:.4f}; {one['n']} images, "
            f"{one['splits']} draws, {one['seeds']} seeds each.",
        ]
    return "\n".join(lines) + "\n"


def replace_table(page: Path, table: str) -> None:
    """Put the table between the markers ``<!-- claim -->`` and ``<!-- /claim -->`` of a page.

    Raises:
        ValueError: the page lacks the markers.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not begin or not end:
        raise ValueError(f"{page} lacks the lines {MARKERS[0]} and {MARKERS[1]}, between which the table goes")
    atomic_write_text(page, f"{before}{begin}\n{table}{end}{after}")


def ranks(scores: Scores, names: Sequence[str], noise: float) -> dict[str, Any]:
    """Average rank of each row over all questions, and Wilcoxon's test of the default against it."""
    values = {name: np.array([scores.of(name, noise, q)[0] for q in scores.questions]) for name in names}
    return average_ranks(DEFAULT, values)
