"""An exported folder as the encoder of `mmkd serve`: ONNX Runtime and NumPy, without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmkd.exporting.usage import DESCRIPTION, Encoder
from mmkd.files import read_json

BATCH_SIZE = 16  # of heat maps; the service collects its own batches


class OnnxEncoder:
    """A folder of ``mmkd export --format onnx`` or ``int8``."""

    batch_size = BATCH_SIZE

    def __init__(self, folder: Path) -> None:
        """Load the towers; `OMP_NUM_THREADS` limits the threads of ONNX Runtime.

        Raises:
            ValueError: a folder in another format, or one without its provenance.
        """
        metadata = read_json(folder / DESCRIPTION)
        if metadata.get("format") not in ("onnx", "int8"):
            raise ValueError(
                f"{folder} holds towers as {metadata.get('format')}, which can run code when they are loaded; serve "
                "the model, or `mmkd export --format onnx`"
            )
        if "provenance" not in metadata:
            raise ValueError(f"{folder} does not name its model; export it again with this version: `mmkd export`")
        self._towers = Encoder(folder, int(os.environ.get("OMP_NUM_THREADS") or 0))
        self.dim: int = metadata["dim"]
        self.provenance: dict[str, Any] = metadata["provenance"]

    def prepare_any(self, image: Image.Image) -> NDArray[np.float32]:
        """See `mmkd.serving.encoders.ServedEncoder`; (3, side, side)."""
        return self._towers.pixels(image)

    def encode_prepared(self, prepared: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """See `mmkd.serving.encoders.ServedEncoder`."""
        return self._towers.encode_pixels(prepared)

    def encode_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """See `mmkd.serving.encoders.Encoder`."""
        return self._towers.encode_images(images)

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See `mmkd.serving.encoders.Encoder`."""
        return self._towers.encode_texts(texts)

    def count_tokens(self, texts: Sequence[str]) -> int:
        """Tokens of texts, each up to the context."""
        return int(self._towers.tokens(texts)["attention_mask"].sum())
