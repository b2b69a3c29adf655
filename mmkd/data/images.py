"""Read any image file as 8-bit RGB, or give a named reason why it cannot be used.

What a file states is followed where it is clear and decided here where it is not:

- first frame of animated files and of multi-page TIFF; EXIF orientation is applied, so that up is up;
- transparency is composited on white, the page that figures with a transparent background are drawn for;
- 16-bit, 32-bit and float grey is windowed by its percentiles (`mmkd.data.pixel_rules`); 16-bit colour keeps its high
  bytes;
- DICOM and NIfTI are read by `mmkd.data.medical`, the middle frame or slice unless another is chosen;
- CMYK, palette, YCbCr and 1-bit images are converted before any resizing.

The header is read before any pixel: an image of more than 89 million pixels (Pillow's own warning threshold, 268 MB as
RGB) is refused undecoded, and so is one over 100 times as long as wide, whose resized copy would be the bomb. Only
formats that Pillow decodes itself are tried; EPS, which starts another program, is not. Images that are stored smaller
are encoded here as well (`shrink`, `encode`).
"""

from __future__ import annotations

import base64
import io
import stat
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mmkd.data.archives import ArchivedFile
from mmkd.data.pixel_rules import (
    DEFAULT_WINDOW,
    MAX_FILE_BYTES,
    MINIMUM_SIDE,
    UnreadableImageError,
    Window,
    check_size,
    form_of,
    window_by_percentiles,
)

FORMATS = ("JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP", "PPM", "JPEG2000")
PNG_BIT_DEPTH_BYTE = 24

TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(
    source: Path | ArchivedFile | bytes,
    minimum_side: int = MINIMUM_SIDE,
    draft_side: int | None = None,
    window: Window = DEFAULT_WINDOW,
) -> Image.Image:
    """Decode an image as 8-bit RGB.

    Args:
        source: the file, or its bytes.
        minimum_side: images with a shorter side than this many pixels are refused.
        draft_side: decode JPEG at 1/2, 1/4 or 1/8 size where both sides still have at least this many pixels.
        window: of DICOM and NIfTI, and which frame.

    Raises:
        UnreadableImageError: with one of `mmkd.data.pixel_rules.REASONS`.
    """
    name = "image" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else read_image_bytes(source)
    return finish_image(open_header(data, name, minimum_side, window), name, draft_side)


def open_header(
    data: bytes, name: str, minimum_side: int = MINIMUM_SIDE, window: Window = DEFAULT_WINDOW
) -> Image.Image:
    """Read the header of an image file, and refuse sizes that must not be decoded; DICOM and NIfTI are decoded here.

    Args:
        data: the bytes of the file.
        name: of the file, in errors, and for DICOM files that only their suffix shows.
        minimum_side: images with a shorter side than this many pixels are refused.
        window: of DICOM and NIfTI, and which frame.

    Raises:
        UnreadableImageError: with one of `mmkd.data.pixel_rules.REASONS`.
    """
    form = form_of(data, name)
    if form:
        from mmkd.data.medical import read_dicom, read_nifti  # here, because trainings seldom read either

        read = read_dicom if form == "dicom" else read_nifti
        return Image.fromarray(read(data, name, minimum_side, window)).convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise UnreadableImageError("too_large", f"{name}: {error}") from error
        except Image.UnidentifiedImageError as error:
            raise UnreadableImageError(
                "unsupported", f"{name} is none of {', '.join(FORMATS)}, DICOM and NIfTI"
            ) from error
        except Exception as error:  # see finish_image
            raise UnreadableImageError("corrupt", f"{name} has a broken header: {error}") from error
    check_size(image.size, name, minimum_side)
    return image


def finish_image(
    image: Image.Image, name: str, draft_side: int | None = None, draft_mode: str | None = None
) -> Image.Image:
    """Decode what `open_header` opened, as upright 8-bit RGB; see `open_image`. Mode L decodes grey alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            if draft_side is not None:
                image.draft(draft_mode, (draft_side, draft_side))
            image.load()
            turned = orientation(image)
            image = to_rgb(image)
        except Exception as error:  # decoders of broken files raise anything from OSError to IndexError
            raise UnreadableImageError("corrupt", f"{name} cannot be decoded: {error}") from error
    return image.transpose(TRANSPOSED[turned]) if turned in TRANSPOSED else image


def read_image_bytes(path: Path | ArchivedFile) -> bytes:
    """The bytes of an image file, or of one inside a tar file.

    Raises:
        UnreadableImageError: there is no such file, it cannot be read, or it is over a gibibyte.
    """
    try:
        if isinstance(path, ArchivedFile):
            return path.read_bytes()
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a folder; a pipe would be waited for without end
            raise UnreadableImageError("missing", f"{path} is not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise UnreadableImageError("too_large", f"{path} has more than {MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except UnreadableImageError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnreadableImageError("missing", f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UnreadableImageError("unreadable", f"{path}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode as 8-bit RGB: deep grey is windowed, transparency composited on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        return Image.fromarray(window_by_percentiles(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        page = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(page, layer).convert("RGB")
    return image.convert("RGB")


def is_plain(data: bytes) -> bool:
    """Whether the bytes are an upright, opaque, 8-bit grey or RGB JPEG or PNG, which all readers decode alike."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        except Image.UnidentifiedImageError:
            return False
        eight_bit = image.format != "PNG" or data[PNG_BIT_DEPTH_BYTE] == 8
        opaque = image.mode in ("L", "RGB") and "transparency" not in image.info
        return eight_bit and opaque and getattr(image, "n_frames", 1) == 1 and orientation(image) == 1


def orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) if there is none or the EXIF block is broken."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1


JPEG_QUALITY = 95
THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 224, 78


def shrink(image: Image.Image, short_side: int) -> Image.Image:
    """The image with its shorter side reduced to ``short_side``, or itself when it is not larger."""
    if not short_side or min(image.size) <= short_side:
        return image
    scale = short_side / min(image.size)
    size = (max(short_side, round(image.width * scale)), max(short_side, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, quality: int | None) -> tuple[str, bytes]:
    """Suffix and bytes: JPEG for a resized JPEG, else PNG.

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


def thumbnail(source: Path | ArchivedFile) -> str:
    """A JPEG data URI of at most 224 pixels a side, for pages of one file; empty if the image cannot be read."""
    try:
        image = open_image(source)
    except UnreadableImageError:
        return ""
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def heat_colours(heat: Image.Image) -> Image.Image:
    """A grey image in the colours of heat maps: dark blue for 0, orange between, light yellow for 255."""
    return ImageOps.colorize(heat, "#1f3b73", "#fff2b0", "#f2a33a")


def check_quality(quality: int) -> None:
    """Refuse a JPEG quality out of range, or too low for training.

    Raises:
        ValueError: it is not 50 to 100.
    """
    if not 50 <= quality <= 100:
        raise ValueError(f"jpeg_quality is {quality}; allowed: 50 to 100")
