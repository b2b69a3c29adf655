"""One shard of a feature store: the image and text vectors of some thousand pairs in one safetensors file.

``features`` is (n, 2, dim), image before text, so that a pair is one stretch of the file. The header carries the
SHA-256 of the numbers, so that a shard can be checked by itself, and what its writer notes.

int8 stores 127 levels either way and, in ``scale`` (n, 2), one bfloat16 factor a vector. Real teachers have a few
dimensions that hold most of a vector (up to 0.68 of its length in the published features), which would leave 30 levels
for all others and a cosine of 0.9991; a Hadamard rotation of every 32 neighbouring dimensions before rounding spreads
them: cosines stay above 0.9999, and reading rotates back.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from mmkd.files import atomic_write_bytes

FeatureType = Literal["float16", "float32", "bfloat16", "int8"]

TORCH_TYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}

STORED_AS = {"float16": "F16", "float32": "F32", "bfloat16": "BF16", "int8": "I8"}

LEVELS = 127

BF16_MARGIN = 1 + 2**-8  # so that rounding a scale to bfloat16 never makes the largest number overflow

ABOUT = "shard"

ROTATED_TOGETHER = 32


def write_shard(
    path: Path, image: Tensor, text: Tensor, dtype: FeatureType, notes: dict[str, str] | None = None
) -> None:
    """Write a shard whole, or not at all.

    Args:
        path: the file.
        image: (n, dim) image features.
        text: (n, dim) text features of the same pairs.
        dtype: how numbers are stored.
        notes: what else the header shall say.

    Raises:
        ValueError: the shapes differ, or a number is not finite or too large for ``dtype``.
        OSError: the disk is full or the folder cannot be written; nothing is left of the file.
    """
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(text.shape)} features must both be (n, dim)")
    features = torch.stack([image, text], dim=1).detach().cpu().float()
    if not torch.isfinite(features).all():
        raise ValueError(f"{path}: features are not finite")
    tensors = encode(features, dtype)
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point()):
        raise ValueError(f"{path}: features up to {features.abs().max():.3g} are not finite in {dtype}")
    write_encoded(path, tensors, notes)


def write_encoded(path: Path, tensors: dict[str, Tensor], notes: dict[str, str] | None = None) -> None:
    """Write a shard of tensors that `encode` made; see `write_shard`."""
    about = json.dumps({**(notes or {}), "sha256": _checksum(tensors)}, sort_keys=True)
    atomic_write_bytes(path, save(tensors, metadata={ABOUT: about}))  # several entries would come in any order


def encoded(stored: np.ndarray, scale: np.ndarray | None, dtype: FeatureType) -> dict[str, Tensor]:
    """Bits as a store gives them, as `encode` gives them."""
    tensors = {"features": torch.from_numpy(stored).view(TORCH_TYPES[dtype])}
    return tensors if scale is None else {**tensors, "scale": torch.from_numpy(scale).view(torch.bfloat16)}


def encode(features: Tensor, dtype: FeatureType) -> dict[str, Tensor]:
    """Features (n, 2, dim) float32 as they are stored."""
    if dtype != "int8":
        return {"features": features.to(TORCH_TYPES[dtype]).contiguous()}
    rotated = _rotate(features)
    scale = (rotated.abs().amax(dim=-1) / LEVELS * BF16_MARGIN).to(torch.bfloat16)
    divisor = torch.where(scale == 0, 1, scale).float().unsqueeze(-1)
    levels = (rotated / divisor).round().clamp(-LEVELS, LEVELS).to(torch.int8)
    return {"features": levels.contiguous(), "scale": scale.contiguous()}


def decode(stored: np.ndarray, scale: np.ndarray | None, dtype: FeatureType) -> Tensor:
    """Stored features (n, 2, dim), and in int8 their scale (n, 2), as (2, n, dim) float32, contiguous."""
    values = torch.from_numpy(stored)
    values = values.view(torch.bfloat16) if dtype == "bfloat16" else values
    found = torch.empty(2, *values.shape[::2])
    found.copy_(values.transpose(0, 1))
    if scale is None:
        return found
    return _rotate(found * torch.from_numpy(scale).view(torch.bfloat16).float().T.unsqueeze(-1))


def shard_fault(path: Path, rows: int, dim: int, dtype: FeatureType, header_sha256: str) -> str:
    """What is wrong with a shard, in words, or nothing; every byte is read.

    Args:
        path: the file.
        rows: pairs it should hold.
        dim: width.
        dtype: how numbers are stored.
        header_sha256: of the file up to its numbers, as the store recorded it.
    """
    try:
        start, header = read_header(path)
        if hashlib.sha256(start).hexdigest() != header_sha256:
            return "its header was changed"
        arrays = TensorMap(path).arrays
    except (ValueError, OSError) as error:
        return str(error)
    if arrays["features"].shape != (rows, 2, dim) or header["features"]["dtype"] != STORED_AS[dtype]:
        return f"it holds {header['features']}, expected {rows} pairs of {dim} {dtype} numbers"
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return (
        "" if digest.hexdigest() == json.loads(header["__metadata__"][ABOUT])["sha256"] else "its numbers were changed"
    )


def header_sha256(path: Path) -> tuple[str, dict[str, str], tuple[int, int]]:
    """Of a shard the SHA-256 of its header, the notes in it, and its number of pairs and width.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, or no shard.
    """
    start, header = read_header(path)
    shape = header.get("features", {}).get("shape", [])
    about = header.get("__metadata__", {}).get(ABOUT)
    if len(shape) != 3 or about is None:
        raise ValueError(f"{path} is no shard of features; remove it and run `mmkd extract` again")
    return hashlib.sha256(start).hexdigest(), json.loads(about), (shape[0], shape[2])


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _rotate(features: Tensor) -> Tensor:
    """Each block of dimensions times an orthonormal Hadamard matrix, which is its own inverse."""
    size = math.gcd(features.shape[-1], ROTATED_TOGETHER)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / math.sqrt(2)
    return (features.unflatten(-1, (-1, size)) @ matrix).flatten(-2)


# Section: Safetensors files as read-only memory maps: a header that is checked, and arrays that are read when touched.


HEADER_LIMIT_BYTES = 100_000_000  # the format's own

NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1", "U8": "u1"}

NUMPY_TYPES |= {"U16": "<u2", "U32": "<u4", "U64": "<u8"}


def read_header(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The start of a safetensors file up to its data, as bytes and as JSON.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is truncated, has bytes left over, or is no safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run `mmkd extract` again")
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        text = file.read(length) if 0 < length < HEADER_LIMIT_BYTES else b""
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file; remove it and run `mmkd extract` again"
        ) from error
    if path.stat().st_size != 8 + length + max(ends, default=0):
        raise ValueError(f"{path} is truncated or has bytes left over; remove it and run `mmkd extract` again")
    return prefix + text, header


class TensorMap:
    """All tensors of a file as read-only arrays on one memory map; bfloat16 as its 16 bits in uint16.

    Attributes:
        arrays: by name.
    """

    def __init__(self, path: Path, scattered: bool = False) -> None:
        """Map the file.

        Args:
            path: the file.
            scattered: single rows will be read here and there: the system shall not read what lies around them, which
                on a disk costs a hundred times the row.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is truncated, damaged, or holds a type that is not used here.
        """
        start, header = read_header(path)
        with path.open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if scattered:
            self._advise("MADV_RANDOM")
        self._bytes = np.frombuffer(self._memory, dtype=np.uint8)
        self.arrays = {
            name: _array(self._bytes[len(start) :], entry, f"{path}: {name}")
            for name, entry in header.items()
            if name != "__metadata__"
        }

    def announce(self, rows: np.ndarray) -> None:
        """Say that a stretch of an array will be read whole, so that the system reads ahead."""
        begin = rows.ctypes.data - self._bytes.ctypes.data
        page = begin - begin % mmap.PAGESIZE
        self._advise("MADV_WILLNEED", page, begin - page + rows.nbytes)

    def _advise(self, advice: str, *stretch: int) -> None:
        if hasattr(mmap, advice):  # not on every system
            self._memory.madvise(getattr(mmap, advice), *stretch)


def _array(data: np.ndarray, entry: dict[str, Any], name: str) -> np.ndarray:
    begin, end = entry["data_offsets"]
    dtype, shape = np.dtype(NUMPY_TYPES.get(entry["dtype"], "V0")), tuple(entry["shape"])
    if not dtype.itemsize or not 0 <= begin <= end or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} is {entry['dtype']} {shape} in {end - begin} bytes, which cannot be")
    return data[begin:end].view(dtype).reshape(shape)
