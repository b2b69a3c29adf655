"""Teachers in transformers' form: CLIP-like models with two feature methods, among them `MMKDClipModel`.

Images go through the slow PIL backend, with which the published features were made; the torchvision backend differs by
up to one grey level. UniMed-CLIP is one checkpoint file in the form of the published student and becomes such a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from mmkd.encoders.authors_checkpoint import from_authors, infer_config
from mmkd.encoders.encoder import FastSquare, HFClipEncoder
from mmkd.encoders.spec import TeacherSpec, describe
from mmkd.encoders.weights import (
    CONFIG_FILES,
    TOKENIZER_FILES,
    WEIGHT_FILES,
    companion,
    fetch,
    first_file,
    load_strictly,
    load_transformers,
    read_part,
    read_processor,
    read_state_dict,
)
from modeling_mmkd import (
    MMKDClipModel,  # the import also registers it with the Auto classes
    MMKDClipProcessor,
)

SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


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
    patterns = [*CONFIG_FILES, *(["*.py"] if spec.trust_remote_code else [])]
    folder = fetch(spec.weights, patterns, () if sharded else names, revision=spec.revision, gated=spec.gated)
    trusted = spec.trust_remote_code
    model = load_transformers(AutoModel, spec.weights, folder, trust_remote_code=trusted)
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise ValueError(f"{spec.weights}: {type(model).__name__} has no get_image_features and get_text_features")
    processor = read_processor(AutoProcessor, folder, backend="pil", trust_remote_code=trusted)
    return build(spec, model, device, processor, sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")))


def load_towers(spec: TeacherSpec, device: str) -> HFClipEncoder:
    """The towers of a student without its projections: a teacher of relations alone, for ``--relational_only``.

    Pooled outputs of the narrower tower are padded with zeros, which leaves its cosines as they are. A student's own
    starting towers keep it from forgetting what they could tell apart; every gain of other teachers is measured against
    them.

    Raises:
        FileNotFoundError: the folder, the repository or a file is not there.
        ValueError: not a student of this package.
    """
    encoder = load(spec, device)
    model = encoder.model
    if not isinstance(model, MMKDClipModel):
        raise ValueError(f"towers:{spec.weights}: {type(model).__name__} is no MMKDClipModel; give a student's folder")
    projections = (model.visual_projection, model.text_projection)
    widths = [next(m for m in part.modules() if isinstance(m, nn.Linear)).in_features for part in projections]
    encoder.dim = max(widths)
    for name, width in zip(("visual_projection", "text_projection"), widths, strict=True):
        model.add_module(name, nn.ZeroPad1d((0, encoder.dim - width)))
    return encoder


def load_unimed(spec: TeacherSpec, device: str) -> HFClipEncoder:
    """Load UniMed-CLIP; the sizes of the towers follow from the tensors, heads are 64 wide.

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
    tokenizer = read_part(AutoTokenizer, companion(checkpoint.parent, spec.text_model, TOKENIZER_FILES))
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
    """The fast form of an image processor of the usual kind; None for another."""
    side = dict(image_processor.size).get("shortest_edge")
    usual = (
        getattr(image_processor, "do_center_crop", False)
        and dict(image_processor.crop_size) == {"height": side, "width": side}
        and int(image_processor.resample) == Image.Resampling.BICUBIC
    )
    return FastSquare(side, image_processor.image_mean, image_processor.image_std, "floor") if side and usual else None


def _preprocessing(image_processor: Any) -> str:
    """All settings that affect the pixels."""
    settings = [f"size {dict(image_processor.size)}"]
    if getattr(image_processor, "do_center_crop", False):
        settings.append(f"centre crop {dict(image_processor.crop_size)}")
    settings.append(f"resample {int(image_processor.resample)}")
    settings += [f"mean {tuple(image_processor.image_mean)}", f"std {tuple(image_processor.image_std)}"]
    return f"{type(image_processor).__name__} {' '.join(settings)}"
