"""Tiles of whole slides: the slide behind one small interface, a tissue mask, and the tiles that are mostly tissue.

Slides are read by OpenSlide; what it does not recognise (a PNG, a TIFF in strips) is read as an image without levels.
The tissue mask is Otsu's threshold on the saturation of a thumbnail: glass is grey, stain is not. Tiles are cut at the
requested resolution, from the nearest finer level, and resampled. `SlideWriter` writes the file of each slide that
`mmkd tile` makes: features of its tiles, or a drawing of them.
"""

from __future__ import annotations

import io
import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mmkd.command.tasks import Progress, resident
from mmkd.data.images import UnreadableImageError, encode, heat_colours, open_image
from mmkd.encoders.encoder import DualEncoder
from mmkd.evaluation.slides.bags import CHECKSUM, values_sha256
from mmkd.files import atomic_write_bytes, atomic_write_text

THUMBNAIL = 1024
GLASS, STAIN = 15, 60  # bounds of the threshold: dirty glass stays below 15; a slide may be tissue all over
PLAIN = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
PYRAMIDS = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".svslide", ".vms")
COARSEST_MPP = 20.0  # a header that states more describes a screen (72 dots an inch), not a microscope
OPACITY, OUTLINE = 0.6, "#0b6b66"
BATCHES_AHEAD = 2
MOST_PIXELS = 10**11  # of a slide; the largest of scanners have half of it
BLOCK = 8000  # largest side, in pixels, of a region that is read at once; 256 MB as RGBA
NOTE = ".skipped"
ARRAYS = ("features", "proj", "coords")


class Slide:
    """A whole slide, read by level; use it as a context manager.

    Attributes:
        sizes: width and height of each level, the finest first.
        mpp: micrometres a pixel of the finest level; None where the file does not state it.
    """

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            ValueError: neither OpenSlide nor the image reader can read it; the message holds both reasons.
            ModuleNotFoundError: OpenSlide is not installed.
        """
        try:
            self._slide, microns = _open(path)
            self.sizes = [(int(width), int(height)) for width, height in self._slide.level_dimensions]
        except (ValueError, ModuleNotFoundError):
            raise
        except Exception as error:  # damaged headers raise anything from OpenSlideError to ZeroDivisionError
            raise ValueError(f"its header is damaged ({error})") from error
        if math.prod(self.sizes[0]) > MOST_PIXELS:
            raise ValueError(f"its header states {self.sizes[0][0]} x {self.sizes[0][1]} pixels; refused")
        self.mpp = microns if microns and 0 < microns < COARSEST_MPP else None

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_: object) -> None:
        self._slide.close()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        """A region of a level as RGB; ``x`` and ``y`` in pixels of that level, white beyond the edge.

        Raises:
            ValueError: the file is damaged there.
        """
        factor = self._slide.level_downsamples[level]
        try:
            region = self._slide.read_region((round(x * factor), round(y * factor)), level, (width, height))
        except Exception as error:  # decoders of damaged files raise anything
            raise ValueError(f"a region of level {level} cannot be read ({error})") from error
        white = Image.new("RGB", region.size, "white")
        white.paste(region, mask=region.getchannel("A"))
        return white

    def scale(self, level: int) -> float:
        """Pixels of the finest level to one of this level."""
        return self.sizes[0][0] / self.sizes[level][0]

    def level_for(self, downsample: float) -> int:
        """The coarsest level that is at least as fine as 1 / ``downsample``, with a tolerance of 1 %."""
        return max(level for level in range(len(self.sizes)) if level == 0 or self.scale(level) <= downsample * 1.01)

    def thumbnail(self, longest: int = THUMBNAIL) -> Image.Image:
        """The whole slide, its longer side at most ``longest``; read in blocks, since it may have one level only."""
        level = self.level_for(max(self.sizes[0]) / longest)
        width, height = self.sizes[level]
        factor = min(1.0, longest / max(width, height))
        small = Image.new("RGB", (max(1, round(width * factor)), max(1, round(height * factor))))
        columns, rows = (np.linspace(0, side, math.ceil(side / factor / BLOCK) + 1).astype(int) for side in small.size)
        across, down = width / small.width, height / small.height
        for left, right in pairwise(columns):
            for top, bottom in pairwise(rows):
                x, y = round(left * across), round(top * down)
                block = self.read(level, x, y, round(right * across) - x, round(bottom * down) - y)
                small.paste(block.resize((right - left, bottom - top), Image.Resampling.BOX), (left, top))
        return small


def _open(path: Path) -> tuple[Any, float | None]:
    """An ``openslide.AbstractSlide``, and micrometres a pixel as the file states them."""
    import openslide

    refused = ""
    if path.suffix.lower() not in PLAIN:
        try:
            slide = openslide.OpenSlide(str(path))
            return slide, float(slide.properties.get(openslide.PROPERTY_NAME_MPP_X, 0))
        except openslide.OpenSlideError as error:
            refused = f"OpenSlide: {error}; "
    try:
        image = open_image(path)
    except UnreadableImageError as error:
        raise ValueError(f"{refused}{error}") from None
    dots_per_inch = float(image.info.get("dpi", (0, 0))[0])
    return openslide.ImageSlide(image), 25400 / dots_per_inch if dots_per_inch else None


def tissue_mask(thumbnail: Image.Image) -> NDArray[np.bool_]:
    """Tissue of a thumbnail, ``(height, width)``: saturation above Otsu's threshold, bounded by glass and stain.

    The threshold is that of scikit-image (Otsu, 1979, doi:10.1109/TSMC.1979.4310076).
    """
    from skimage.filters import threshold_otsu

    saturation = np.asarray(thumbnail.convert("HSV"))[..., 1]
    return saturation > np.clip(threshold_otsu(saturation), GLASS, STAIN)


def tile_corners(slide: Slide, side: float, tissue: float) -> NDArray[np.int64]:
    """Upper left corners ``(N, 2)``, x and y in pixels of the finest level, of tiles that hold enough tissue.

    Args:
        slide: the slide.
        side: of a tile, in pixels of the finest level.
        tissue: smallest share of tissue in a tile's area.
    """
    thumbnail = slide.thumbnail()
    integral = np.pad(tissue_mask(thumbnail).astype(np.int64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    width, height = slide.sizes[0]
    columns, rows = math.floor(width / side), math.floor(height / side)
    if columns < 1 or rows < 1:
        return np.zeros((0, 2), dtype=np.int64)
    x, y = (np.arange(count + 1) * side for count in (columns, rows))
    edges_x = np.minimum(np.round(x * thumbnail.width / width), thumbnail.width).astype(np.int64)
    edges_y = np.minimum(np.round(y * thumbnail.height / height), thumbnail.height).astype(np.int64)
    corners = integral[np.ix_(edges_y, edges_x)]
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


@dataclass(frozen=True)
class Tiling:
    """How a slide is cut.

    Attributes:
        size: side of a tile in pixels of its own resolution.
        mpp: that resolution, micrometres a pixel.
        slide_mpp: resolution of slides that do not state it.
        level: pyramid level to cut at, whatever its resolution.
        tissue: smallest share of tissue in a tile.
    """

    size: int = 256
    mpp: float = 0.5
    slide_mpp: float | None = None
    level: int | None = None
    tissue: float = 0.25

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            ValueError: the message names the settings.
        """
        if self.size < 1 or self.mpp <= 0:
            raise ValueError("--size must be at least 1, --mpp above 0")
        if not 0 <= self.tissue <= 1 or (self.level or 0) < 0 or (self.slide_mpp or 1) <= 0:
            raise ValueError("--tissue lies between 0 and 1, --level is at least 0, --slide_mpp above 0")

    def side(self, slide: Slide) -> float:
        """Side of a tile in pixels of the finest level.

        Raises:
            ValueError: the slide lacks the level, or states no resolution.
        """
        if self.level is not None:
            if self.level >= len(slide.sizes):
                raise ValueError(f"it has {len(slide.sizes)} levels, so --level {self.level} does not exist")
            return self.size * slide.scale(self.level)
        mpp = slide.mpp or self.slide_mpp
        if mpp is None:
            raise ValueError("it does not state its resolution; give --slide_mpp or --level 0")
        return self.size * self.mpp / mpp

    def corners(self, slide: Slide) -> NDArray[np.int64]:
        """Corners of the tiles that hold enough tissue; see `tile_corners`.

        Raises:
            ValueError: there is none, or see `side`.
        """
        corners = tile_corners(slide, self.side(slide), self.tissue)
        if not len(corners):
            raise ValueError(f"no tile of {self.size} pixels holds {self.tissue:.0%} tissue")
        return corners

    def batches(
        self, slide: Slide, corners: NDArray[np.int64], batch_size: int, workers: int
    ) -> Iterator[list[Image.Image]]:
        """Tiles in batches, while threads read the next batches."""
        side = self.side(slide)
        with ThreadPoolExecutor(workers) as readers:
            batches = (
                [
                    readers.submit(read_tile, slide, corner, side, self.size)
                    for corner in corners[start : start + batch_size]
                ]
                for start in range(0, len(corners), batch_size)
            )
            waiting = deque(itertools.islice(batches, BATCHES_AHEAD))
            while waiting:
                batch = waiting.popleft()
                waiting.extend(itertools.islice(batches, 1))
                yield [tile.result() for tile in batch]


def drawn_tiles(
    slide: Slide, corners: NDArray[np.int64], side: float, scores: NDArray[np.float32] | None = None
) -> Image.Image:
    """A thumbnail with its tiles: outlined, or coloured by their scores from the 2nd to the 98th percentile.

    Args:
        slide: the slide.
        corners: of n tiles, in pixels of the finest level.
        side: of a tile, in pixels of the finest level.
        scores: (n,).
    """
    thumbnail = slide.thumbnail()
    factor = thumbnail.width / slide.sizes[0][0]
    boxes = [(x * factor, y * factor, (x + side) * factor, (y + side) * factor) for x, y in corners.tolist()]
    if scores is None:
        canvas = ImageDraw.Draw(thumbnail)
        for box in boxes:
            canvas.rectangle(box, outline=OUTLINE)
        return thumbnail
    low, high = np.percentile(scores, (2, 98))
    shades = (255 * np.clip((scores - low) / max(high - low, 1e-12), 0, 1)).round().astype(int)
    heat, covered = Image.new("L", thumbnail.size), Image.new("L", thumbnail.size)
    draw_heat, draw_covered = ImageDraw.Draw(heat), ImageDraw.Draw(covered)
    for box, shade in zip(boxes, shades.tolist(), strict=True):
        draw_heat.rectangle(box, fill=shade)
        draw_covered.rectangle(box, fill=round(255 * OPACITY))
    return Image.composite(heat_colours(heat), thumbnail, covered)


@dataclass(frozen=True)
class SlideWriter:
    """Writes bags, or previews.

    Attributes:
        folder: for one file of each slide; a slide that cannot be used leaves a note with the reason until the end.
        tiling: how slides are cut.
        batch_size: tiles per batch of the encoder.
        threads: that read tiles.
        made_of: what a bag depends on, stored with it; None for previews.
    """

    folder: Path
    tiling: Tiling
    batch_size: int
    threads: int
    made_of: dict[str, Any] | None = None

    def has(self, slide: str) -> bool:
        """Whether the file of a slide is there and whole, or its note; nothing is changed.

        Raises:
            ValueError: a bag was made with other settings.
        """
        import h5py

        path = self._file(slide)
        if self.made_of is None or not path.is_file():
            return path.is_file() or self._note(slide).is_file()
        try:
            with h5py.File(path, "r") as file:
                own = dict(json.loads(file.attrs.get("made_of", "{}")))
                stored = {name: file[name] for name in ARRAYS if name in file}
                stated = [array.attrs.get(CHECKSUM) == values_sha256(array[:]) for array in stored.values()]
        except Exception:  # of damaged files, h5py raises anything from OSError to SystemError
            return False
        differing = [key for key in self.made_of if own.get(key) != self.made_of[key]]
        if differing:
            changes = ", ".join(f"{key} {own.get(key)!r} there, {self.made_of[key]!r} now" for key in differing)
            raise ValueError(f"{path} was made with other settings ({changes}); choose another --output")
        return len(stored) == len(ARRAYS) and all(stated)

    def write(self, slide: str, path: Path, encoder: DualEncoder | None) -> None:
        """Write the file of a slide in place of a damaged one, or a note without it."""
        try:
            with Slide(path) as opened:
                corners = self.tiling.corners(opened)
                if encoder is None or self.made_of is None:
                    content = encode(drawn_tiles(opened, corners, self.tiling.side(opened)), None)[1]
                else:
                    content = self._bag(opened, corners, encoder, self.made_of)
        except (ValueError, OSError) as error:
            self._file(slide).unlink(missing_ok=True)
            atomic_write_text(self._note(slide), str(error))
            return
        atomic_write_bytes(self._file(slide), content)

    def skipped(self) -> dict[str, str]:
        """The slides that could not be used, with the reason, as their notes state, which are removed."""
        notes = sorted(self.folder.glob(f"*{NOTE}"))
        found = {note.name.removesuffix(NOTE): note.read_text(encoding="utf-8") for note in notes}
        for note in notes:
            note.unlink()
        return found

    def _file(self, slide: str) -> Path:
        return self.folder / f"{slide}.{'png' if self.made_of is None else 'h5'}"

    def _note(self, slide: str) -> Path:
        return self.folder / f"{slide}{NOTE}"

    def _bag(self, slide: Slide, corners: np.ndarray, encoder: DualEncoder, made_of: dict[str, Any]) -> bytes:
        """An HDF5 file with features, joint vectors and coordinates of a slide's tiles.

        Raises:
            ValueError: a tile cannot be read.
        """
        import h5py

        encoder.batch_size = self.batch_size
        joint: list[torch.Tensor] = []
        pooled: list[torch.Tensor] = []
        for images in self.tiling.batches(slide, corners, self.batch_size, self.threads):
            vectors, before = encoder.encode_images_and_pooled(images)
            joint.append(vectors)
            pooled.append(vectors if before is None else before)
        kind, buffer = np.dtype(made_of["dtype"]), io.BytesIO()
        arrays = *(torch.cat(own).numpy().astype(kind) for own in (pooled, joint)), corners
        with h5py.File(buffer, "w") as file:
            for name, array in zip(ARRAYS, arrays, strict=True):
                file.create_dataset(name, data=array, fletcher32=True).attrs[CHECKSUM] = values_sha256(array)
            file.attrs["encoder"] = made_of["encoder"]
            file.attrs["made_of"] = json.dumps(made_of, sort_keys=True)
        return buffer.getvalue()


def write_slides(
    run: str,
    writer: SlideWriter,
    load: Callable[[], DualEncoder] | None,
    slides: Sequence[tuple[str, Path]],
    progress: Progress,
) -> None:
    """A task of `mmkd.command.tasks`; a process loads the encoder for its first slide of a run."""
    encoder = None if load is None else resident(run, load)
    for slide, path in slides:
        writer.write(slide, path, encoder)
        progress(1)
