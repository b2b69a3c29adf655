"""Search an index for the images that are most similar to a sentence or to an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mmkd.command.settings import check_arguments, run, setting


@dataclass
class SearchSettings:
    """Search an index by a sentence or an image.

    Example:
        mmkd search scans.index "sagittal T1-weighted MRI of the brain" -k 10
    """

    GROUPS: ClassVar[dict[str, str]] = {"computing": "device"}

    index: Path = setting(help="folder that `mmkd index` has written", positional=True)
    query: str = setting(help="a sentence, or the file of an image", positional=True)
    k: int = setting(10, "number of results; an index of fewer images gives all", least=1)
    near: bool = setting(False, "only near duplicates: a cosine of at least 0.95")
    least: float = setting(-1.0, "minimum cosine similarity of a result", least=-1, most=1)
    format: Literal["table", "csv", "json"] = setting("table", "form of the output")
    model: str = setting("", "folder or Hub id of the model; by default the one that the index names")
    device: str = setting("auto", "cpu, cuda, cuda:1 ...; auto = a GPU if there is one")


if __name__ == "__main__":
    check_arguments(SearchSettings)  # before the imports that take seconds

import csv
import json
import sys

from torch import Tensor

from mmkd.data.images import open_image
from mmkd.data.pixel_rules import Window
from mmkd.data.readers import IMAGE_SUFFIXES
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.zoo import load_encoder
from mmkd.serving.images import URL
from mmkd.serving.index import Hit, SearchIndex

NEAR_COSINE = 0.95
SUFFIXES = {*IMAGE_SUFFIXES, "dcm", "nii", "gz"}


def main(settings: SearchSettings) -> None:
    """Encode the query and print the answers.

    Raises:
        FileNotFoundError: the index, the model or the image is not there.
        ValueError: settings that cannot work, a damaged index, one of another model, or an unreadable image.
    """
    is_image = names_image(settings.query)
    index = SearchIndex.open(settings.index)
    encoder = load_encoder(settings.model or index.model_source, settings.device)
    index.require_model(encoder.provenance)
    hits = index.search(encode(encoder, settings.query, is_image, index.window), settings.k)[0]
    least = max(settings.least, NEAR_COSINE if settings.near else -1.0)
    show([hit for hit in hits if hit.score >= least], settings.format)


def names_image(query: str) -> bool:
    """Whether a query is the file of an image; any other text is a sentence.

    Raises:
        FileNotFoundError: it has the form of a file that is not there.
        ValueError: it is empty, or a URL.
    """
    if not query.strip():
        raise ValueError("the query is empty; give a sentence, or the file of an image")
    if URL.match(query):
        raise ValueError(f"{query} is a URL; nothing is downloaded here: download the image, and give the file")
    path = Path(query)
    if len(query) < 4096 and path.is_file():
        return True
    if " " not in query and path.suffix.lower().lstrip(".") in SUFFIXES:
        raise FileNotFoundError(f"{query}: no such file; it is taken for an image by its suffix")
    return False


def encode(encoder: DualEncoder, query: str, is_image: bool, window: Window) -> Tensor:
    """The vector of the query, ``(1, dim)``."""
    if is_image:
        return encoder.encode_images([open_image(Path(query), window=window)])
    return encoder.encode_texts([query])


def show(hits: list[Hit], form: str) -> None:
    """Print the answers."""
    if form == "json":
        print(json.dumps([{"image": hit.id, "score": hit.score} for hit in hits], indent=2, ensure_ascii=False))
    elif form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("image", "score"))
        writer.writerows((hit.id, hit.score) for hit in hits)
    else:
        for hit in hits:
            print(f"{hit.score:6.3f}  {hit.id}")
        if not hits:
            print("no answer", file=sys.stderr)


if __name__ == "__main__":
    run(SearchSettings, main)
