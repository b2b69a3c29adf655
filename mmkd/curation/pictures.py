"""Check, measure, hash and prepare one image for storage, with as little decoding as possible.

An upright 8-bit JPEG is kept as it is. To check it and compute its hash, its grey values at an eighth of
the size are enough: they need all of the file, and a fifth of the time of all its pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmkd.data.images import JPEG_QUALITY, encode, finish_image, is_plain, open_header, shrink
from mmkd.data.pixel_rules import DEFAULT_WINDOW, MINIMUM_SIDE, Window

HASH_SIDE = 64


@dataclass(frozen=True, slots=True)
class Picture:
    """A stored image: file extension, bytes, size in pixels, and perceptual hash."""

    suffix: str
    content: bytes
    width: int
    height: int
    perceptual_hash: int


def prepare_picture(
    data: bytes,
    minimum_side: int = MINIMUM_SIDE,
    short_side: int = 0,
    jpeg_quality: int = JPEG_QUALITY,
    window: Window = DEFAULT_WINDOW,
    suffix: str = "",
) -> Picture:
    """Check an image and choose the bytes to store.

    Args:
        data: the file.
        minimum_side: images with a shorter side in pixels are refused.
        short_side: larger images are stored with this shorter side; 0 keeps sizes.
        jpeg_quality: of JPEG files that are stored smaller, see `mmkd.data.images.encode`.
        window: of DICOM and NIfTI, and which frame.
        suffix: of the file's name, for DICOM files that only it shows.

    Raises:
        UnreadableImageError: see `mmkd.data.pixel_rules.REASONS`.
    """
    image = open_header(data, f"image.{suffix}", minimum_side, window)
    shrinks = 0 < short_side < min(image.size)
    keeps_bytes = not shrinks and is_plain(data)
    if keeps_bytes and image.format == "JPEG":
        width, height = image.size
        return Picture("jpg", data, width, height, perceptual_hash(finish_image(image, "image", HASH_SIDE, "L")))
    quality = jpeg_quality if shrinks and image.format == "JPEG" else None
    decoded = shrink(finish_image(image, "image", draft_side=short_side or None), short_side)
    ending, content = (".png", data) if keeps_bytes else encode(decoded, quality)
    return Picture(ending[1:], content, decoded.width, decoded.height, perceptual_hash(decoded))


def perceptual_hash(image: Image.Image) -> int:
    """The 64-bit DCT hash of ImageHash: near images differ in few bits."""
    import imagehash

    reduced = image.reduce(max(1, min(image.size) // HASH_SIDE)) if min(image.size) >= 2 * HASH_SIDE else image
    bits = imagehash.phash(reduced).hash
    return int.from_bytes(np.packbits(bits.ravel()).tobytes(), "big")
