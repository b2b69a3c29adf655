"""An exported folder as an encoder; apart from the comparison, so that the service loads no evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmkd.encoders.encoder import DualEncoder
from mmkd.exporting.usage import Encoder


class ExportedEncoder(DualEncoder):
    """An exported folder as an encoder; its own ``usage.py`` prepares images and texts."""

    def __init__(self, folder: Path, name: str, provenance: dict[str, Any] | None = None) -> None:
        """Load the towers.

        Args:
            folder: that ``mmkd export`` has written.
            name: of the encoder.
            provenance: of the model that was exported, by default what the folder states.
        """
        self._encoder = Encoder(folder, threads=torch.get_num_threads())
        metadata = self._encoder.metadata
        super().__init__(name, metadata["dim"], {"export": metadata} if provenance is None else provenance)

    def prepare(self, image: Image.Image) -> NDArray[np.float32]:
        """See `DualEncoder`; (3, side, side)."""
        return self._encoder.pixels(image)

    def image_features(self, prepared: list[NDArray[np.float32]]) -> Tensor:
        """See `DualEncoder`."""
        return torch.from_numpy(self._encoder.encode_pixels(prepared))

    def text_features(self, texts: list[str]) -> Tensor:
        """See `DualEncoder`."""
        return torch.from_numpy(self._encoder.encode_texts(texts))
