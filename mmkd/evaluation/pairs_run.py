"""An evaluation on the held-out pairs of one folder, and the comparison that all evaluations share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from mmkd.data.records import PairFolder, open_pairs
from mmkd.distributed import rank, wait_for_everyone, world_size
from mmkd.encoder import DualEncoder
from mmkd.evaluation.cells import CellFolder
from mmkd.evaluation.embedding import Embedded
from mmkd.evaluation.encoders import Inputs, Known, embed_everything
from mmkd.evaluation.eval_settings import EvalSettings
from mmkd.evaluation.image_sources import FolderImages
from mmkd.evaluation.means import overall
from mmkd.evaluation.questions import question_texts, read_questions
from mmkd.evaluation.suite import collect_samples, run_task, tasks_for, texts_for
from mmkd.evaluation.summary import Table, split_summary, task_summary
from mmkd.evaluation.task import Samples, Task

Load = Callable[[str], DualEncoder]


def evaluate_pairs(settings: EvalSettings, sources: dict[str, str], load: Load) -> dict[str, Any]:
    """Embed the pairs with every encoder, evaluate, compare.

    Args:
        settings: checked.
        sources: encoders by name.
        load: loads a dual encoder.

    Returns:
        What `summary.json` says; on the first process only, nothing on the others.

    Raises:
        FileNotFoundError: the pairs or an encoder's folder do not exist.
        ValueError: there is nothing to evaluate on.
    """
    folder = evaluated_pairs(settings)
    source = FolderImages(folder)
    questions = read_questions(settings.questions) if settings.questions else []
    held_out = [pair for pair in folder.pairs if pair.split == settings.split]
    texts = sorted({*texts_for(held_out), *question_texts(questions)})
    inputs = Inputs.of("", source, lambda: source, texts, settings.quiet or rank() > 0)
    known = embed_everything(sources, [inputs], load, settings.embeddings, settings.batch_size, settings.quiet)
    wait_for_everyone()
    encoders = [each.embedded(inputs, folder.pairs, source) for each in known]
    unreadable = {key: reason for each in encoders for key, reason in each.unreadable.items()}
    samples = collect_samples(folder.pairs, settings.split, inputs.digests, unreadable)
    samples = replace(samples, questions=questions, within=settings.within, captioned=settings.captioned)
    tasks, skipped = tasks_for(samples, settings.kinds) if samples.held_out else ([], {})
    if not tasks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            f"nothing to evaluate on the {len(samples.held_out)} readable {settings.split} pairs. {reasons}"
        )
    student, teachers, baselines = roles(settings, known)
    cells = CellFolder(settings.output, samples.held_out, settings.replicates, settings.seed)
    table = run_tasks(tasks, samples, encoders, teachers, cells, settings.quiet)
    if rank() > 0:
        return {}
    summaries = {task.name: task_summary(cells.describe(task), table[task.name], student, cells) for task in tasks}
    assert settings.pairs is not None
    return {
        "student": student,
        "teachers": teachers,
        "baselines": baselines,
        "tasks": summaries,
        "overall": overall(summaries, student, teachers, cells.together),
        "encoders": {each.name: encoder_row(each, own.failures) for each, own in zip(known, encoders, strict=True)},
        "skipped": skipped,
        "unreadable": unreadable,
        "splits": split_summary(open_pairs(settings.pairs).pairs, inputs.digests, settings.split),
        "datasets": {"pairs": {"content": [*inputs.content.images, *inputs.content.texts]}},
    }


def run_tasks(
    tasks: Sequence[Task],
    samples: Samples,
    encoders: list[Embedded],
    teachers: list[str],
    cells: CellFolder,
    quiet: bool,
) -> Table:
    """Every cell of these tasks; processes share the tasks, and the first one then has all cells.

    Returns:
        Cells by task and row on the first process, nothing on the others.
    """
    hidden = quiet or rank() > 0
    own = tasks[rank() :: world_size()]
    table = {
        task.name: run_task(task, samples, encoders, teachers, cells)
        for task in tqdm(own, desc="tasks", unit="task", disable=hidden)
    }
    if world_size() > 1:
        wait_for_everyone()
        table = {} if rank() else {task.name: run_task(task, samples, encoders, teachers, cells) for task in tasks}
    return table


def roles(settings: EvalSettings, known: Sequence[Known]) -> tuple[str, list[str], list[str]]:
    """Names of the student, of its teachers and of the baselines."""
    student, *others = [each.name for each in known]
    teachers = [name for name in others if name not in settings.baselines]
    return student, teachers, [name for name in others if name in settings.baselines]


def evaluated_pairs(settings: EvalSettings) -> PairFolder:
    """The held-out pairs, and those of the other splits if a task learns from them."""
    assert settings.pairs is not None
    folder = open_pairs(settings.pairs)
    if not any(pair.split == settings.split for pair in folder.pairs):
        raise ValueError(f"{settings.pairs} holds {len(folder.pairs)} pairs, none of them in split {settings.split!r}")
    if "probe" not in settings.kinds and "vqa" not in settings.kinds:
        folder.pairs = [pair for pair in folder.pairs if pair.split == settings.split]
    return folder


def encoder_row(known: Known, failures: list[str]) -> dict[str, Any]:
    """What the summary says of an encoder."""
    return {
        "source": known.source,
        "fingerprint": known.fingerprint,
        "failures": failures,
        "provenance": known.provenance,
    }
