"""Fast reading of training images: from a file to a random square of uint8 in less than half of Pillow's time.

Nearly all of a collection is upright 8-bit grey or colour JPEG. Those are decoded by libjpeg-turbo through simplejpeg,
whose pixels are Pillow's own bit for bit, at 1/2, 1/4 or 1/8 size where that is enough; everything else is read by
`open_image`, which handles all other files. Sizes are read from the header, and bombs refused, before any decoding.
The crop is resized as uint8 in channels-last memory, where torch's antialiased bicubic kernel takes a seventh of
Pillow's time and differs by a rounding. Evaluation does not come here: its pixels are the processor's, exactly.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmkd.data.archives import ArchivedFile
from mmkd.data.images import finish_image, open_header, orientation, read_image_bytes
from mmkd.data.pixel_rules import DEFAULT_WINDOW, MINIMUM_SIDE, Window, check_size

try:
    import simplejpeg
except ImportError:  # the same pixels by Pillow, in twice the time
    simplejpeg = None

CROP_AREA = 0.9
CROP_ASPECT = (3 / 4, 4 / 3)
DRAFT_FACTOR = 2
JPEG_START = b"\xff\xd8\xff"
METADATA_MARKER, SCAN_MARKER = 0xE1, 0xDA  # APP1: EXIF or XMP, either of which may turn the image; SOS: pixels follow


def read_pixels(
    source: Path | ArchivedFile | bytes,
    minimum_side: int = MINIMUM_SIDE,
    draft_side: int | None = None,
    window: Window = DEFAULT_WINDOW,
) -> Tensor:
    """Decode an image as 8-bit RGB, the pixels of `open_image`.

    Args:
        source: the file, alone or inside a tar file, or its bytes.
        minimum_side: images with a shorter side than this many pixels are refused.
        draft_side: decode JPEG at 1/2, 1/4 or 1/8 size where both sides still have at least this many pixels.
        window: of DICOM and NIfTI, and which frame.

    Returns:
        (3, height, width) uint8, in channels-last memory.

    Raises:
        UnreadableImageError: with one of `mmkd.data.pixel_rules.REASONS`.
    """
    name = "image" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else read_image_bytes(source)
    pixels = _plain_jpeg(data, name, minimum_side, draft_side)
    if pixels is not None:
        return torch.from_numpy(pixels).permute(2, 0, 1)
    return to_tensor(finish_image(open_header(data, name, minimum_side, window), name, draft_side))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as (3, height, width) uint8, in channels-last memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(pixels: Tensor) -> Image.Image:
    """(3, height, width) uint8 as an RGB image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def random_crop(pixels: Tensor, size: int, generator: np.random.Generator, least: float = CROP_AREA) -> Tensor:
    """A random rectangle, 3:4 to 4:3, resized to a square by antialiased bicubic interpolation.

    Where ten draws do not fit into the image, the largest central rectangle within the aspects is taken, as
    torchvision's RandomResizedCrop does.

    Args:
        pixels: (3, height, width) uint8.
        size: side of the square.
        generator: draws the rectangle.
        least: smallest share of the area.

    Returns:
        (3, size, size) uint8.
    """
    left, top, width, height = crop_box(pixels.shape[2], pixels.shape[1], generator, least)
    cropped = pixels[None, :, top : top + height, left : left + width]
    return F.interpolate(cropped, (size, size), mode="bicubic", antialias=True)[0]


def crop_box(
    width: int, height: int, generator: np.random.Generator, least: float = CROP_AREA
) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random crop."""
    for area, aspect, across, down in generator.random((10, 4)).tolist():
        area = width * height * (least + area * (1 - least))
        aspect = CROP_ASPECT[0] * (CROP_ASPECT[1] / CROP_ASPECT[0]) ** aspect  # uniform in the logarithm
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = int(across * (width - crop_width + 1)), int(down * (height - crop_height + 1))
            return left, top, crop_width, crop_height
    crop_width = min(width, round(height * CROP_ASPECT[1]))
    crop_height = min(height, round(width / CROP_ASPECT[0]))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def _plain_jpeg(data: bytes, name: str, minimum_side: int, draft_side: int | None) -> np.ndarray | None:
    """(height, width, 3) of an upright grey or YCbCr JPEG; None for all others, and for those that Pillow checks."""
    if simplejpeg is None or not data.startswith(JPEG_START):
        return None
    if _has_metadata(data) and orientation(open_header(data, name, minimum_side)) != 1:
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    check_size((width, height), name, minimum_side)
    if colors not in ("Gray", "YCbCr"):
        return None
    scale = 1
    while draft_side is not None and scale < 8 and min(height, width) // (2 * scale) >= draft_side:
        scale *= 2
    try:
        return simplejpeg.decode_jpeg(data, min_height=-(-height // scale), min_width=-(-width // scale))
    except ValueError:
        return None


def _has_metadata(data: bytes) -> bool:
    """Whether a JPEG file has an EXIF or XMP segment before its pixels, or inconsistent segments."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == SCAN_MARKER:
            return False
        if marker == METADATA_MARKER:
            return True
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return True
