"""Pairs: list a folder of pairs, count it, preview it, verify every image, and write it in other forms."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial, singledispatch
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from mmkd.command.settings import check_arguments, run, setting


@dataclass
class ListSettings:
    """List pairs, a line each.

    Example:
        mmkd pairs ls pairs --modality endoscopy --number 20
    """

    folder: Path = setting(help="a folder of pairs", positional=True)
    split: str | None = setting(None, "train, validation or test")
    modality: str | None = setting(None, "keep only pairs of this modality")
    search: str | None = setting(None, "only pairs whose caption contains this text")
    number: int = setting(20, "maximum number of lines")


@dataclass
class ShowSettings:
    """Show everything known about one pair, and write its image.

    Example:
        mmkd pairs show pairs --id 0d2177e46e9b4d8cb1283ff7 --image figure.jpg
    """

    folder: Path = setting(help="a folder of pairs", positional=True)
    id: str = setting(help="id of the pair")
    image: Path | None = setting(None, "file to write the image to")


@dataclass
class StatsSettings:
    """Count pairs by split, modality, licence, source and label.

    Example:
        mmkd pairs stats pairs
    """

    folder: Path = setting(help="a folder of pairs", positional=True)
    split: str | None = setting(None, "train, validation or test")
    json: bool = setting(False, "print JSON")


@dataclass
class VerifySettings:
    """Decode every image and compare it with the manifest.

    Example:
        mmkd pairs verify pairs --workers 8
    """

    folder: Path = setting(help="a folder of pairs", positional=True)
    workers: int = setting(4, "threads that decode")
    quiet: bool = setting(False, "no progress bar")


@dataclass
class ExportSettings:
    """Write pairs as WebDataset tars, or their rows without images as Parquet.

    Example:
        mmkd pairs export webdataset --pairs pairs --output tars
        mmkd pairs export manifest --pairs pairs --output manifest.parquet
    """

    form: Literal["webdataset", "manifest"] = setting(help="webdataset or manifest", positional=True)
    pairs: Path = setting(help="a folder of pairs")
    output: Path = setting(help="folder, or for a manifest the .parquet file, to write")
    split: str | None = setting(None, "train, validation or test")
    shard_pairs: int = setting(10_000, "pairs per tar")
    overwrite: bool = setting(False, "replace OUTPUT")
    quiet: bool = setting(False, "no progress bar")


@dataclass
class PreviewSettings:
    """Write a contact sheet: some images with their captions, one HTML file, to look at before anything is trained.

    Example:
        mmkd pairs preview pairs --output preview.html
    """

    folder: Path = setting(help="a folder of pairs", positional=True)
    output: Path = setting(help=".html file to write")
    split: str | None = setting(None, "train, validation or test")
    number: int = setting(60, "maximum number of pairs")
    overwrite: bool = setting(False, "replace OUTPUT")


@dataclass
class ViewsSettings:
    """Write random crops of every training image, once, as pairs that teachers and student see alike.

    Distil them with ``--crop center --positives caption``: the crops are made already, and views of one image are no
    negatives of each other.

    Example:
        mmkd pairs views pairs --output views --number 4
    """

    folder: Path = setting(help="a folder of pairs", positional=True)
    output: Path = setting(help="folder of pairs to write")
    number: int = setting(4, "crops of each training image", least=1)
    side: int = setting(256, "side of the crops [pixels]", least=1)
    crop_area: float = setting(0.5, "smallest area of a crop, as a share of the image", above=0, most=1)
    seed: int = setting(42, "seed of the crops")
    workers: int = setting(4, "threads that decode", least=1)
    shard_pairs: int = setting(10_000, "pairs per tar", least=1)
    overwrite: bool = setting(False, "replace OUTPUT")
    quiet: bool = setting(False, "no progress bar")


ACTIONS = {
    "ls": ListSettings,
    "show": ShowSettings,
    "stats": StatsSettings,
    "verify": VerifySettings,
    "preview": PreviewSettings,
    "export": ExportSettings,
    "views": ViewsSettings,
}


if __name__ == "__main__":
    check_arguments(ACTIONS)  # before the imports that take seconds

from tqdm import tqdm

from mmkd.data.folder import open_pairs, write_manifest
from mmkd.data.images import read_image_bytes
from mmkd.data.inspection import (
    count_pairs,
    faults,
    random_views,
    stored_images,
    write_parquet,
    write_preview,
    write_webdataset,
)
from mmkd.files import atomic_file, atomic_folder, atomic_write_bytes, refuse_existing

SHOWN_FAULTS = 20
SHOWN_CAPTION = 80


@singledispatch
def main(settings: Any) -> None:
    """Run the action to which these settings belong."""
    raise TypeError(f"no action has {type(settings).__name__}")


@main.register
def list_pairs(settings: ListSettings) -> None:
    """Print pairs."""
    wanted, text = settings.modality, (settings.search or "").casefold()
    found = (
        pair
        for pair in open_pairs(settings.folder, settings.split).pairs
        if (wanted is None or pair.modality == wanted) and text in pair.caption.casefold()
    )
    for pair in islice(found, settings.number):
        caption = pair.caption if len(pair.caption) <= SHOWN_CAPTION else pair.caption[: SHOWN_CAPTION - 1] + "…"
        print(f"{pair.id}  {pair.split:<10} {pair.modality:<26} {pair.width}x{pair.height}  {caption}")


@main.register
def show(settings: ShowSettings) -> None:
    """Print one pair.

    Raises:
        ValueError: no pair has this id.
    """
    folder = open_pairs(settings.folder)
    pair = next((pair for pair in folder.pairs if pair.id == settings.id), None)
    if pair is None:
        raise ValueError(f"{settings.folder} has no pair {settings.id!r}; `mmkd pairs ls` lists them")
    print(json.dumps(asdict(pair), indent=2, ensure_ascii=False))
    if settings.image:
        atomic_write_bytes(settings.image, read_image_bytes(folder.image_path(pair)))


@main.register
def stats(settings: StatsSettings) -> None:
    """Print counts."""
    counts = count_pairs(open_pairs(settings.folder, settings.split).pairs)
    if settings.json:
        print(json.dumps(counts, indent=2, ensure_ascii=False))
        return
    for name, value in counts.items():
        if isinstance(value, dict):
            print(f"\n{name}")
            print("\n".join(f"  {count:>10,}  {entry}" for entry, count in value.items()))
        else:
            print(f"{name.replace('_', ' '):<16}{value:>10,}")


@main.register
def verify(settings: VerifySettings) -> None:
    """Print what is wrong.

    Raises:
        ValueError: anything is.
    """
    folder = open_pairs(settings.folder)
    with tqdm(total=len(folder.pairs), desc="verify", unit="pair", disable=settings.quiet) as bar:
        found, originals = faults(folder, settings.workers, bar.update)
    if found:
        more = [f"and {len(found) - SHOWN_FAULTS} more"] if len(found) > SHOWN_FAULTS else []
        raise ValueError("\n       ".join([f"{len(found)} faults in {settings.folder}:", *found[:SHOWN_FAULTS], *more]))
    if not settings.quiet:
        total = len(folder.pairs)
        print(f"{settings.folder}: {total:,} images open and have their size, {originals:,} are the original files")


@main.register
def preview(settings: PreviewSettings) -> None:
    """Write the page.

    Raises:
        ValueError: the output is no ``.html`` file, or the number is below 1.
    """
    if settings.output.suffix != ".html" or settings.number < 1:
        raise ValueError(f"--output {settings.output} must end in .html, and --number {settings.number} be 1 or more")
    refuse_existing(settings.output, settings.overwrite)
    shown = write_preview(open_pairs(settings.folder, settings.split), settings.output, settings.number)
    print(f"{settings.output}: {shown} pairs")


@main.register
def export(settings: ExportSettings) -> None:
    """Export."""
    refuse_existing(settings.output, settings.overwrite)
    folder = open_pairs(settings.pairs, settings.split)
    with tqdm(total=len(folder.pairs), desc="export", unit="pair", disable=settings.quiet) as bar:
        if settings.form == "manifest":
            with atomic_file(settings.output) as file:
                write_parquet(folder, file, bar.update)
        else:
            with atomic_folder(settings.output, settings.overwrite) as output:
                for _ in write_webdataset(stored_images(folder), output, settings.shard_pairs):
                    bar.update()
    if not settings.quiet:
        print(f"{settings.output}: {len(folder.pairs):,} pairs")


@main.register
def views(settings: ViewsSettings) -> None:
    """Write the views.

    Raises:
        FileExistsError: the output is there.
        FileNotFoundError: the folder holds no pairs.
        UnreadableImageError: an image is missing or broken.
    """
    refuse_existing(settings.output, settings.overwrite)
    folder = open_pairs(settings.folder)
    crops = random_views(folder, settings.number, settings.side, settings.crop_area, settings.seed, settings.workers)
    total = sum(settings.number if pair.split == "train" else 1 for pair in folder.pairs)
    bar = partial(tqdm, total=total, desc="views", unit="pair", disable=settings.quiet)
    with atomic_folder(settings.output, settings.overwrite) as output:
        (output / "images").mkdir()
        write_manifest(output, bar(write_webdataset(crops, output / "images", settings.shard_pairs)))
    if not settings.quiet:
        print(f"{settings.output}: {total:,} pairs of {len(folder.pairs):,}")


if __name__ == "__main__":
    run(ACTIONS, main)
