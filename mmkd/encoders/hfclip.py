"""Teachers in transformers' form: CLIP-like models with two feature methods, among them `MMKDClipModel`.

Images go through the slow PIL backend, with which the published features were made; the torchvision backend differs by
up to one grey level. UniMed-CLIP is one checkpoint file in the form of the published student and becomes such a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmkd.encoders.authors_checkpoint import from_authors, infer_config
from mmkd.encoders.encoder import DualEncoder, FastSquare, NoTokens, with_input_of
from mmkd.encoders.spec import TeacherSpec, describe
from mmkd.encoders.weights import (
    TOKENIZER_FILES,
    companion,
    fetch,
    first_file,
    load_strictly,
    load_transformers,
    read_state_dict,
)
from modeling_mmkd import (
    MMKDClipModel,  # the import also registers it with the Auto classes
    MMKDClipProcessor,
)

CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json", *TOKENIZER_FILES)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class HFClipEncoder(DualEncoder):
    """A transformers model with ``get_image_features`` and ``get_text_features``, and its processor."""

    def __init__(
        self, name: str, dim: int, provenance: dict[str, Any], model: Any, processor: Any, context: int
    ) -> None:
        """Take a model in evaluation mode."""
        super().__init__(name, dim, provenance)
        self.model = model
        self.processor = processor
        self.context = context

    def prepare(self, image: Image.Image) -> Tensor:
        """See `DualEncoder`; (3, height, width)."""
        return self.processor(images=[image], return_tensors="pt")["pixel_values"][0]

    def image_features(self, prepared: list[Tensor]) -> Tensor:
        """See `DualEncoder`."""
        own = {"pooled_only": True} if isinstance(self.model, MMKDClipModel) else {}
        pixels = torch.stack(prepared).to(self.model.device)
        return _pooled(self.model.get_image_features(pixel_values=pixels, **own))

    def image_and_pooled(self, prepared: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """See `DualEncoder`; models such as SigLIP have no projection."""
        projection = getattr(self.model, "visual_projection", None)
        if projection is None:
            return self.image_features(prepared), None
        return with_input_of(projection, lambda: self.image_features(prepared))

    def text_features(self, texts: list[str]) -> Tensor:
        """See `DualEncoder`."""
        return _pooled(self.model.get_text_features(**self._tokens(texts)))

    def image_token_features(self, prepared: list[Tensor]) -> Tensor:
        """See `DualEncoder`; the rows of a convolutional tower's map follow one another."""
        states = self._tower("vision_model")(pixel_values=torch.stack(prepared).to(self.model.device)).last_hidden_state
        return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states

    def text_token_features(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """See `DualEncoder`."""
        inputs = self._tokens(texts)
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        return self._tower("text_model")(input_ids=ids, attention_mask=mask).last_hidden_state, mask.bool()

    def _tokens(self, texts: list[str]) -> Any:
        """Tokens of a batch; SigLIP pools the last position of the whole context, other towers a text's own tokens."""
        padding = "max_length" if "siglip" in self.model.config.model_type else True
        options = {"padding": padding, "truncation": True, "max_length": self.context, "return_tensors": "pt"}
        return self.processor(text=texts, **options).to(self.model.device)

    def _tower(self, name: str) -> Any:
        tower = getattr(self.model, name, None)
        if tower is None:
            raise NoTokens(f"{self.name}: {type(self.model).__name__} has no {name} that gives token sequences")
        return tower


def load(spec: TeacherSpec, device: str) -> HFClipEncoder:
    """Load a teacher of this form.

    Raises:
        FileNotFoundError: the folder, the repository or a file is not there.
        ValueError: keys that do not fit, or a model without the two feature methods.
    """
    from transformers import AutoModel, AutoProcessor

    names = spec.files or WEIGHT_FILES
    local = Path(spec.weights)
    sharded = local.is_dir() and any((local / name).is_file() for name in SHARDED)
    wanted = [*CONFIG_FILES, *(["*.py"] if spec.trust_remote_code else [])]
    folder = fetch(spec.weights, wanted, () if sharded else names, revision=spec.revision, gated=spec.gated)
    trusted = spec.trust_remote_code
    model = load_transformers(AutoModel, spec.weights, folder, trust_remote_code=trusted)
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise ValueError(f"{spec.weights}: {type(model).__name__} has no get_image_features and get_text_features")
    processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=trusted)
    return build(spec, model, device, processor, sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")))


def load_unimed(spec: TeacherSpec, device: str) -> HFClipEncoder:
    """Load UniMed-CLIP; the sizes of the towers are read off the tensors, heads are 64 wide.

    Raises:
        FileNotFoundError: the checkpoint or the tokenizer is not there.
        ValueError: keys that do not fit.
    """
    from transformers import AutoTokenizer, CLIPImageProcessorPil

    checkpoint = Path(spec.weights)
    if not checkpoint.is_file():
        folder = fetch(spec.weights, TOKENIZER_FILES, spec.files, revision=spec.revision, gated=spec.gated)
        checkpoint = first_file(folder, spec.files)
    state = read_state_dict(checkpoint)
    config = infer_config(state)
    model: Any = MMKDClipModel(config)
    load_strictly(model, from_authors(state), str(checkpoint))
    size = config.vision_config.image_size
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size=size, image_mean=list(spec.mean), image_std=list(spec.std)
    )
    tokenizer = AutoTokenizer.from_pretrained(
        companion(checkpoint.parent, spec.text_model, TOKENIZER_FILES), trust_remote_code=False
    )
    processor = MMKDClipProcessor(image_processor, tokenizer)
    return build(spec, model, device, processor, [checkpoint])


def build(spec: TeacherSpec, model: Any, device: str, processor: Any, weight_files: list[Path]) -> HFClipEncoder:
    """The encoder of a loaded model.

    The context is the shortest of specification, tokenizer and position embeddings. Convolutions run with channels
    last, which takes about half the time on CPUs.
    """
    model = model.to(device=device, memory_format=torch.channels_last)
    limits = (spec.context, processor.tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
    context = min(limit for limit in limits if limit)
    provenance = describe(
        spec,
        weight_files,
        preprocessing=_preprocessing(processor.image_processor),
        tokenizer=type(processor.tokenizer).__name__,
        context=context,
        pooling=f"{type(model).__name__}.get_text_features",
        logit_scale=getattr(model, "logit_scale", None),
    )
    encoder = HFClipEncoder(spec.name, spec.dim, provenance, model, processor, context)
    encoder.fast_prepare = _fast_square(processor.image_processor)
    with torch.inference_mode():
        encoder.dim = encoder.text_features(["a"]).shape[-1]
    return encoder


def _fast_square(image_processor: Any) -> FastSquare | None:
    """The fast form of an image processor, if it is of the usual kind."""
    side = dict(image_processor.size).get("shortest_edge")
    usual = (
        getattr(image_processor, "do_center_crop", False)
        and dict(image_processor.crop_size) == {"height": side, "width": side}
        and int(image_processor.resample) == Image.Resampling.BICUBIC
    )
    return FastSquare(side, image_processor.image_mean, image_processor.image_std, "floor") if side and usual else None


def _preprocessing(image_processor: Any) -> str:
    """All settings that affect the pixels."""
    facts = [f"size {dict(image_processor.size)}"]
    if getattr(image_processor, "do_center_crop", False):
        facts.append(f"centre crop {dict(image_processor.crop_size)}")
    facts.append(f"resample {int(image_processor.resample)}")
    facts += [f"mean {tuple(image_processor.image_mean)}", f"std {tuple(image_processor.image_std)}"]
    return f"{type(image_processor).__name__} {' '.join(facts)}"


def _pooled(output: Any) -> Tensor:
    """The projected features; since version 5, transformers wraps them."""
    return output if isinstance(output, Tensor) else output.pooler_output
