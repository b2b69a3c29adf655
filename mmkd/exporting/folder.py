"""An exported folder: the towers, ``export.json``, the processor, and ``usage.py``, which runs without this package.

``usage.py`` reads images by copies of the modules that read them in training, in the folder ``pixel_reader`` beside it.

A tower maps pixels or tokens to unit vectors, for any batch and text length. As ``torch.export`` programs they are two
files; as ONNX (`mmkd.exporting.onnx_files`) they have the layout of transformers.js and optimum-onnx, whose classes for
CLIP read the folder: ``config.json`` states the form of a CLIP, and the graphs hold everything else.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional
from transformers.utils import IMAGE_PROCESSOR_NAME

from mmkd.data.provenance import installed_versions
from mmkd.exporting.onnx_files import FOLDER, FP16, QUANTIZED, quiet_exporters, write_onnx
from mmkd.exporting.usage import DESCRIPTION, load_tower
from mmkd.files import atomic_write_text, read_json, write_json
from modeling_mmkd import MMKDClipModel

Form = Literal["onnx", "exported-program"]

FILES: dict[Form, dict[str, str]] = {
    "onnx": {"image": f"{FOLDER}/vision_model.onnx", "text": f"{FOLDER}/text_model.onnx"},
    "exported-program": {"image": "image.pt2", "text": "text.pt2"},
}
USAGE = "usage.py"
READER, READER_MODULES = "pixel_reader", ("archives.py", "images.py", "medical.py", "pixel_rules.py")
PACKAGES = ("mmkd-clip", "torch", "transformers", "onnx", "onnxruntime")
TOLERANCE = 1e-4  # largest difference to the model that an export in floating point may have
MAX_BATCH = 65536
NOT_OF_EXPORT = ("processor_config.json", "processing_mmkd.py")  # of a processor that needs this package


class _Part(nn.Module):
    """A part of a model, to be traced."""

    def __init__(self, model: MMKDClipModel) -> None:
        super().__init__()
        self.model = model


class ImageTower(_Part):
    """Pixels to unit vectors."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map `(images, 3, side, side)` to `(images, dim)`."""
        return functional.normalize(self.model.get_image_features(pixel_values, return_dict=True).pooler_output, dim=-1)


class TextTower(_Part):
    """Tokens to unit vectors."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map token ids and mask, each `(texts, tokens)`, to `(texts, dim)`."""
        output = self.model.get_text_features(input_ids, attention_mask, return_dict=True)
        return functional.normalize(output.pooler_output, dim=-1)


class BothTowers(_Part):
    """Pixels and tokens to similarities and unit vectors, with the arguments and outputs of a CLIP."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Similarities `(images, texts)` and `(texts, images)`, text and image vectors."""
        output = self.model(input_ids, pixel_values, attention_mask, return_dict=True)
        return output.logits_per_image, output.logits_per_text, output.text_embeds, output.image_embeds


def towers(model: MMKDClipModel) -> dict[str, nn.Module]:
    """Both towers by name, in evaluation mode."""
    return {"image": ImageTower(model).eval(), "text": TextTower(model).eval()}


def examples(model: MMKDClipModel, side: int, batch: int = 3, tokens: int = 7, seed: int = 0) -> dict[str, Any]:
    """Random inputs of both towers by name; the last text is half padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, model.config.text_config.vocab_size, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, max(1, tokens // 2) :] = 0
    pixels = torch.randn(batch, 3, side, side, generator=generator)
    return {"image": {"pixel_values": pixels}, "text": {"input_ids": ids, "attention_mask": mask}}


def require_exportable(processor: Any, folder: Path) -> None:
    """Refuse a processor that `usage.py` could not replace, before anything is traced.

    Raises:
        ValueError: another image processor than CLIP's, or a tokenizer without ``tokenizer.json``.
    """
    pixels, tokenizer = processor.image_processor, processor.tokenizer
    crop = pixels.crop_size
    if "clipimageprocessor" not in type(pixels).__name__.lower() or crop["height"] != crop["width"]:
        raise ValueError(f"{folder} prepares images by {type(pixels).__name__}; only CLIP's square crop is exported")
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(f"{folder} has no tokenizer, so its text tower could not be used; save it there first")
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"the tokenizer of {folder} ({type(tokenizer).__name__}) has no tokenizer.json form")


def write_export(
    output: Path, model: MMKDClipModel, processor: Any, form: Form, provenance: dict[str, Any] | None = None
) -> None:
    """Write towers, description, processor and usage into an empty folder.

    Args:
        output: the folder.
        model: in evaluation mode, on the CPU, in fp32.
        processor: the model's.
        form: of the towers.
        provenance: of the model as an encoder, by which a calibration or an index is known to be of its weights.

    Raises:
        ValueError: a tower cannot be traced, or its export differs from the model by more than the tolerance.
    """
    side, context = int(processor.image_processor.crop_size["height"]), model.config.text_limit
    description = describe(model, processor, form)
    inputs = examples(model, side, tokens=min(7, context))
    if form == "onnx":
        both = trace(BothTowers(model).eval(), inputs["text"] | inputs["image"], context)
        description["integer_products"] = write_onnx(both, output)
    else:
        for name, tower in towers(model).items():
            torch.export.save(trace(tower, inputs[name], context), output / FILES[form][name])
    shapes = ((1, 2), (4, min(33, context)), (2, context))
    difference = max(found for found, _ in compare_towers(output, FILES[form], model, side, shapes).values())
    if difference > TOLERANCE:
        raise ValueError(f"the {form} towers differ from the model by {difference:.1e}, more than {TOLERANCE:.0e}")
    description |= {"largest_difference": difference}
    write_json(output / DESCRIPTION, description | ({"provenance": provenance} if provenance else {}))
    processor.save_pretrained(output)
    write_client_files(output, model, processor)
    write_usage(output)


def write_client_files(output: Path, model: MMKDClipModel, processor: Any) -> None:
    """Write what clients of a CLIP read, none of which needs this package; sizes that the graphs hold are left out."""
    for name in NOT_OF_EXPORT:
        (output / name).unlink(missing_ok=True)
    pixels = read_json(output / IMAGE_PROCESSOR_NAME)
    write_json(output / IMAGE_PROCESSOR_NAME, pixels | {"processor_class": "VisionTextDualEncoderProcessor"})
    width, text = {"projection_dim": model.config.projection_dim}, model.config.text_config
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        **width,
        "logit_scale_init_value": math.log(float(model.logit_scale.detach().exp())),
        "vision_config": {**width, "model_type": "clip_vision_model", "image_size": pixels["crop_size"]["height"]},
        "text_config": {
            **width,
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": model.config.text_limit,
            "pad_token_id": processor.tokenizer.pad_token_id,
        },
    }
    write_json(output / "config.json", config)


def write_usage(output: Path) -> None:
    """Write ``usage.py`` and the modules that it reads images by, which import nothing of this package."""
    usage = (resources.files("mmkd.exporting") / USAGE).read_text(encoding="utf-8")
    atomic_write_text(output / USAGE, usage.replace("from mmkd.data.", f"from {READER}."))
    (output / READER).mkdir()
    for name in READER_MODULES:
        module = (resources.files("mmkd.data") / name).read_text(encoding="utf-8")
        atomic_write_text(output / READER / name, module.replace("from mmkd.data.", "from ."))


def quantized_export(source: Path, output: Path) -> None:
    """The same folder with the towers of 8-bit weights alone.

    Args:
        source: written by `write_export` as ONNX.
        output: an empty folder.
    """
    others = shutil.ignore_patterns("*model.onnx*", f"*{FP16}.onnx*")
    shutil.copytree(source, output, ignore=others, dirs_exist_ok=True)
    description = read_json(source / DESCRIPTION)
    for name, file in FILES["onnx"].items():
        description[name]["file"] = file.replace(".onnx", f"{QUANTIZED}.onnx")
    del description["largest_difference"]
    write_json(output / DESCRIPTION, description | {"format": "int8"})


def describe(model: MMKDClipModel, processor: Any, form: Form) -> dict[str, Any]:
    """Everything that is needed to use the towers."""
    pixels, tokenizer = processor.image_processor, processor.tokenizer
    return {
        "format": form,
        "dim": model.config.projection_dim,
        "logit_scale": float(model.logit_scale.detach().exp()),
        "image": {
            "file": FILES[form]["image"],
            "size": pixels.size["shortest_edge"],
            "side": int(pixels.crop_size["height"]),
            "resample": int(pixels.resample),
            "mean": list(pixels.image_mean),
            "std": list(pixels.image_std),
        },
        "text": {
            "file": FILES[form]["text"],
            "context": min(model.config.text_limit, tokenizer.model_max_length),
            "pad_id": tokenizer.pad_token_id,
            "pad_token": tokenizer.pad_token,
        },
        "versions": installed_versions(PACKAGES),
    }


def trace(module: nn.Module, inputs: dict[str, Tensor], context: int) -> ExportedProgram:
    """A module as a program with dynamic numbers of images and texts, and a dynamic text length up to the context.

    Raises:
        ValueError: a tower is of a kind that cannot be traced; the message holds the tracer's first line.
    """
    images, texts = Dim("images", min=1, max=MAX_BATCH), Dim("texts", min=1, max=MAX_BATCH)
    words = {0: texts, 1: Dim("tokens", min=2, max=context)}
    shapes = {"pixel_values": {0: images}, "input_ids": words, "attention_mask": words}
    try:
        with torch.no_grad(), quiet_exporters():
            dynamic = {name: shapes[name] for name in inputs}
            return torch.export.export(module, (), inputs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # the tracer raises many types, none of which a user can act on
        first = str(error).strip().partition("\n")[0]
        kind = type(module).__name__
        raise ValueError(f"the model cannot be traced as {kind} ({type(error).__name__}: {first})") from error


def compare_towers(
    folder: Path, files: dict[str, str], model: MMKDClipModel, side: int, shapes: Sequence[tuple[int, int]]
) -> dict[str, tuple[float, float]]:
    """An export against the model on random inputs.

    Args:
        folder: of the export.
        files: of the towers in it.
        model: in evaluation mode.
        side: of the images in pixels.
        shapes: batch and text length of each comparison.

    Returns:
        tower -> largest absolute difference of any number, and lowest cosine similarity of any vector.
    """
    found = {}
    for name, tower in towers(model).items():
        exported, difference, cosine = load_tower(folder / files[name]), 0.0, 1.0
        for batch, tokens in shapes:
            inputs = examples(model, side, batch, tokens, seed=tokens)[name]
            with torch.inference_mode():
                expected = tower(**inputs).numpy()
            vectors = exported({key: value.numpy() for key, value in inputs.items()})
            difference = max(difference, float(np.abs(vectors - expected).max()))
            cosine = min(cosine, float((vectors * expected).sum(axis=1).min()))
        found[name] = (difference, cosine)
    return found
