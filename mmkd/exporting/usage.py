"""Encode images and texts with the two towers in this folder; needs no mmkd-clip, and with ONNX no torch.

    pip install numpy pillow tokenizers onnxruntime        # torch instead of onnxruntime where the towers end in .pt2
    python usage.py picture.png "an MRI of the brain" "a chest radiograph"

In code: ``Encoder(folder).encode_images([open_image(path)])`` and ``.encode_texts([...])``; their products are cosine
similarities. ``pixel_reader`` beside this file reads images as in training, DICOM and NIfTI too (``pip install pydicom
nibabel``). ``export.json`` states how pixels and texts are prepared and which versions made the towers.

A ``.pt2`` file can run code when it is loaded: load only those that you trust. An ``.onnx`` file holds a graph alone.
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from mmkd.data.images import open_image, to_rgb

DESCRIPTION = "export.json"

Tower = Callable[[dict[str, NDArray[Any]]], NDArray[np.float32]]


class Encoder:
    """The two towers of an exported folder.

    Attributes:
        metadata: ``export.json``.
        scale: factor of cosine similarities before a softmax.
    """

    def __init__(self, folder: Path | str, threads: int = 0) -> None:
        """Load towers and tokenizer.

        Args:
            folder: the exported folder.
            threads: of ONNX Runtime; 0 for as many as there are cores.

        Raises:
            ValueError: ``export.json`` names a tower outside the folder, or a program as the tower of a folder of ONNX.
        """
        folder = Path(folder)
        self.metadata: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        self.scale = float(self.metadata["logit_scale"])
        ending = ".pt2" if self.metadata["format"] == "exported-program" else ".onnx"
        paths = [folder / self.metadata[name]["file"] for name in ("image", "text")]
        for path in paths:
            if path.suffix != ending or not path.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{folder / DESCRIPTION} names the tower {path}; allowed: {ending} files in it")
        self._image, self._text = (load_tower(path, threads) for path in paths)
        text = self.metadata["text"]
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(text["context"])
        self._tokenizer.enable_padding(pad_id=text["pad_id"], pad_token=text["pad_token"])

    def encode_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Images of any size to unit vectors, (n, dim)."""
        return self.encode_pixels([self.pixels(image) for image in images])

    def encode_pixels(self, pixels: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Images that `pixels` has prepared to unit vectors, (n, dim)."""
        return self._image({"pixel_values": np.stack(pixels)})

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts to unit vectors, (n, dim); texts longer than the context are truncated."""
        return self._text(self.tokens(texts))

    def pixels(self, image: Image.Image) -> NDArray[np.float32]:
        """An image of any mode as (3, side, side): shortest side to ``size``, bicubic; central square; normalized."""
        image_metadata = self.metadata["image"]
        image = to_rgb(image)
        width, height = image.size
        short, side = image_metadata["size"], image_metadata["side"]
        long = int(short * max(width, height) / min(width, height))
        target = (short, long) if width <= height else (long, short)
        resized = np.asarray(image.resize(target, Image.Resampling(image_metadata["resample"])))
        top, left = (resized.shape[0] - side) // 2, (resized.shape[1] - side) // 2
        cropped = resized[top : top + side, left : left + side].astype(np.float32) * np.float32(1 / 255)
        mean, std = (np.array(image_metadata[key], dtype=np.float32) for key in ("mean", "std"))
        return ((cropped - mean) / std).transpose(2, 0, 1)

    def tokens(self, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """Token ids and mask, each (n, tokens), padded to the longest."""
        cleaned = [" ".join(html.unescape(html.unescape(text)).split()) for text in texts]
        encoded = self._tokenizer.encode_batch(cleaned)
        return {
            "input_ids": np.array([entry.ids for entry in encoded], dtype=np.int64),
            "attention_mask": np.array([entry.attention_mask for entry in encoded], dtype=np.int64),
        }


def load_tower(path: Path, threads: int = 0) -> Tower:
    """A tower from an ``.onnx`` or ``.pt2`` file, as a function of named arrays; a ``.pt2`` file can run code."""
    if path.suffix == ".pt2":
        return _load_program(path)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=onnxruntime.get_available_providers())
    return lambda inputs: session.run(None, inputs)[0]


def _load_program(path: Path) -> Tower:
    import torch

    program = torch.export.load(path).module()

    def tower(inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return program(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()

    return tower


def main() -> None:
    """Print the similarity of each text with an image."""
    picture, *texts = sys.argv[1:]
    encoder = Encoder(Path(__file__).parent)
    logits = encoder.scale * encoder.encode_images([open_image(Path(picture))])[0] @ encoder.encode_texts(texts).T
    shares = np.exp(logits - logits.max())
    for text, share in sorted(zip(texts, shares / shares.sum(), strict=True), key=lambda item: -item[1]):
        print(f"{share:.3f}  {text}")


if __name__ == "__main__":
    main()
