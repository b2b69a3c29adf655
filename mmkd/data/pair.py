"""One image-text pair."""

from __future__ import annotations

from dataclasses import dataclass

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and its caption, with what is known about both.

    Attributes:
        id: unique in its manifest.
        image: path relative to the image root, with forward slashes.
        group: patient, case or specimen; never on both sides of a split.
        split: train, validation or test.
        width: pixels of the stored image; 0 when unknown.
        sha256: of the original image file.
        teachers: names of the teachers whose features may be used for this pair; None before screening.
    """

    id: str
    image: str
    caption: str
    modality: str = ""
    label: str = ""
    group: str = ""
    split: str = "train"
    source: str = ""
    license: str = ""
    width: int = 0
    height: int = 0
    sha256: str = ""
    teachers: tuple[str, ...] | None = None
