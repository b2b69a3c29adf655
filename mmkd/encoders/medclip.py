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

from mmkd.encoders.spec import TeacherSpec, describe
from mmkd.encoders.tower_pair import TowerPairEncoder, Towers, bert_files
from mmkd.encoders.weights import companion, first_file, is_stray, load_config, load_transformers, read_state_dict
from mmkd.files import atomic_folder, extract_zip

WEIGHT_FILE = "pytorch_model.bin"
VISION, TEXT, HEAD = "vision_model.model.", "text_model.model.", "projection_head.weight"
EXPECTED = (f"vision_model.{HEAD}", f"text_model.{HEAD}", "logit_scale")
AVERAGED_LAYERS = (1, 2, -1)


def load(spec: TeacherSpec, device: str) -> TowerPairEncoder:
    """Load a teacher of this form from the folder of the unpacked archive.

    Raises:
        FileNotFoundError: the folder, or a tower's configuration or tokenizer, is not there.
        ValueError: keys that do not fit.
    """
    from transformers import BertModel, SwinModel

    folder = _folder(spec.weights)
    file = first_file(folder, [WEIGHT_FILE])
    state = read_state_dict(file)
    missing = [key for key in EXPECTED if key not in state]
    unexpected = [key for key in state if key not in EXPECTED and not key.startswith((VISION, TEXT))]
    if missing or unexpected:
        raise ValueError(f"{file} does not fit MedCLIP; missing: {missing}; unexpected: {unexpected}")
    swin = load_config(companion(folder, spec.vision_model, ["config.json"]))
    bert, tokenizer = bert_files(folder, spec.text_model)
    vision = load_transformers(SwinModel, str(file), config=swin, state_dict=_part(state, VISION)).to(device)
    text = load_transformers(BertModel, str(file), config=bert, state_dict=_part(state, TEXT)).to(device)
    size, mean, std = swin.image_size, spec.mean[0], spec.std[0]
    provenance = describe(
        spec,
        [file],
        preprocessing=f"grey, square on black, {size} x {size} bicubic, mean {mean} std {std}",
        tokenizer=spec.text_model,
        context=spec.context,
        pooling="mean over the text's tokens and hidden states 1, 2 and last",
        logit_scale=state["logit_scale"],
    )
    towers = Towers(
        image=lambda pixels: vision(pixels).pooler_output,
        image_projection=state[EXPECTED[0]].float().T.to(device),
        text=text,
        text_projection=state[EXPECTED[1]].float().T.to(device),
        pooling=mean_of_layers,
        needs_hidden_states=True,
    )

    def transform(image: Image.Image) -> Tensor:
        grey = np.asarray(grey_square(image, size), dtype=np.float32) / 255
        return torch.from_numpy((grey - mean) / std).float().expand(3, -1, -1)

    return TowerPairEncoder(spec.name, provenance, towers, transform, tokenizer, spec.context)


def mean_of_layers(output: Any, attention_mask: Tensor) -> Tensor:
    """Mean over a text's tokens and over three layers, (batch, width)."""
    layers = torch.stack([output.hidden_states[layer] for layer in AVERAGED_LAYERS]).mean(dim=0)
    mask = attention_mask.unsqueeze(-1).to(layers.dtype)
    return (layers * mask).sum(dim=1) / mask.sum(dim=1)


def grey_square(image: Image.Image, size: int) -> Image.Image:
    """An image in grey, centred on a black square of at least ``size`` pixels, resized to ``size``."""
    side = max(size, *image.size)
    square = Image.new("L", (side, side))
    square.paste(image.convert("L"), ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def _folder(weights: str) -> Path:
    """The folder itself, or the content of a zip, unpacked beside it."""
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
            "YAML file of form medclip"
        )
    return path


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One tower's tensors under its own names, without derived buffers."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix) and not is_stray(k)}
