"""An exported folder as the encoder of `mmkd serve`: ONNX Runtime and NumPy, without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmkd.exporting.usage import DESCRIPTION, Encoder
from mmkd.files import read_object

LARGEST_SIDE = 4096  # pixels of an image as the model takes it
BATCH_SIZE = 16  # of heat maps; the service collects its own batches


class OnnxEncoder(Encoder):
    """A folder of ``mmkd export --format onnx`` or ``int8``; see `mmkd.serving.predictor.ServedEncoder`."""

    batch_size = BATCH_SIZE

    def __init__(self, folder: Path) -> None:
        """Load the towers; `OMP_NUM_THREADS` limits the threads of ONNX Runtime.

        Raises:
            ValueError: a folder in another format, one without its provenance, or a damaged one.
        """
        metadata = read_object(folder / DESCRIPTION)
        form = metadata.get("format")
        if form not in ("onnx", "int8"):
            raise ValueError(
                f"{folder} holds towers as {form}, which can run code when they are loaded; serve "
                "the model, or `mmkd export --format onnx`"
            )
        if not isinstance(metadata.get("provenance"), dict):
            raise ValueError(f"{folder} does not name its model; export it again with this version: `mmkd export`")
        self.provenance: dict[str, Any] = metadata["provenance"]
        try:
            self.dim: int = metadata["dim"]
            if not 1 <= metadata["image"]["side"] <= metadata["image"]["size"] <= LARGEST_SIDE:
                raise ValueError(f"image: side and size must be 1 to {LARGEST_SIDE}, side the smaller")
            super().__init__(folder, int(os.environ.get("OMP_NUM_THREADS") or 0))
            for vectors in (self.encode_images([Image.new("RGB", (8, 8))]), self.encode_texts(["a"])):
                if vectors.shape != (1, self.dim) or not np.isfinite(vectors).all():
                    raise ValueError(f"the towers give vectors {vectors.shape}, dim is {self.dim}")
        except Exception as error:  # of damaged graphs and tokenizers, their libraries raise anything
            told = " ".join(str(error).split())
            raise ValueError(f"{folder / DESCRIPTION}, or a file that it names, cannot be used: {told}") from error

    prepare_any = Encoder.pixels
    encode_prepared = Encoder.encode_pixels

    def count_tokens(self, texts: Sequence[str]) -> int:
        """Tokens of texts, each up to the context."""
        return int(self.tokens(texts)["attention_mask"].sum())
