"""Where the images of an evaluation come from: a folder of pairs, or a dataset that a manifest describes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

from PIL import Image
from tqdm import tqdm

from mmkd.data.images import open_image, read_image_bytes
from mmkd.data.records import Pair, PairFolder


class ImageSource(Protocol):
    """Pairs, and the image and the hash of each."""

    @property
    def pairs(self) -> Sequence[Pair]:
        """In the order in which they are embedded."""

    def image(self, pair: Pair) -> Image.Image:
        """The image of a pair.

        Raises:
            UnreadableImage: it cannot be read; the reason says why.
            ValueError: it lies outside the folder.
        """

    def digest(self, pair: Pair) -> str:
        """A hash of the stored image; ``"missing"`` where it cannot be read."""


class FolderImages:
    """Images of a folder of pairs."""

    def __init__(self, folder: PairFolder) -> None:
        """Take the folder; nothing is read yet."""
        self.folder = folder

    @property
    def pairs(self) -> Sequence[Pair]:
        """See `ImageSource`."""
        return self.folder.pairs

    def image(self, pair: Pair) -> Image.Image:
        """See `ImageSource`."""
        return open_image(self.folder.image_path(pair))

    def digest(self, pair: Pair) -> str:
        """See `ImageSource`; SHA-256 of the file."""
        try:
            return hashlib.sha256(read_image_bytes(self.folder.image_path(pair))).hexdigest()
        except ValueError:
            return "missing"


def image_digests(source: ImageSource, quiet: bool = False) -> dict[str, str]:
    """A hash of every image by pair id; ``"missing"`` where it cannot be read."""
    shown = tqdm(source.pairs, desc="looking for changed images", unit="image", disable=quiet)
    return {pair.id: source.digest(pair) for pair in shown}
