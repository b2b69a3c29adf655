"""Weights in 8 bits by ONNX Runtime's dynamic quantization: no calibration data, a file that runs without torch.

Matrix products get integer weights, one scale a column, and inputs that are rounded as they come; embedding tables are
stored in 8 bits. Convolutions stay as they are: ONNX Runtime's integer convolution is slower than the one in floating
point on the CPUs it was tried on. Weights take seven bits, because the eighth overflows on processors without VNNI.
"""

from __future__ import annotations

import logging
from pathlib import Path

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
