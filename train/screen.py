"""Screen: which teachers are available for which pair, and which pairs enough teachers agree with.

    mmkd screen --pairs pairs --features features --output screened

Only the training split is thinned out. Validation and test pairs all stay, because held-out data that the teachers had
chosen would flatter the student; they carry their availability, compared within their own split. Pairs pass by one
after the other, so that memory does not grow with them. Images stay where they are: the new manifest points at the root
of the old one. ``report.json`` holds counts and histograms, ``report.html`` shows them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mmkd.command.settings import nearest, run, save_settings, setting
from mmkd.data.features.lookup import TeacherFeatures, seen_pairs
from mmkd.data.folder import Choice, PairFolder, in_chunks, open_pairs, write_choice
from mmkd.data.table import SPLITS, Pair
from mmkd.distillation.screening import (
    BINS,
    KEPT,
    OTHER_MODALITY,
    TOO_FEW,
    UNSEEN,
    Pool,
    Pools,
    Rule,
    ScreeningReport,
    above,
    default_minimum,
    pools_of,
    screening_page,
    within_top,
)
from mmkd.files import atomic_folder, refuse_existing, write_json
from mmkd.pages.page import write_page


@dataclass
class ScreenSettings:
    """Find the teachers that are available for each pair, and keep the training pairs that enough agree with."""

    pairs: Path = setting(help="folder of pairs")
    features: Path = setting(help="folder with one feature store for each teacher")
    output: Path = setting(help="folder to write: a manifest, images stay where they are")
    teachers: list[str] = setting(factory=list, help="teachers that are asked, by default all")
    rule: Rule = setting("percentile", "above a percentile of mismatches | rank = own caption within --top | all")
    percentile: float = setting(80.0, "percentage of mismatched similarities that a pair's own must exceed")
    top: int = setting(1, "rank of the own caption in the pool that still passes (rule rank)")
    minimum_teachers: int | None = setting(
        None, "teachers that must agree; none = 5 of 9, or that share of fewer; 0 keeps every pair"
    )
    modalities: list[str] = setting(
        factory=list, help="training pairs of other modalities are dropped; empty keeps all"
    )
    pool: int = setting(1024, "random pairs of each split that give the mismatches")
    seed: int = setting(42, "of the pools")
    quiet: bool = setting(False, "no progress bar")
    overwrite: bool = setting(False, "replace OUTPUT")


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
    pools = draw_pools(folder, features, settings)
    thresholds = {
        split: {name: pool.threshold(settings.percentile) for name, pool in members.items()}
        for split, members in pools.items()
    }
    report = ScreeningReport(features.names)
    with atomic_folder(settings.output, settings.overwrite) as output:
        write_choice(output, folder, choices(folder, features, pools, thresholds, report, minimum, settings))
        summary = report.summary(minimum, about_pools(pools["train"], thresholds["train"], settings.rule))
        if not summary["train"]["kept"]:
            raise ValueError(nothing_left(summary, settings, minimum))
        write_json(output / "report.json", summary)
        write_page(output / "report.html", screening_page(summary))
        save_settings(settings, output / "settings.yaml")
    if not settings.quiet:
        train = summary["train"]
        dropped = ", ".join(f"{reason} {count}" for reason, count in train["dropped"].items() if count) or "none"
        print(f"{settings.output}: {train['kept']} of {train['pairs']} training pairs; dropped: {dropped}")


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
    return minimum


def draw_pools(folder: PairFolder, features: TeacherFeatures, settings: ScreenSettings) -> Pools:
    """For each split and teacher random pairs that the teacher has seen.

    Every pair gets a random number, those with the smallest ones are drawn: one pass, and the same pairs for all.

    Raises:
        ValueError: a modality is asked for that no training pair has.
    """
    generator = np.random.default_rng(settings.seed)
    drawn: dict[str, list[tuple[float, str, str]]] = {split: [] for split in SPLITS}
    modalities: set[str] = set()
    for _, pairs in in_chunks(folder.pairs):
        seen, numbers = features.seen([pair.id for pair in pairs]), generator.random(len(pairs))
        for pair, known, number in zip(pairs, seen.tolist(), numbers.tolist(), strict=True):
            modalities.add(pair.modality.lower())
            if known:
                drawn[pair.split].append((number, pair.id, pair.caption))
        drawn = {split: sorted(members)[: settings.pool] for split, members in drawn.items()}
    for name in settings.modalities:
        if name.lower() not in modalities:
            known_names = ", ".join(sorted(modalities))
            raise ValueError(f"--modalities {name!r}{nearest(name.lower(), modalities)}: no such pair; {known_names}")
    return {split: pools_of(members, features) for split, members in drawn.items()}


def choices(
    folder: PairFolder,
    features: TeacherFeatures,
    pools: Pools,
    thresholds: dict[str, dict[str, float]],
    report: ScreeningReport,
    minimum: int,
    settings: ScreenSettings,
) -> Iterator[Choice]:
    """The pairs that stay, with their teachers, some thousands at a time; every pair is counted in the report."""
    allowed = {name.lower() for name in settings.modalities}
    with tqdm(total=len(folder.pairs), desc="screening", unit="pair", disable=settings.quiet) as bar:
        for start, pairs in in_chunks(folder.pairs):
            passed, seen = availability(pairs, features, pools, thresholds, report, settings)
            kept: list[tuple[int, Pair]] = []
            for k, pair in enumerate(pairs):
                teachers = tuple(name for name in features.names if passed[name][k])
                reason = keep(pair, teachers, bool(seen[k]), minimum, allowed)
                report.add(pair, teachers, reason)
                if reason == KEPT:
                    kept.append((start + k, dataclasses.replace(pair, teachers=teachers)))
            yield np.array([position for position, _ in kept], dtype=np.int64), [pair for _, pair in kept]
            bar.update(len(pairs))


def availability(
    pairs: Sequence[Pair],
    features: TeacherFeatures,
    pools: Pools,
    thresholds: dict[str, dict[str, float]],
    report: ScreeningReport,
    settings: ScreenSettings,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Which pairs each teacher is available for, (n,) bool: it has seen them and the rule of their split lets them.

    Returns:
        that by teacher, and which pairs any teacher has seen.
    """
    splits = np.array([pair.split for pair in pairs])
    passed, seen = {}, np.zeros(len(pairs), dtype=bool)
    for name, found in features.lookup([pair.id for pair in pairs]).items():
        image, text, passes = found["image"], found["text"], found["mask"].clone()
        for split in set(splits.tolist()):
            rows = torch.from_numpy(splits == split) & found["mask"]
            if split == "train":
                report.add_similarities(name, (image[rows] * text[rows]).sum(dim=1).numpy())
            if settings.rule == "percentile":
                passes[rows] = above(image[rows], text[rows], thresholds[split][name])
            elif settings.rule == "rank":
                captions = [pairs[k].caption for k in rows.nonzero().flatten().tolist()]
                passes[rows] = within_top(image[rows], text[rows], captions, pools[split][name], settings.top)
        passed[name] = passes.numpy()
        seen |= found["mask"].numpy()
    return passed, seen


def keep(pair: Pair, teachers: tuple[str, ...], seen: bool, minimum: int, modalities: set[str]) -> str:
    """Whether a pair stays, or why not; held-out pairs always do."""
    if pair.split != "train":
        return KEPT
    if modalities and pair.modality.lower() not in modalities:
        return OTHER_MODALITY
    if len(teachers) >= minimum:
        return KEPT
    return TOO_FEW if seen else UNSEEN


def about_pools(pools: dict[str, Pool], thresholds: dict[str, float], rule: Rule) -> dict[str, dict[str, Any]]:
    """Size, mismatches and threshold of each teacher's pool, for the report."""
    return {
        name: {
            "pool": len(pool.captions),
            "threshold": thresholds[name] if rule == "percentile" and np.isfinite(thresholds[name]) else None,
            "mismatched": np.histogram(pool.mismatched().clamp(-1, 1).numpy(), BINS)[0],
        }
        for name, pool in pools.items()
    }


def nothing_left(summary: dict[str, Any], settings: ScreenSettings, minimum: int) -> str:
    """The error when every training pair is dropped."""
    counts = ", ".join(f"{name} {count}" for name, count in summary["available"].items())
    return (
        f"none of the {summary['train']['pairs']} training pairs of {settings.pairs} has {minimum} agreeing teachers "
        f"(available: {counts}); lower --minimum_teachers or --percentile, or look whether features and pairs belong "
        "together"
    )


if __name__ == "__main__":
    run(ScreenSettings, main)
