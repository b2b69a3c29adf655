"""An exported folder: two towers, ``export.json``, the processor, and ``usage.py``, which needs nothing of ours."""

from __future__ import annotations

import logging
import shutil
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.export import ExportedProgram

from mmkd.encoders.spec import installed_versions
from mmkd.exporting.towers import OUTPUTS, examples, quiet_tracing, save_onnx, towers, trace
from mmkd.exporting.usage import load_tower
from mmkd.files import atomic_write_text, read_json, write_json
from modeling_mmkd import MMKDClipModel

Form = Literal["onnx", "exported-program"]

ENDINGS = {"onnx": "onnx", "exported-program": "pt2"}

TOLERANCE = 1e-4  # largest difference to the model that an export in floating point may have

DESCRIPTION, USAGE = "export.json", "usage.py"

PACKAGES = ("mmkd-clip", "torch", "transformers", "onnx", "onnxruntime")


def require_exportable(processor: Any, folder: Path) -> None:
    """Refuse what `usage.py` could not prepare inputs for, before anything is traced.

    Raises:
        ValueError: another image processor than CLIP's, or a tokenizer without ``tokenizer.json``.
    """
    pixels, tokenizer = processor.image_processor, processor.tokenizer
    crop = pixels.crop_size
    if not type(pixels).__name__.startswith("CLIPImageProcessor") or crop["height"] != crop["width"]:
        raise ValueError(f"{folder} prepares images by {type(pixels).__name__}; only CLIP's square way is exported")
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(f"{folder} has no tokenizer, so its text tower could not be used; save it there first")
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"the tokenizer of {folder} ({type(tokenizer).__name__}) has no tokenizer.json form")


def write_export(output: Path, model: MMKDClipModel, processor: Any, form: Form) -> dict[str, Any]:
    """Write towers, description, processor and usage into an empty folder.

    Args:
        output: the folder.
        model: in evaluation mode, on the CPU, in fp32.
        processor: the model's.
        form: of the towers.

    Returns:
        The description, as in ``export.json``.

    Raises:
        ValueError: a tower cannot be traced, or its export differs from the model by more than the tolerance.
    """
    side, context = _side(processor), model.config.text_limit
    files = {name: f"{name}.{ENDINGS[form]}" for name in OUTPUTS}
    for name, program in trace(model, side, context).items():
        _save(program, name, output / files[name], form)
    difference = largest_difference(output, files, model, side, context)
    if difference > TOLERANCE:
        raise ValueError(f"the {form} towers differ from the model by {difference:.1e}, more than {TOLERANCE:.0e}")
    description = describe(model, processor, form, files) | {"largest_difference": difference}
    write_json(output / DESCRIPTION, description)
    processor.save_pretrained(output)
    usage = resources.files("mmkd.exporting") / USAGE
    atomic_write_text(output / USAGE, usage.read_text(encoding="utf-8"))
    return description


def quantize_export(source: Path, output: Path) -> dict[str, Any]:
    """The same folder with towers in 8 bits.

    Args:
        source: written by `write_export` as ONNX.
        output: an empty folder.

    Returns:
        The description, as in ``export.json``; ``integer_products`` counts each tower's matrix products in integers.
    """
    description = read_json(source / DESCRIPTION)
    files = {name: description[name]["file"] for name in OUTPUTS}
    for path in source.iterdir():
        if not path.name.startswith(tuple(files.values())):
            shutil.copyfile(path, output / path.name)
    products = {
        name: quantize(source / description[name]["file"], output / description[name]["file"]) for name in OUTPUTS
    }
    del description["largest_difference"]
    description |= {"format": "int8", "integer_products": products}
    write_json(output / DESCRIPTION, description)
    return description


def describe(model: MMKDClipModel, processor: Any, form: Form, files: dict[str, str]) -> dict[str, Any]:
    """What has to be known to use the towers."""
    pixels, tokenizer = processor.image_processor, processor.tokenizer
    return {
        "format": form,
        "dim": model.config.projection_dim,
        "logit_scale": float(model.logit_scale.detach().exp()),
        "image": {
            "file": files["image"],
            "size": pixels.size["shortest_edge"],
            "side": _side(processor),
            "resample": int(pixels.resample),
            "mean": list(pixels.image_mean),
            "std": list(pixels.image_std),
        },
        "text": {
            "file": files["text"],
            "context": min(model.config.text_limit, tokenizer.model_max_length),
            "pad_id": tokenizer.pad_token_id,
            "pad_token": tokenizer.pad_token,
        },
        "versions": installed_versions(PACKAGES),
    }


def largest_difference(folder: Path, files: dict[str, str], model: MMKDClipModel, side: int, context: int) -> float:
    """Largest difference of any number to the model's, over batches of one and several and short and long texts."""
    largest = 0.0
    for name, tower in towers(model).items():
        exported = load_tower(folder / files[name])
        for batch, tokens in ((1, 2), (4, min(33, context)), (2, context)):
            inputs = examples(model, side, batch, tokens, seed=tokens)[name]
            with torch.inference_mode():
                expected = tower(**inputs).numpy()
            found = exported({key: value.numpy() for key, value in inputs.items()})
            largest = max(largest, float(np.abs(found - expected).max()))
    return largest


def tower_bytes(folder: Path, file: str) -> int:
    """Size of a tower, weights beside its graph included."""
    return sum(path.stat().st_size for path in folder.glob(f"{file}*"))


def _save(program: ExportedProgram, name: str, path: Path, form: Form) -> None:
    if form == "onnx":
        save_onnx(program, name, path)
    else:
        with quiet_tracing():
            torch.export.save(program, path)


def _side(processor: Any) -> int:
    return int(processor.image_processor.crop_size["height"])


# Section: Weights in 8 bits by ONNX Runtime's dynamic quantization: no calibration data, a file that runs without
# torch.
#
# Matrix products get integer weights, one scale a column, and inputs that are rounded as they come; embedding tables
# are
# stored in 8 bits. Convolutions stay as they are: ONNX Runtime's integer convolution is slower than the one in floating
# point on the CPUs it was tried on. Weights take seven bits, because the eighth overflows on processors without VNNI.


QUANTIZED = ["MatMul", "Gemm", "Gather"]


def quantize(source: Path, target: Path) -> int:
    """Write an ONNX file with 8-bit weights.

    Args:
        source: a file in floating point.
        target: the file to write.

    Returns:
        Number of matrix products that became integer; 0 where the tower has none with constant weights.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    constants = {constant.name for constant in model.graph.initializer}
    shapes = [value for value in model.graph.value_info if value.name not in constants]
    del model.graph.value_info[:]  # ONNX Runtime 1.23, the last for Python 3.10, trips over those of constants
    model.graph.value_info.extend(shapes)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it warns on the root logger
    try:
        quantize_dynamic(
            model,
            target,
            op_types_to_quantize=QUANTIZED,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
    finally:
        root.setLevel(level)
    graph = onnx.load(target, load_external_data=False).graph
    return sum(node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul") for node in graph.node)
