"""An exported folder: two towers, ``export.json``, the processor, and ``usage.py``, which runs without this package.

``usage.py`` reads images by copies of the modules that read them in training, in the folder ``pixel_reader`` beside it.

A tower maps pixels or tokens to unit vectors, for any batch and text length. Both are traced once by ``torch.export``;
the program is saved as it is or passed to the ONNX exporter, so that the two formats hold the same graph.

Weights in 8 bits are ONNX Runtime's dynamic quantization, which needs no calibration data. Matrix products get integer
weights with one scale a column and activations quantized at run time; embedding tables are stored in 8 bits.
Convolutions stay in floating point: ONNX Runtime's integer convolution was slower on every CPU it was tried on. Weights
take seven bits, because the eighth overflows on processors without VNNI.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from mmkd.data.provenance import installed_versions
from mmkd.exporting.usage import DESCRIPTION, load_tower
from mmkd.files import atomic_write_text, read_json, write_json
from modeling_mmkd import MMKDClipModel

Form = Literal["onnx", "exported-program"]

ENDINGS = {"onnx": "onnx", "exported-program": "pt2"}
OUTPUTS = {"image": "image_embeds", "text": "text_embeds"}
USAGE = "usage.py"
READER, READER_MODULES = "pixel_reader", ("archives.py", "images.py", "medical.py", "pixel_rules.py")
PACKAGES = ("mmkd-clip", "torch", "transformers", "onnx", "onnxruntime")
TOLERANCE = 1e-4  # largest difference to the model that an export in floating point may have
OPSET = 18
PROTOBUF_LIMIT_BYTES = 1_500_000_000  # larger weights are stored beside the graph
MAX_BATCH = 65536
QUANTIZED = ["MatMul", "Gemm", "Gather"]


class ImageTower(nn.Module):
    """Pixels to unit vectors."""

    def __init__(self, model: MMKDClipModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map `(images, 3, side, side)` to `(images, dim)`."""
        return functional.normalize(self.model.get_image_features(pixel_values, return_dict=True).pooler_output, dim=-1)


class TextTower(nn.Module):
    """Tokens to unit vectors."""

    def __init__(self, model: MMKDClipModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map token ids and mask, each `(texts, tokens)`, to `(texts, dim)`."""
        output = self.model.get_text_features(input_ids, attention_mask, return_dict=True)
        return functional.normalize(output.pooler_output, dim=-1)


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
    if not type(pixels).__name__.startswith("CLIPImageProcessor") or crop["height"] != crop["width"]:
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
    files = {name: f"{name}.{ENDINGS[form]}" for name in OUTPUTS}
    for name, program in trace(model, side, context).items():
        with _quiet_exporters():
            if form == "onnx":
                _save_onnx(program, name, output / files[name])
            else:
                torch.export.save(program, output / files[name])
    shapes = ((1, 2), (4, min(33, context)), (2, context))
    difference = max(found for found, _ in compare_towers(output, files, model, side, shapes).values())
    if difference > TOLERANCE:
        raise ValueError(f"the {form} towers differ from the model by {difference:.1e}, more than {TOLERANCE:.0e}")
    description = describe(model, processor, form, files) | {"largest_difference": difference}
    write_json(output / DESCRIPTION, description | ({"provenance": provenance} if provenance else {}))
    processor.save_pretrained(output)
    write_usage(output)


def write_usage(output: Path) -> None:
    """Write ``usage.py`` and the modules that it reads images by, which import nothing of this package."""
    usage = (resources.files("mmkd.exporting") / USAGE).read_text(encoding="utf-8")
    atomic_write_text(output / USAGE, usage.replace("from mmkd.data.", f"from {READER}."))
    (output / READER).mkdir()
    for name in READER_MODULES:
        module = (resources.files("mmkd.data") / name).read_text(encoding="utf-8")
        atomic_write_text(output / READER / name, module.replace("from mmkd.data.", "from ."))


def quantize_export(source: Path, output: Path) -> None:
    """The same folder with towers in 8 bits; ``integer_products`` in its description counts their integer products.

    Args:
        source: written by `write_export` as ONNX.
        output: an empty folder.
    """
    description = read_json(source / DESCRIPTION)
    files = {name: description[name]["file"] for name in OUTPUTS}
    shutil.copytree(
        source, output, ignore=shutil.ignore_patterns(*(f"{file}*" for file in files.values())), dirs_exist_ok=True
    )
    products = {name: quantize(source / file, output / file) for name, file in files.items()}
    del description["largest_difference"]
    write_json(output / DESCRIPTION, description | {"format": "int8", "integer_products": products})


def quantize(source: Path, target: Path) -> int:
    """Write an ONNX file with 8-bit weights.

    Args:
        source: a file in floating point.
        target: the file to write.

    Returns:
        Number of matrix products in integers; 0 where the tower has none with constant weights.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    constants = {constant.name for constant in model.graph.initializer}
    shapes = [value for value in model.graph.value_info if value.name not in constants]
    del model.graph.value_info[:]  # ONNX Runtime 1.23, the last for Python 3.10, fails on those of constants
    model.graph.value_info.extend(shapes)
    with _quiet_exporters():
        quantize_dynamic(
            model,
            target,
            op_types_to_quantize=QUANTIZED,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
    graph = onnx.load(target, load_external_data=False).graph
    return sum(node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul") for node in graph.node)


def describe(model: MMKDClipModel, processor: Any, form: Form, files: dict[str, str]) -> dict[str, Any]:
    """Everything that is needed to use the towers."""
    pixels, tokenizer = processor.image_processor, processor.tokenizer
    return {
        "format": form,
        "dim": model.config.projection_dim,
        "logit_scale": float(model.logit_scale.detach().exp()),
        "image": {
            "file": files["image"],
            "size": pixels.size["shortest_edge"],
            "side": int(pixels.crop_size["height"]),
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


def trace(model: MMKDClipModel, side: int, context: int) -> dict[str, ExportedProgram]:
    """Both towers as programs with a dynamic batch, and a dynamic text length up to the context.

    Raises:
        ValueError: a tower is of a kind that cannot be traced; the message holds the tracer's first line.
    """
    batch, tokens = Dim("batch", min=1, max=MAX_BATCH), Dim("tokens", min=2, max=context)
    texts = {0: batch, 1: tokens}
    shapes = {"image": {"pixel_values": {0: batch}}, "text": {"input_ids": texts, "attention_mask": texts}}
    inputs = examples(model, side, tokens=min(7, context))
    programs = {}
    for name, tower in towers(model).items():
        try:
            with torch.no_grad(), _quiet_exporters():
                programs[name] = torch.export.export(tower, (), inputs[name], dynamic_shapes=shapes[name], strict=False)
        except Exception as error:  # the tracer raises many types, none of which a user can act on
            first = str(error).strip().partition("\n")[0]
            raise ValueError(f"the {name} tower cannot be traced ({type(error).__name__}: {first})") from error
    return programs


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


def tower_bytes(folder: Path, file: str) -> int:
    """Size of a tower, with weights beside its graph."""
    return sum(path.stat().st_size for path in folder.glob(f"{file}*"))


def _save_onnx(program: ExportedProgram, name: str, path: Path) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    torch.onnx.export(
        program,
        (),
        str(path),
        dynamo=True,
        opset_version=OPSET,
        output_names=[OUTPUTS[name]],
        external_data=size > PROTOBUF_LIMIT_BYTES,
        verbose=False,
    )


@contextmanager
def _quiet_exporters() -> Iterator[None]:
    """Silence the exporters; ONNX Runtime's quantization warns on the root logger."""
    noisy = [logging.getLogger(name) for name in (None, "torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    before = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, before, strict=True):
            logger.setLevel(level)
