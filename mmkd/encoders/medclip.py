"""MedCLIP: Swin-Tiny and Bio_ClinicalBERT, each with a linear projection, trained on chest radiographs.

Images are made grey, padded to a square and normalized with one mean. The text feature is the mean over tokens and over
hidden states 1, 2 and last. The authors' code takes that mean over padding too, which makes a text's feature depend on
its batch; here it is over the text's own tokens, which is what their code gives for a text alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.row import TeacherRow, describe
from mmkd.encoders.weights import TOKENIZER_FILES, companion, first_file, is_stray, load_transformers, read_state_dict
from mmkd.files import atomic_folder, extract_zip

WEIGHT_FILE = "pytorch_model.bin"
VISION, TEXT, HEAD = "vision_model.model.", "text_model.model.", "projection_head.weight"
EXPECTED = (f"vision_model.{HEAD}", f"text_model.{HEAD}", "logit_scale")
AVERAGED_LAYERS = (1, 2, -1)


class MedClipEncoder(DualEncoder):
    """The two towers and their projections (dim, width)."""

    def __init__(
        self, row: TeacherRow, provenance: dict[str, Any], vision: Any, text: Any, heads: list[Tensor], tokenizer: Any
    ) -> None:
        """Take towers in evaluation mode and the image and text projections."""
        super().__init__(row.name, len(heads[0]), provenance)
        self.vision = vision
        self.text = text
        self.image_head, self.text_head = heads
        self.tokenizer = tokenizer
        self.context = row.context
        self.mean, self.std = row.mean[0], row.std[0]

    def prepare(self, image: Image.Image) -> Tensor:
        """See `DualEncoder`; (size, size)."""
        grey = np.asarray(grey_square(image, self.vision.config.image_size), dtype=np.float32) / 255
        return torch.from_numpy((grey - self.mean) / self.std).float()

    def image_features(self, prepared: list[Tensor]) -> Tensor:
        """See `DualEncoder`."""
        return self.image_and_pooled(prepared)[0]

    def image_and_pooled(self, prepared: list[Tensor]) -> tuple[Tensor, Tensor]:
        """See `DualEncoder`."""
        pixels = torch.stack(prepared).to(self.image_head.device).unsqueeze(1).expand(-1, 3, -1, -1)
        pooled = self.vision(pixels).pooler_output
        return pooled @ self.image_head.T, pooled

    def text_features(self, texts: list[str]) -> Tensor:
        """See `DualEncoder`."""
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=self.context, return_tensors="pt").to(
            self.text_head.device
        )
        states = self.text(**inputs, output_hidden_states=True).hidden_states
        layers = torch.stack([states[layer] for layer in AVERAGED_LAYERS]).mean(dim=0)
        mask = inputs["attention_mask"].unsqueeze(-1).to(layers.dtype)
        return (layers * mask).sum(dim=1) / mask.sum(dim=1) @ self.text_head.T


def load(row: TeacherRow, device: str) -> MedClipEncoder:
    """Load a teacher of this form from the unpacked archive's folder.

    Raises:
        FileNotFoundError: the folder, or a tower's configuration or tokenizer, is not there.
        ValueError: keys that do not fit.
    """
    from transformers import AutoConfig, AutoTokenizer, BertModel, SwinModel

    folder = _folder(row.weights)
    file = first_file(folder, [WEIGHT_FILE])
    state = read_state_dict(file)
    missing = [key for key in EXPECTED if key not in state]
    unexpected = [key for key in state if key not in EXPECTED and not key.startswith((VISION, TEXT))]
    if missing or unexpected:
        raise ValueError(f"{file} does not fit MedCLIP; missing: {missing}; unexpected: {unexpected}")
    swin = companion(folder, row.vision_model, ["config.json"])
    bert = companion(folder, row.text_model, ["config.json", *TOKENIZER_FILES])
    towers = [
        load_transformers(model, str(file), config=AutoConfig.from_pretrained(path), state_dict=_part(state, prefix))
        for model, path, prefix in ((SwinModel, swin, VISION), (BertModel, bert, TEXT))
    ]
    vision, text = (tower.to(device) for tower in towers)
    size = vision.config.image_size
    provenance = describe(
        row,
        [file],
        [],
        preprocessing=f"grey, square on black, {size} x {size} bicubic, mean {row.mean[0]} std {row.std[0]}",
        tokenizer=row.text_model,
        context=row.context,
        pooling="mean over the text's tokens and hidden states 1, 2 and last",
    )
    heads = [state[key].float().to(device) for key in EXPECTED[:2]]
    return MedClipEncoder(row, provenance, vision, text, heads, AutoTokenizer.from_pretrained(bert))


def grey_square(image: Image.Image, size: int) -> Image.Image:
    """An image in grey, centred on a black square of at least ``size`` pixels, resized to ``size``."""
    side = max(size, *image.size)
    square = Image.new("L", (side, side))
    square.paste(image.convert("L"), ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def _folder(weights: str) -> Path:
    """The folder itself, or what a zip holds, unpacked beside it."""
    path = Path(weights)
    if path.suffix == ".zip" and path.is_file():
        folder = path.with_suffix("")
        if not folder.is_dir():
            with atomic_folder(folder) as temporary:
                extract_zip(path, temporary)
        return folder
    if not path.is_dir():
        raise FileNotFoundError(
            f"MedCLIP's weights are not on the Hub: download {weights}, unpack it, and give the folder as weights in a "
            "YAML row of form medclip"
        )
    return path


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One tower's tensors under its own names, without derived buffers."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix) and not is_stray(k)}
