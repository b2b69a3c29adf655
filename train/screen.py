"""Screen: which teachers are available for which pair, and which pairs enough teachers agree with.

    mmkd screen --pairs pairs --features features --output screened

Only the training split is thinned out. Validation and test pairs all stay, because held-out data that the teachers had
chosen would flatter the student; they carry their availability, compared within their own split. Images stay where they
are: the new manifest points at the root of the old one.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mmkd.data.features import TeacherFeatures
from mmkd.data.records import SPLITS, Pair, open_pairs, write_manifest
from mmkd.files import atomic_folder, refuse_existing, write_json
from mmkd.screening import Rule, available, default_minimum, pools
from mmkd.settings import run, save_settings, setting


@dataclass
class ScreenSettings:
    """Find the teachers that are available for each pair, and keep the training pairs that enough agree with."""

    pairs: Path = setting(help="folder of pairs")
    features: Path = setting(help="folder with one feature store for each teacher")
    output: Path = setting(help="folder to write: a manifest, images stay where they are")
    teachers: list[str] = setting(factory=list, help="teachers that are asked, by default all")
    rule: Rule = setting("percentile", "above a percentile of mismatches | paper = own caption ranks first | all")
    percentile: float = setting(80.0, "percentage of mismatched similarities that a pair's own must exceed")
    minimum_teachers: int | None = setting(None, "teachers that must agree; none = 5 of 9, or that share of fewer")
    pool: int = setting(1024, "pairs that are compared with each other")
    seed: int = setting(42, "of the pools")
    quiet: bool = setting(False, "no progress bar")
    overwrite: bool = setting(False, "replace OUTPUT")


def main(settings: ScreenSettings) -> None:
    """Screen, and write manifest and ``report.json``.

    Raises:
        FileNotFoundError: pairs or features are not there.
        FileExistsError: OUTPUT exists.
        ValueError: settings out of range, or no training pair is left.
    """
    refuse_existing(settings.output, settings.overwrite)
    folder = open_pairs(settings.pairs)
    features = TeacherFeatures.open(settings.features, settings.teachers or None)
    minimum = check(settings, features)
    names = availability(folder.pairs, features, settings)
    has_features = set(features.ids)
    outcome = [keep(pair, names[pair.id], pair.id in has_features, minimum) for pair in folder.pairs]
    kept = [
        dataclasses.replace(pair, teachers=names[pair.id])
        for pair, reason in zip(folder.pairs, outcome, strict=True)
        if reason == KEPT
    ]
    report = summary(folder.pairs, outcome, names, features, minimum)
    if not report["train"]["kept"]:
        raise ValueError(nothing_left(report, settings, minimum))
    with atomic_folder(settings.output, settings.overwrite) as output:
        write_manifest(output, kept, images=folder.image_root)
        write_json(output / "report.json", report)
        save_settings(settings, output / "settings.yaml")
    if not settings.quiet:
        train = report["train"]
        dropped = ", ".join(f"{reason} {count}" for reason, count in train["dropped"].items() if count) or "none"
        print(f"{settings.output}: {train['kept']} of {train['pairs']} training pairs; dropped: {dropped}")


KEPT, TOO_FEW, UNSEEN = "kept", "too few teachers agree", "no teacher has its features"


def check(settings: ScreenSettings, features: TeacherFeatures) -> int:
    """The number of teachers that must agree; raises on settings out of range."""
    count = len(features.names)
    minimum = default_minimum(count) if settings.minimum_teachers is None else settings.minimum_teachers
    if not 1 <= minimum <= count:
        raise ValueError(
            f"--minimum_teachers is {minimum}; {settings.features} has {count} teachers, so allowed: 1-{count}"
        )
    if not 0 <= settings.percentile <= 100 or settings.pool < 2 or settings.seed < 0:
        raise ValueError(
            f"--percentile {settings.percentile} must be 0 to 100, --pool {settings.pool} at least 2, --seed at least 0"
        )
    return minimum


def availability(
    pairs: Sequence[Pair], features: TeacherFeatures, settings: ScreenSettings
) -> dict[str, tuple[str, ...]]:
    """For each pair id the teachers that are available, pools being formed within each split."""
    names: dict[str, tuple[str, ...]] = {}
    with tqdm(total=len(pairs), desc="screening", unit="pair", disable=settings.quiet) as bar:
        for split in SPLITS:
            members = [pair for pair in pairs if pair.split == split]
            for positions in pools(len(members), settings.pool, settings.seed) if members else []:
                names |= pool_availability([members[k] for k in positions], features, settings)
                bar.update(len(positions))
    return names


def pool_availability(
    pool: Sequence[Pair], features: TeacherFeatures, settings: ScreenSettings
) -> dict[str, tuple[str, ...]]:
    """The same for the pairs of one pool; a teacher is asked about the pairs it has seen."""
    captions = [pair.caption for pair in pool]
    passed: dict[str, torch.Tensor] = {}
    for name, found in features.lookup([pair.id for pair in pool]).items():
        mask = found["mask"]
        seen = [caption for caption, known in zip(captions, mask.tolist(), strict=True) if known]
        passed[name] = mask.clone()
        passed[name][mask] = available(
            found["image"][mask], found["text"][mask], seen, settings.rule, settings.percentile
        )
    return {pair.id: tuple(name for name, passes in passed.items() if bool(passes[k])) for k, pair in enumerate(pool)}


def keep(pair: Pair, teachers: tuple[str, ...], has_features: bool, minimum: int) -> str:
    """Whether a pair stays, or why not; held-out pairs always do."""
    if pair.split != "train" or len(teachers) >= minimum:
        return KEPT
    return TOO_FEW if has_features else UNSEEN


def summary(
    pairs: Sequence[Pair],
    outcome: Sequence[str],
    names: dict[str, tuple[str, ...]],
    features: TeacherFeatures,
    minimum: int,
) -> dict[str, Any]:
    """Counts that add up: training pairs = kept + dropped = sum of ``agreeing``; by modality and by teacher, too."""
    train = [(pair, reason) for pair, reason in zip(pairs, outcome, strict=True) if pair.split == "train"]
    reasons = Counter(reason for _, reason in train)
    agreeing = Counter(len(names[pair.id]) for pair, _ in train)
    teachers = Counter(name for pair, _ in train for name in names[pair.id])
    modalities = Counter(pair.modality or "unnamed" for pair, _ in train)
    kept_of = Counter(pair.modality or "unnamed" for pair, reason in train if reason == KEPT)
    return {
        "minimum_teachers": minimum,
        "train": {
            "pairs": len(train),
            "kept": reasons[KEPT],
            "dropped": {reason: reasons[reason] for reason in (TOO_FEW, UNSEEN)},
        },
        "held_out_kept_unscreened": len(pairs) - len(train),
        "agreeing_teachers": {str(count): agreeing[count] for count in range(len(features.names) + 1)},
        "available": {name: teachers[name] for name in features.names},
        "modalities": {name: {"pairs": count, "kept": kept_of[name]} for name, count in sorted(modalities.items())},
    }


def nothing_left(report: dict[str, Any], settings: ScreenSettings, minimum: int) -> str:
    """The error when every training pair is dropped."""
    counts = ", ".join(f"{name} {count}" for name, count in report["available"].items())
    return (
        f"none of the {report['train']['pairs']} training pairs of {settings.pairs} has {minimum} agreeing teachers "
        f"(available: {counts}); lower --minimum_teachers or --percentile, or look whether features and pairs belong "
        "together"
    )


if __name__ == "__main__":
    run(ScreenSettings, main)
