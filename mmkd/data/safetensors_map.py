"""Safetensors files as read-only memory maps: a header that is checked, and arrays that are read when touched."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

HEADER_LIMIT_BYTES = 100_000_000  # the format's own
NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1", "U8": "u1", "U32": "<u4", "U64": "<u8"}


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


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file as read-only arrays on one memory map; bfloat16 as its 16 bits in uint16.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is truncated, damaged, or holds a type that is not used here.
    """
    start, header = read_header(path)
    data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))[len(start) :]  # the bare array indexes faster
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        dtype, shape = np.dtype(NUMPY_TYPES.get(entry["dtype"], "V0")), tuple(entry["shape"])
        if not dtype.itemsize or not 0 <= begin <= end or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: {name} is {entry['dtype']} {shape} in {end - begin} bytes, which cannot be")
        arrays[name] = data[begin:end].view(dtype).reshape(shape)
    return arrays
