"""Tiles of whole slides: a reader of pyramids, a mask of tissue, and the tiles whose area is mostly tissue.

A slide is read through OpenSlide where that is installed and knows the format, else as a TIFF pyramid, else as a plain
image. The tissue mask is Otsu's threshold on the saturation of a thumbnail (glass is grey, stain is not). Tiles are
cut at the resolution that is asked for, from the nearest finer level, and resampled.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmkd.data.images import UnreadableImage, open_image

THUMBNAIL = 1024
GLASS, STAIN = 15, 60  # saturation that dirty glass may have, and that only tissue has: all of a slide may be tissue
PLAIN = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
PYRAMIDS = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".svslide", ".vms")
MICRONS_PER = {"centimeter": 1e4, "millimeter": 1e3, "micrometer": 1.0, "inch": 25400.0}
JPEGS = (6, 7, 33007, 34892)  # the kinds of compression whose tables stand outside the pieces
MOST_READ = 64_000_000  # pixels of one region


class Slide(ABC):
    """An image pyramid.

    Attributes:
        sizes: width and height of each level, the finest first.
        mpp: micrometres a pixel of the finest level; None where the file does not say.
    """

    sizes: list[tuple[int, int]]
    mpp: float | None = None

    @abstractmethod
    def read(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        """A region of a level as RGB; ``x`` and ``y`` in pixels of that level, white beyond the edge."""

    def close(self) -> None:
        """Let go of the file."""
        return

    def scale(self, level: int) -> float:
        """Pixels of the finest level to one of this."""
        return self.sizes[0][0] / self.sizes[level][0]

    def thumbnail(self, longest: int = THUMBNAIL) -> Image.Image:
        """The whole slide, its longer side about ``longest``.

        Raises:
            ValueError: there is no level small enough to be read whole.
        """
        level = self.level_for(max(self.sizes[0]) / longest)
        width, height = self.sizes[level]
        if width * height > MOST_READ:
            raise ValueError(f"its smallest level of {width} x {height} pixels is too large; convert it to a pyramid")
        image = self.read(level, 0, 0, width, height)
        factor = min(1.0, longest / max(width, height))
        return image.resize((max(1, round(width * factor)), max(1, round(height * factor))), Image.Resampling.BOX)

    def level_for(self, downsample: float) -> int:
        """The coarsest level that is at least as fine as 1 / ``downsample``, a hundredth of slack allowed."""
        return max(level for level in range(len(self.sizes)) if level == 0 or self.scale(level) <= downsample * 1.01)


class PlainSlide(Slide):
    """An image file without levels."""

    def __init__(self, path: Path) -> None:
        """Decode it.

        Raises:
            UnreadableImage: with the reason.
        """
        self._image = open_image(path)
        self.sizes = [self._image.size]

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        """See `Slide.read`."""
        region = Image.new("RGB", (width, height), "white")
        region.paste(self._image.crop((x, y, min(x + width, self.sizes[0][0]), min(y + height, self.sizes[0][1]))))
        return region


class TiffSlide(Slide):
    """A TIFF pyramid, read in strips and tiles as they are stored."""

    def __init__(self, path: Path) -> None:
        """Read the headers.

        Raises:
            ValueError: it is no TIFF, or its levels are not 8-bit colour or grey.
        """
        import tifffile

        try:
            self._file = tifffile.TiffFile(path)
        except (tifffile.TiffFileError, OSError) as error:
            raise ValueError(f"it is no TIFF that can be read ({str(error).splitlines()[0]})") from None
        self._levels: list[Any] = [level.pages[0] for series in self._file.series[:1] for level in series.levels]
        strange = [page for page in self._levels if str(page.dtype) != "uint8" or page.axes not in ("YXS", "YX")]
        if strange or not self._levels:
            self.close()
            shown = f"{strange[0].dtype} with axes {strange[0].axes}" if strange else "missing"
            raise ValueError(f"its image is {shown}; 8-bit colour or grey is read")
        self.sizes = [(page.imagewidth, page.imagelength) for page in self._levels]
        self.mpp = self._microns()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        """See `Slide.read`."""
        page = self._levels[level]
        region = np.full((height, width, 3), 255, dtype=np.uint8)
        for piece, top, left in _segments(page, x, y, width, height):
            own_top, own_left = max(top, y), max(left, x)
            bottom = min(top + piece.shape[0], y + height, self.sizes[level][1])
            right = min(left + piece.shape[1], x + width, self.sizes[level][0])
            if own_top < bottom and own_left < right:
                cut = piece[own_top - top : bottom - top, own_left - left : right - left]
                region[own_top - y : bottom - y, own_left - x : right - x] = cut[..., :3]
        return Image.fromarray(region)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _microns(self) -> float | None:
        page = self._levels[0]
        for part in page.description.split("|"):
            name, equals, value = part.partition("=")
            if equals and name.strip() == "MPP":
                return float(value)
        unit, resolution = page.tags.get("ResolutionUnit"), page.tags.get("XResolution")
        if unit is None or resolution is None:
            return None
        per = {2: "inch", 3: "centimeter", 4: "millimeter", 5: "micrometer"}.get(int(unit.value))
        above, below = resolution.value
        if per is None or not above or not below:
            return None
        microns = MICRONS_PER[per] * below / above
        return microns if microns < 20 else None  # 72 dots an inch is a screen's default and no microscope's


class OpenSlideSlide(Slide):
    """Whatever OpenSlide knows."""

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            ValueError: OpenSlide cannot read it.
        """
        import openslide

        try:
            self._slide = openslide.OpenSlide(str(path))
        except openslide.OpenSlideError as error:
            raise ValueError(f"OpenSlide cannot read it ({error})") from None
        self._error = openslide.OpenSlideError
        self.sizes = [(int(w), int(h)) for w, h in self._slide.level_dimensions]
        mpp = self._slide.properties.get(openslide.PROPERTY_NAME_MPP_X)
        self.mpp = float(mpp) if mpp else None

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        """See `Slide.read`."""
        factor = self._slide.level_downsamples[level]
        try:
            region = self._slide.read_region((round(x * factor), round(y * factor)), level, (width, height))
        except self._error as error:
            raise ValueError(f"OpenSlide cannot read a region of it ({error})") from None
        white = Image.new("RGB", region.size, "white")
        white.paste(region, mask=region.getchannel("A"))
        return white

    def close(self) -> None:
        """Let go of the file."""
        self._slide.close()


def open_slide(path: Path) -> Slide:
    """The slide in a file, by the first of the readers that can.

    Raises:
        ValueError: none can; the reasons are told.
    """
    if path.suffix.lower() in PLAIN:
        return PlainSlide(path)
    reasons = []
    for reader in (OpenSlideSlide, TiffSlide):
        try:
            return reader(path)
        except ValueError as error:
            reasons.append(str(error))
        except ModuleNotFoundError as error:
            reasons.append(f"{error.name} is not installed")
        except ImportError:
            reasons.append("OpenSlide's library is not installed: pip install openslide-bin")
    try:
        return PlainSlide(path)
    except UnreadableImage as error:
        raise ValueError("; ".join([*reasons, str(error)])) from None


def saturation_mask(thumbnail: Image.Image) -> NDArray[np.bool_]:
    """Tissue of a thumbnail ``(height, width)``: saturation above Otsu's threshold, between glass and stain."""
    saturation = np.asarray(thumbnail.convert("HSV"))[..., 1]
    return saturation > np.clip(otsu(np.bincount(saturation.ravel(), minlength=256)), GLASS, STAIN)


def otsu(histogram: NDArray[Any]) -> int:
    """The level ``(256,)`` counts are best cut after: the variance between both parts is greatest."""
    counts = histogram.astype(np.float64)
    below = np.cumsum(counts)
    total, moments = below[-1], np.cumsum(counts * np.arange(len(counts)))
    apart = np.square(moments[-1] * below - moments * total)
    between = np.divide(apart, below * (total - below), out=np.zeros(len(counts)), where=below * (total - below) > 0)
    return int(between.argmax())


def grid(slide: Slide, side: float, tissue: float) -> NDArray[np.int64]:
    """Upper left corners ``(N, 2)``, x and y in pixels of the finest level, of tiles that hold enough tissue.

    Args:
        slide: the slide.
        side: of a tile, in pixels of the finest level.
        tissue: least share of a tile's area.
    """
    thumbnail = slide.thumbnail()
    mask = np.pad(saturation_mask(thumbnail).astype(np.int64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    width, height = slide.sizes[0]
    columns, rows = math.floor(width / side), math.floor(height / side)
    if columns < 1 or rows < 1:
        return np.zeros((0, 2), dtype=np.int64)
    x, y = (np.arange(count + 1) * side for count in (columns, rows))
    edges_x = np.minimum(np.round(x * thumbnail.width / width), thumbnail.width).astype(np.int64)
    edges_y = np.minimum(np.round(y * thumbnail.height / height), thumbnail.height).astype(np.int64)
    corners = mask[np.ix_(edges_y, edges_x)]
    inside = corners[1:, 1:] - corners[:-1, 1:] - corners[1:, :-1] + corners[:-1, :-1]
    area = np.outer(np.diff(edges_y), np.diff(edges_x))
    found = np.argwhere(inside >= tissue * np.maximum(area, 1))
    return np.stack([x[found[:, 1]], y[found[:, 0]]], axis=1).round().astype(np.int64)


def read_tile(slide: Slide, corner: NDArray[np.int64], side: float, pixels: int) -> Image.Image:
    """The tile at a corner, ``side`` pixels of the finest level wide, as ``pixels`` x ``pixels`` RGB."""
    level = slide.level_for(side / pixels)
    factor = slide.scale(level)
    own = max(1, round(side / factor))
    region = slide.read(level, round(int(corner[0]) / factor), round(int(corner[1]) / factor), own, own)
    return region if own == pixels else region.resize((pixels, pixels), Image.Resampling.LANCZOS)


def _segments(page: Any, x: int, y: int, width: int, height: int) -> Iterator[tuple[NDArray[np.uint8], int, int]]:
    """Decoded tiles or strips of a page that touch a region, with the place of their first pixel."""
    tall, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    across = -(-page.imagewidth // wide)
    jpeg = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression in JPEGS else {}
    handle = page.parent.filehandle
    for row in range(max(y, 0) // tall, -(-min(y + height, page.imagelength) // tall)):
        for column in range(max(x, 0) // wide, -(-min(x + width, page.imagewidth) // wide)):
            number = row * across + column
            with handle.lock:
                handle.seek(page.dataoffsets[number])
                data = handle.read(page.databytecounts[number])
            try:
                piece, _, _ = page.decode(data or None, number, **jpeg)
            except Exception as error:  # codecs raise errors of many kinds for damaged bytes
                raise ValueError(f"piece {number} of a level cannot be decoded ({error})") from None
            if piece is not None:
                yield piece[0], row * tall, column * wide


@contextmanager
def opened(path: Path) -> Iterator[Slide]:
    """`open_slide`, closed again."""
    slide = open_slide(path)
    try:
        yield slide
    finally:
        slide.close()
