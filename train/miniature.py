"""The claim at a size that two cores can do: is a student of many teachers better than it could be without them?

Teachers with other vision towers are trained on most groups of several collections, students on a tenth of that, with
partly wrong captions, by every arm at the same number of steps and of tuning trials. The arms include controls without
any teacher. Tuning reads the validation groups of draw 0 alone; the report reads the test groups of the other draws,
and collections that no model was trained on. Started again, what has finished is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.command.settings import check_arguments, check_limits, run, setting


@dataclass(kw_only=True)
class MiniatureSettings:
    """Compare the default recipe with controls that have no teacher, on a folder of labelled collections.

    Example:
        mmkd miniature --data collections --quick
    """

    data: list[Path] = setting(help="folders of collections, each with a labels.csv and images")
    collections: list[str] = setting(factory=list, help="collections to train on; empty takes all that are not unseen")
    unseen: list[str] = setting(
        factory=list, help="collections that no model is trained on; empty takes every third one with two labels"
    )
    work: Path = setting(
        Path("miniature-work"), "folder for images, models and answers; the same command resumes in it"
    )
    results: Path = setting(Path("miniature-results"), "folder for claim.json and claim.md")
    arms: list[str] = setting(factory=list, help="arms by name; empty takes all")
    noise: list[float] = setting(factory=lambda: [0.0, 0.2, 0.4], help="shares of the student's captions made wrong")
    draws: int = setting(3, "number of assignments of groups to teachers, student and test", least=1)
    seeds: int = setting(3, "number of training seeds of each student", least=1)
    maximum: int = setting(1500, "maximum number of images of a collection", least=1)
    image_size: int = setting(128, "side of the images [pixels]")
    page: Path | None = setting(None, "Markdown file in which the table between <!-- claim --> markers is replaced")
    protocol: str = setting("", "version of the protocol, such as a commit; recorded in claim.json")
    quick: bool = setting(False, "one draw, one seed, 20 % wrong captions, five arms, 300 images of a collection")
    train_vision: bool = setting(
        False, "also train the students' vision towers, minutes each; tuning trials are chosen with frozen towers"
    )
    workers: int = setting(2, "number of processes", least=1)
    quiet: bool = setting(False, "show no progress bars")

    def __post_init__(self) -> None:
        """Apply ``quick`` and refuse values out of range.

        Raises:
            ValueError: the message names the setting and what is allowed.
        """
        if self.quick:
            self.draws, self.seeds, self.noise, self.maximum = 1, 1, [0.2], min(self.maximum, 300)
        check_limits(self, vars(self))
        if not self.noise or not all(0 <= share < 1 for share in self.noise):
            raise ValueError(f"--noise {self.noise}: give shares from 0 to below 1")


if __name__ == "__main__":
    check_arguments(MiniatureSettings)  # before the imports that take seconds

import numpy as np

from mmkd.command.settings import nearest, resolved
from mmkd.evaluation.results.summary import versions
from mmkd.files import atomic_write_text, write_json
from mmkd.miniature.data import WorldSettings
from mmkd.miniature.report import Row, Scores, best_control, contrasts, primary, ranks, replace_table, summary, table
from mmkd.miniature.runs import COMBINATIONS, Run, Runner, Sizes
from mmkd.miniature.training import ARMS, DEFAULT, NO_TEACHER, QUICK, STAGE1

TUNING_DRAW, TUNING_NOISE = 0, 0.2


def main(settings: MiniatureSettings) -> None:
    """Run what has not finished, and write ``claim.json`` and ``claim.md``.

    Raises:
        FileNotFoundError: there are too few collections.
        ValueError: unknown arms or collections.
    """
    arms = chosen_arms(settings)
    world = WorldSettings(
        tuple(settings.data),
        tuple(settings.collections),
        tuple(settings.unseen),
        settings.work / "world",
        settings.image_size,
        settings.maximum,
        settings.quiet,
    )
    runner = Runner(world, settings.work, Sizes(), settings.workers)
    runner.prepare()
    draws = range(1, settings.draws + 1)
    teachers = [(number, name) for number in (TUNING_DRAW, *draws) for name in runner.specialists]
    runner.run_all("teachers", Runner.teacher, teachers)
    best = {number: runner.best_teacher(number) for number in (TUNING_DRAW, *draws)}
    trials = tuned(runner, arms, best)
    runs = [
        Run(draw, noise, seed, name, trials[name], settings.train_vision)
        for draw in draws
        for noise in settings.noise
        for seed in range(1, settings.seeds + 1)
        for name in arms
    ]
    train_students(runner, runs, best)
    write(settings, runner, arms, runs, trials)


def chosen_arms(settings: MiniatureSettings) -> list[str]:
    """Names of the arms to run, always with the default and a control.

    Raises:
        ValueError: an unknown name; the message has the nearest and all known ones.
    """
    for name in settings.arms:
        if name not in ARMS:
            raise ValueError(f"--arms {name!r} is unknown{nearest(name, ARMS)}; known: {', '.join(ARMS)}")
    asked = settings.arms or (QUICK if settings.quick else tuple(ARMS))
    return [name for name in ARMS if name in {*asked, DEFAULT, NO_TEACHER}]


def train_students(runner: Runner, runs: Sequence[Run], best: dict[int, str]) -> None:
    """Stage 1 of every draw, noise and seed, the earlier students that some arms learn from, then the arms."""
    starts = list(dict.fromkeys(run.start for run in runs))
    runner.run_all("stage 1", Runner.stage1, [(start,) for start in starts])
    if any(ARMS[run.arm].source == "self" for run in runs):
        runner.run_all("earlier students", Runner.student, [(start.earlier, "") for start in starts])
    runner.run_all("students", Runner.student, [(run, best[run.draw]) for run in runs])


def tuned(runner: Runner, arms: Sequence[str], best: dict[int, str]) -> dict[str, int]:
    """Number of the trial with the highest validation score in the tuning draw, by arm."""
    trials = {
        name: [Run(TUNING_DRAW, TUNING_NOISE, 1, name, trial) for trial in range(len(ARMS[name].trials))]
        for name in arms
    }
    train_students(runner, [run for own in trials.values() for run in own], best)
    return {
        name: max(own, key=lambda run: (runner.validation_score(run), -run.trial)).trial for name, own in trials.items()
    }


def write(
    settings: MiniatureSettings,
    runner: Runner,
    arms: Sequence[str],
    runs: Sequence[Run],
    trials: dict[str, int],
) -> None:
    """Score everything and write the results."""
    draws = [runner.draw(number) for number in range(1, settings.draws + 1)]
    rows = []
    for noise in settings.noise:
        for name in (STAGE1, *arms):
            own = [run for run in runs if run.noise == noise and run.arm == (arms[0] if name == STAGE1 else name)]
            answers = {
                draw.number: [
                    runner.answers_of(run.start if name == STAGE1 else run) for run in own if run.draw == draw.number
                ]
                for draw in draws
            }
            rows.append(Row(name, noise, answers))
    baselines = [*runner.specialists, *COMBINATIONS]
    of_teachers = {draw.number: runner.teacher_answers(draw.number) for draw in draws}
    for noise in settings.noise:
        rows += [Row(name, noise, {n: [own[name]] for n, own in of_teachers.items()}) for name in baselines]
    scores = Scores(draws, rows)
    validation = {
        name: float(np.mean([runner.validation_score(run) for run in runs if run.arm == name])) for name in arms
    }
    control = best_control(validation)
    found: dict[str, Any] = {
        "protocol": settings.protocol,
        "settings": {k: v for k, v in resolved(settings).items() if k not in ("data", "work", "results", "page")},
        "versions": versions(),
        "collections": {"seen": runner.world.seen, "unseen": runner.world.unseen},
        "trials": {name: dict(ARMS[name].trials[trial]) for name, trial in trials.items()},
        "validation": validation,
        "control": control,
        "screening": {str(noise): runner.screening(Run(1, noise, 1)) for noise in settings.noise},
        "teachers": {draw.number: runner.teacher_fields(draw.number) for draw in draws},
        "primary": primary(scores, control) if {0.2, 0.4} <= set(settings.noise) else None,
        **contrasts(scores, [STAGE1, *arms], baselines, settings.noise),
        "ranks": {str(noise): ranks(scores, [STAGE1, *arms, *baselines], noise) for noise in settings.noise},
    }
    for row in found["rows"] + ([found["primary"]] if found["primary"] else []):
        row |= {"seeds": settings.seeds, "splits": settings.draws}
    names = [STAGE1, *arms, *baselines]
    tables = [summary(found), *(table(scores, names, settings.noise, endpoint) for endpoint in scores.present())]
    settings.results.mkdir(parents=True, exist_ok=True)
    write_json(settings.results / "claim.json", found)
    atomic_write_text(settings.results / "claim.md", "\n".join(tables))
    if settings.page is not None:
        replace_table(settings.page, tables[0])
    if not settings.quiet:
        print("\n".join(tables))


if __name__ == "__main__":
    run(MiniatureSettings, main, lambda settings: [settings.work, settings.results])
