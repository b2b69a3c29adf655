"""The two towers of a model as programs of their own: pixels or tokens in, unit vectors out, any batch and text length.

Both are traced by ``torch.export``; the program is saved as it is, or handed to the ONNX exporter, so that the two
forms cannot differ in what was traced.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from modeling_mmkd import MMKDClipModel

OUTPUTS = {"image": "image_embeds", "text": "text_embeds"}
OPSET = 18
PROTOBUF_LIMIT_BYTES = 1_500_000_000  # beyond it weights lie beside the graph
MAX_BATCH = 65536


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
        """Map `(texts, tokens)` twice to `(texts, dim)`."""
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


def trace(model: MMKDClipModel, side: int, context: int) -> dict[str, ExportedProgram]:
    """Both towers as programs whose batch, and whose text length up to the context, may be anything.

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
            with torch.no_grad(), quiet_tracing():
                programs[name] = torch.export.export(tower, (), inputs[name], dynamic_shapes=shapes[name], strict=False)
        except Exception as error:  # the tracer raises of many kinds, none of which a user can act on
            first = str(error).strip().partition("\n")[0]
            raise ValueError(f"the {name} tower cannot be traced ({type(error).__name__}: {first})") from error
    return programs


def save_onnx(program: ExportedProgram, name: str, path: Path) -> None:
    """Write a program as ONNX.

    Args:
        program: from `trace`.
        name: image or text.
        path: file to write; very large weights get a second one beside it.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    with quiet_tracing():
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
def quiet_tracing() -> Iterator[None]:
    """Hush what the exporters say of themselves."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
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
