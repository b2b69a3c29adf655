"""Filter pairs by teacher agreement.

Only the training split is filtered. Validation and test pairs all stay, because held-out data chosen by the teachers
would be optimistic; they carry their availability, compared within their own split. Pairs are streamed, so that memory
does not grow with them. Images stay where they are: the new manifest points at the root of the old one. ``report.json``
holds counts and histograms, ``report.html`` shows them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmkd.command.settings import check_arguments, run, setting


@dataclass
class ScreenSettings:
    """Filter pairs by teacher agreement: find the available teachers of each pair, keep training pairs with enough.

    Example:
        mmkd screen --pairs pairs --features features --output screened
    """

    pairs: Path = setting(help="folder of pairs")
    features: Path = setting(help="folder with one feature store for each teacher")
    output: Path = setting(help="folder to write: a manifest, images stay where they are")
    teachers: list[str] = setting(factory=list, help="teachers to use; empty takes all")
    rule: Literal["percentile", "rank", "all"] = setting(
        "percentile", "above a percentile of mismatches | rank = own caption within --top | all"
    )
    percentile: float = setting(80.0, "percentage of mismatched similarities that a pair's own must exceed")
    top: int = setting(1, "rank of the own caption in the pool that still passes (rule rank)")
    minimum_teachers: int | None = setting(
        None, "number of teachers that must agree; null is 5 of 9, or that share of fewer; 0 keeps every pair"
    )
    modalities: list[str] = setting(
        factory=list, help="training pairs of other modalities are dropped; empty keeps all"
    )
    pool: int = setting(1024, "random pairs of each split, and of each modality in it, that give the mismatches")
    modality_pairs: int | None = setting(
        50, "pairs in the pool from which a modality has a threshold of its own; null = one threshold for all"
    )
    seed: int = setting(42, "seed of the pools")
    quiet: bool = setting(False, "show no progress bar")
    overwrite: bool = setting(False, "replace OUTPUT if it exists")


if __name__ == "__main__":
    check_arguments(ScreenSettings)  # before the imports that take seconds

import numpy as np
from tqdm import tqdm

from mmkd.command.settings import nearest, save_settings
from mmkd.data.features.lookup import TeacherFeatures, seen_pairs
from mmkd.data.folder import Choice, PairFolder, in_chunks, open_pairs, write_choice
from mmkd.data.table import Pair
from mmkd.distillation.screening import (
    KEPT,
    OTHER_MODALITY,
    TOO_FEW,
    UNSEEN,
    Screen,
    ScreeningReport,
    default_minimum,
    draw_pools,
    screening_page,
    warnings_of,
)
from mmkd.files import atomic_folder, refuse_existing, write_json
from mmkd.pages.page import write_page

logger = logging.getLogger(__name__)


def main(settings: ScreenSettings) -> None:
    """Screen, and write manifest, ``report.json`` and ``report.html``.

    Raises:
        FileNotFoundError: pairs or features are not there.
        FileExistsError: OUTPUT exists.
        ValueError: settings out of range, or no training pair is left.
    """
    refuse_existing(settings.output, settings.overwrite)
    folder = open_pairs(settings.pairs)
    features = TeacherFeatures.open(settings.features, settings.teachers or None)
    minimum = check(settings, features)
    seen_pairs(features, folder.pairs, settings.features)
    pools, modalities = draw_pools(folder, features, settings.pool, settings.seed, settings.modality_pairs)
    for name in settings.modalities:
        if name.lower() not in modalities:
            hint, listed = nearest(name.lower(), modalities), ", ".join(sorted(modalities))
            raise ValueError(f"--modalities {name!r}{hint}: no pair has it; the pairs have {listed}")
    screen = Screen(features, pools, settings.rule, settings.percentile, settings.top)
    report = ScreeningReport(features.names)
    with atomic_folder(settings.output, settings.overwrite) as output:
        write_choice(output, folder, choices(folder, screen, report, minimum, settings))
        summary = report.summary(minimum, screen.about_pools())
        if not summary["train"]["kept"]:
            raise ValueError(nothing_left(summary, settings, minimum))
        write_json(output / "report.json", summary)
        write_page(output / "report.html", screening_page(summary))
        save_settings(settings, output / "settings.yaml")
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
    if not 0 <= settings.percentile <= 100 or settings.pool < 2 or settings.seed < 0 or settings.top < 1:
        raise ValueError(
            f"--percentile {settings.percentile} must be 0 to 100, --pool {settings.pool} at least 2, --top "
            f"{settings.top} at least 1, --seed {settings.seed} at least 0"
        )
    if settings.modality_pairs is not None and settings.modality_pairs < 2:
        raise ValueError(f"--modality_pairs is {settings.modality_pairs}; it must be at least 2, or null")
    return minimum


def choices(
    folder: PairFolder, screen: Screen, report: ScreeningReport, minimum: int, settings: ScreenSettings
) -> Iterator[Choice]:
    """The pairs that stay, with their teachers, some thousands at a time; every pair is counted in the report."""
    allowed = {name.lower() for name in settings.modalities}
    with tqdm(total=len(folder.pairs), desc="screening", unit="pair", disable=settings.quiet) as bar:
        for start, pairs in in_chunks(folder.pairs):
            passed, present = screen.availability(pairs, report)
            kept: list[tuple[int, Pair]] = []
            for k, pair in enumerate(pairs):
                teachers = tuple(name for name in screen.features.names if passed[name][k])
                reason = keep(pair, teachers, bool(present[k]), minimum, allowed)
                report.add(pair, teachers, reason)
                if reason == KEPT:
                    kept.append((start + k, dataclasses.replace(pair, teachers=teachers)))
            yield np.array([position for position, _ in kept], dtype=np.int64), [pair for _, pair in kept]
            bar.update(len(pairs))


def keep(pair: Pair, teachers: tuple[str, ...], has_features: bool, minimum: int, modalities: set[str]) -> str:
    """Whether a pair stays, or why not; held-out pairs always do."""
    if pair.split != "train":
        return KEPT
    if modalities and pair.modality.lower() not in modalities:
        return OTHER_MODALITY
    if len(teachers) >= minimum:
        return KEPT
    return TOO_FEW if has_features else UNSEEN


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
