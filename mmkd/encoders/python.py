"""A teacher of any kind: a Python function that returns an object with ``encode_images`` and ``encode_texts``.

The object may also have ``image_tokens`` and ``text_tokens`` for heads that read token sequences: (n, tokens, width) of
images, the same and a padding mask (n, tokens) of texts; and ``logit_scale``, the logarithm of its trained factor.

The specification names the function (``form: python``, ``weights: module.function``), which is called with the device.
Naming it allows its code to run; no other key of a specification runs code, ``trust_remote_code`` apart.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.spec import TeacherSpec, describe


class Encodes(Protocol):
    """The object that the function returns; features are (n, dim) tensors or arrays of any length."""

    def encode_images(self, images: Sequence[Image.Image]) -> Any:
        """Features of images."""

    def encode_texts(self, texts: Sequence[str]) -> Any:
        """Features of texts."""


class PythonEncoder(DualEncoder):
    """A user's own encoder behind the interface of `DualEncoder`."""

    def __init__(self, name: str, dim: int, provenance: dict[str, Any], encodes: Encodes) -> None:
        """Wrap the object; with a dim of 0, it encodes one text to find the width."""
        super().__init__(name, dim, provenance)
        self.encodes = encodes
        if not dim:
            self.dim = self.text_features(["a"]).shape[-1]

    def image_features(self, prepared: list[Image.Image]) -> Tensor:
        """See `DualEncoder`."""
        return torch.as_tensor(self.encodes.encode_images(prepared))

    def text_features(self, texts: list[str]) -> Tensor:
        """See `DualEncoder`."""
        return torch.as_tensor(self.encodes.encode_texts(texts))

    def image_token_features(self, prepared: list[Image.Image]) -> Tensor:
        """See `DualEncoder`."""
        if not hasattr(self.encodes, "image_tokens"):
            return super().image_token_features(prepared)
        return torch.as_tensor(self.encodes.image_tokens(prepared))

    def text_token_features(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """See `DualEncoder`."""
        if not hasattr(self.encodes, "text_tokens"):
            return super().text_token_features(texts)
        tokens, mask = self.encodes.text_tokens(texts)
        return torch.as_tensor(tokens), torch.as_tensor(mask)


def load(spec: TeacherSpec, device: str) -> PythonEncoder:
    """Import the function, from the working directory too, and call it with ``device``.

    Raises:
        ValueError: there is no such module or function, or it returns something else.
    """
    module_name, _, function_name = spec.weights.rpartition(".")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
        function = vars(module)[function_name]
    except (ImportError, KeyError, ValueError) as error:
        raise ValueError(f"{spec.weights!r} is not module.function, or cannot be imported: {error}") from error
    encodes = function(device)
    if not hasattr(encodes, "encode_images") or not hasattr(encodes, "encode_texts"):
        raise ValueError(f"{spec.weights}() returned {type(encodes).__name__} without encode_images and encode_texts")
    code = [Path(module.__file__)] if module.__file__ else []
    own = "the function's own"
    scale = getattr(encodes, "logit_scale", None)
    provenance = describe(
        spec,
        code,
        preprocessing=own,
        tokenizer=own,
        context=spec.context,
        pooling=own,
        logit_scale=None if scale is None else torch.as_tensor(scale),
    )
    return PythonEncoder(spec.name, spec.dim, provenance, encodes)
