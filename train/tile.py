"""Cut whole slides into tiles and encode them: one HDF5 file per slide, for survival and diagnosis in `mmkd eval`.

Tissue is found on a thumbnail; its tiles are read at the requested resolution and encoded in batches.
``OUTPUT/ENCODER/SLIDE.h5`` holds ``features`` (before the projection, or the joint vectors where the encoder has no
projection), ``proj`` (the joint space, unit length) and ``coords``. Files are written atomically; run the
same command again to resume. Slides that cannot be read are listed in ``skipped.json``. ``--preview`` draws the tiles
on thumbnails instead, to try a resolution and a share of tissue before anything is encoded.
"""

from __future__ import annotations

import importlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmkd.command.settings import check_arguments, run, setting


@dataclass
class TileSettings:
    """Cut slides into tiles and keep an encoder's features of them.

    Example:
        mmkd tile --slides slides --encoder biomedclip --output bags
    """

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
    batch_size: int = setting(64, "tiles per batch of the encoder")
    workers: int = setting(4, "threads that read tiles")
    device: str = setting("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    quiet: bool = setting(False, "no progress bar")


if __name__ == "__main__":
    check_arguments(TileSettings)  # before the imports that take seconds

import numpy as np
import torch
from tqdm import tqdm

from mmkd.data.images import encode
from mmkd.distributed import chosen_device
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.zoo import load_encoder
from mmkd.evaluation.embeddings.encoders import encoder_fingerprint, named_sources
from mmkd.evaluation.slides.bags import slide_name
from mmkd.evaluation.slides.tiles import PLAIN, PYRAMIDS, Slide, Tiling, drawn_tiles
from mmkd.files import atomic_write_bytes, write_json

SKIPPED_FILE = "skipped.json"
ARRAYS = ("features", "proj", "coords")


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
    folder = settings.output / "preview"
    made_of: dict[str, Any] | None = None
    if not settings.preview:
        name, source = next(iter(named_sources([settings.encoder]).items()))
        encoder = load_encoder(source, chosen_device(settings.device))
        encoder.batch_size = settings.batch_size
        folder, made_of = settings.output / name, recipe(settings, encoder, source, name)
    skipped: dict[str, str] = {}
    tiles = 0
    for slide, path in tqdm(files.items(), desc=folder.name, unit="slide", disable=settings.quiet):
        target = folder / f"{slide}.{'png' if made_of is None else 'h5'}"
        if made_of is not None and is_made(target, made_of):
            continue
        try:
            with Slide(path) as opened_slide:
                corners = tiling(settings).corners(opened_slide)
                if made_of is None:
                    side = tiling(settings).side(opened_slide)
                    content = encode(drawn_tiles(opened_slide, corners, side), None)[1]
                else:
                    content = packed(bag(opened_slide, corners, encoder, settings), made_of)
        except (ValueError, OSError) as error:
            skipped[slide] = str(error)
            continue
        atomic_write_bytes(target, content)
        tiles += len(corners)
    write_json(folder / SKIPPED_FILE, skipped)
    if len(skipped) == len(files):
        raise ValueError(f"none of {len(files)} slides could be used; the first: {next(iter(skipped.values()))}")
    if not settings.quiet:
        print(f"{folder}: {len(files) - len(skipped)} of {len(files)} slides, {tiles} new tiles")
        for slide, reason in skipped.items():
            print(f"  {slide}: {reason}")


def check(settings: TileSettings) -> None:
    """Raise on invalid settings before anything is loaded."""
    if not settings.slides.is_dir():
        raise FileNotFoundError(f"--slides {settings.slides} is not a folder")
    if not settings.encoder and not settings.preview:
        raise ValueError("give --encoder, whose features are kept, or --preview true")
    if min(settings.batch_size, settings.workers) < 1:
        raise ValueError("--batch_size and --workers must be at least 1")
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


def is_made(path: Path, made_of: dict[str, Any]) -> bool:
    """Whether a bag exists; one that is damaged is written again.

    Raises:
        ValueError: it was made with other settings.
    """
    import h5py

    if not path.is_file():
        return False
    try:
        with h5py.File(path, "r") as file:
            own = dict(json.loads(file.attrs.get("made_of", "{}")))
            for name in ARRAYS:
                file[name][:]  # compares the checksum of every chunk
    except Exception:  # of damaged files, h5py raises anything from OSError to SystemError
        return False
    differing = [key for key in made_of if own.get(key) != made_of[key]]
    if differing:
        changes = ", ".join(f"{key} {own.get(key)!r} there, {made_of[key]!r} now" for key in differing)
        raise ValueError(f"{path} was made with other settings ({changes}); choose another --output")
    return True


def bag(slide: Slide, corners: np.ndarray, encoder: DualEncoder, settings: TileSettings) -> dict[str, np.ndarray]:
    """Features, joint vectors and coordinates of a slide's tiles.

    Raises:
        ValueError: a tile cannot be read.
    """
    joint: list[torch.Tensor] = []
    pooled: list[torch.Tensor] = []
    for images in tiling(settings).batches(slide, corners, settings.batch_size, settings.workers):
        vectors, before = encoder.encode_images_and_pooled(images)
        joint.append(vectors)
        pooled.append(vectors if before is None else before)
    kind = np.dtype(settings.dtype)
    arrays = {"features": torch.cat(pooled).numpy().astype(kind), "proj": torch.cat(joint).numpy().astype(kind)}
    return {**arrays, "coords": corners}


def packed(arrays: dict[str, np.ndarray], made_of: dict[str, Any]) -> bytes:
    """The bytes of an HDF5 file."""
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, fletcher32=True)
        file.attrs["encoder"] = made_of["encoder"]
        file.attrs["made_of"] = json.dumps(made_of, sort_keys=True)
    return buffer.getvalue()


def held(settings: TileSettings) -> list[Path]:
    """The folder of this run; bags of other encoders may be written meanwhile."""
    return [settings.output / ("preview" if settings.preview else next(iter(named_sources([settings.encoder]))))]


if __name__ == "__main__":
    run(TileSettings, main, held)
