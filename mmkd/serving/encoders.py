"""What prediction, heat maps and the service need of an encoder: arrays, or tensors that are read as arrays.

`DualEncoder` satisfies both protocols, and so does an exported folder without torch (`mmkd.exporting.served`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import ArrayLike
from PIL import Image


class Encoder(Protocol):
    """Encodes images and texts into one space.

    Attributes:
        batch_size: images that are best given at once.
    """

    batch_size: int

    def encode_images(self, images: Sequence[Image.Image]) -> ArrayLike:
        """Images of any size and mode to unit vectors, (n, dim)."""

    def encode_texts(self, texts: Sequence[str]) -> ArrayLike:
        """Texts to unit vectors, (n, dim)."""


class ServedEncoder(Encoder, Protocol):
    """An encoder whose images several threads prepare.

    Attributes:
        dim: width of its vectors.
        provenance: JSON values that describe it.
    """

    dim: int
    provenance: dict[str, Any]

    def prepare_any(self, image: Image.Image) -> Any:
        """Preprocess one image."""

    def encode_prepared(self, prepared: Sequence[Any]) -> ArrayLike:
        """Images that `prepare_any` has prepared to unit vectors, (n, dim)."""
