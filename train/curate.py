"""Curate: raw images and texts become ``pairs/``, which every later stage reads.

    mmkd curate --source my-images --output pairs             # a folder with labels.csv: manifest.jsonl and images/
    mmkd curate --source packaged --output pairs              # real images that arrive with PyPI packages
    mmkd curate --source /data/biomedica --output pairs --workers 16   # WebDataset tars: manifest.arrow, shards/
    mmkd curate --source hf://datasets/BIOMEDICA/biomedica_webdataset_24M --output pairs --workers 16

``my-images/labels.csv`` needs a column ``file`` and at least one of ``caption``, ``label``, ``modality``; ``group``,
``split``, ``license`` and ``source`` are used when present. A list is small and judged as a whole; tars, Parquet files,
JSON lines, folders of images and the Hub are streamed, see docs/curation.md.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmkd.command.settings import check_arguments, run, setting
from mmkd.curation.rules import NearMode


@dataclass
class CurateSettings:
    """Turn a collection of images and captions or labels into a folder of pairs."""

    source: str = setting(
        help="folder or file of tars, Parquet, JSON lines, images or labels.csv, hf://..., or packaged"
    )
    output: Path = setting(help="folder to write")
    table: Path | None = setting(None, "the list, where it does not lie in SOURCE as labels.csv")
    form: Literal["auto", "folder", "shards"] = setting("auto", "folder of image files (lists), or tars (all else)")
    preset: str = setting("auto", "rules: paper (auto: for tars), any (auto: for all else), or a YAML file")
    max_pairs: int = setting(0, "most pairs to keep; of a list in proportion to split, modality and label; 0 for all")
    short_side: int = setting(0, "store larger images with this shorter side in pixels; 0 keeps sizes")
    jpeg_quality: int = setting(95, "of JPEG stored smaller; below 95 with 4:2:0 colour, which training reads faster")
    minimum_side: int | None = setting(None, "drop images with a shorter side in pixels (default 16 for lists, else 8)")
    minimum_words: int | None = setting(None, "drop shorter captions (default 1)")
    maximum_words: int | None = setting(None, "drop longer captions (default 1000)")
    licenses: list[str] | None = setting(None, "commercial, noncommercial, other or single licences; [] for any")
    panel_types: list[str] | None = setting(None, "single, multiple; [] for any")
    languages: list[str] | None = setting(None, "ISO 639-1 codes such as en; [] for any")
    modalities: list[str] | None = setting(None, "modalities to keep; [] for any")
    split_panels: bool = setting(False, "one pair for each panel that a compound caption names")
    mentions: int = setting(0, "sentences of the article that mention the figure, added to the caption")
    scrub: bool = setting(False, "replace obvious identifiers of people in captions")
    near_duplicates: NearMode = setting("both", "drop pairs nearly like another in image and caption, one, or off")
    image_distance: int = setting(4, "bits of 64 in which perceptual hashes of near images may differ")
    caption_similarity: float = setting(0.8, "Jaccard similarity from which captions are near")
    exclude_manifests: list[Path] = setting(factory=list, help="evaluation sets whose images and articles are dropped")
    validation_share: float = setting(0.0, "part of the articles held out where the source gives no split")
    test_share: float = setting(0.0, "the same for testing")
    list_dropped: bool = setting(False, "write dropped.jsonl with every dropped sample (lists always do)")
    shard: str = setting("1/1", "i/n: work off the i-th of n parts of the source, then stop")
    seed: int = setting(42, "of splits and of the choice of max_pairs")
    workers: int = setting(1, "processes that read images")
    quiet: bool = setting(False, "no progress bar")
    overwrite: bool = setting(False, "replace OUTPUT")


if __name__ == "__main__":
    check_arguments(CurateSettings)  # before the imports that take seconds

from mmkd.curation.lists import CurationRules, curate
from mmkd.curation.packaged import write_packaged
from mmkd.curation.rules import StreamRules, read_rules
from mmkd.curation.sources import kind_of_source
from mmkd.curation.stream import curate_stream
from mmkd.files import refuse_existing

LIST_SETTINGS = (
    "source", "output", "table", "form", "preset", "max_pairs", "short_side", "jpeg_quality", "minimum_side",
    "maximum_words", "seed", "workers", "quiet", "overwrite",
)  # fmt: skip


def main(settings: CurateSettings) -> None:
    """Curate and print one line of counts."""
    kind = "list" if settings.source == "packaged" or settings.table else kind_of_source(settings.source)
    is_list = settings.form == "folder" or (settings.form == "auto" and kind == "list")
    line = curate_list(settings) if is_list else curate_shards(settings, kind)
    if not settings.quiet:
        print(line)


def curate_list(settings: CurateSettings) -> str:
    """Curate a list of images as a whole.

    Raises:
        ValueError: a setting was given that only streamed sources have.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(settings)} | {"exclude_manifests": []}
    foreign = [name for name in defaults if getattr(settings, name) != defaults[name] and name not in LIST_SETTINGS]
    if foreign or settings.preset != "auto":
        raise ValueError(
            f"--{foreign[0] if foreign else 'preset'} is for streamed sources; add --form shards to curate this list so"
        )
    refuse_existing(settings.output, settings.overwrite)
    rules = CurationRules(
        settings.max_pairs,
        settings.short_side,
        16 if settings.minimum_side is None else settings.minimum_side,
        1000 if settings.maximum_words is None else settings.maximum_words,
        settings.seed,
        settings.jpeg_quality,
    )
    with tempfile.TemporaryDirectory(prefix="mmkd-packaged-") as temporary:
        source = Path(settings.source)
        if settings.source == "packaged":
            source = Path(temporary) / "packaged"
            write_packaged(source)
        report = curate(
            source, settings.output, rules, settings.workers, settings.quiet, settings.overwrite, settings.table
        )
    counts = report.summary()
    return _line(settings.output, len(report.pairs), counts["splits"], report.reasons)


def curate_shards(settings: CurateSettings, kind: str) -> str:
    """Curate a streamed source."""
    if settings.source == "packaged":
        raise ValueError("the packaged images are a list; leave --form as it is")
    preset = settings.preset if settings.preset != "auto" else "paper" if kind == "tar" else "any"
    names = ("minimum_side", "minimum_words", "maximum_words", "licenses", "panel_types", "languages", "modalities")
    changes: dict[str, Any] = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    own = [field.name for field in dataclasses.fields(StreamRules) if field.name != "sample"]
    rules = StreamRules(read_rules(preset, changes), **{name: getattr(settings, name) for name in own})
    report = curate_stream(
        settings.source,
        settings.output,
        rules,
        workers=settings.workers,
        shard=_shard(settings.shard),
        exclude=settings.exclude_manifests,
        quiet=settings.quiet,
        overwrite=settings.overwrite,
    )
    if report is None:
        return f"{settings.output}.parts: shard {settings.shard} is done; when all are, run the command without --shard"
    return _line(settings.output, report["kept"], report["contents"]["split"], report["dropped"])


def _line(output: Path, pairs: int, splits: dict[str, int], reasons: dict[str, int]) -> str:
    counts = ", ".join(f"{split} {count}" for split, count in splits.items())
    dropped = ", ".join(f"{reason} {count}" for reason, count in reasons.items()) or "none"
    return f"{output}: {pairs} pairs ({counts}); dropped: {dropped}"


def _shard(text: str) -> tuple[int, int]:
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise ValueError(f"--shard {text} must be i/n with 1 <= i <= n, for example 3/8")
    return int(number), int(total)


if __name__ == "__main__":
    run(CurateSettings, main)
