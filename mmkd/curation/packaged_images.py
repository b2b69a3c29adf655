"""Tiles of flat images that arrive with scikit-image and pydicom; see `mmkd.curation.packaged`.

Boxes leave out margins, scales and burned-in text. What a caption says of a single tile is where it lies and what was
measured in it: the share of brown (DAB) pixels, of color-coded flow, of bright phase.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmkd.curation.samples import RawSample
from mmkd.data.pixel_rules import window_between, window_by_percentiles

ROWS, COLUMNS = ("upper", "middle", "lower"), ("left", "central", "right")
PYDICOM = "pydicom test file (MIT package)"
Finding = Callable[[np.ndarray], tuple[str, str]]


def flat_images() -> Iterator[RawSample]:
    """Tiles of all flat sources.

    Raises:
        ValueError: scikit-image or pydicom is not installed.
    """
    for field in FIELDS:
        path = package_file(field.package, field.file)
        images = _read_dicom(field, path) if field.package == "pydicom" else [np.asarray(Image.open(path))]
        for frame, pixels in zip(field.frames, images, strict=True):
            yield from _tiles(field, frame, pixels)


@dataclass(frozen=True)
class Field:
    """A flat source and how it is cut.

    Attributes:
        name: for files and groups.
        finding: what a tile shows: its label, and a phrase about what was measured in it, which may be empty.
        box: left, top, right and bottom in pixels of the part that is cut.
        tile: side of a tile in pixels.
        split_by: whether columns or rows of tiles are held out.
        dark: tiles of which more than half is below this grey level are left out.
        window: CT display window, center and width in Hounsfield units.
        frames: which frames of a loop.
    """

    name: str
    package: str
    file: str
    license: str
    modality: str
    facts: tuple[str, ...]
    finding: Finding
    box: tuple[int, int, int, int]
    tile: int
    split_by: str = "columns"
    dark: int = 16
    window: tuple[int, int] | None = None
    frames: tuple[int, ...] = (0,)


def _always(label: str) -> Finding:
    return lambda tile: (label, "")


def _dab(tile: np.ndarray) -> tuple[str, str]:
    """Brown is where red exceeds blue by more than 30 grey levels."""
    brown = float((tile[..., 0].astype(int) - tile[..., 2] > 30).mean())
    answer = "positive" if brown >= 0.5 else "negative"
    return f"mostly DAB-{answer} immunohistochemistry", f"brown DAB reaction on {100 * brown:.0f} % of the area"


def _flow(tile: np.ndarray) -> tuple[str, str]:
    """Color-coded flow is where red exceeds blue by more than 60 grey levels."""
    flow = float((tile[..., 0].astype(int) - tile[..., 2] > 60).mean())
    return (
        "power Doppler ultrasound of a lymph node",
        "color-coded flow" if flow > 0.02 else "gray-scale tissue",
    )


def _phase(tile: np.ndarray) -> tuple[str, str]:
    """The cell has a phase far above the background's."""
    bright = float((tile > 150).mean())
    return "quantitative phase image", "part of the cell" if bright > 0.05 else "background around the cell"


FIELDS = (
    Field(
        "ihc", "scikit-image", "data/ihc.png", "no known copyright restrictions (CMMI)", "immunohistochemistry",
        ("Immunohistochemistry of colonic glands, FHL2 revealed with DAB, hematoxylin counterstain",
         "Light microscopy of the colon, immunohistochemical stain for FHL2 with DAB and hematoxylin",
         "Colonic tissue stained for FHL2 protein (DAB, brown) and counterstained with hematoxylin (blue)"),
        _dab, (0, 0, 512, 512), 64,
    ),
    Field(
        "fundus", "scikit-image", "data/retina.jpg", "CC0 1.0 (Mikael Häggström)", "fundus photography",
        ("Color fundus photograph of a normal left eye", "Normal human retina, color fundus photography",
         "Retinal photograph, color, normal left eye"),
        _always("color fundus photograph"), (0, 0, 1408, 1408), 176,
    ),
    Field(
        "microaneurysms", "scikit-image", "data/microaneurysms.png", "CC0 (Andreas Maier, HRF)", "fundus photography",
        ("Green channel of a fundus photograph, from a detail with microaneurysms",
         "Gray-level detail of a retina (green channel), from a region with microaneurysms"),
        _always("green-channel fundus detail"), (0, 0, 102, 102), 34,
    ),
    Field(
        "cell", "scikit-image", "data/cell.png", "CC0 (Paul Müller)", "quantitative phase microscopy",
        ("Quantitative phase image of a cell floating in saline", "Digital hologram of a cell, quantitative phase",
         "Phase microscopy of a cell in saline"),
        _phase, (0, 0, 550, 660), 110, split_by="rows",
    ),
    *(
        Field(
            f"ct-head-{name}", "pydicom", "data/test_files/J2K_pixelrep_mismatch.dcm", PYDICOM, "CT",
            (f"Axial CT of the head, {name} window", f"Computed tomography of the head, axial slice, {name} window",
             f"Head CT, 5 mm axial slice shown in a {name} window"),
            _always("axial CT of the head"), (112, 40, 416, 420), 76, window=window,
        )
        for name, window in (("soft tissue", (40, 100)), ("bone", (500, 2000)))
    ),
    Field(
        "mr-abdomen", "pydicom", "data/test_files/examples_overlay.dcm", PYDICOM, "MRI",
        ("Axial contrast-enhanced T1-weighted MRI of the abdomen", "Abdominal MRI, axial T1-weighted with contrast",
         "Contrast-enhanced MR image of the liver region, axial T1-weighted gradient echo"),
        _always("axial MRI of the abdomen"), (40, 20, 400, 260), 60,
    ),
    Field(
        "us-node", "pydicom", "data/test_files/examples_jpeg2k.dcm", PYDICOM, "ultrasound",
        ("Power Doppler ultrasound of a lymph node", "Ultrasound of a lymph node with power Doppler",
         "Lymph node, small-parts ultrasound in power Doppler mode"),
        _flow, (80, 120, 560, 300), 60,
    ),
    Field(
        "us-heart", "pydicom", "data/test_files/examples_ybr_color.dcm", PYDICOM, "ultrasound",
        ("Echocardiogram", "B-mode ultrasound of the heart", "Cardiac ultrasound, one frame of a loop"),
        _always("echocardiogram"), (90, 25, 240, 200), 50, dark=8, frames=(0, 7, 14, 21, 28),
    ),
    Field(
        "bone-scan", "pydicom", "data/test_files/JPEG2000.dcm", PYDICOM, "nuclear medicine",
        ("Whole-body bone scan", "Bone scintigraphy, whole body", "Nuclear medicine bone scan of the whole body"),
        _always("whole-body bone scan"), (48, 64, 208, 864), 80, split_by="rows",
    ),
)  # fmt: skip


def _read_dicom(field: Field, path: Path) -> list[np.ndarray]:
    """The frames as (height, width) or (height, width, 3) uint8."""
    import pydicom

    dataset = pydicom.dcmread(path)
    pixels = dataset.pixel_array
    if pixels.dtype == np.uint8:
        return [pixels[frame] for frame in field.frames] if pixels.ndim == 4 else [pixels]
    return [_window(dataset, pixels, field.window)]


def _window(dataset: Any, pixels: np.ndarray, window: tuple[int, int] | None) -> np.ndarray:
    """Stored values through the rescale slope and the display window, by default the 0.5-99.5 percentile range."""
    values = pixels * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))
    if window is None:
        return window_by_percentiles(values)
    return window_between(values, window[0] - window[1] / 2, window[0] + window[1] / 2)


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
            label, finding = field.finding(tile)
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


IMPORT_NAMES = {"scikit-image": "skimage", "nilearn": "nilearn", "pydicom": "pydicom"}


TEMPLATES = (
    "{facts}, {detail}.",
    "{facts}: {detail}.",
    "{facts}. {detail}.",
    "{detail}. {facts}.",
    "Biomedical image: {facts}, {detail}.",
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
