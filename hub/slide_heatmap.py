"""Heat map of a whole slide: how similar each tile is to a text, as a picture and as GeoJSON for QuPath.

In QuPath, drag OUTPUT.geojson onto the open slide, and colour the tiles by the measurement (Measure, Show measurement
maps). Coordinates are pixels of the finest level. Similarities of one model rank tiles; they are not probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mmkd.command.settings import check_arguments, run, setting


@dataclass
class SlideHeatmapSettings:
    """Map the similarity of a slide's tiles with a text.

    Example:
        mmkd slide-heatmap slide.svs "tumour" --against "normal tissue" --model mmkd-clip --output tumour
    """

    GROUPS: ClassVar[dict[str, str]] = {"tiles": "mpp slide_mpp level size tissue", "computing": "batch_size workers"}

    slide: Path = setting(help="file of a whole slide", positional=True)
    text: str = setting(help="caption that the map is for", positional=True)
    output: Path = setting(help="OUTPUT.geojson and OUTPUT.png are written")
    model: str = setting(help="folder or Hub id of a model, or the name of a teacher")
    against: str = setting("", "another caption, whose similarity is subtracted")
    mpp: float = setting(0.5, "resolution of a tile [micrometres per pixel]; 0.5 is 20x")
    slide_mpp: float | None = setting(None, "resolution of a slide that does not state it [micrometres per pixel]")
    level: int | None = setting(None, "cut at this pyramid level, whatever its resolution")
    size: int = setting(256, "side of a tile [pixels]")
    tissue: float = setting(0.25, "smallest share of tissue in a tile")
    batch_size: int = setting(64, "tiles per batch of the model", least=1)
    workers: int = setting(4, "threads that read tiles", least=1)
    device: str = setting("auto", "cpu, cuda, cuda:1 ...; auto = a GPU if there is one")
    quiet: bool = setting(False, "no progress bar, print nothing")
    overwrite: bool = setting(False, "replace OUTPUT if it exists")


if __name__ == "__main__":
    check_arguments(SlideHeatmapSettings)  # before the imports that take seconds

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mmkd.data.images import encode
from mmkd.encoders.zoo import load_encoder
from mmkd.evaluation.slides.tiles import Slide, Tiling, drawn_tiles
from mmkd.files import atomic_write_bytes, refuse_existing, write_json
from mmkd.serving.explain import text_direction


def main(settings: SlideHeatmapSettings) -> None:
    """Encode the tiles and the texts, and write both files.

    Raises:
        FileExistsError: one of the files exists.
        FileNotFoundError: the slide or the model is not there.
        ModuleNotFoundError: a package of the extra ``slides`` is not installed.
        ValueError: the slide cannot be read or holds no tissue, or settings do not fit together.
    """
    table, picture = (settings.output.with_name(settings.output.name + end) for end in (".geojson", ".png"))
    for file in (table, picture):
        refuse_existing(file, settings.overwrite)
    if not settings.text.strip():
        raise ValueError("the text must not be empty")
    if not settings.slide.is_file():
        raise FileNotFoundError(f"{settings.slide}: no such file")
    tiling = Tiling(settings.size, settings.mpp, settings.slide_mpp, settings.level, settings.tissue)
    with Slide(settings.slide) as slide:
        try:
            corners, side = tiling.corners(slide), tiling.side(slide)
        except ValueError as error:
            raise ValueError(f"{settings.slide.name}: {error}") from None
        encoder = load_encoder(settings.model, settings.device)
        encoder.batch_size = settings.batch_size
        direction = text_direction(encoder, settings.text, settings.against)
        parts: list[NDArray[np.float32]] = []
        with tqdm(total=len(corners), unit="tile", disable=settings.quiet) as bar:
            for images in tiling.batches(slide, corners, settings.batch_size, settings.workers):
                parts.append(encoder.encode_images(images).numpy() @ direction)
                bar.update(len(images))
        scores = np.concatenate(parts)
        drawn = drawn_tiles(slide, corners, side, scores)
    name = f"{settings.text} - {settings.against}" if settings.against.strip() else settings.text
    write_json(table, geojson(corners, side, scores, name))
    atomic_write_bytes(picture, encode(drawn, None)[1])
    if not settings.quiet:
        low, middle, high = np.percentile(scores, (0, 50, 100))
        print(f"{table}, {picture}: {len(corners)} tiles, similarity {low:.3f} to {high:.3f}, median {middle:.3f}")


def geojson(corners: NDArray[np.int64], side: float, scores: NDArray[np.float32], name: str) -> dict[str, Any]:
    """Tiles as QuPath imports them: polygons with the score as a measurement.

    Args:
        corners: (n, 2), upper left corners in pixels of the finest level.
        side: of a tile, in the same pixels.
        scores: (n,).
        name: of the measurement.
    """
    features = []
    for (x, y), score in zip(corners.tolist(), scores.tolist(), strict=True):
        right, bottom = round(x + side), round(y + side)
        ring = [[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"objectType": "tile", "measurements": {name: round(score, 6)}},
            }
        )
    return {"type": "FeatureCollection", "features": features}


if __name__ == "__main__":
    run(SlideHeatmapSettings, main)
