"""What the packaged sources share: one image with its facts, and where a package keeps its files."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IMPORT_NAMES = {"scikit-image": "skimage", "nilearn": "nilearn", "pydicom": "pydicom"}


@dataclass(frozen=True)
class PackagedImage:
    """One image of the default data.

    Attributes:
        name: file name without suffix.
        pixels: (height, width) or (height, width, 3) uint8.
        modality: of the source.
        label: class name.
        facts: ways to say what the source is; a caption takes one.
        details: ways to say what sets this image apart; a caption takes one.
        group: tiles or slices that are on one side of the split together.
        split: train, validation or test.
        package: distribution that brings the source.
        file: of the source, within the package.
        license: of the source, as the package states it.
    """

    name: str
    pixels: np.ndarray
    modality: str
    label: str
    facts: tuple[str, ...]
    details: tuple[str, ...]
    group: str
    split: str
    package: str
    file: str
    license: str


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
    raise ValueError(f'the packaged images need {package}, but {problem}: pip install "mmkd-clip[demo]"')
