"""The paper's experiment at a size that two cores can do: does one student learn from many teachers on real images?

Specialists and generalists are trained on groups that the student never sees, students on pairs whose captions are
partly wrong, by every objective at the same budget; all are asked the same questions about a third set of groups, and
the default is compared with every rival by paired intervals. Each stage is the command a user would type. Started
again, what has finished is skipped. Choices are made with ``--split validation``; ``test`` is for the report.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mmkd.command.settings import check_arguments, run, setting


@dataclass
class MiniatureSettings:
    """The paper's experiment on a folder of small collections of real images.

    Settings of a stage are given under its name: `--distill.max_steps 800`.

    Example:
        mmkd miniature --data collections --quick
    """

    data: Path = setting(help="folder of collections, each with a labels.csv and images")
    work: Path = setting(Path("miniature-work"), "folder for everything between; the same command goes on in it")
    results: Path = setting(Path("miniature-results"), "folder for miniature.json or ablations.json and its table")
    readme: Path | None = setting(None, "file in which the table between the markers is replaced")
    noise: list[float] = setting(factory=lambda: [0.0, 0.2, 0.4], help="shares of the student's captions made wrong")
    seeds: list[int] = setting(factory=lambda: [1, 2, 3], help="of the students; teachers have one each")
    split: Literal["validation", "test"] = setting("test", "groups that are reported; choose on validation")
    rivals: list[str] = setting(factory=list, help="rivals by name, by default all")
    ablations: bool = setting(False, "one change of the default at a time, instead of the rivals")
    quick: bool = setting(False, "one seed, the rivals that must be beaten, and fewer images")
    workers: int = setting(2, "stages that run at the same time")
    quiet: bool = setting(False, "no progress bars")
    training: dict[str, Any] = setting(factory=dict, help="settings of every training")
    teacher: dict[str, Any] = setting(factory=dict, help="settings of each teacher's training, a pretraining")
    stage1: dict[str, Any] = setting(factory=dict, help="settings of the students' pretraining")
    quarter: dict[str, Any] = setting(factory=dict, help="what is smaller in a student a quarter as large")
    screen: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")
    align: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")
    distill: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")
    eval: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")


if __name__ == "__main__":
    check_arguments(MiniatureSettings)  # before the imports that take seconds

from mmkd.command.stages import Stage, StageRunner
from mmkd.data.folder import open_pairs, write_manifest
from mmkd.evaluation.datasets.pairs import slug
from mmkd.files import fingerprint, write_json
from mmkd.miniature.data import deal, with_noise, write_table
from mmkd.miniature.plan import (
    ABLATIONS,
    ENSEMBLE,
    GENERALISTS,
    ORACLE,
    QUARTER,
    QUICK,
    RIVALS,
    SPECIALISTS,
    STAGE1,
    TEACHER,
    Plan,
    Rival,
)
from mmkd.miniature.report import Report

QUICK_ROWS = 300  # of each collection
SEED = 42  # of splits and wrong captions
CLEAN, STANDARDIZER = "clean", "phi-s"


def main(settings: MiniatureSettings) -> None:
    """Run what has not finished, compare, and write results and table.

    Raises:
        FileNotFoundError: the folder holds too few of the collections.
        ValueError: unknown rivals, shares or seeds out of range, or a stage that failed.
        SystemExit: with 0, SIGTERM or SIGUSR1 came; the stages at hand have saved.
    """
    started = time.monotonic()
    rivals = check(settings)
    experiment = Experiment(settings, rivals)
    with experiment.runner:
        experiment.prepare()
        experiment.train()
        results = experiment.evaluate()
    report = Report(settings, results, experiment.rows(), experiment.facts)
    report.write(round(time.monotonic() - started))


def check(settings: MiniatureSettings) -> dict[str, Rival]:
    """The rivals that are asked for, by name.

    Raises:
        ValueError: a name that is unknown, or a share or seed out of range.
    """
    if settings.quick:
        settings.seeds = settings.seeds[:1]
    if settings.ablations:
        return {f"{group}: {name}": rival for group, own in ABLATIONS.items() for name, rival in own.items()}
    known = {**RIVALS, **QUARTER}
    unknown = [name for name in settings.rivals if name not in known]
    if unknown or not settings.seeds or not all(0 <= share < 1 for share in settings.noise):
        raise ValueError(
            f"rivals {unknown or settings.rivals} must be among {', '.join(known)}; seeds {settings.seeds} at least "
            f"one; noise {settings.noise} shares from 0 to below 1"
        )
    names = settings.rivals or (QUICK if settings.quick else list(known))
    return {name: known[name] for name in dict.fromkeys((*QUICK, *names))}


class Experiment:
    """All stages in their order; what each made is kept for those that build on it."""

    def __init__(self, settings: MiniatureSettings, rivals: dict[str, Rival]) -> None:
        """Nothing is run yet."""
        self.settings, self.rivals = settings, rivals
        names = ("training", "teacher", "stage1", "quarter", "screen", "align", "distill", "eval")
        self.plan = Plan(settings.work, {name: getattr(settings, name) for name in names})
        self.runner = StageRunner(settings.work, settings.quiet)
        self.noises = {noise_name(share): share for share in settings.noise}
        self.teachers: dict[str, dict[str, Stage]] = {}
        self.students: dict[tuple[str, str], list[Stage]] = {}
        self.facts: dict[str, Any] = {}

    def prepare(self) -> None:
        """Curate all collections as one, and deal their groups to teachers, student, validation and test."""
        work, settings = self.settings.work, self.settings
        found = write_table(settings.data, work / "table.csv", QUICK_ROWS if settings.quick else None)
        self.data = fingerprint([work / "table.csv"])
        values = {"source": str(settings.data), "table": str(work / "table.csv"), "seed": SEED}
        self.curated = Stage("curate", "pairs", work / "pairs" / "all", values, [self.data])
        self.runner.run(self.curated)
        folder = open_pairs(self.curated.output)
        parts = deal(folder.pairs, SEED)
        split = {"teachers": "train", "student": "train", "validation": "validation", "test": "test"}
        own = {name: [replace(pair, split=split[name]) for pair in pairs] for name, pairs in parts.items()}
        held_out = own["validation"] + own["test"]
        replaced: dict[str, dict[str, int]] = {}
        for name, share in {CLEAN: 0.0, **self.noises}.items():
            for path, part, others in ((name, "student", held_out), (f"teachers-{name}", "teachers", [])):
                pairs, kinds = with_noise(own[part], share, SEED)
                write_manifest(work / "pairs" / path, pairs + others, folder.image_root)
                write_json(work / "pairs" / path / "replaced.json", kinds)
                replaced[path] = dict(Counter(kinds.values()))
        counts = {name: {"pairs": len(p), "groups": len({x.group or x.id for x in p})} for name, p in parts.items()}
        self.facts |= {
            "data_fingerprint": self.data,
            "collections": found,
            "parts": counts,
            "captions_replaced": replaced,
        }

    def train(self) -> None:
        """Teachers, their features, screened pairs and targets, stage 1 and every student."""
        names = (*SPECIALISTS, *GENERALISTS)
        self.teachers = {
            noise: {name: self.plan.teacher(name, noise, k, self.curated) for k, name in enumerate(names)}
            for noise in self.noises
        }
        teachers = list({s.name: s for own in self.teachers.values() for s in own.values()}.values())
        self._run(teachers[:1])  # alone first: it encodes what all share
        self._run(teachers[1:])
        features = {noise: self.plan.extract(noise, self.teachers[noise], self.curated) for noise in self.noises}
        self._run(features.values())
        subsets = {rival.teachers for rival in self.rivals.values()} | {()}
        screened = {(n, own): self.plan.screen(n, features[n], own) for n in self.noises for own in subsets}
        self._run(screened.values())
        kinds = {(rival.aligner, rival.teachers) for rival in self.rivals.values()}
        if any(rival.has_heads for rival in self.rivals.values()):
            kinds.add((STANDARDIZER, ()))
        aligned = {
            (kind, n, own): self.plan.align(kind, n, screened[n, own], own) for n in self.noises for kind, own in kinds
        }
        self._run(aligned.values())
        self._train_students(screened, aligned)

    def _train_students(self, screened: dict[Any, Stage], aligned: dict[Any, Stage]) -> None:
        """Stage 1 by noise, seed and size; from each, every rival for as long."""
        sizes = sorted({rival.size for rival in self.rivals.values()})
        stage1 = {
            (noise, seed, size): self.plan.stage1(noise, seed, size, self.curated)
            for size in sizes
            for noise in self.noises
            for seed in self.settings.seeds
        }
        self._run(stage1.values())
        for noise in self.noises:
            for name, rival in self.rivals.items():
                made_from = [screened[noise, rival.teachers], aligned[rival.aligner, noise, rival.teachers]]
                self.students[name, noise] = [
                    self.plan.student(slug(name), rival, noise, seed, stage1[noise, seed, rival.size], made_from)
                    for seed in self.settings.seeds
                ]
            self.students[STAGE1, noise] = [stage1[noise, seed, "full"] for seed in self.settings.seeds]
        self._run([stage for stages in self.students.values() for stage in stages])

    def evaluate(self) -> dict[float, list[Path]]:
        """Folders of results by share of noise: students in one, teachers and their ensemble in another."""
        split = self.settings.split
        values: dict[str, Any] = {"split": split, "captioned": ["medpix2"]}
        questions = self.settings.data / "vqa_rad" / "vqa_rad.json"
        if questions.is_file():
            values["questions"] = str(questions.resolve())
        stages: dict[float, list[Stage]] = {}
        for noise, share in self.noises.items():
            students = {s.output.name: s for (_, n), made in self.students.items() if n == noise for s in made}
            first = dict(list(students.items())[:1])
            stages[share] = [
                self.plan.evaluate(f"{split}/{noise}/students", students, list(students)[1:], values),
                self.plan.evaluate(f"{split}/{noise}/teachers", {**first, **self.teachers[noise]}, [], values),
            ]
        self._run([stage for own in stages.values() for stage in own])
        return {share: [stage.output for stage in own] for share, own in stages.items()}

    def rows(self) -> dict[float, dict[str, list[str]]]:
        """By share of noise the encoders behind each row, one for each seed."""
        found: dict[float, dict[str, list[str]]] = {}
        for noise, share in self.noises.items():
            teachers = {f"{TEACHER}{name}": [name] for name in self.teachers[noise]}
            found[share] = {**teachers, ENSEMBLE: ["ensemble"], ORACLE: ["oracle"]}
            for (name, own), made in self.students.items():
                if own == noise:
                    found[share][name] = [stage.output.name for stage in made]
        return found

    def _run(self, stages: Iterable[Stage]) -> None:
        self.runner.run_all(list(stages), self.settings.workers)


def noise_name(share: float) -> str:
    """Folder name of a share of wrong captions."""
    return f"noise-{round(100 * share):02d}" if share else CLEAN


if __name__ == "__main__":
    run(MiniatureSettings, main)
