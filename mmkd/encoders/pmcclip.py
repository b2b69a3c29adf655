"""PMC-CLIP: CLIP's modified ResNet-50 and PubMedBERT, published as three separate weight files.

The text feature is the first token of the last hidden state times the projection; taking BERT's pooler instead, as one
published example does, gives near-chance scores. Whether the attention pool has 32 heads (the training configuration)
or 8 (a public port) cannot be read off the weights: ``heads`` in the teacher's row decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmkd.encoders.encoder import DualEncoder, FastSquare
from mmkd.encoders.row import TeacherRow, describe
from mmkd.encoders.weights import (
    TOKENIZER_FILES,
    companion,
    fetch,
    first_file,
    load_strictly,
    read_state_dict,
    read_tensors,
)

IMAGE_FILE, TEXT_FILE, PROJECTION_FILE = "image_encoder(resnet50).pth", "text_encoder.pth", "text_projection_layer.pth"


class PmcClipEncoder(DualEncoder):
    """The two towers and the text projection (width, dim)."""

    def __init__(
        self,
        row: TeacherRow,
        provenance: dict[str, Any],
        vision: Any,
        text: Any,
        projection: Tensor,
        transform: Any,
        tokenizer: Any,
    ) -> None:
        """Take towers in evaluation mode."""
        super().__init__(row.name, projection.shape[1], provenance)
        self.vision = vision
        self.text = text
        self.projection = projection
        self.transform = transform
        self.tokenizer = tokenizer
        self.context = row.context

    def prepare(self, image: Image.Image) -> Tensor:
        """See `DualEncoder`; (3, size, size)."""
        return self.transform(image)

    def image_features(self, prepared: list[Tensor]) -> Tensor:
        """See `DualEncoder`."""
        return self.vision(torch.stack(prepared).to(self.projection.device))

    def text_features(self, texts: list[str]) -> Tensor:
        """See `DualEncoder`."""
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=self.context, return_tensors="pt").to(
            self.projection.device
        )
        return self.text(**inputs).last_hidden_state[:, 0] @ self.projection


def load(row: TeacherRow, device: str) -> PmcClipEncoder:
    """Load a teacher of this form.

    Raises:
        FileNotFoundError: one of the three files, or PubMedBERT's configuration or tokenizer, is not there.
        ValueError: keys that do not fit, or a projection of another width.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from transformers import AutoConfig, AutoTokenizer, BertModel

    names = (IMAGE_FILE, TEXT_FILE, PROJECTION_FILE)
    folder = fetch(row.weights, names, repo_type=row.repo_type, revision=row.revision, gated=row.gated)
    files = [first_file(folder, [name]) for name in names]
    vision = _vision_tower(read_state_dict(files[0]), row.heads, str(files[0]))
    bert = companion(folder, row.text_model, ["config.json", *TOKENIZER_FILES])
    state = read_state_dict(files[1])
    text: Any = BertModel(AutoConfig.from_pretrained(bert), add_pooling_layer="pooler.dense.weight" in state)
    load_strictly(text, state, str(files[1]))
    projection = read_tensors(files[2])
    if not isinstance(projection, Tensor) or projection.ndim != 2 or len(projection) != text.config.hidden_size:
        raise ValueError(f"{files[2]} must hold one matrix with {text.config.hidden_size} rows")
    preprocess = PreprocessCfg(size=vision.image_size, mean=tuple(row.mean), std=tuple(row.std))
    provenance = describe(
        row,
        files,
        ["open_clip_torch"],
        preprocessing=f"open_clip {preprocess}",
        tokenizer=row.text_model,
        context=row.context,
        pooling=f"last hidden state, first token; {row.heads} heads in the image tower's attention pool",
    )
    transform, tokenizer = image_transform_v2(preprocess, is_train=False), AutoTokenizer.from_pretrained(bert)
    weight = projection.detach().float().to(device)
    encoder = PmcClipEncoder(row, provenance, vision.to(device), text.to(device), weight, transform, tokenizer)
    encoder.fast_prepare = FastSquare(vision.image_size, row.mean, row.std, "round")
    return encoder


def _vision_tower(state: Mapping[str, Tensor], heads: int, source: str) -> Any:
    """CLIP's modified ResNet with the sizes that the tensors show."""
    from open_clip.modified_resnet import ModifiedResNet

    needed = ("conv1.weight", "attnpool.positional_embedding", "attnpool.c_proj.weight")
    absent = [key for key in needed if key not in state]
    if absent:
        raise ValueError(f"{source} is not a modified ResNet's state dict: missing {', '.join(absent)}")
    width, dim = 2 * len(state["conv1.weight"]), len(state["attnpool.c_proj.weight"])
    if (32 * width) % heads:
        raise ValueError(f"{heads} heads do not divide the attention pool's width {32 * width}; set heads in the row")
    tower = ModifiedResNet(_layers(state), dim, heads, 32 * _grid(state["attnpool.positional_embedding"]), width)
    load_strictly(tower, state, source)
    return tower


def _layers(state: Mapping[str, Tensor]) -> list[int]:
    """Number of blocks in each of the four stages."""
    found = [re.match(r"layer(\d)\.(\d+)\.", key) for key in state]
    return [1 + max((int(m[2]) for m in found if m and m[1] == str(stage)), default=-1) for stage in range(1, 5)]


def _grid(positions: Tensor) -> int:
    """Side of the last feature map."""
    return round((len(positions) - 1) ** 0.5)
