"""Teachers that are published as two separate towers: an image tower and a BERT, each with a projection of its own.

PMC-CLIP is CLIP's modified ResNet-50 and PubMedBERT in three weight files. Its text feature is the first token of the
last hidden state times the projection; taking BERT's pooler instead, as one published example does, gives near-chance
scores. The weights do not show whether the attention pool has 32 heads (the training configuration) or 8 (a public
port): ``heads`` in the teacher's specification decides.

MedCLIP is Swin-Tiny and Bio_ClinicalBERT, trained on chest radiographs. Images are made grey, padded to a square and
normalized with one mean. The text feature is the mean over tokens and over hidden states 1, 2 and last. The authors'
code takes that mean over padding too, which makes a text's feature depend on its batch; here it is over the text's own
tokens, which is what their code gives for a text alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.openclip import clip_transform
from mmkd.encoders.spec import TeacherSpec, describe
from mmkd.encoders.weights import (
    TOKENIZER_FILES,
    companion,
    fetch,
    first_file,
    is_stray,
    load_config,
    load_strictly,
    load_transformers,
    read_part,
    read_state_dict,
    read_tensors,
)
from mmkd.files import atomic_folder, extract_zip

IMAGE_FILE, TEXT_FILE, PROJECTION_FILE = "image_encoder(resnet50).pth", "text_encoder.pth", "text_projection_layer.pth"
MEDCLIP_FILE = "pytorch_model.bin"
VISION, TEXT, HEAD = "vision_model.model.", "text_model.model.", "projection_head.weight"
EXPECTED = (f"vision_model.{HEAD}", f"text_model.{HEAD}", "logit_scale")
AVERAGED_LAYERS = (1, 2, -1)

# Hidden states and attention mask of a text tower to one vector a text, (batch, width).
Pooling = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Towers:
    """The parts of a tower pair, in evaluation mode.

    Attributes:
        image: pixels (batch, 3, size, size) to pooled features (batch, width).
        image_projection: (width, dim); None where the image tower ends in the shared space.
        text: a BERT.
        text_projection: (width, dim).
        pooling: of the text tower's output.
        needs_hidden_states: whether the pooling reads the hidden states of every layer.
    """

    image: Callable[[Tensor], Tensor]
    image_projection: Tensor | None
    text: nn.Module
    text_projection: Tensor
    pooling: Pooling
    needs_hidden_states: bool = False


class TowerPairEncoder(DualEncoder):
    """An image tower, a BERT with its tokenizer, and their projections."""

    def __init__(
        self,
        name: str,
        provenance: dict[str, Any],
        towers: Towers,
        transform: Callable[[Image.Image], Tensor],
        tokenizer: Any,
        context: int,
    ) -> None:
        """Take towers on one device."""
        super().__init__(name, towers.text_projection.shape[1], provenance)
        self.towers, self.transform, self.tokenizer, self.context = towers, transform, tokenizer, context
        self.device = towers.text_projection.device

    def prepare(self, image: Image.Image) -> Tensor:
        """See `DualEncoder`; (3, size, size)."""
        return self.transform(image)

    def image_features(self, prepared: list[Tensor]) -> Tensor:
        """See `DualEncoder`."""
        return self.image_and_pooled(prepared)[0]

    def image_and_pooled(self, prepared: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """See `DualEncoder`."""
        features = self.towers.image(torch.stack(prepared).to(self.device))
        if self.towers.image_projection is None:
            return features, None
        return features @ self.towers.image_projection, features

    def text_features(self, texts: list[str]) -> Tensor:
        """See `DualEncoder`; texts are padded to the longest of the batch."""
        options = {"padding": True, "truncation": True, "max_length": self.context, "return_tensors": "pt"}
        inputs = self.tokenizer(texts, **options).to(self.device)
        output = self.towers.text(**inputs, output_hidden_states=self.towers.needs_hidden_states)
        return self.towers.pooling(output, inputs["attention_mask"]) @ self.towers.text_projection


def bert_files(folder: Path, hub_id: str) -> tuple[Any, Any]:
    """Configuration and tokenizer of the BERT that a teacher builds on: in a sub-folder of ``folder``, or on the Hub.

    Raises:
        FileNotFoundError: neither is there.
    """
    from transformers import AutoTokenizer

    bert = companion(folder, hub_id, ["config.json", *TOKENIZER_FILES])
    config = load_config(bert)
    return config, read_part(AutoTokenizer, bert)


def load_pmcclip(spec: TeacherSpec, device: str) -> TowerPairEncoder:
    """Load PMC-CLIP.

    Raises:
        FileNotFoundError: one of the three files, or PubMedBERT's configuration or tokenizer, is not there.
        ValueError: keys that do not fit, or a projection of another width.
    """
    from transformers import BertModel

    names = (IMAGE_FILE, TEXT_FILE, PROJECTION_FILE)
    folder = fetch(spec.weights, names, repo_type=spec.repo_type, revision=spec.revision, gated=spec.gated)
    files = [first_file(folder, [name]) for name in names]
    vision = _modified_resnet(read_state_dict(files[0]), spec.heads, str(files[0]))
    config, tokenizer = bert_files(folder, spec.text_model)
    state = read_state_dict(files[1])
    text: Any = BertModel(config, add_pooling_layer="pooler.dense.weight" in state)
    load_strictly(text, state, str(files[1]))
    projection = read_tensors(files[2])
    if not isinstance(projection, Tensor) or projection.ndim != 2 or len(projection) != text.config.hidden_size:
        raise ValueError(f"{files[2]} must hold one matrix with {text.config.hidden_size} rows")
    transform = clip_transform({"size": vision.image_size, "mean": tuple(spec.mean), "std": tuple(spec.std)})
    provenance = describe(
        spec,
        files,
        ["open_clip_torch"],
        preprocessing=transform.description,
        tokenizer=spec.text_model,
        context=spec.context,
        pooling=f"last hidden state, first token; {spec.heads} heads in the image tower's attention pool",
        logit_scale=None,  # in none of the three files
    )
    towers = Towers(
        image=vision.to(device),
        image_projection=None,
        text=text.to(device),
        text_projection=projection.detach().float().to(device),
        pooling=lambda output, _: output.last_hidden_state[:, 0],
    )
    encoder = TowerPairEncoder(spec.name, provenance, towers, transform.exact, tokenizer, spec.context)
    encoder.fast_prepare = transform.fast
    return encoder


def _modified_resnet(state: Mapping[str, Tensor], heads: int, source: str) -> Any:
    """CLIP's modified ResNet with the sizes that the tensors show."""
    from open_clip.modified_resnet import ModifiedResNet

    needed = ("conv1.weight", "attnpool.positional_embedding", "attnpool.c_proj.weight")
    absent = [key for key in needed if key not in state]
    if absent:
        raise ValueError(f"{source} is not a modified ResNet's state dict: missing {', '.join(absent)}")
    width, dim = 2 * len(state["conv1.weight"]), len(state["attnpool.c_proj.weight"])
    if (32 * width) % heads:
        raise ValueError(f"{heads} heads do not divide the attention pool's width {32 * width}; set another heads")
    grid = round((len(state["attnpool.positional_embedding"]) - 1) ** 0.5)  # side of the last feature map
    tower = ModifiedResNet(_layers(state), dim, heads, 32 * grid, width)
    load_strictly(tower, state, source)
    return tower


def _layers(state: Mapping[str, Tensor]) -> list[int]:
    """Number of blocks in each of the four stages."""
    found = [re.match(r"layer(\d)\.(\d+)\.", key) for key in state]
    return [1 + max((int(m[2]) for m in found if m and m[1] == str(stage)), default=-1) for stage in range(1, 5)]


def load_medclip(spec: TeacherSpec, device: str) -> TowerPairEncoder:
    """Load MedCLIP from the folder of the unpacked archive.

    Raises:
        FileNotFoundError: the folder, or a tower's configuration or tokenizer, is not there.
        ValueError: keys that do not fit.
    """
    from transformers import BertModel, SwinModel

    folder = _folder(spec.weights)
    file = first_file(folder, [MEDCLIP_FILE])
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
