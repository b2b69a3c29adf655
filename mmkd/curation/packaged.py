"""The default data: real biomedical images that arrive with PyPI packages, cut into pairs that state facts.

scikit-image brings an immunohistochemistry field, two retina images and a quantitative phase image; nilearn the MNI152
T1, gray matter and white matter templates; pydicom a CT, an MR, two ultrasound files and a bone scan. They are cut into
tiles and slices that curation reads like any other collection. Captions name modality, organ, plane, level and stain as
the packages and file headers state them, or what was measured in the tile; nothing is diagnosed.

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

import importlib.metadata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from mmkd.curation.packaged_images import IMPORT_NAMES, flat_images, package_file, packaged_sample
from mmkd.curation.samples import RawSample, decode_metadata


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


def brain_slices() -> Iterator[RawSample]:
    """Slices of the MNI152 templates of nilearn, all maps and planes.

    Coordinates are millimetres of MNI space, whose origin is the anterior commissure: +x right, +y anterior, +z
    superior.

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


def _slice(map_name: str, plane: Plane, position: int, pixels: np.ndarray, group: str, split: str) -> RawSample:
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
    return packaged_sample(
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
