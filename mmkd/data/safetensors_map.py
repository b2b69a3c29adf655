"""Safetensors files as read-only memory maps: a header that is checked, and arrays that are read when touched."""

from __future__ import annotations

import json
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

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
