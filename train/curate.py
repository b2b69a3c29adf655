"""Curate: raw images and texts become ``pairs/``, the folder that every later stage reads.

``my-images/labels.csv`` needs a column ``file`` and at least one of ``caption``, ``label``, ``modality``; ``group``,
``split``, ``license`` and ``source`` are used when present. Tars, Parquet files, JSON lines, folders of images and the
Hub (``hf://datasets/OWNER/NAME``) are read as well, all with the same options, and ``packaged`` stands for real images
that come with PyPI packages; see docs/curation.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mmkd.command.settings import check_arguments, run, setting
from mmkd.command.tasks import TaskSettings
from mmkd.curation.rules import NearMode, Rules, read_rules
from mmkd.data.pixel_rules import WindowPreset


@dataclass(kw_only=True)
class CurateSettings(TaskSettings):
    """Turn a collection of images and captions or labels into a folder of pairs.

    Example:
        mmkd curate --source my-images --output pairs
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "data": "table salt preset max_pairs licenses modalities validation_share test_share exclude_manifests",
        "images": "window frame burned_in secondary_captures short_side jpeg_quality minimum_side panel_types "
        "split_panels",
        "reports": "reports query join text sections columns",
        "captions": "minimum_words maximum_words languages mentions scrub",
        "duplicates": "near_duplicates image_distance caption_similarity",
        "computing": "seed quiet overwrite",
    }

    source: str = setting(
        help="folder or file of tars, Parquet, JSON lines, images, DICOM or labels.csv, hf://..., or packaged"
    )
    output: Path = setting(help="folder to write")
    table: Path | None = setting(None, "list of the images, if it is not SOURCE/labels.csv")
    salt: Path | None = setting(
        None, "secret file, the key of hashes of DICOM patients; without it the source's first file"
    )
    reports: str | None = setting(None, "reports of DICOM files: CSV, Parquet or the URL of a database")
    query: str = setting("", "SQL that gives the reports, where they are in a database")
    join: str = setting("AccessionNumber", "DICOM element that reports are joined by, or ELEMENT=COLUMN")
    text: str = setting("ReportText", "column of the reports' text")
    sections: list[str] = setting(factory=list, help="headings whose text becomes the caption, such as impression")
    columns: list[str] = setting(
        factory=list, help="FIELD=COLUMN of the reports or the list of images, such as group=PatientID"
    )
    preset: str = setting(
        "auto", "rules: paper (auto: for tars), list (labelled images), any (all else) or a YAML file"
    )
    max_pairs: int = setting(0, "maximum number of pairs, in proportion to split, modality and label; 0 for all")
    window: WindowPreset = setting(
        "auto", "grey values of CT and NIfTI: lung, soft, bone, brain, three (RGB), or auto: the file's own"
    )
    frame: str = setting("middle", "frame of DICOM and slice of NIfTI: middle, a number from 1, or each (DICOM)")
    burned_in: bool = setting(False, "keep files of DICOM folders that state to show text about the patient")
    secondary_captures: bool = setting(False, "keep screenshots and scanned documents of DICOM folders")
    short_side: int = setting(0, "store larger images with this shorter side [pixels]; 0 keeps sizes")
    jpeg_quality: int = setting(95, "quality of resized JPEG; below 95 with 4:2:0 colour, which training reads faster")
    minimum_side: int | None = setting(None, "drop images with a shorter side [pixels] (preset: 16 for lists, else 8)")
    minimum_words: int | None = setting(None, "drop shorter captions (preset: 1)")
    maximum_words: int | None = setting(None, "drop longer captions (preset: 1000)")
    licenses: list[str] | None = setting(None, "commercial, noncommercial, other or single licences; [] for any")
    panel_types: list[str] | None = setting(None, "single, multiple; [] for any")
    languages: list[str] | None = setting(None, "ISO 639-1 codes such as en; [] for any")
    modalities: list[str] | None = setting(None, "modalities to keep; [] for any")
    split_panels: bool = setting(False, "one pair for each panel that a compound caption names")
    mentions: int = setting(0, "sentences of the article that mention the figure, added to the caption")
    scrub: bool = setting(False, "replace obvious identifiers of people in captions")
    near_duplicates: NearMode | None = setting(
        None, "drop pairs near another in image and caption (both), image or caption (preset: off for lists, else both)"
    )
    image_distance: int = setting(4, "bits of 64 in which perceptual hashes of near images may differ")
    caption_similarity: float = setting(0.8, "Jaccard similarity from which captions are near")
    exclude_manifests: list[Path] = setting(factory=list, help="evaluation sets whose images and articles are dropped")
    validation_share: float | None = setting(
        None, "share of groups held out where the source gives no split (preset: 0.15, 0 for tars)"
    )
    test_share: float | None = setting(None, "the same for testing (preset: 0.25, 0 for tars)")
    seed: int = setting(42, "seed of splits and of the choice of max_pairs")
    quiet: bool = setting(False, "no progress bar")
    overwrite: bool = setting(False, "replace OUTPUT")


if __name__ == "__main__":
    check_arguments(CurateSettings)  # before the imports that take seconds

from mmkd.curation.reports import ReportSource, read_mapping
from mmkd.curation.sources import preset_of
from mmkd.curation.stream import curate
from mmkd.data.table import SPLITS


def main(settings: CurateSettings) -> None:
    """Curate and print one line of counts."""
    preset = preset_of(settings.source, settings.table) if settings.preset == "auto" else settings.preset
    given = {field.name: getattr(settings, field.name, None) for field in dataclasses.fields(Rules)}
    columns, reports = read_mapping(settings.columns), None
    if settings.reports is not None:
        mapping = {"caption": settings.text} | columns
        reports = ReportSource(settings.reports, settings.join, mapping, settings.query, tuple(settings.sections))
    report = curate(
        settings.source,
        settings.output,
        read_rules(preset, **{name: value for name, value in given.items() if value is not None}),
        table=settings.table,
        salt=settings.salt,
        columns=columns if settings.reports is None else None,
        reports=reports,
        tasks=settings,
        exclude=settings.exclude_manifests,
        quiet=settings.quiet,
        overwrite=settings.overwrite,
    )
    if settings.quiet:
        return
    counts = report["contents"]["split"]
    splits = ", ".join(f"{split} {counts[split]}" for split in SPLITS if split in counts)
    dropped = ", ".join(f"{reason} {count}" for reason, count in report["dropped"].items()) or "none"
    print(f"{settings.output}: {report['kept']} pairs ({splits}); dropped: {dropped}")


if __name__ == "__main__":
    run(CurateSettings, main)
