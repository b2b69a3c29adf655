"""Average the weights of two models, or choose among both and their averages on validation pairs.

With ``--pairs``, the first model is the start of the second, and the output is the best of both and of their averages
by the mean over kinds of task that the report shows, on the validation split. The start stays unless the best is ahead
of it by more than one standard error of the paired difference: the highest of several noisy means is optimistic, and
what is not measurably better than the start gives no reason to leave it. ``choice.json`` holds every mean. The test
split is not read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mmkd.command.settings import check_arguments, run, setting
from mmkd.evaluation.settings import PAIRS_KINDS

DEFAULT_WEIGHT, DEFAULT_GRID = 0.5, (0.25, 0.5, 0.75)


@dataclass
class MergeSettings:
    """Average the weights of two models, or choose among both and their averages on validation pairs.

    Example:
        mmkd merge stage1 distilled --pairs pairs --output mmkd-clip
    """

    models: list[str] = setting(
        help="two folders or Hub ids of one architecture; with --pairs the first is the start of the second",
        positional=True,
    )
    output: Path = setting(help="folder to write, for from_pretrained")
    weight: list[float] = setting(
        factory=list, help="share of the second model, 0 to 1; by default 0.5, with --pairs 0.25, 0.5 and 0.75"
    )
    pairs: Path | None = setting(None, "folder of pairs; write what is best on its validation split")
    kinds: list[str] = setting(factory=list, help=f"(pairs) kinds of task, by default all: {', '.join(PAIRS_KINDS)}")
    replicates: int = setting(1000, "(pairs) replicates of the bootstrap")
    batch_size: int = setting(32, "(pairs) images or texts at a time")
    device: str = setting("auto", "(pairs) cpu, cuda, cuda:1 ...; auto = a GPU if there is one")
    seed: int = setting(42, "(pairs) seed of the bootstrap")
    quiet: bool = setting(False, "no progress bars")
    overwrite: bool = setting(False, "replace OUTPUT if it exists")


if __name__ == "__main__":
    check_arguments(MergeSettings)  # before the imports that take seconds

from transformers.utils.logging import disable_progress_bar

from mmkd.command.settings import save_settings
from mmkd.data.folder import open_pairs
from mmkd.evaluation.datasets.dataset import split_samples
from mmkd.evaluation.datasets.pairs import PairsDataset
from mmkd.evaluation.run import evaluate, task_options, tasks_for
from mmkd.evaluation.settings import EvalSettings
from mmkd.evaluation.settings import check as check_evaluation
from mmkd.files import atomic_folder, refuse_existing, write_json
from mmkd.student.merging import ModelPair

CHOICE_FILE = "choice.json"
SPLIT: Literal["validation"] = "validation"
METRIC = "mean over kinds of task of the primary metric"
RULE = (
    "the highest mean on validation; the start, unless the highest is ahead of it by more than one standard error of "
    "the paired difference"
)
INTERVAL_IN_ERRORS = 2 * 1.96  # width of a 95 % interval in standard errors


@dataclass(frozen=True)
class Candidate:
    """An average and what validation found.

    Attributes:
        weight: share of the second model.
        value: mean score.
        ahead: mean score minus that of the first model, from the same draws.
        error: standard error of `ahead`; None where it could not be estimated.
    """

    weight: float
    value: float
    ahead: float
    error: float | None


def main(settings: MergeSettings) -> None:
    """Write the average, or the choice.

    Raises:
        FileNotFoundError: a model or the pairs do not exist.
        FileExistsError: OUTPUT exists.
        ValueError: settings out of range, or models that cannot be averaged.
    """
    check(settings)
    refuse_existing(settings.output, settings.overwrite)
    if settings.quiet:
        disable_progress_bar()
    models = ModelPair(*settings.models)
    with atomic_folder(settings.output, settings.overwrite) as output:
        if settings.pairs is None:
            models.write(output, (settings.weight or [DEFAULT_WEIGHT])[0])
        else:
            choice = choose(models, settings)
            models.write(output, choice["weight"])
            write_json(output / CHOICE_FILE, choice)
            if not settings.quiet:
                print_choice(choice)
        save_settings(settings, output / "settings.yaml")


def check(settings: MergeSettings) -> None:
    """Refuse settings that cannot work.

    Raises:
        ValueError: what came, what is allowed and what to do.
    """
    if len(settings.models) != 2:
        raise ValueError(f"give two models, not {len(settings.models)}: `mmkd merge A B --output C`")
    for weight in settings.weight:
        if not 0 <= weight <= 1:
            raise ValueError(f"--weight {weight:g} is the share of the second model; it must be 0 to 1")
    if settings.pairs is None and len(settings.weight) > 1:
        raise ValueError(f"--weight names {len(settings.weight)} shares; give one, or --pairs to choose among them")
    if settings.pairs is not None:
        check_evaluation(evaluation(settings, Path(), []), {})


def choose(models: ModelPair, settings: MergeSettings) -> dict[str, Any]:
    """Evaluate both models and their averages on validation pairs; returns the content of ``choice.json``."""
    weights = sorted({0.0, *(settings.weight or DEFAULT_GRID), 1.0})
    reason = why_not_evaluated(settings)
    found: list[Candidate] = []
    tasks: list[str] = []
    if reason is None:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{settings.output.name}.", dir=settings.output.parent) as work:
            found, tasks = candidates(models, weights, settings, Path(work))
    best = best_of(found) if found else None
    return {
        "models": [Path(name).name for name in settings.models],
        "weight": 0.0 if best is None else best.weight,
        "split": SPLIT,
        "metric": METRIC,
        "rule": RULE,
        "tasks": tasks,
        "pairs": sum(pair.split == SPLIT for pair in open_pairs(settings.pairs).pairs) if settings.pairs else 0,
        "candidates": [asdict(candidate) for candidate in found],
        "not_evaluated": reason,
    }


def why_not_evaluated(settings: MergeSettings) -> str | None:
    """Why the pairs allow no validation; None where they do."""
    assert settings.pairs is not None
    folder = open_pairs(settings.pairs)
    samples = split_samples(PairsDataset(folder, SPLIT), SPLIT, {pair.id: pair.sha256 for pair in folder.pairs})
    if not samples.held_out:
        return f"none of the {len(folder.pairs)} pairs is in the {SPLIT} split"
    own = evaluation(settings, Path(), [])
    tasks, reasons = tasks_for(samples, own.task_kinds, task_options(own))
    return None if tasks else f"the {len(samples.held_out)} {SPLIT} pairs allow no task: {'; '.join(reasons.values())}"


def candidates(
    models: ModelPair, weights: Sequence[float], settings: MergeSettings, work: Path
) -> tuple[list[Candidate], list[str]]:
    """Both models and their averages, evaluated as `mmkd eval --split validation` does; and the names of the tasks."""
    names = {f"{weight:g}": weight for weight in weights}
    sources = {name: str(work / name) for name in names}
    for name, weight in names.items():
        models.write(work / name, weight)
    encoders = [f"{name}={source}" for name, source in sources.items()]
    summary = evaluate(evaluation(settings, work, encoders), sources)
    overall = summary["overall"]
    start = overall["rows"][f"{weights[0]:g}"]["value"]
    found = [Candidate(weights[0], start, 0.0, 0.0)]
    for name, weight in list(names.items())[1:]:
        behind = overall["differences"][name]  # of the first model, which stands in the place of the student
        width = None if behind["low"] is None else behind["high"] - behind["low"]
        error = None if width is None else width / INTERVAL_IN_ERRORS
        value = overall["rows"][name]["value"]
        found.append(Candidate(weight, value, value - start, error))
    return found, overall["tasks"]


def evaluation(settings: MergeSettings, work: Path, encoders: list[str]) -> EvalSettings:
    """The settings of the evaluation on validation pairs."""
    return EvalSettings(
        encoders=encoders,
        pairs=settings.pairs,
        output=work / "results",
        split=SPLIT,
        kinds=settings.kinds,
        baselines=[source.partition("=")[0] for source in encoders[1:]],
        replicates=settings.replicates,
        batch_size=settings.batch_size,
        device=settings.device,
        seed=settings.seed,
        quiet=settings.quiet,
    )


def best_of(found: Sequence[Candidate]) -> Candidate:
    """The choice by `RULE`; of equal means the one nearer to the start."""
    start = min(found, key=lambda candidate: candidate.weight)
    best = max(found, key=lambda candidate: (candidate.value, -candidate.weight))
    return best if best.error is not None and best.ahead > best.error else start


def print_choice(choice: dict[str, Any]) -> None:
    """One line for each candidate, and the choice."""
    first, second = choice["models"]
    for own in choice["candidates"]:
        error = "no standard error" if own["error"] is None else f"standard error {own['error']:.3f}"
        beside = "" if own["weight"] == 0 else f"  {own['ahead']:+.3f} ({error})"
        print(f"  {own['weight']:<5g} {own['value']:.3f}{beside}")
    if choice["not_evaluated"]:
        print(f"no validation: {choice['not_evaluated']}")
    print(f"chosen: {choice['weight']:g} of {second}, the rest {first}")


if __name__ == "__main__":
    run(MergeSettings, main)
