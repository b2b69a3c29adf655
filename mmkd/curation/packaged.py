"""The default data: real biomedical images that arrive with PyPI packages, cut into pairs that state facts.

scikit-image brings an immunohistochemistry field, two retina images and a quantitative phase image; nilearn the MNI152
T1, gray matter and white matter templates; pydicom a CT, an MR, two ultrasound files and a bone scan. They are cut into
tiles and slices and written as an ordinary collection (``labels.csv``, ``ATTRIBUTION.md``), which curation reads like
any other. Captions name modality, organ, plane, level and stain as the packages and file headers state them, or what
was measured in the tile; nothing is diagnosed.

Held-out pairs are kept apart by place, not by chance:

- a flat image is cut into tiles that do not overlap, and whole columns (or rows) of tiles are held out; the frames of
  the ultrasound loop are cut at the same columns, so that no place is trained on in one frame and tested in another;
- a volume is cut into slabs with gaps of 8 mm between them, whose slices are left out; the same slabs are held out of
  T1, gray matter and white matter, which show the same brain. The template is symmetric, so sagittal slices come from
  one side alone. Slices of different planes cross in single lines of voxels.

So few source images show that the pipeline works; they are no medical result.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from mmkd.curation.labels import LABELS_FILE
from mmkd.curation.packaged_images import PackagedImage, flat_images, package_file

COLUMNS = ("file", "modality", "label", "caption", "group", "split", "license", "source")

TEMPLATES = (
    "{facts}, {detail}.",
    "{facts}: {detail}.",
    "{facts}. {detail}.",
    "{detail}. {facts}.",
    "Biomedical image: {facts}, {detail}.",
)


def write_packaged(folder: Path) -> None:
    """Write the packaged images as a collection.

    Args:
        folder: created; gets ``images/``, ``labels.csv`` and ``ATTRIBUTION.md``.

    Raises:
        ValueError: a package is not installed or lacks a file.
    """
    (folder / "images").mkdir(parents=True)
    images = list(chain(flat_images(), brain_slices()))
    with (folder / LABELS_FILE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for image in images:
            path = f"images/{image.name}.png"
            Image.fromarray(image.pixels).save(folder / path, compress_level=1)
            source = f"{image.package} {image.file}"
            row = (
                path,
                image.modality,
                image.label,
                caption_of(image),
                image.group,
                image.split,
                image.license,
                source,
            )
            writer.writerow(row)
    (folder / "ATTRIBUTION.md").write_text(_attribution(images), encoding="utf-8")


def caption_of(image: PackagedImage) -> str:
    """A sentence of one of the image's facts and one of its details; its name chooses the wording."""
    digest = hashlib.sha256(image.name.encode()).digest()
    template = TEMPLATES[digest[0] % len(TEMPLATES)]
    facts, detail = image.facts[digest[1] % len(image.facts)], image.details[digest[2] % len(image.details)]
    if template.startswith("{detail}") or "{facts}. {detail}" in template:
        detail = detail[0].upper() + detail[1:]
    return template.format(facts=facts, detail=detail)


def _attribution(images: Sequence[PackagedImage]) -> str:
    """Where every image comes from, and how held-out images were kept apart."""
    lines = [
        "# Biomedical images that arrive with Python packages",
        "",
        "| package | file | images | license |",
        "|---|---|---:|---|",
    ]
    sources = sorted({(image.package, image.file, image.license) for image in images})
    for package, file, license in sources:
        count = sum((image.package, image.file) == (package, file) for image in images)
        lines.append(f"| {package} {importlib.metadata.version(package)} | {file} | {count} | {license} |")
    lines += [
        "",
        "Flat images were cut into tiles that do not overlap, and whole columns or rows of tiles are held out. Volumes",
        "were cut into slabs with 8 mm left out between them; the same slabs are held out of all three brain maps.",
        "Slices of different planes still cross in a line of voxels.",
        "Captions state what the packages, file headers and coordinates say, or what was measured in the tile.",
        "",
    ]
    return "\n".join(lines)


# Section: Slices of the MNI152 templates that arrive with nilearn; see `mmkd.curation.packaged` for what is held out
# and why.
#
# Coordinates are millimetres of MNI space, whose origin is the anterior commissure: +x right, +y anterior, +z superior.


FILE = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"

LICENSE = "ICBM 152 atlas (Fonov et al. 2009), distributed with nilearn (BSD-3-Clause)"

ORIGIN_MM = (-98, -134, -72)

MAPS = {
    "t1": ("T1-weighted MRI of the brain", "T1-weighted magnetic resonance image of the brain", "MNI152 T1 template"),
    "gm": ("gray matter map of the brain", "gray matter probability map from brain MRI", "MNI152 gray matter template"),
    "wm": (
        "white matter map of the brain",
        "white matter probability map from brain MRI",
        "MNI152 white matter template",
    ),
}


@dataclass(frozen=True)
class Plane:
    """A direction of slicing: its axis, step and slabs in mm, and words for its three thirds from low to high."""

    name: str
    axis: int
    letter: str
    step_mm: int
    extent_mm: tuple[int, int]
    thirds: tuple[str, str, str]
    sides: tuple[str, str]
    slabs: tuple[tuple[str, int, int], ...]


PLANES = (
    Plane(
        "axial", 2, "z", 4, (-71, 82), ("inferior", "middle", "superior"), ("below", "above"),
        (("train", -48, -20), ("test", -12, 4), ("train", 12, 32), ("validation", 40, 48), ("train", 56, 72)),
    ),
    Plane(
        "coronal", 1, "y", 4, (-107, 74), ("posterior", "middle", "anterior"), ("behind", "in front of"),
        (("train", -96, -64), ("test", -56, -36), ("train", -28, 0), ("validation", 8, 16), ("train", 24, 60)),
    ),
    Plane(
        "sagittal", 0, "x", 3, (0, 72), ("medial", "intermediate", "lateral"), ("left of", "right of"),
        (("train", 1, 19), ("test", 27, 36), ("train", 45, 54), ("validation", 62, 65)),
    ),
)  # fmt: skip


def brain_slices() -> Iterator[PackagedImage]:
    """Slices of all maps and planes.

    Raises:
        ValueError: nilearn is not installed.
    """
    for map_name in MAPS:
        volume = _load(map_name)
        for plane in PLANES:
            for slab, (split, first, last) in enumerate(plane.slabs):
                for position in range(first, last + 1, plane.step_mm):
                    pixels = np.moveaxis(volume, plane.axis, 0)[position - ORIGIN_MM[plane.axis]]
                    group = f"mni152 {plane.name} slab {slab}"
                    yield _slice(map_name, plane, position, np.ascontiguousarray(pixels.T[::-1]), group, split)


def _load(map_name: str) -> np.ndarray:
    """The template, (197, 233, 189) uint8 at 1 mm."""
    path = package_file("nilearn", FILE.format(map_name))
    import nibabel  # comes with nilearn

    return np.asarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]


def _slice(map_name: str, plane: Plane, position: int, pixels: np.ndarray, group: str, split: str) -> PackagedImage:
    short, long, template = MAPS[map_name]
    low, high = plane.extent_mm
    third = plane.thirds[min(2, int(3 * (position - low) / (high - low)))]
    side = (
        f"{abs(position)} mm {plane.sides[position > 0]} the anterior commissure"
        if position
        else "at the anterior commissure"
    )
    level = f"{plane.letter} = {position:+d} mm" if position else f"{plane.letter} = 0 mm"
    name = f"mni152-{map_name}-{plane.name}-{position:+04d}"
    return PackagedImage(
        name=name,
        pixels=pixels,
        modality="MRI",
        label=f"{plane.name} {short}",
        facts=(
            f"{plane.name.capitalize()} {short}",
            f"{long[0].upper()}{long[1:]}, {plane.name} plane",
            f"{plane.name.capitalize()} slice of the {template}",
        ),
        details=(
            f"{third} third of the brain, {level}",
            f"a slice {side}, {third} third",
            f"the brain at {level} in MNI space",
        ),
        group=group,
        split=split,
        package="nilearn",
        file=FILE.format(map_name),
        license=LICENSE,
    )
