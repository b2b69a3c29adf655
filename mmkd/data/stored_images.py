"""How images are stored that are made smaller: their size, their form and what quality is worth."""

from __future__ import annotations

import io

from PIL import Image

JPEG_QUALITY = 95


def shrink(image: Image.Image, short_side: int) -> Image.Image:
    """The image with its shorter side reduced to ``short_side``, or itself when it is not larger."""
    if not short_side or min(image.size) <= short_side:
        return image
    scale = short_side / min(image.size)
    size = (max(short_side, round(image.width * scale)), max(short_side, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, quality: int | None) -> tuple[str, bytes]:
    """Suffix and bytes, for an image that was JPEG and is resized as JPEG, else as PNG.

    Args:
        image: 8-bit RGB.
        quality: of JPEG, from 95 without chroma subsampling and below with half the colour both ways (4:2:0), which
            is read faster; None for PNG.
    """
    buffer = io.BytesIO()
    if quality is not None:
        image.save(buffer, "JPEG", quality=quality, subsampling=0 if quality >= JPEG_QUALITY else 2)
        return ".jpg", buffer.getvalue()
    image.save(buffer, "PNG")
    return ".png", buffer.getvalue()


def check_quality(quality: int) -> None:
    """Refuse a JPEG quality that no encoder has or no training should see.

    Raises:
        ValueError: it is not 50 to 100.
    """
    if not 50 <= quality <= 100:
        raise ValueError(f"jpeg_quality is {quality}; allowed: 50 to 100")
