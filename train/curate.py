"""Curate: a folder of images with a list becomes ``pairs/``, which every later stage reads.

    mmkd curate --source my-images --output pairs
    mmkd curate --source packaged --output pairs        # real images that arrive with PyPI packages

``my-images/labels.csv`` needs a column ``file`` and at least one of ``caption``, ``label``, ``modality``; ``group``,
``split``, ``license`` and ``source`` are used when present.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from mmkd.data.curation import CurationRules, curate
from mmkd.data.packaged import write_packaged
from mmkd.files import refuse_existing
from mmkd.settings import run, setting


@dataclass
class CurateSettings:
    """Turn a collection of images and captions or labels into a folder of pairs."""

    source: str = setting(help="folder with labels.csv, the authors' folder with meta.jsonl, or `packaged`")
    output: Path = setting(help="folder to write")
    max_pairs: int = setting(0, "most pairs to keep, in proportion to split, modality and label; 0 for all")
    short_side: int = setting(0, "store larger images with this shorter side in pixels; 0 keeps sizes")
    minimum_side: int = setting(16, "drop images with a shorter side in pixels")
    maximum_words: int = setting(1000, "drop longer captions")
    seed: int = setting(42, "of splits and of the choice of max_pairs")
    workers: int = setting(1, "processes that read images")
    quiet: bool = setting(False, "no progress bar")
    overwrite: bool = setting(False, "replace OUTPUT")


def main(settings: CurateSettings) -> None:
    """Curate and print one line of counts."""
    refuse_existing(settings.output, settings.overwrite)
    rules = CurationRules(
        settings.max_pairs, settings.short_side, settings.minimum_side, settings.maximum_words, settings.seed
    )
    with tempfile.TemporaryDirectory(prefix="mmkd-packaged-") as temporary:
        source = Path(settings.source)
        if settings.source == "packaged":
            source = Path(temporary) / "packaged"
            write_packaged(source)
        report = curate(source, settings.output, rules, settings.workers, settings.quiet, settings.overwrite)
    if not settings.quiet:
        counts = ", ".join(f"{split} {count}" for split, count in report.summary()["splits"].items())
        dropped = ", ".join(f"{reason} {count}" for reason, count in report.reasons.items()) or "none"
        print(f"{settings.output}: {len(report.pairs)} pairs ({counts}); dropped: {dropped}")


if __name__ == "__main__":
    run(CurateSettings, main)
