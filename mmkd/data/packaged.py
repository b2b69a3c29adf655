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
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from PIL import Image

from mmkd.data.packaged_flat import flat_images
from mmkd.data.packaged_image import PackagedImage
from mmkd.data.packaged_volumes import brain_slices
from mmkd.data.sources import LABELS_FILE

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
