"""Heat maps: which parts of an image its similarity with a text depends on.

Method: occlusion (Zeiler and Fergus, ECCV 2014). A window is moved over the image and filled with the image's mean
colour; the heat of a place is the mean fall of the cosine similarity over the windows that cover it. It needs no
gradients and no layer, so it is the same for convolutional towers, transformers, ONNX and a user's own encoder, and it
lies in the coordinates of the image rather than of the central square that an encoder sees: what the encoder does not
see has a heat of zero. A negative heat says that the image fits the text better without this part.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mmkd.data.images import heat_colours, shrink, to_rgb
from mmkd.serving.predictor import Encoder

CELLS, WINDOW, SHORT_SIDE = 10, 3, 384


def text_direction(encoder: Encoder, text: str, against: str = "") -> NDArray[np.float32]:
    """The vector (dim,) whose product with an image's vector is its similarity with a text.

    Args:
        encoder: of the images.
        text: caption.
        against: another caption, whose similarity is subtracted.

    Raises:
        ValueError: an empty text.
    """
    if not text.strip():
        raise ValueError("the text is empty; give the caption that the heat map is for")
    texts = np.asarray(encoder.encode_texts([text, against] if against.strip() else [text]), np.float32)
    direction: NDArray[np.float32] = texts[0] - texts[1] if len(texts) == 2 else texts[0]
    return direction


def heat_map(
    encoder: Encoder, image: Image.Image, text: str, against: str = "", cells: int = CELLS
) -> NDArray[np.float32]:
    """The fall of the similarity with a text where a part of the image is hidden.

    Args:
        encoder: model to explain.
        image: of any size and mode.
        text: caption to explain.
        against: another caption, whose similarity is subtracted: what speaks for ``text`` rather than for this one.
            Without it the heat of all texts of a modality is much alike.
        cells: number of cells along the shorter side; a window has three cells a side.

    Returns:
        (rows, columns) float32, in units of cosine similarity, positive where the part speaks for the text.

    Raises:
        ValueError: fewer cells than a window has, or an empty text.
    """
    if cells < WINDOW:
        raise ValueError(f"cells is {cells}; at least {WINDOW} are needed")
    image = shrink(to_rgb(image), SHORT_SIDE)
    side = min(image.size) / cells
    columns, rows = (max(cells, round(length / side)) for length in image.size)
    direction = text_direction(encoder, text, against)
    windows = list(_windows(rows, columns))
    whole = float(np.asarray(encoder.encode_images([image]))[0] @ direction)
    fill = tuple(int(value) for value in np.asarray(image).mean(axis=(0, 1)).round())
    heat, covered = np.zeros((rows, columns)), np.zeros((rows, columns))
    for start in range(0, len(windows), encoder.batch_size):
        batch = windows[start : start + encoder.batch_size]
        hidden = [_without(image, window, rows, columns, fill) for window in batch]
        similarities = np.asarray(encoder.encode_images(hidden)) @ direction
        for (top, left, bottom, right), similarity in zip(batch, similarities, strict=True):
            heat[top:bottom, left:right] += whole - float(similarity)
            covered[top:bottom, left:right] += 1
    return (heat / covered).astype(np.float32)


def overlay(image: Image.Image, heat: NDArray[np.float32], opacity: float = 0.65) -> Image.Image:
    """The image with the positive part of a heat map in colour; the more heat, the more opaque.

    Args:
        image: that the heat map was made of.
        heat: (rows, columns) of `heat_map`.
        opacity: of the hottest place, 0 to 1.
    """
    image = to_rgb(image)
    positive = np.clip(heat, 0, None)
    scaled = (255 * positive / max(float(positive.max()), np.finfo(np.float32).tiny)).round().astype(np.uint8)
    smooth = Image.fromarray(scaled).resize(image.size, Image.Resampling.BICUBIC)
    grey = ImageOps.grayscale(image).convert("RGB")
    return Image.composite(heat_colours(smooth), grey, smooth.point(lambda value: opacity * value))


def _windows(rows: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Top, left, bottom and right of every window in cells; those at the edges are cut, so that no cell is missed."""
    reach = WINDOW // 2
    for row in range(rows):
        for column in range(columns):
            yield (
                max(0, row - reach),
                max(0, column - reach),
                min(rows, row + reach + 1),
                min(columns, column + reach + 1),
            )


def _without(
    image: Image.Image, window: tuple[int, int, int, int], rows: int, columns: int, fill: tuple[int, ...]
) -> Image.Image:
    """A copy with a window filled."""
    top, left, bottom, right = window
    width, height = image.size
    box = (
        round(left * width / columns),
        round(top * height / rows),
        round(right * width / columns),
        round(bottom * height / rows),
    )
    copy = image.copy()
    copy.paste(fill, box)
    return copy
