"""The settings of an evaluation and of its report, and the checks before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mmkd.command.settings import check_limits, nearest, setting
from mmkd.command.tasks import TaskSettings
from mmkd.encoders.settings import Precision
from mmkd.evaluation.statistics.bootstrap import REPLICATES, SEED

STAGE1, DISTILLED, NO_TEACHER = "stage1", "distilled", "no-teacher"  # names of rows that the report explains
TASK_KINDS = ("zeroshot", "retrieval", "probe", "vqa", "diagnosis", "survival")
PAIRS_KINDS = ("zeroshot", "retrieval", "probe", "vqa")


@dataclass
class EvalSettings(TaskSettings):
    """Compare encoders on held-out pairs, on the datasets of a suite, or while a student is trained.

    The first encoder is the student, the others are its teachers unless they are named as baselines. Exactly one of
    pairs, suite and datasets is required.

    Example:
        mmkd eval --encoders mmkd-clip,stage1,biomedclip,plip --pairs pairs --output results
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "data": "pairs suite datasets data output cache split questions",
        "tasks": "kinds probe_on probe_search probe_curve",
        "statistics": "baselines replicates seed",
        "computing": "batch_size precision device watch poll_seconds quiet",
    }

    encoders: list[str] = setting(
        help="names, folders, Hub ids, open_clip:ARCHITECTURE[:PRETRAINED], features:STORE; each may be given as "
        "NAME=SOURCE; the first is the student"
    )
    pairs: Path | None = setting(None, "folder of pairs")
    suite: str | None = setting(None, "name of a list of datasets; `mmkd datasets ls` shows them")
    datasets: list[str] = setting(factory=list, help="manifests of datasets, or ids of the catalog")
    data: Path | None = setting(None, "folder of the data: ${DATA} in manifests")
    output: Path = setting(Path("results"), "folder of results and summary.json; existing results are kept")
    cache: Path | None = setting(None, "folder of embeddings, by default OUTPUT/embeddings; may be shared")
    split: Literal["train", "validation", "test"] = setting("test", "split that is evaluated")
    kinds: list[str] = setting(factory=list, help=f"kinds of task, by default all: {', '.join(TASK_KINDS)}")
    probe_on: Literal["pooled", "joint"] | None = setting(
        None,
        "image vectors of the probes, before the projection (pooled) or after it; null = pooled, of pairs joint",
    )
    probe_search: Literal["sweep", "fast"] = setting(
        "sweep", "C of a probe: by 13 fits on the validation images, or dim * classes / 100"
    )
    probe_curve: bool | None = setting(
        None, "also probe with few images and parts of the training set; null = true, of pairs false"
    )
    questions: Path | None = setting(None, "(pairs) JSON in the form of VQA-RAD, its images in images/ beside it")
    baselines: list[str] = setting(factory=lambda: [STAGE1], help="baseline encoders")
    replicates: int = setting(REPLICATES, "bootstrap replicates", least=100)
    batch_size: int = setting(32, "images or texts embedded at a time", least=1)
    precision: Precision = setting("float32", "precision of the forward pass; tf32 and bfloat16 are faster on GPUs")
    device: str = setting("auto", "cpu, cuda, cuda:1 ...; auto = a GPU if there is one, another for each process")
    watch: Path | None = setting(None, "output of a training: evaluate its checkpoints as they appear, as the student")
    poll_seconds: float = setting(30.0, "(watch) polling interval [s]", above=0)
    seed: int = setting(SEED, "seed of the bootstrap")
    quiet: bool = setting(False, "no progress bars")

    @property
    def task_kinds(self) -> list[str]:
        """The requested kinds of task."""
        return self.kinds or list(PAIRS_KINDS if self.pairs is not None else TASK_KINDS)

    @property
    def embeddings(self) -> Path:
        """Root of the embeddings."""
        return self.cache or self.output / "embeddings"


@dataclass
class ReportSettings:
    """Write the report; sections of logs and reports that are not given, or do not exist, are left out.

    Example:
        mmkd report --results results --pairs pairs --output report.html
    """

    results: Path = setting(help="folder written by `mmkd eval`")
    pairs: Path | None = setting(None, "folder of the evaluated pairs, for example images")
    output: Path = setting(Path("report.html"), "the page; Markdown is written beside it")
    stage1_log: Path | None = setting(None, "log.jsonl of the pretraining; settings are read beside it")
    distill_log: Path | None = setting(None, "log.jsonl of the distillation; settings are read beside it")
    choice: Path | None = setting(None, "choice.json of `mmkd merge --pairs`: what the student is made of")
    screen_report: Path | None = setting(None, "report.json of the screening")
    align_report: Path | None = setting(None, "report.json of the alignment; settings are read beside it")
    stages: Path | None = setting(None, "stages.json of the pipeline, for the time each stage took")
    quiet: bool = setting(False, "do not print the location of the page")
    overwrite: bool = setting(False, "replace OUTPUT")


def check(settings: EvalSettings, sources: dict[str, str]) -> None:
    """Raise on settings that cannot work before anything is loaded.

    Args:
        settings: as given.
        sources: encoders by name.

    Raises:
        ValueError: a setting is not allowed; the message states which values are.
    """
    given = [name for name in ("pairs", "suite", "datasets") if getattr(settings, name)]
    if len(given) != 1:
        raise ValueError(f"give one of --pairs, --suite and --datasets; {' and '.join(given) or 'none'} given")
    unused, belongs = ("data", "--suite or --datasets") if given == ["pairs"] else ("questions", "--pairs")
    if getattr(settings, unused) is not None:
        raise ValueError(f"--{unused} belongs to {belongs}; leave it out with --{given[0]}")
    settings.check_tasks()
    for kind in settings.kinds:
        if kind not in TASK_KINDS:
            raise ValueError(f"unknown task {kind!r}{nearest(kind, TASK_KINDS)}; known: {', '.join(TASK_KINDS)}")
    for name in settings.baselines:
        if name != STAGE1 and name not in sources:
            raise ValueError(
                f"baseline {name!r}{nearest(name, sources)} is not among the encoders: {', '.join(sources)}"
            )
    check_limits(settings, vars(settings))
