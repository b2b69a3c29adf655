"""Features: look at stores, check every byte, merge them, and go to and from the authors' folder form.

    mmkd features ls features
    mmkd features verify features
    mmkd features merge one/features,other/features --output features
    mmkd features export features --pairs screened --output MMKDCLIP_DATA
    mmkd features import MMKDCLIP_DATA --output features

``merge`` brings stores of the same teachers together and packs small shards into full ones; ``export`` writes one
``clips_output.pt`` a pair, which the authors' code reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmkd.command.settings import run, setting
from mmkd.data.features.folders import describe_store, export_published, faults, import_published, merge, unfinished
from mmkd.data.features.lookup import TeacherFeatures, store_paths
from mmkd.data.features.published import FeatureKind
from mmkd.data.features.shards import FeatureType
from mmkd.data.features.store import FeatureStore
from mmkd.data.folder import open_pairs
from mmkd.files import atomic_folder, refuse_existing


@dataclass
class ListSettings:
    """List the stores of a folder."""

    folder: Path = setting(help="a store, or a folder of stores", positional=True)


@dataclass
class VerifySettings:
    """Read every byte of the stores of a folder and compare with the checksums."""

    folder: Path = setting(help="a store, or a folder of stores", positional=True)
    quiet: bool = setting(False, "no progress bar")


@dataclass
class MergeSettings:
    """Bring stores of the same teachers together, each in full shards; a pair that several hold is taken once."""

    folders: list[Path] = setting(help="stores or folders of stores, with commas between", positional=True)
    output: Path = setting(help="folder to write: one store for each teacher")
    overwrite: bool = setting(False, "replace OUTPUT")
    quiet: bool = setting(False, "say nothing")


@dataclass
class ExportSettings:
    """Write pairs and features in the authors' folder form."""

    folder: Path = setting(help="folder of stores with raw features", positional=True)
    pairs: Path = setting(help="folder of pairs; screened ones say which teachers are available")
    output: Path = setting(help="folder to write")
    aligned: Path | None = setting(None, "folder of aligned stores, for clips_project_output.pt")
    images: bool = setting(True, "copy images, so that the folder stands alone")
    overwrite: bool = setting(False, "replace OUTPUT")
    quiet: bool = setting(False, "no progress bar")


@dataclass
class ImportSettings:
    """Turn the authors' folder into one store for each teacher."""

    folder: Path = setting(help="the authors' folder, with meta.jsonl", positional=True)
    output: Path = setting(help="folder to write: one store for each teacher")
    kind: FeatureKind = setting("raw", "raw = clips_output.pt | aligned = clips_project_output.pt")
    dtype: FeatureType = setting("float16", "how numbers are stored")
    overwrite: bool = setting(False, "replace OUTPUT")
    quiet: bool = setting(False, "no progress bar")


ACTIONS = {
    "ls": ListSettings,
    "verify": VerifySettings,
    "merge": MergeSettings,
    "export": ExportSettings,
    "import": ImportSettings,
}


@singledispatch
def main(settings: Any) -> None:
    """Run the action to which these settings belong."""
    raise TypeError(f"no action has {type(settings).__name__}")


@main.register
def list_stores(settings: ListSettings) -> None:
    """Print a line for each store."""
    rows = [describe_store(path) for path in stores_in(settings.folder)]
    wide = max([15, *(len(row["teacher"]) for row in rows)]) + 1
    print(f"{'teacher':<{wide}}{'pairs':>12}{'dim':>6} {'dtype':<10}{'shards':>7}{'GB':>9}  {'license':<14}weights")
    for row in rows:
        size = f"{row['bytes'] / 1e9:.3f}"
        print(
            f"{row['teacher']:<{wide}}{row['pairs']:>12,}{row['dim']:>6} {row['dtype']:<10}{row['shards']:>7}"
            f"{size:>9}  {row['license']:<14}{row['weights']} {row['fingerprint'][:12]}"
        )
    for name, count in unfinished(settings.folder).items():
        print(f"{name:<{wide}}unfinished: {count} shards are there; the same `mmkd extract` goes on")


@main.register
def verify(settings: VerifySettings) -> None:
    """Print what is wrong.

    Raises:
        ValueError: anything is.
    """
    found: list[str] = []
    for path in stores_in(settings.folder):
        with tqdm(desc=path.name, unit="pair", disable=settings.quiet) as bar:
            found += faults(path, bar.update)
    if found:
        raise ValueError("\n       ".join([f"{len(found)} faults; remove what is damaged and extract again:", *found]))
    if not settings.quiet:
        print(f"{settings.folder}: every byte is as it was written")


@main.register
def merge_stores(settings: MergeSettings) -> None:
    """Merge."""
    refuse_existing(settings.output, settings.overwrite)
    with atomic_folder(settings.output, settings.overwrite) as output:
        counts = merge(settings.folders, output)
    tell(counts, settings.output, settings.quiet)


@main.register
def export(settings: ExportSettings) -> None:
    """Export."""
    refuse_existing(settings.output, settings.overwrite)
    pairs, raw = open_pairs(settings.pairs), TeacherFeatures.open(settings.folder)
    aligned = None if settings.aligned is None else TeacherFeatures.open(settings.aligned, kind="aligned")
    with (
        tqdm(total=len(pairs.pairs), desc="export", unit="pair", disable=settings.quiet) as bar,
        atomic_folder(settings.output, settings.overwrite) as output,
    ):
        written, left_out = export_published(pairs, output, raw, aligned, settings.images, bar.update)
        if not written:
            raise ValueError(f"{settings.folder} has features for no pair of {settings.pairs}; nothing to export")
    if not settings.quiet:
        print(f"{settings.output}: {written} pairs; {left_out} left out, no teacher has them")


@main.register
def import_folder(settings: ImportSettings) -> None:
    """Import."""
    refuse_existing(settings.output, settings.overwrite)
    with (
        tqdm(desc="import", unit="pair", disable=settings.quiet) as bar,
        atomic_folder(settings.output, settings.overwrite) as output,
    ):
        counts = import_published(settings.folder, output, settings.kind, settings.dtype, bar.update)
    tell(counts, settings.output, settings.quiet)


def stores_in(folder: Path) -> list[Path]:
    """The finished stores of a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = store_paths(folder)
    if not paths and not (folder.is_dir() and unfinished(folder)):
        raise FileNotFoundError(f"{folder} holds no feature store; make one with `mmkd extract`")
    return paths


def tell(counts: dict[str, int], output: Path, quiet: bool) -> None:
    """Print the pairs of each teacher."""
    for name, count in counts.items():
        if not quiet:
            print(f"{output / name}: {count:,} pairs, {FeatureStore(output / name).dim} wide")


if __name__ == "__main__":
    run(ACTIONS, main)
