"""Filter pairs by teacher agreement.

Only the training split is filtered. Validation and test pairs all stay, because held-out data chosen by the teachers
would be optimistic; they carry their availability, compared within their own split. Tasks of any executor screen runs
of pairs, whose files are joined. Images stay where they are: the new manifest points at the root of the old one.
``report.json`` holds counts and histograms, ``report.html`` shows them.
"""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from mmkd.command.settings import check_arguments, run, setting
from mmkd.command.tasks import TaskSettings


@dataclass(kw_only=True)
class ScreenSettings(TaskSettings):
    """Filter pairs by teacher agreement: find the available teachers of each pair, keep training pairs with enough.

    Example:
        mmkd screen --pairs pairs --features features --output screened
    """

    GROUPS: ClassVar[dict[str, str]] = {"computing": "quiet"}

    pairs: Path = setting(help="folder of pairs")
    features: Path = setting(help="folder with one feature store for each teacher")
    output: Path = setting(help="folder to write: a manifest, images stay where they are")
    teachers: list[str] = setting(factory=list, help="teachers to use; empty takes all")
    rule: Literal["percentile", "rank", "all"] = setting(
        "percentile", "above a percentile of mismatches | rank = own caption within --top | all"
    )
    percentile: float = setting(
        80.0, "percentage of mismatched similarities that a pair's own must exceed", least=0, most=100
    )
    top: int = setting(1, "rank of the own caption in the pool that still passes (rule rank)", least=1)
    minimum_teachers: int | None = setting(
        None, "number of teachers that must agree; null is 5 of 9, or that share of fewer; 0 keeps every pair"
    )
    modalities: list[str] = setting(
        factory=list, help="training pairs of other modalities are dropped; empty keeps all"
    )
    pool: int = setting(
        1024, "random pairs of each split, and of each modality in it, that give the mismatches", least=2
    )
    modality_pairs: int | None = setting(
        50, "pairs in the pool from which a modality has a threshold of its own; null = one threshold for all", least=2
    )
    seed: int = setting(42, "seed of the pools", least=0)
    quiet: bool = setting(False, "show no progress bar")
    overwrite: bool = setting(False, "replace OUTPUT if it exists")


if __name__ == "__main__":
    check_arguments(ScreenSettings)  # before the imports that take seconds

from tqdm import tqdm

from mmkd.command.settings import nearest, save_settings
from mmkd.command.tasks import open_parts, resident, run_tasks
from mmkd.data.features.lookup import TeacherFeatures, seen_pairs
from mmkd.data.folder import join_parts, manifest_sha256, open_pairs
from mmkd.data.table import VERSION
from mmkd.distillation.screening import (
    Screen,
    ScreeningReport,
    counts_of,
    default_minimum,
    draw,
    screen_runs,
    screening_page,
    warnings_of,
)
from mmkd.files import atomic_folder, refuse_existing, remove, write_json
from mmkd.pages.page import write_page

RUN = 16384  # pairs whose decisions are one file

logger = logging.getLogger(__name__)


def main(settings: ScreenSettings) -> None:
    """Screen, and write manifest, ``report.json`` and ``report.html``.

    Raises:
        FileNotFoundError: pairs or features are not there.
        FileExistsError: OUTPUT exists.
        ValueError: settings out of range, or no training pair is left.
    """
    settings.check_tasks()
    refuse_existing(settings.output, settings.overwrite)
    folder = open_pairs(settings.pairs)
    features = TeacherFeatures.open(settings.features, settings.teachers or None)
    minimum = check(settings, features)
    seen_pairs(features, folder.pairs, settings.features)
    drawn, modalities = draw(folder.pairs, features, settings.pool, settings.seed, settings.modality_pairs)
    for name in settings.modalities:
        if name.lower() not in modalities:
            hint, listed = nearest(name.lower(), modalities), ", ".join(sorted(modalities))
            raise ValueError(f"--modalities {name!r}{hint}: no pair has it; the pairs have {listed}")
    parts = open_parts(settings.output, made_of(settings, features), settings.overwrite)
    rule = drawn, settings.modality_pairs, settings.rule, settings.percentile, settings.top
    screen, files = Screen(folder, features, *rule), runs(len(folder.pairs), parts)
    opened = partial(Screen.open, settings.pairs, settings.features, features.names, *rule)
    elsewhere = partial(resident, uuid.uuid4().hex, opened)
    run_tasks(
        partial(
            screen_runs,
            (lambda: screen) if settings.is_here else elsewhere,
            minimum,
            {name.lower() for name in settings.modalities},
        ),
        files.items(),
        lambda item: item[0].exists(),
        settings,
        settings.output,
        partial(tqdm, desc="screening", unit="pair", disable=settings.quiet),
        lambda item: len(item[1]),
    )
    report = ScreeningReport(features.names)
    for file in files:
        report.add_json(counts_of(file))
    summary = report.summary(minimum, screen.about_pools())
    if not summary["train"]["kept"]:
        remove(parts)
        raise ValueError(nothing_left(summary, settings, minimum))
    with atomic_folder(settings.output, settings.overwrite) as output:
        join_parts(output, list(files), folder.image_root)
        write_json(output / "report.json", summary)
        write_page(output / "report.html", screening_page(summary))
        save_settings(settings, output / "settings.yaml")
    remove(parts)
    if not settings.quiet:
        train = summary["train"]
        dropped = ", ".join(f"{reason} {count}" for reason, count in train["dropped"].items() if count) or "none"
        print(f"{settings.output}: {train['kept']} of {train['pairs']} training pairs; dropped: {dropped}")
    for warning in warnings_of(summary):
        logger.warning(warning)


def check(settings: ScreenSettings, features: TeacherFeatures) -> int:
    """The number of teachers that must agree; raises on settings out of range."""
    count = len(features.names)
    minimum = default_minimum(count) if settings.minimum_teachers is None else settings.minimum_teachers
    if not 0 <= minimum <= count:
        raise ValueError(
            f"--minimum_teachers is {minimum}; {settings.features} has {count} teachers, so allowed: 0-{count}"
        )
    return minimum


def runs(count: int, parts: Path) -> dict[Path, range]:
    """The files of decisions, and the positions of their pairs."""
    return {parts / f"{k}.arrow": range(k, min(k + RUN, count)) for k in range(0, count, RUN)}


def made_of(settings: ScreenSettings, features: TeacherFeatures) -> dict[str, Any]:
    """What decisions depend on."""
    names = ("rule", "percentile", "top", "minimum_teachers", "modalities", "pool", "modality_pairs", "seed")
    data = {"features": features.identity, "pairs": manifest_sha256(settings.pairs)}
    return {"version": VERSION, **{name: getattr(settings, name) for name in names}, **data}


def nothing_left(summary: dict[str, Any], settings: ScreenSettings, minimum: int) -> str:
    """The error when every training pair is dropped."""
    counts = ", ".join(f"{name} {count}" for name, count in summary["available"].items())
    return (
        f"none of the {summary['train']['pairs']} training pairs of {settings.pairs} has {minimum} agreeing teachers "
        f"(available: {counts}); lower --minimum_teachers or --percentile, or check that features and pairs belong "
        "together"
    )


if __name__ == "__main__":
    run(ScreenSettings, main)
