"""Evaluate a student while it is trained: each checkpoint as it appears, and the finished model at the end.

A checkpoint's weights are put into the student that the run started from and written as a folder, which is evaluated
like any other; teachers' embeddings and results are reused, so that only the student is embedded again. Checkpoints
that were removed before their evaluation are skipped.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from mmkd.evaluation.embeddings.encoders import ENSEMBLE, ORACLE
from mmkd.evaluation.results.store import FOLDER
from mmkd.files import atomic_write_text, json_lines, read_yaml, rename_folder
from mmkd.student.folder import save_student
from mmkd.student.towers import starting_student
from mmkd.training.checkpoints import AVERAGE, SETTINGS_FILE, WEIGHTS, RunFolder, damage

STUDENT = "student"
FINAL, LOG = "final", "watch.jsonl"
Evaluate = Callable[[Path, Path], dict[str, Any]]


def watch(run: Path, output: Path, evaluate: Evaluate, poll_seconds: float, quiet: bool = False) -> None:
    """Evaluate what a training writes until it is finished; started again, it resumes with new checkpoints.

    Args:
        run: the training's ``--output``; its checkpoints lie in ``run.partial`` until it is finished.
        output: gets ``step-N/`` for each checkpoint, ``final/``, and a line for each in ``watch.jsonl``.
        evaluate: from a student's folder and a folder for the results to their summary.
        poll_seconds: polling interval [s].
        quiet: print nothing while waiting.

    Raises:
        FileNotFoundError: there is neither a finished nor an unfinished run.
        ValueError: its checkpoints are not those of a student.
    """
    folder = RunFolder(run)
    if not run.is_dir() and not folder.path.is_dir():
        raise FileNotFoundError(f"--watch {run}: neither {run} nor {folder.path} is there; start the training first")
    before: Path | None = None
    announced = False
    while True:
        found = _pending(folder, output)
        for name, student in _students(folder, found, output):
            take_over(before, output / name)
            _note(output, name, evaluate(student, output / name))
            before, announced = output / name, False
        if FINAL in found or FINAL in _evaluated(output):
            return
        if not found:
            if not (announced or quiet):
                print(f"waiting for the next checkpoint in {folder.checkpoints}")
                announced = True
            time.sleep(poll_seconds)


def write_student(checkpoint: Path, settings: Path, target: Path) -> None:
    """Write the student of a checkpoint as a ``from_pretrained`` folder.

    Args:
        checkpoint: one of `mmkd.training.checkpoints`; where it holds averaged weights, these are taken, as for the
        final output.
        settings: of the run.
        target: the folder; appears whole.

    Raises:
        FileNotFoundError: the checkpoint was removed meanwhile.
        ValueError: it is not that of a student of stage 1 or 2.
    """
    tensors = load_file(checkpoint / WEIGHTS)
    if (checkpoint / AVERAGE).is_file():
        tensors |= load_file(checkpoint / AVERAGE)
    model, processor = starting_student(read_yaml(settings))
    own = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    expected = model.state_dict()
    if own.keys() != expected.keys() or any(own[name].shape != expected[name].shape for name in own):
        raise ValueError(f"{checkpoint} is not of the student that {settings} starts from; watch pretrain or distill")
    model.load_state_dict(own)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_student(temporary, model, processor)
    rename_folder(temporary, target)


def take_over(before: Path | None, after: Path) -> None:
    """Copy the results and scores of all rows but the student's from one results folder to the next."""
    if before is None or after.exists():
        return
    for kind in (FOLDER, "scores"):
        for row in sorted((before / kind).glob("*")):
            if row.name != STUDENT:
                shutil.copytree(row, after / kind / row.name)


def _pending(folder: RunFolder, output: Path) -> list[str]:
    """Names of the checkpoints to evaluate in order, and of the finished model."""
    whole = [path for path in sorted(folder.checkpoints.glob("step-*")) if damage(path) is None]
    names = [f"step-{int(path.name.removeprefix('step-'))}" for path in whole]
    done = _evaluated(output)
    return [name for name in [*names, *([FINAL] if folder.output.is_dir() else [])] if name not in done]


def _students(folder: RunFolder, found: list[str], output: Path) -> Iterator[tuple[str, Path]]:
    """Each student as a folder, removed again when it has been evaluated."""
    for name in found:
        if name == FINAL:
            yield name, folder.output
            continue
        target = output / "students" / name
        checkpoint = folder.checkpoints / f"step-{int(name.removeprefix('step-')):08d}"
        try:
            if not target.is_dir():
                write_student(checkpoint, folder.path / SETTINGS_FILE, target)
        except FileNotFoundError:  # a newer checkpoint has taken its place
            shutil.rmtree(target, ignore_errors=True)
            continue
        yield name, target
        shutil.rmtree(target.parent)


def _note(output: Path, name: str, summary: dict[str, Any]) -> None:
    """Add a line with the overall score of every row and the primary metric of the student on every task."""
    student = {
        task: result["metrics"].get(own["primary_metric"])
        for task, own in summary["tasks"].items()
        if (result := own["rows"].get(STUDENT))
    }
    overall = {row: own for row, own in summary["overall"]["rows"].items() if row not in (ORACLE, ENSEMBLE)}
    line = {"name": name, "overall": overall, "tasks": student}
    log = output / LOG
    lines = log.read_text(encoding="utf-8") if log.is_file() else ""
    atomic_write_text(log, lines + json.dumps(line, sort_keys=True) + "\n")


def _evaluated(output: Path) -> set[str]:
    """Names of the lines of the log."""
    log = output / LOG
    return {json.loads(line)["name"] for _, line in json_lines(log)} if log.is_file() else set()
