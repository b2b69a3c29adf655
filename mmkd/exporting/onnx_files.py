"""ONNX files in the layout of transformers.js and optimum-onnx: ``onnx/{model,vision_model,text_model}{SUFFIX}.onnx``.

``model`` holds both towers and the similarities; the halves are the parts of its graph that lead to one output. Weights
in 8 bits (``_quantized``) are ONNX Runtime's dynamic quantization, which needs no calibration data. Matrix products get
integer weights with one scale a column and activations quantized at run time; embedding tables are stored in 8 bits.
Convolutions stay in floating point: ONNX Runtime's integer convolution was slower on every CPU it was tried on. Weights
take seven bits, because the eighth overflows on processors without VNNI. ``_fp16`` keeps inputs and outputs in fp32.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

FOLDER = "onnx"
OPSET = 18
PROTOBUF_LIMIT_BYTES = 1_500_000_000  # larger weights are stored beside the graph, as transformers.js names them
HALVES = {"vision_model": "image_embeds", "text_model": "text_embeds"}
OUTPUTS = ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]
FP16, QUANTIZED = "_fp16", "_quantized"
QUANTIZED_OPERATORS = ["MatMul", "Gemm", "Gather"]
INTEGER_PRODUCTS = ("MatMulInteger", "DynamicQuantizeMatMul")


def write_onnx(program: ExportedProgram, output: Path) -> dict[str, int]:
    """Write the nine files of a traced model into the folder ``onnx`` of an export.

    Args:
        program: of both towers, with the outputs of `OUTPUTS`.
        output: the exported folder.

    Returns:
        Number of matrix products in integers by half; 0 where a tower has none with constant weights.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    folder = output / FOLDER
    folder.mkdir()
    with quiet_exporters():
        traced = torch.onnx.export(program, (), dynamo=True, opset_version=OPSET, output_names=OUTPUTS, verbose=False)
        assert traced is not None  # only the old exporter gives None
        _save(_bare(traced.model_proto), folder, "")
        _save(convert_float_to_float16(onnx.load(folder / "model.onnx"), keep_io_types=True), folder, FP16)
        return _save(_quantized(folder / "model.onnx"), folder, QUANTIZED)


@contextmanager
def quiet_exporters() -> Iterator[None]:
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


def _save(model: Any, folder: Path, suffix: str) -> dict[str, int]:
    """Write a model and its halves; returns the integer products of the halves."""
    import onnx

    parts = {name: _half(model, output) for name, output in HALVES.items()}
    for name, part in {**parts, "model": model}.items():  # the model last: saving moves large weights out of it
        file = f"{name}{suffix}.onnx"
        large = sum(len(constant.raw_data) for constant in part.graph.initializer) > PROTOBUF_LIMIT_BYTES
        onnx.save(part, folder / file, save_as_external_data=large, location=f"{file}_data")
    return {name: sum(node.op_type in INTEGER_PRODUCTS for node in part.graph.node) for name, part in parts.items()}


def _half(model: Any, output: str) -> Any:
    """The part of a model that leads to one output; onnx has a function for it, but for models below 2 GB alone."""
    from onnx import helper

    graph, needed, waiting = model.graph, set(), [output]
    makers = {name: node for node in graph.node for name in node.output}
    while waiting:  # not by the order of nodes: the conversion to fp16 appends casts
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += makers[name].input if name in makers else []
    nodes = [node for node in graph.node if needed.intersection(node.output)]
    inputs, constants = ([item for item in items if item.name in needed] for items in (graph.input, graph.initializer))
    outputs = [item for item in graph.output if item.name == output]
    part = helper.make_graph(nodes, graph.name, inputs, outputs, constants)
    return helper.make_model(
        part, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
    )


def _bare(model: Any) -> Any:
    """The model without the places of this machine's source files, and without shapes that can be inferred.

    ONNX Runtime 1.23, the last for Python 3.10, fails on shapes of constants when it quantizes.
    """
    del model.graph.value_info[:]
    for owner in (model, *model.functions):
        del owner.metadata_props[:]
    del model.graph.metadata_props[:]
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            del node.metadata_props[:]
            node.ClearField("doc_string")
    return model


def _quantized(path: Path) -> Any:
    """A model with 8-bit weights."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(prefix="mmkd-quantize-") as temporary:
        target = Path(temporary) / "model.onnx"
        quantize_dynamic(
            path,
            target,
            op_types_to_quantize=QUANTIZED_OPERATORS,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
        return onnx.load(target)
