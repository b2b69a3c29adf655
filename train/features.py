"""Features: list feature stores, verify their checksums, merge them, and convert from and to the authors' folder.

``merge`` packs small shards into full ones; ``export`` writes one ``clips_output.pt`` a pair, which the authors' code
reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any

from mmkd.command.settings import check_arguments, run, setting
from mmkd.data.features import FeatureKind, FeatureType


@dataclass
class ListSettings:
    """List the feature stores of a folder.

    Example:
        mmkd features ls features
    """

    folder: Path = setting(help="a feature store, or a folder of them", positional=True)


@dataclass
class VerifySettings:
    """Compare all checksums of the feature stores of a folder.

    Example:
        mmkd features verify features
    """

    folder: Path = setting(help="a feature store, or a folder of them", positional=True)
    quiet: bool = setting(False, "no progress bar")


@dataclass
class MergeSettings:
    """Merge feature stores of the same teachers, each into full shards; a pair that several hold is taken once.

    Example:
        mmkd features merge one/features,other/features --output features
    """

    folders: list[Path] = setting(help="feature stores or folders of them, separated by commas", positional=True)
    output: Path = setting(help="folder to write: one feature store for each teacher")
    overwrite: bool = setting(False, "replace OUTPUT")
    quiet: bool = setting(False, "print nothing")


@dataclass
class ExportSettings:
    """Write pairs and features in the authors' folder form.

    Example:
        mmkd features export features --pairs screened --output MMKDCLIP_DATA
    """

    folder: Path = setting(help="folder of feature stores with raw features", positional=True)
    pairs: Path = setting(help="folder of pairs; screened ones list the available teachers")
    output: Path = setting(help="folder to write")
    aligned: Path | None = setting(None, "folder of aligned features, for clips_project_output.pt")
    images: bool = setting(True, "copy the images into the folder")
    overwrite: bool = setting(False, "replace OUTPUT")
    quiet: bool = setting(False, "no progress bar")


@dataclass
class ImportSettings:
    """Convert the authors' folder into one feature store for each teacher.

    Example:
        mmkd features import MMKDCLIP_DATA --output features
    """

    folder: Path = setting(help="the authors' folder, with meta.jsonl", positional=True)
    output: Path = setting(help="folder to write: one feature store for each teacher")
    kind: FeatureKind = setting("raw", "raw from clips_output.pt, or aligned from clips_project_output.pt")
    dtype: FeatureType = setting("float16", "stored number format")
    overwrite: bool = setting(False, "replace OUTPUT")
    quiet: bool = setting(False, "no progress bar")


ACTIONS = {
    "ls": ListSettings,
    "verify": VerifySettings,
    "merge": MergeSettings,
    "export": ExportSettings,
    "import": ImportSettings,
}


if __name__ == "__main__":
    check_arguments(ACTIONS)  # before the imports that take seconds

from tqdm import tqdm

from mmkd.data.features.conversion import Lookup, export_published, import_published
from mmkd.data.features.lookup import TeacherFeatures
from mmkd.data.features.store import FeatureStore, faults, store_paths, unfinished
from mmkd.data.features.writer import merge
from mmkd.data.folder import open_pairs
from mmkd.files import atomic_folder, refuse_existing


@singledispatch
def main(settings: Any) -> None:
    """Run the action to which these settings belong."""
    raise TypeError(f"no action has {type(settings).__name__}")


@main.register
def list_stores(settings: ListSettings) -> None:
    """Print a line for each feature store."""
    stores = [FeatureStore(path) for path in stores_in(settings.folder)]
    wide = max([15, *(len(store.name) for store in stores)]) + 1
    print(f"{'teacher':<{wide}}{'pairs':>12}{'dim':>6} {'dtype':<10}{'shards':>7}{'GB':>9}  {'license':<14}weights")
    for store in stores:
        files = [*store.files, store.path / store.meta["ids"]["file"]]
        size = f"{sum(file.stat().st_size for file in files) / 1e9:.3f}"
        license, weights, made = (store.provenance.get(key, "") for key in ("license", "weights", "fingerprint"))
        print(
            f"{store.name:<{wide}}{len(store):>12,}{store.dim:>6} {store.dtype:<10}{len(store.files):>7}"
            f"{size:>9}  {license:<14}{weights} {made[:12]}"
        )
    for name, count in unfinished(settings.folder).items():
        print(f"{name:<{wide}}unfinished: {count} shards are there; run the same `mmkd extract` again to resume")


@main.register
def verify(settings: VerifySettings) -> None:
    """Print that all checksums match.

    Raises:
        ValueError: a file is missing or damaged, or does not belong to its store; the message lists all of them.
    """
    found: list[str] = []
    for path in stores_in(settings.folder):
        with tqdm(desc=path.name, unit="pair", disable=settings.quiet) as bar:
            found += map(str, faults(path, every_byte=True, progress=bar.update))
    if found:
        raise ValueError(
            "\n       ".join([f"{len(found)} faults; remove the damaged files and extract again:", *found])
        )
    if not settings.quiet:
        print(f"{settings.folder}: checksums match")


@main.register
def merge_stores(settings: MergeSettings) -> None:
    """Merge feature stores."""
    refuse_existing(settings.output, settings.overwrite)
    with atomic_folder(settings.output, settings.overwrite) as output:
        counts = merge(settings.folders, output)
    print_counts(counts, settings.output, settings.quiet)


@main.register
def export(settings: ExportSettings) -> None:
    """Write the authors' folder."""
    refuse_existing(settings.output, settings.overwrite)
    pairs = open_pairs(settings.pairs)
    features: dict[FeatureKind, Lookup] = {"raw": TeacherFeatures.open(settings.folder).lookup}
    if settings.aligned is not None:
        features["aligned"] = TeacherFeatures.open(settings.aligned, kind="aligned").lookup
    with (
        tqdm(total=len(pairs.pairs), desc="export", unit="pair", disable=settings.quiet) as bar,
        atomic_folder(settings.output, settings.overwrite) as output,
    ):
        written, left_out = export_published(pairs, output, features, settings.images, bar.update)
        if not written:
            raise ValueError(f"{settings.folder} has features for no pair of {settings.pairs}; nothing to export")
    if not settings.quiet:
        print(f"{settings.output}: {written} pairs; {left_out} left out because no teacher has features of them")


@main.register
def import_folder(settings: ImportSettings) -> None:
    """Read the authors' folder."""
    refuse_existing(settings.output, settings.overwrite)
    with (
        tqdm(desc="import", unit="pair", disable=settings.quiet) as bar,
        atomic_folder(settings.output, settings.overwrite) as output,
    ):
        counts = import_published(settings.folder, output, settings.kind, settings.dtype, bar.update)
    print_counts(counts, settings.output, settings.quiet)


def stores_in(folder: Path) -> list[Path]:
    """The finished feature stores of a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = store_paths(folder)
    if not paths and not (folder.is_dir() and unfinished(folder)):
        raise FileNotFoundError(f"{folder} holds no feature store; make one with `mmkd extract`")
    return paths


def print_counts(counts: dict[str, int], output: Path, quiet: bool) -> None:
    """Print the pairs of each teacher."""
    for name, count in counts.items():
        if not quiet:
            print(f"{output / name}: {count:,} pairs, {FeatureStore(output / name).dim} wide")


if __name__ == "__main__":
    run(ACTIONS, main)
