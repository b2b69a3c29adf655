"""Slices of the MNI152 templates that arrive with nilearn; see `mmkd.data.packaged` for what is held out and why.

Coordinates are millimetres of MNI space, whose origin is the anterior commissure: +x right, +y anterior, +z superior.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mmkd.data.packaged_image import PackagedImage, package_file

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
