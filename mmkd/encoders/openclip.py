"""Teachers in open_clip's form: a folder with ``open_clip_config.json``, or an architecture's name and one weight file.

The model is built here from its configuration and loaded strictly, instead of through ``open_clip.create_model``, which
downloads the text tower's configuration even when the weights are in a folder, and silently falls back to default
preprocessing when the configuration states none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmkd.command.settings import nearest
from mmkd.encoders.encoder import DualEncoder, FastSquare, NoTokens
from mmkd.encoders.hooks import with_input_of
from mmkd.encoders.spec import TeacherSpec, describe
from mmkd.encoders.weights import TOKENIZER_FILES, companion, fetch, first_file, load_strictly, read_state_dict
from mmkd.files import is_inside, read_object
from modeling_mmkd.modeling_mmkd import check_bounds

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
LAST_LAYER = {"normalize_intermediates": True, "output_fmt": "NLC"}


class OpenClipEncoder(DualEncoder):
    """An open_clip model with its own transform and tokenizer."""

    def __init__(
        self,
        name: str,
        dim: int,
        provenance: dict[str, Any],
        model: Any,
        transform: Any,
        tokenizer: Any,
        padding: int | None,
    ) -> None:
        """Take an open_clip model in evaluation mode; ``padding`` is the token whose columns may be left out."""
        super().__init__(name, dim, provenance)
        self.model = model
        self.transform = transform
        self.tokenizer = tokenizer
        self.padding = padding
        self.device = next(model.parameters()).device

    def prepare(self, image: Image.Image) -> Tensor:
        """See `DualEncoder`; (3, size, size)."""
        return self.transform(image)

    def image_features(self, prepared: list[Tensor]) -> Tensor:
        """See `DualEncoder`."""
        return self.model.encode_image(torch.stack(prepared).to(self.device))

    def image_and_pooled(self, prepared: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """See `DualEncoder`; a ResNet's attention pool ends in the shared space without a projection."""
        visual = self.model.visual
        projection = getattr(visual, "proj", None)
        if isinstance(projection, nn.Parameter):
            visual.proj = None  # without its matrix a ViT returns the features before the projection
            try:
                pooled = self.image_features(prepared)
            finally:
                visual.proj = projection
            return pooled @ projection, pooled
        head = getattr(visual, "head", None)
        if isinstance(head, nn.Sequential) and any(name in ("proj", "mlp") for name, _ in head.named_children()):
            return with_input_of(head, lambda: self.image_features(prepared))
        return self.image_features(prepared), None

    def text_features(self, texts: list[str]) -> Tensor:
        """See `DualEncoder`."""
        return self.model.encode_text(self._tokens(texts))

    def image_token_features(self, prepared: list[Tensor]) -> Tensor:
        """See `DualEncoder`."""
        pixels = torch.stack(prepared).to(self.device)
        found = self.model.visual.forward_intermediates(pixels, indices=1, intermediates_only=True, **LAST_LAYER)
        states = found["image_intermediates"][-1]
        return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states

    def text_token_features(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """See `DualEncoder`."""
        tokens = self._tokens(texts)
        if self.padding is not None:
            mask = tokens != self.padding
            return self.model.text.transformer(input_ids=tokens, attention_mask=mask).last_hidden_state, mask
        if not hasattr(self.model, "transformer"):
            raise NoTokens(f"{self.name}: the text tower of {type(self.model).__name__} gives no token sequence")
        found = self.model.forward_intermediates(
            text=tokens, text_indices=1, intermediates_only=True, normalize_intermediates=True
        )
        return found["text_intermediates"][-1], tokens != 0

    def _tokens(self, texts: list[str]) -> Tensor:
        """Tokens (batch, tokens) without the columns that are padding in every text, if they may be left out."""
        tokens = self.tokenizer(texts)
        if self.padding is not None:
            tokens = tokens[:, : int((tokens != self.padding).sum(dim=1).max())]
        return tokens.to(self.device)


def load(spec: TeacherSpec, device: str) -> OpenClipEncoder:
    """Load a teacher of this form.

    Raises:
        FileNotFoundError: weights, or the text tower's configuration or tokenizer, are not there.
        ValueError: an unknown architecture, keys that do not fit, or a folder that does not state its preprocessing.
    """
    from open_clip.transform import merge_preprocess_dict

    weights, config, stated = _find(spec)
    text_config = config["text_cfg"]
    if spec.context:
        text_config["context_length"] = spec.context
    context = text_config.get("context_length", 77)
    tokenizer, tokenizer_name = _tokenizer(weights.parent, text_config, context)
    try:
        model = _build(weights.parent, config)
    except Exception as error:  # of wrong values, open_clip, timm and torch raise anything
        told = " ".join(str(error).split())
        raise ValueError(f"{weights.parent / CONFIG_FILE} describes no model that can be built: {told}") from error
    load_strictly(model, _renamed(read_state_dict(weights), model), str(weights))
    transform = clip_transform({**merge_preprocess_dict({}, stated), "size": model.visual.image_size})
    provenance = describe(
        spec,
        [weights],
        ["open_clip_torch", "timm"],
        preprocessing=transform.description,
        tokenizer=tokenizer_name,
        context=context,
        pooling=text_config.get("hf_pooler_type") or text_config.get("pool_type", "argmax"),
        logit_scale=model.logit_scale,
    )
    trims = "hf_model_name" in text_config and not text_config.get("tokenizer_mode")
    padding = model.text.config.pad_token_id if trims else None
    model = model.eval().to(device)
    encoder = OpenClipEncoder(spec.name, config["embed_dim"], provenance, model, transform.exact, tokenizer, padding)
    encoder.fast_prepare = transform.fast
    return encoder


@dataclass(frozen=True)
class ClipTransform:
    """open_clip's evaluation preprocessing: the exact transform, its fast form if there is one, and its description."""

    exact: Callable[[Image.Image], Tensor]
    fast: FastSquare | None
    description: str


def clip_transform(options: Mapping[str, Any]) -> ClipTransform:
    """The preprocessing of open_clip's ``PreprocessCfg(**options)``."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(**options)
    height, width = config.size if isinstance(config.size, (tuple, list)) else (config.size,) * 2
    usual = height == width and config.interpolation == "bicubic" and config.resize_mode == "shortest"
    fast = FastSquare(height, config.mean, config.std, "round") if usual else None
    return ClipTransform(image_transform_v2(config, is_train=False), fast, f"open_clip {config}")


def _find(spec: TeacherSpec) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The weight file, the model's configuration, and the preprocessing as stated with the weights."""
    if spec.architecture:
        return find_by_architecture(spec)
    files = spec.files or WEIGHT_FILES
    folder = _fetch(spec, files)
    config = read_object(first_file(folder, [CONFIG_FILE]))
    stated = config.get("preprocess_cfg") or {}
    if "model_cfg" not in config or not {"mean", "std"} <= set(stated):
        raise ValueError(f"{folder / CONFIG_FILE} must state model_cfg and, in preprocess_cfg, mean and std")
    try:
        check_bounds("model_cfg", config["model_cfg"])
        for key, name in config["model_cfg"]["text_cfg"].items():
            if key in ("hf_model_name", "hf_tokenizer_name") and not is_inside(name):
                raise ValueError(f"{key} is {name!r}, which leaves the folder; refused")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error
    return first_file(folder, files), deepcopy(config["model_cfg"]), stated


def find_by_architecture(spec: TeacherSpec) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The weight file, configuration and preprocessing of one of open_clip's named architectures.

    Args:
        spec: with the architecture; its weights are a file, a folder, a Hub id, or a tag of open_clip's.

    Raises:
        FileNotFoundError: the weights are not there, or the Hub cannot be reached; the message says what to do.
        ValueError: an unknown architecture or tag; the message lists the known ones.
    """
    import open_clip

    config = open_clip.get_model_config(spec.architecture)
    if config is None:
        known = open_clip.list_models()
        raise ValueError(
            f"open_clip has no architecture {spec.architecture!r}{nearest(spec.architecture, known)}; "
            f"`open_clip.list_models()` lists all {len(known)}"
        )
    stated = {"mean": tuple(spec.mean), "std": tuple(spec.std)}
    if Path(spec.weights).is_file():
        return Path(spec.weights), config, stated
    tag = open_clip.get_pretrained_cfg(spec.architecture, spec.weights)
    if tag:
        config["quick_gelu"] = tag.get("quick_gelu", config.get("quick_gelu", False))
        repository, _, file = tag["hf_hub"].rpartition("/")
        names = [file] if file else WEIGHT_FILES
        return first_file(fetch(repository, [], names), names), config, {**stated, **tag}
    if not Path(spec.weights).is_dir() and spec.weights.count("/") != 1:
        tags = open_clip.list_pretrained_tags_by_model(spec.architecture)
        raise ValueError(
            f"{spec.weights!r} is not a file, folder, Hub id or tag of {spec.architecture}; tags: {', '.join(tags)}"
        )
    files = spec.files or WEIGHT_FILES
    return first_file(_fetch(spec, files), files), config, stated


def _fetch(spec: TeacherSpec, files: Sequence[str]) -> Path:
    patterns = [CONFIG_FILE, "config.json", *TOKENIZER_FILES]
    return fetch(spec.weights, patterns, files, revision=spec.revision, repo_type=spec.repo_type, gated=spec.gated)


def _tokenizer(folder: Path, text_config: dict[str, Any], context: int) -> tuple[Any, str]:
    """open_clip's own tokenizer, or the text tower's: in the folder, in a sub-folder with its name, or from the Hub."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    name = text_config.get("hf_tokenizer_name")
    options = dict(text_config.get("tokenizer_kwargs") or {})
    if not name:
        return SimpleTokenizer(context_length=context, **options), "open_clip byte-pair encoding"
    options["trust_remote_code"] = False
    own = any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt", "vocab.json"))
    source = folder if own else companion(folder, name, ["config.json", *TOKENIZER_FILES])
    mode = text_config.get("tokenizer_mode")
    return HFTokenizer(str(source), context_length=context, tokenizer_mode=mode, **options), name


def _build(folder: Path, model_config: dict[str, Any]) -> Any:
    """The model with random weights; nothing is downloaded but a text tower's ``config.json``."""
    import open_clip

    config = deepcopy(model_config)
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    name = config["text_cfg"].get("hf_model_name")
    if name:
        config["text_cfg"]["hf_model_name"] = str(companion(folder, name, ["config.json"]))
        config["text_cfg"]["hf_model_pretrained"] = False
    custom = config.pop("custom_text", False) or bool(name)
    return open_clip.CustomTextCLIP(**config) if custom else open_clip.CLIP(**config)


def _renamed(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A state dict of the older layout (text tower at the top, another shape of the scale) in the model's form."""
    from open_clip.model import convert_to_custom_text_state_dict

    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    if "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(model.logit_scale.shape)
    return state
