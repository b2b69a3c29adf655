"""Cut whole slides into tiles and encode them: one HDF5 file per slide, for survival and diagnosis in `mmkd eval`.

Tissue is found on a thumbnail; its tiles are read at the requested resolution and encoded in batches.
``OUTPUT/ENCODER/SLIDE.h5`` holds ``features`` (before the projection, or the joint vectors where the encoder has no
projection), ``proj`` (the joint space, unit length) and ``coords``. Files are written atomically; run the
same command again to resume. Tasks of any executor share the slides; those that cannot be read are listed in
``skipped.json``. ``--preview`` draws the tiles
on thumbnails instead, to try a resolution and a share of tissue before anything is encoded.
"""

from __future__ import annotations

import importlib
import uuid
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from mmkd.command.settings import check_arguments, run, setting
from mmkd.command.tasks import TaskSettings


@dataclass(kw_only=True)
class TileSettings(TaskSettings):
    """Cut slides into tiles and keep an encoder's features of them.

    Example:
        mmkd tile --slides slides --encoder biomedclip --output bags
    """

    GROUPS: ClassVar[dict[str, str]] = {"computing": "batch_size threads device quiet"}

    slides: Path = setting(help="folder of slides, searched recursively")
    encoder: str = setting("", "a teacher's name, a folder or a Hub id; NAME=SOURCE sets the name for `mmkd eval`")
    preview: bool = setting(False, "draw the tiles on thumbnails, OUTPUT/preview/SLIDE.png, and encode nothing")
    output: Path = setting(Path("bags"), "folder that gets ENCODER/SLIDE.h5; existing bags are kept")
    mpp: float = setting(0.5, "resolution of a tile [micrometres per pixel]; 0.5 is 20x")
    slide_mpp: float | None = setting(None, "resolution of slides that do not state it [micrometres per pixel]")
    level: int | None = setting(None, "cut at this pyramid level, whatever its resolution")
    size: int = setting(256, "side of a tile [pixels]")
    tissue: float = setting(0.25, "smallest share of tissue in a tile")
    dtype: Literal["float16", "float32"] = setting("float16", "stored number format")
    batch_size: int = setting(64, "tiles per batch of the encoder", least=1)
    threads: int = setting(4, "threads that read tiles", least=1)
    device: str = setting("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one, another for each process")
    quiet: bool = setting(False, "no progress bar")


if __name__ == "__main__":
    check_arguments(TileSettings)  # before the imports that take seconds

from tqdm import tqdm

from mmkd.command.tasks import run_tasks
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.zoo import load_encoder
from mmkd.evaluation.embeddings.encoders import encoder_fingerprint, named_sources
from mmkd.evaluation.slides.bags import slide_name
from mmkd.evaluation.slides.tiles import PLAIN, PYRAMIDS, SlideWriter, Tiling, write_slides
from mmkd.files import remove, write_json

SKIPPED_FILE = "skipped.json"


def main(settings: TileSettings) -> None:
    """Make the bags that are missing.

    Raises:
        FileNotFoundError: the folder of slides or the encoder's weights do not exist.
        ModuleNotFoundError: a package of the extra ``slides`` is not installed.
        ValueError: invalid settings, no slides, two slides of one name, bags made with other settings, or no slide
            can be read.
    """
    for package in ("h5py", "openslide", "skimage"):  # a missing package is reported before anything is encoded
        importlib.import_module(package)

    check(settings)
    files = slide_files(settings.slides)
    sizes = tiling(settings), settings.batch_size, settings.threads
    if settings.preview:
        writer, opened = SlideWriter(settings.output / "preview", *sizes), None
        remove(writer.folder)
    else:
        name, source = next(iter(named_sources([settings.encoder]).items()))
        encoder = load_encoder(source, settings.device if settings.is_here else "cpu")
        writer = SlideWriter(settings.output / name, *sizes, recipe(settings, encoder, source, name))
        opened = (lambda: encoder) if settings.is_here else partial(load_encoder, source, settings.device)
    run_tasks(
        partial(write_slides, uuid.uuid4().hex, writer, opened),
        files.items(),
        lambda item: writer.has(item[0]),
        settings,
        writer.folder,
        partial(tqdm, desc=writer.folder.name, unit="slide", disable=settings.quiet),
    )
    skipped = writer.skipped()
    write_json(writer.folder / SKIPPED_FILE, skipped)
    if len(skipped) == len(files):
        raise ValueError(f"none of {len(files)} slides could be used; the first: {next(iter(skipped.values()))}")
    if not settings.quiet:
        print(f"{writer.folder}: {len(files) - len(skipped)} of {len(files)} slides")
        for slide, reason in skipped.items():
            print(f"  {slide}: {reason}")


def check(settings: TileSettings) -> None:
    """Raise on invalid settings before anything is loaded."""
    if not settings.slides.is_dir():
        raise FileNotFoundError(f"--slides {settings.slides} is not a folder")
    if not settings.encoder and not settings.preview:
        raise ValueError("give --encoder, whose features are kept, or --preview true")
    settings.check_tasks()
    tiling(settings)


def tiling(settings: TileSettings) -> Tiling:
    """How slides are cut."""
    return Tiling(settings.size, settings.mpp, settings.slide_mpp, settings.level, settings.tissue)


def slide_files(folder: Path) -> dict[str, Path]:
    """Slides of a folder by name.

    Raises:
        ValueError: there is none, or two have one name.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (*PYRAMIDS, *PLAIN) and path.is_file():
            name = slide_name(path.name)
            if name in found:
                raise ValueError(f"{found[name]} and {path} would both become {name}.h5; rename one")
            found[name] = path
    if not found:
        raise ValueError(f"{folder} holds no slides; supported: {' '.join((*PYRAMIDS, *PLAIN))}")
    return found


def recipe(settings: TileSettings, encoder: DualEncoder, source: str, name: str) -> dict[str, Any]:
    """The settings a bag depends on; stored in its attributes."""
    resolution = f"level {settings.level}" if settings.level is not None else f"{settings.mpp:g} um/pixel"
    return {
        "encoder": name,
        "fingerprint": encoder_fingerprint(encoder, source),
        "resolution": resolution,
        "size": settings.size,
        "tissue": settings.tissue,
        "dtype": settings.dtype,
    }


def held(settings: TileSettings) -> list[Path]:
    """The folder of this run; bags of other encoders may be written meanwhile."""
    return [settings.output / ("preview" if settings.preview else next(iter(named_sources([settings.encoder]))))]


if __name__ == "__main__":
    run(TileSettings, main, held)
