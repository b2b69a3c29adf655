"""Explore a folder of images in LightlyStudio, by the vectors of a model folder.

    pip install lightly-studio
    LIGHTLY_STUDIO_ANALYTICS_ENABLED=false python examples/embed_in_lightly_studio.py mmkd-clip pictures

LightlyStudio before 1.2 names the interface `ImageEmbeddingGenerator`.
"""

import sys
from pathlib import Path

import lightly_studio
import torch
from lightly_studio import EmbeddingResult, EmbeddingSpaceSpec
from lightly_studio_serve.embedder import ImageBytesEmbedder, ImagePathEmbedder, TextEmbedder

from mmkd.data.images import open_image
from mmkd.encoders.zoo import load_encoder


class MMKDClipEmbedder(ImagePathEmbedder, ImageBytesEmbedder, TextEmbedder):
    """A model folder as an embedder of images and texts."""

    def __init__(self, folder: str) -> None:
        self.encoder = load_encoder(folder, "cuda" if torch.cuda.is_available() else "cpu")

    def embedding_space_spec(self) -> EmbeddingSpaceSpec:
        """Name the space by the weights' fingerprint."""
        return EmbeddingSpaceSpec(space_key=self.encoder.provenance["fingerprint"], dimension=self.encoder.dim)

    def embed_images(self, paths: list[str]) -> EmbeddingResult:
        """Embed the images of a dataset; DICOM and NIfTI too."""
        return result(self.encoder.encode_images([open_image(Path(path)) for path in paths]))

    def embed_image_bytes(self, images: list[bytes]) -> EmbeddingResult:
        """Embed images that are dropped into the search bar."""
        return result(self.encoder.encode_images([open_image(image) for image in images]))

    def embed_text(self, texts: list[str]) -> EmbeddingResult:
        """Embed queries."""
        return result(self.encoder.encode_texts(texts))


def result(vectors: torch.Tensor) -> EmbeddingResult:
    return EmbeddingResult(embeddings=vectors.numpy(), kept_indices=list(range(len(vectors))))


def main(folder: str, pictures: str) -> None:
    lightly_studio.register_default_embedder(embedder=MMKDClipEmbedder(folder))
    dataset = lightly_studio.ImageDataset.create()
    dataset.add_images_from_path(path=pictures)
    lightly_studio.start_gui()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
