"""The default data: real biomedical images that arrive with PyPI packages, cut into pairs that state facts.

scikit-image brings an immunohistochemistry field, two retina images and a quantitative phase image; nilearn the MNI152
T1, gray matter and white matter templates; pydicom a CT, an MR, two ultrasound files and a bone scan. They are cut into
tiles and slices, as ``packaged.yaml`` beside this file describes, that curation reads like any other collection.
Captions name modality, organ, plane, level and stain as the packages and file headers state them, or what was measured
in the tile: the share of brown (DAB) pixels, of color-coded flow, of bright phase. Nothing is diagnosed.

Held-out pairs are kept apart by place, not by chance:

- a flat image is cut into tiles that do not overlap, and whole columns (or rows) of tiles are held out; the frames of
  the ultrasound loop are cut at the same columns, so that no place is in the training set in one frame and in the test
  set in another;
- a volume is cut into slabs with gaps of 8 mm between them, whose slices are left out; the same slabs are held out of
  T1, gray matter and white matter, which show the same brain. The template is symmetric, so sagittal slices come from
  one side alone. Slices of different planes cross in single lines of voxels.

So few source images show that the pipeline works; they are not a clinical result.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from mmkd.curation.samples import RawSample, decode_metadata
from mmkd.data.pixel_rules import window_between, window_by_percentiles

IMPORT_NAMES = {"scikit-image": "skimage", "nilearn": "nilearn", "pydicom": "pydicom"}
ROWS, COLUMNS = ("upper", "middle", "lower"), ("left", "central", "right")
TEMPLATES = (
    "{facts}, {detail}.",
    "{facts}: {detail}.",
    "{facts}. {detail}.",
    "{detail}. {facts}.",
    "Biomedical image: {facts}, {detail}.",
)
BRAIN_FILE = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
BRAIN_LICENSE = "ICBM 152 atlas (Fonov et al. 2009), distributed with nilearn (BSD-3-Clause)"
ORIGIN_MM = (-98, -134, -72)


@dataclass(frozen=True)
class Field:
    """A flat source and how it is cut; ``packaged.yaml`` says what each attribute is."""

    name: str
    package: str
    file: str
    license: str
    modality: str
    facts: list[str]
    box: tuple[int, int, int, int]
    tile: int
    label: str = ""
    finding: str = ""
    split_by: str = "columns"
    dark: int = 16
    window: tuple[int, int] | None = None
    frames: Sequence[int] = (0,)


@cache
def description() -> dict[str, Any]:
    """The content of ``packaged.yaml``."""
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return found


def read_packaged() -> Iterator[RawSample]:
    """The packaged images as samples, each a PNG: tiles of all flat images, then slices of all volumes.

    Raises:
        ValueError: a package is not installed or lacks a file.
    """
    return chain(flat_images(), brain_slices())


def packaged_versions() -> str:
    """The installed versions of the packages that bring the images.

    Raises:
        ValueError: a package is not installed.
    """
    try:
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in IMPORT_NAMES)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f'the packaged images need {error.name}: pip install -e ".[demo]" in your clone') from error


def packaged_attribution() -> str:
    """Where every image comes from, and how held-out images are kept apart, as Markdown."""
    stated = (decode_metadata(sample.metadata) for sample in read_packaged())
    counts = Counter((*metadata.text("source").split(" ", 1), metadata.text("license")) for metadata in stated)
    lines = [
        "# Biomedical images that arrive with Python packages",
        "",
        "| package | file | images | license |",
        "|---|---|---:|---|",
    ]
    for (package, file, license), count in sorted(counts.items()):
        lines.append(f"| {package} {importlib.metadata.version(package)} | {file} | {count} | {license} |")
    lines += [
        "",
        "Flat images were cut into tiles that do not overlap, and whole columns or rows of tiles are held out. Volumes",
        "were cut into slabs with 8 mm left out between them; the same slabs are held out of all three brain maps.",
        "Slices of different planes still cross in a line of voxels.",
        "Captions state what the packages, file headers and coordinates state, or what was measured in the tile.",
        "",
    ]
    return "\n".join(lines)


def flat_images() -> Iterator[RawSample]:
    """Tiles of all flat sources.

    Raises:
        ValueError: scikit-image or pydicom is not installed.
    """
    for field in (Field(**entry) for entry in description()["flat"]):
        path = package_file(field.package, field.file)
        images = _read_dicom(field, path) if field.package == "pydicom" else [np.asarray(Image.open(path))]
        for frame, pixels in zip(field.frames, images, strict=True):
            yield from _tiles(field, frame, pixels)


def _dab(tile: np.ndarray) -> tuple[str, str]:
    """Brown is where red exceeds blue by more than 30 grey levels."""
    brown = float((tile[..., 0].astype(int) - tile[..., 2] > 30).mean())
    answer = "positive" if brown >= 0.5 else "negative"
    return f"mostly DAB-{answer} immunohistochemistry", f"brown DAB reaction on {100 * brown:.0f} % of the area"


def _flow(tile: np.ndarray) -> tuple[str, str]:
    """Color-coded flow is where red exceeds blue by more than 60 grey levels."""
    flow = float((tile[..., 0].astype(int) - tile[..., 2] > 60).mean())
    return "power Doppler ultrasound of a lymph node", "color-coded flow" if flow > 0.02 else "gray-scale tissue"


def _phase(tile: np.ndarray) -> tuple[str, str]:
    """The cell has a phase far above the background's."""
    bright = float((tile > 150).mean())
    return "quantitative phase image", "part of the cell" if bright > 0.05 else "background around the cell"


FINDINGS = {"dab": _dab, "flow": _flow, "phase": _phase}  # from a tile to its label, and a phrase about it


def _read_dicom(field: Field, path: Path) -> list[np.ndarray]:
    """The frames as (height, width) or (height, width, 3) uint8, deep ones in the window or by percentiles."""
    import pydicom

    dataset = pydicom.dcmread(path)
    pixels = dataset.pixel_array
    if pixels.dtype == np.uint8:
        return [pixels[frame] for frame in field.frames] if pixels.ndim == 4 else [pixels]
    values = pixels * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))
    if field.window is None:
        return [window_by_percentiles(values)]
    center, width = field.window
    return [window_between(values, center - width / 2, center + width / 2)]


def _tiles(field: Field, frame: int, pixels: np.ndarray) -> Iterator[RawSample]:
    """The tiles of one image, dark ones left out."""
    left, top, right, bottom = field.box
    columns, rows = (right - left) // field.tile, (bottom - top) // field.tile
    for row in range(rows):
        for column in range(columns):
            y, x = top + row * field.tile, left + column * field.tile
            tile = pixels[y : y + field.tile, x : x + field.tile]
            if (tile.reshape(field.tile, field.tile, -1).max(axis=2) < field.dark).mean() > 0.5:
                continue
            run = _run(column, columns) if field.split_by == "columns" else _run(row, rows)
            place = f"{ROWS[3 * row // rows]} {COLUMNS[3 * column // columns]} part of the image"
            label, finding = FINDINGS[field.finding](tile) if field.finding else (field.label, "")
            yield packaged_sample(
                name=f"{field.name}-{frame:02d}-{row:02d}-{column:02d}",
                pixels=np.ascontiguousarray(tile),
                modality=field.modality,
                label=label,
                facts=field.facts,
                details=(f"{finding}, {place}", f"{place}, {finding}") if finding else (place, f"detail, {place}"),
                group=f"{Path(field.file).stem} {field.split_by} {run}",
                split=run,
                package=field.package,
                file=field.file,
                license=field.license,
            )


def _run(position: int, count: int) -> str:
    """Which split a column or row of tiles belongs to: the first ones train, then validation, the last ones test."""
    test, validation = max(1, round(0.25 * count)), max(1, round(0.15 * count))
    if position >= count - test:
        return "test"
    return "validation" if position >= count - test - validation else "train"


def brain_slices() -> Iterator[RawSample]:
    """Slices of the MNI152 templates of nilearn, all maps and planes.

    Coordinates are millimetres of MNI space, whose origin is the anterior commissure: +x right, +y anterior, +z
    superior.

    Raises:
        ValueError: nilearn is not installed.
    """
    for map_name in description()["maps"]:
        path = package_file("nilearn", BRAIN_FILE.format(map_name))
        import nibabel  # comes with nilearn

        volume = np.asarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]  # (197, 233, 189) uint8, 1 mm
        for plane in description()["planes"]:
            for slab, (split, first, last) in enumerate(plane["slabs"]):
                for position in range(first, last + 1, plane["step"]):
                    pixels = np.moveaxis(volume, plane["axis"], 0)[position - ORIGIN_MM[plane["axis"]]]
                    group = f"mni152 {plane['name']} slab {slab}"
                    yield _slice(map_name, plane, position, np.ascontiguousarray(pixels.T[::-1]), group, split)


def _slice(
    map_name: str, plane: dict[str, Any], position: int, pixels: np.ndarray, group: str, split: str
) -> RawSample:
    name, letter = plane["name"], plane["letter"]
    short, long, template = description()["maps"][map_name]
    low, high = plane["extent"]
    third = plane["thirds"][min(2, int(3 * (position - low) / (high - low)))]
    where = f"{abs(position)} mm {plane['sides'][position > 0]}" if position else "at"
    level = f"{letter} = {position:+d} mm" if position else f"{letter} = 0 mm"
    return packaged_sample(
        name=f"mni152-{map_name}-{name}-{position:+04d}",
        pixels=pixels,
        modality="MRI",
        label=f"{name} {short}",
        facts=(
            f"{name.capitalize()} {short}",
            f"{long[0].upper()}{long[1:]}, {name} plane",
            f"{name.capitalize()} slice of the {template}",
        ),
        details=(
            f"{third} third of the brain, {level}",
            f"a slice {where} the anterior commissure, {third} third",
            f"the brain at {level} in MNI space",
        ),
        group=group,
        split=split,
        package="nilearn",
        file=BRAIN_FILE.format(map_name),
        license=BRAIN_LICENSE,
    )


def packaged_sample(
    name: str,
    pixels: np.ndarray,
    modality: str,
    label: str,
    facts: Sequence[str],
    details: Sequence[str],
    group: str,
    split: str,
    package: str,
    file: str,
    license: str,
) -> RawSample:
    """One image of the default data; its caption has one of the facts and one of the details, selected by its name.

    Args:
        name: file name without suffix.
        pixels: (height, width) or (height, width, 3) uint8.
        modality: of the source.
        label: class name.
        facts: ways to say what the source is.
        details: ways to say what sets this image apart.
        group: tiles or slices that are on one side of the split together.
        split: train, validation or test.
        package: distribution that brings the source.
        file: of the source, within the package.
        license: of the source, as the package states it.
    """
    digest = hashlib.sha256(name.encode()).digest()
    template = TEMPLATES[digest[0] % len(TEMPLATES)]
    fact, detail = facts[digest[1] % len(facts)], details[digest[2] % len(details)]
    if template.startswith("{detail}") or "{facts}. {detail}" in template:
        detail = detail[0].upper() + detail[1:]
    metadata = {"modality": modality, "label": label, "group": group, "split": split, "license": license}
    metadata |= {"source": f"{package} {file}"}
    key = f"images/{name}.png"
    return RawSample(key, key, template.format(facts=fact, detail=detail), metadata, partial(_png, pixels), "png")


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def package_file(package: str, file: str) -> Path:
    """Path of a file that a package brings; the package itself is not imported.

    Raises:
        ValueError: the package is not installed, or this version of it lacks the file.
    """
    spec = importlib.util.find_spec(IMPORT_NAMES[package])
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    problem = f"this version of {package} has no {file}" if spec else f"{package} is not installed"
    raise ValueError(f'the packaged images need {package}, but {problem}: pip install -e ".[demo]" in your clone')
