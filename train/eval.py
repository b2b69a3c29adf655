"""Evaluate: student, teachers and their ensemble on the same held-out images, with intervals and paired differences.

Every encoder embeds images and texts once; all tasks read that cache. Each cell (encoder x task) is a file of its own,
written whole, so that the same command after a kill, or with one more encoder, makes only what is missing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from mmkd.data.records import PairFolder, open_pairs
from mmkd.device import chosen_device
from mmkd.evaluation.bootstrap import REPLICATES, SEED
from mmkd.evaluation.cells import CellFolder
from mmkd.evaluation.embedding import Embedded, embed, image_digests
from mmkd.evaluation.questions import question_texts, read_questions
from mmkd.evaluation.suite import ENSEMBLE, ORACLE, SUITE, collect_samples, run_task, tasks_for, texts_for
from mmkd.evaluation.summary import Table, overall, split_summary, task_summary, versions
from mmkd.evaluation.task import Samples, Task
from mmkd.files import write_json
from mmkd.frozen_towers import with_frozen_towers
from mmkd.settings import nearest, resolved, run, save_settings, setting
from mmkd.teachers.zoo import load_encoder

STAGE1 = "stage1"


@dataclass
class EvalSettings:
    """Evaluate encoders side by side on the held-out pairs.

    The first encoder is the student, the others are its teachers unless they are named as baselines.
    """

    encoders: list[str] = setting(help="names or folders, each may be given as NAME=SOURCE; the first is the student")
    pairs: Path = setting(help="folder of pairs")
    output: Path = setting(Path("results"), "folder of cells and summary.json; what is there already is kept")
    split: Literal["train", "validation", "test"] = setting("test", "which pairs are evaluated on")
    tasks: list[str] = setting(factory=lambda: list(SUITE), help="kinds of task: zeroshot, retrieval, probe, vqa")
    questions: Path | None = setting(None, "JSON in the form of VQA-RAD, its images in images/ beside it")
    within: Literal["modality", "source"] = setting(
        "modality", "labels are told apart within modalities and over all, or within each collection"
    )
    captioned: list[str] = setting(factory=list, help="collections whose captions are retrieved, by default all")
    baselines: list[str] = setting(factory=lambda: [STAGE1], help="encoders shown beside, but no teachers")
    replicates: int = setting(REPLICATES, "bootstrap replicates")
    batch_size: int = setting(32, "images or texts embedded at a time")
    device: str = setting("auto", "cpu, cuda, cuda:1 ...; auto = a GPU if there is one")
    cache_frozen_towers: Path | None = setting(
        None, "folder for tower outputs of models of ours; those that share towers encode with them once"
    )
    seed: int = setting(SEED, "seed of the bootstrap")
    quiet: bool = setting(False, "no progress bars")


def main(settings: EvalSettings) -> None:
    """Embed, evaluate, compare, and write ``summary.json``.

    Raises:
        FileNotFoundError: the pairs or an encoder's folder do not exist.
        ValueError: unknown tasks, two encoders of one name, or nothing to evaluate on.
    """
    sources = named_sources(settings.encoders)
    check(settings, sources)
    folder = evaluated_pairs(settings)
    digests = image_digests(folder, settings.quiet)
    questions = read_questions(settings.questions) if settings.questions else []
    encoders = embed_all(settings, sources, folder, digests, question_texts(questions))
    samples = collect_samples(folder, settings.split, digests, encoders[0].unreadable)
    samples = replace(samples, questions=questions, within=settings.within, captioned=settings.captioned)
    tasks, skipped = tasks_for(samples, settings.tasks) if samples.held_out else ([], {})
    if not tasks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            f"nothing to evaluate on the {len(samples.held_out)} readable {settings.split} pairs. {reasons}"
        )
    summary = compare(settings, samples, tasks, encoders)
    summary |= {
        "encoders": {e.name: _encoder_row(e, sources[e.name]) for e in encoders},
        "skipped": skipped,
        "unreadable": encoders[0].unreadable,
        "splits": split_summary(open_pairs(settings.pairs), digests, settings.split),
        "settings": resolved(settings),
        "versions": versions(),
    }
    save_settings(settings, settings.output / "settings.yaml")
    write_json(settings.output / "summary.json", summary)
    print_summary(summary)


def compare(settings: EvalSettings, samples: Samples, tasks: list[Task], encoders: list[Embedded]) -> dict[str, Any]:
    """Run every task and set the student against its rivals."""
    student, *others = [encoder.name for encoder in encoders]
    teachers = [name for name in others if name not in settings.baselines]
    cells = CellFolder(settings.output, samples.held_out, settings.replicates, settings.seed)
    table: Table = {}
    for task in tqdm(tasks, desc="tasks", disable=settings.quiet):
        table[task.name] = run_task(task, samples, encoders, teachers, cells)
    summaries = {task.name: task_summary(cells.describe(task), table[task.name], student, cells) for task in tasks}
    return {
        "student": student,
        "teachers": teachers,
        "baselines": [name for name in others if name in settings.baselines],
        "tasks": summaries,
        "overall": overall(summaries, table, student, teachers, cells),
    }


def named_sources(encoders: list[str]) -> dict[str, str]:
    """Sources by the name they have in the results: what stands before ``=``, else the last part of the source.

    Raises:
        ValueError: none is given, two have one name, or a name is that of a row made here.
    """
    named: dict[str, str] = {}
    for entry in encoders:
        before, equals, after = entry.partition("=")
        source = after if equals else before
        name = re.sub(r"[^\w.+-]+", "-", before if equals else Path(source).name).strip("-.")
        if not name or not source or name in (ENSEMBLE, ORACLE):
            raise ValueError(f"encoder {entry!r}: give NAME=SOURCE with a name other than {ENSEMBLE} and {ORACLE}")
        if name.lower() in map(str.lower, named):
            raise ValueError(f"two encoders are called {name!r}; tell them apart with NAME=SOURCE")
        named[name] = source
    if not named:
        raise ValueError("--encoders is empty; name the student first, then its teachers")
    return named


def check(settings: EvalSettings, sources: dict[str, str]) -> None:
    """Raise on settings that cannot work before anything is loaded."""
    for kind in settings.tasks:
        if kind not in SUITE:
            raise ValueError(f"unknown task {kind!r}{nearest(kind, SUITE)}; known: {', '.join(SUITE)}")
    for name in settings.baselines:
        if name != STAGE1 and name not in sources:
            raise ValueError(
                f"baseline {name!r}{nearest(name, sources)} is not among the encoders: {', '.join(sources)}"
            )
    if settings.replicates < 100 or settings.batch_size < 1:
        raise ValueError(
            f"replicates is {settings.replicates}, at least 100; batch_size {settings.batch_size}, at least 1"
        )


def evaluated_pairs(settings: EvalSettings) -> PairFolder:
    """The held-out pairs, and those of the other splits if a task learns from them."""
    folder = open_pairs(settings.pairs)
    if not any(pair.split == settings.split for pair in folder.pairs):
        raise ValueError(f"{settings.pairs} holds {len(folder.pairs)} pairs, none of them in split {settings.split!r}")
    if "probe" not in settings.tasks and "vqa" not in settings.tasks:
        folder.pairs = [pair for pair in folder.pairs if pair.split == settings.split]
    return folder


def embed_all(
    settings: EvalSettings,
    sources: dict[str, str],
    folder: PairFolder,
    digests: dict[str, str],
    questions: list[str],
) -> list[Embedded]:
    """Embed with one encoder after another; only one is in memory at a time."""
    device = chosen_device(settings.device)
    texts = sorted({*texts_for([pair for pair in folder.pairs if pair.split == settings.split]), *questions})
    embedded = []
    for name, source in sources.items():
        encoder = with_frozen_towers(load_encoder(source, device=device), settings.cache_frozen_towers, settings.quiet)
        cache = settings.output / "embeddings" / name
        embedded.append(
            embed(encoder, source, name, folder, digests, texts, cache, settings.batch_size, settings.quiet)
        )
    return embedded


def print_summary(summary: dict[str, Any]) -> None:
    """The headline metric of every row on every task."""
    for name, task in summary["tasks"].items():
        frame = task["frames"]["image"]
        print(
            f"\n{name}: {task['headline']}, {frame['n']} images in {frame['groups']} groups, "
            f"chance {task['chance'][task['headline']]:.3f}"
        )
        width = max(map(len, task["rows"]))
        for row, cell in task["rows"].items():
            metric = cell["metrics"].get(task["headline"])
            print(f"  {row:<{width}}  {_shown(metric) if metric else cell['undefined']}")
    for name, encoder in summary["encoders"].items():
        for failure in encoder["failures"]:
            print(f"\n{name}: {failure}")
    for name, reason in summary["skipped"].items():
        print(f"\n{name}: left out, {reason}")
    if summary["unreadable"]:
        print(f"\n{len(summary['unreadable'])} images could not be read and are left out")


def _shown(metric: dict[str, float | None]) -> str:
    value, low, high = (float("nan") if metric[key] is None else metric[key] for key in ("value", "low", "high"))
    return f"{value:.3f}  [{low:.3f}, {high:.3f}]"


def _encoder_row(embedded: Embedded, source: str) -> dict[str, Any]:
    return {
        "source": source,
        "fingerprint": embedded.fingerprint,
        "failures": embedded.failures,
        "provenance": embedded.provenance,
    }


if __name__ == "__main__":
    run(EvalSettings, main)
