"""The full pipeline from one YAML file: curate, pretrain, extract, screen, align, distill, merge, evaluate, report.

Every stage is the command a user would type, run in its own process and printed before it starts; the pipeline adds
only the order, the folder names and, when no teachers are named, a partition of the pairs among small specialists
fine-tuned on the spot. Started again, it skips finished stages and resumes the one that was killed. The output is
what validation prefers among stage 1, the distilled student and their averages (`mmkd merge --pairs`).

The control, a student without a teacher, goes through the same steps with the relations of its own towers after stage 1
in the place of the teachers' features, and is chosen on validation likewise. A difference between the two is therefore
not an effect of training longer; with one seed it is no proof that the teachers cause it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.command.settings import check_arguments, run, setting


@dataclass
class PipelineSettings:
    """Run the full pipeline, from images to a distilled student and a report.

    Settings of a stage are given under its name: `--distill.epochs 4`.

    Example:
        mmkd pipeline --data images --teachers biomedclip,plip --output mmkd-clip --distill.epochs 4
        mmkd quickstart --data images
    """

    output: Path = setting(Path("mmkd-clip"), "folder of the student, for AutoModel.from_pretrained")
    report: Path = setting(Path("report.html"), "the page that shows student, teachers and examples")
    work: Path = setting(Path("mmkd-clip-work"), "folder of the stages' outputs: pairs, teachers, features, results")
    data: Path | None = setting(None, "folder with a labels.csv; without it, images that came with PyPI packages")
    teachers: list[str] = setting(factory=list, help="teachers by name or folder; empty trains specialists here")
    control: bool = setting(True, "also train a student without a teacher, as long, for the report to compare with")
    specialists: int = setting(3, "how many specialists are trained when no teachers are named")
    seed: int = setting(42, "seed of every stage")
    quiet: bool = setting(False, "no progress bars")
    overwrite: bool = setting(False, "replace OUTPUT and REPORT even if this pipeline did not make them")
    curate: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")
    pretrain: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")
    specialist: dict[str, Any] = setting(factory=dict, help="settings of each specialist's training, a pretraining")
    extract: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")
    screen: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")
    align: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")
    distill: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")
    merge: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")
    eval: dict[str, Any] = setting(factory=dict, help="settings of the stage of that name")


if __name__ == "__main__":
    check_arguments(PipelineSettings)  # before the imports that take seconds

from mmkd.command.stages import Stage, StageRunner, hash_of_named
from mmkd.data.folder import open_pairs
from mmkd.data.splits import partition
from mmkd.evaluation.datasets.dataset import split_samples
from mmkd.evaluation.datasets.pairs import PROBED, PairsDataset
from mmkd.evaluation.run import SUITE, tasks_for
from mmkd.evaluation.settings import DISTILLED, NO_TEACHER, STAGE1
from mmkd.evaluation.tasks.task import TaskOptions
from mmkd.files import refuse_existing

SEEDED = ("curate", "pretrain", "align", "distill", "merge", "eval")
OWN_TOWERS = "own-towers"
CONTROL_LOSSES = {"task": 1.0, "relational": 3.0}
CONTROL_STAGES = 3
STAGES = ("curate", "pretrain", "extract", "screen", "align", "distill", "merge", "eval", "report")


def main(settings: PipelineSettings) -> None:
    """Run every stage that has not finished yet.

    Raises:
        FileNotFoundError: the folder of images does not exist.
        FileExistsError: OUTPUT exists and was not made by this pipeline.
        ValueError: a stage failed, and its own message stands above; or there is nothing to evaluate on.
        SystemExit: with 0, SIGTERM or SIGUSR1 came; the stage at hand has saved.
    """
    started, stages = time.monotonic(), Stages(settings)
    with stages.runner:
        run_stages(settings, stages)
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"\nDone in {minutes} min {seconds:02d} s. Student: {settings.output}/  Report: {settings.report}")


def run_stages(settings: PipelineSettings, stages: Stages) -> None:
    """Each stage on what those before it wrote."""
    work = settings.work
    stages.check()
    pairs, features, aligned = work / "pairs", work / "features", work / "aligned"
    stage1, distilled = work / STAGE1, work / DISTILLED
    source = str(settings.data) if settings.data else "packaged"
    stages.run("curate", "curate", pairs, {"source": source, **settings.curate})
    if evaluated_pairs(settings) is not None:
        require_questions(pairs, settings.eval.get("split", "test"))
    stages.run("pretrain", "pretrain", stage1, {"pairs": str(pairs), **settings.pretrain})
    teachers = settings.teachers or train_specialists(stages, settings, pairs)
    stages.run("extract", "extract", features, {"teacher": teachers, "pairs": str(pairs), **settings.extract})
    inputs = {"pairs": str(pairs), "features": str(features)}
    stages.run("screen", "screen", work / "screened", {**inputs, **settings.screen})
    inputs["pairs"] = str(work / "screened")
    stages.run("align", "align", aligned, {**inputs, **settings.align})
    inputs |= {"aligned": str(aligned), "model": str(stage1)}
    stages.run("distill", "distill", distilled, {**inputs, **settings.distill})
    choice = {"models": [str(stage1), str(distilled)], "pairs": str(pairs)}
    stages.run("merge", "merge", settings.output, {**choice, **settings.merge})
    baselines = {STAGE1: stage1, DISTILLED: distilled}
    if settings.control:
        baselines[NO_TEACHER] = train_control(stages, settings, pairs, stage1)
    encoders = [f"student={settings.output}", *teachers, *(f"{name}={path}" for name, path in baselines.items())]
    compared = {"encoders": encoders, "baselines": list(baselines), "pairs": evaluated_pairs(settings)}
    stages.run("eval", "eval", work / "results", {**compared, **settings.eval})
    stages.run("report", "report", settings.report, report_inputs(settings, stages))


def evaluated_pairs(settings: PipelineSettings) -> str | None:
    """The folder whose held-out pairs are evaluated; None where the evaluation names datasets instead."""
    found: str | None = settings.eval.get("pairs", str(settings.work / "pairs"))
    return found


def require_questions(pairs: Path, split: str) -> None:
    """Stop before the first training where the last stage would find nothing to ask.

    Raises:
        ValueError: fewer than two training pairs, or held-out ones that allow no task.
    """
    folder = open_pairs(pairs)
    digests = {pair.id: pair.sha256 for pair in folder.pairs}
    samples = split_samples(PairsDataset(folder, split), split, digests)
    if not samples.held_out:
        groups = len({pair.group or pair.id for pair in folder.pairs})
        raise ValueError(
            f"none of the {len(folder.pairs)} pairs of {pairs} is in split {split!r}, so nothing can be evaluated; "
            f"they form {groups} group(s), which are never cut, and at least two groups are needed"
        )
    if len(samples.train) < 2:
        raise ValueError(
            f"{len(samples.train)} of the {len(folder.pairs)} pairs of {pairs} can be trained on; add images, two are "
            "the least"
        )
    tasks, reasons = tasks_for(samples, list(SUITE), TaskOptions(probe_curve=False, probe_images=PROBED))
    if not tasks:
        raise ValueError(
            f"the {len(samples.held_out)} {split} pairs of {pairs} are too few or too much alike to evaluate on: "
            f"{'; '.join(reasons.values())}. Add images, or captions and labels that differ"
        )


def train_specialists(stages: Stages, settings: PipelineSettings, pairs: Path) -> list[str]:
    """Train one small teacher on each share of the training pairs; returns their folders."""
    shares = partition(open_pairs(pairs, "train").pairs, settings.specialists)
    folders = []
    for number, (name, selection) in enumerate(shares.items()):
        folder = settings.work / "teachers" / name
        values = {"pairs": str(pairs), **selection, **settings.specialist, "seed": settings.seed + 1 + number}
        stages.run("pretrain", f"teacher {name}", folder, values)
        folders.append(str(folder))
    return folders


def train_control(stages: Stages, settings: PipelineSettings, pairs: Path, stage1: Path) -> Path:
    """Train and choose a student whose only teacher is its own state after stage 1; returns its folder."""
    folder = settings.work / NO_TEACHER
    features, trained, chosen = folder / "features", folder / "trained", folder / "model"
    own = {"teacher": [f"{OWN_TOWERS}=towers:{stage1}"], "pairs": str(pairs)}
    stages.run("extract", "own towers", features, {**settings.extract, **own})
    inputs = {"pairs": str(pairs), "features": str(features), "model": str(stage1)}
    without = {"losses": CONTROL_LOSSES, "relational_only": [OWN_TOWERS], "teacher_temperature": "spread"}
    stages.run("distill", "control", trained, {**settings.distill, **inputs, **without})
    choice = {"models": [str(stage1), str(trained)], "pairs": str(pairs)}
    stages.run("merge", "choice of the control", chosen, {**choice, **settings.merge})
    return chosen


def report_inputs(settings: PipelineSettings, stages: Stages) -> dict[str, Any]:
    """Where the report finds what the stages left."""
    work = settings.work
    return {
        "results": str(work / "results"),
        "pairs": evaluated_pairs(settings),
        "stage1_log": str(work / STAGE1 / "log.jsonl"),
        "distill_log": str(work / DISTILLED / "log.jsonl"),
        "choice": str(settings.output / "choice.json"),
        "screen_report": str(work / "screened" / "report.json"),
        "align_report": str(work / "aligned" / "report.json"),
        "stages": str(stages.record),
    }


class Stages:
    """The stages in their order: each depends on the settings of all before it, and on the files that these name."""

    def __init__(self, settings: PipelineSettings):
        self.settings = settings
        self.runner = StageRunner(settings.work, settings.quiet)
        self.record = self.runner.record
        self.total = len(STAGES) + (0 if settings.teachers else settings.specialists)
        self.total += CONTROL_STAGES if settings.control else 0
        self.number = 0
        if not self.runner.known:
            refuse_existing(settings.work, settings.overwrite)
        if settings.data is not None and not settings.data.is_dir():
            raise FileNotFoundError(
                f"--data {settings.data}: no such folder; it should hold a labels.csv and the images it names"
            )
        self.chain = ""
        for name, path in (("merge", settings.output), ("report", settings.report)):
            if self.runner.known.get(name, {}).get("output") != str(path):
                refuse_existing(path, settings.overwrite)

    def check(self) -> None:
        """Have every stage check the names and types of its settings before the first one works.

        Raises:
            ValueError: a stage refused; its own message stands above.
        """
        for name in ("curate", "pretrain", "specialist", "extract", "screen", "align", "distill", "merge", "eval"):
            self.runner.check("pretrain" if name == "specialist" else name, name, vars(self.settings)[name])

    def run(self, recipe: str, name: str, output: Path, values: dict[str, Any]) -> None:
        """Run a stage, unless it finished before with these settings after the same stages."""
        self.number += 1
        if recipe in SEEDED:
            values = {"seed": self.settings.seed, **values}
        own = [self.settings.work, self.settings.output, self.settings.report]
        stage = Stage(recipe, name, output, values, [self.chain, hash_of_named(values, own)])
        self.chain = stage.key
        self.runner.run(stage, f"[{self.number}/{self.total}] {name}")


if __name__ == "__main__":
    run(PipelineSettings, main, lambda settings: [settings.work])
