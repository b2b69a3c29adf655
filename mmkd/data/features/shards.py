"""One shard of a vector store: some thousand rows in one safetensors file, written whole and memory-mapped.

A shard holds arrays of n rows each, the ids of its rows (``id_text``, UTF-8, and ``id_end``), their ``fingerprints``
(`mmkd.data.features.index`) where these are known, and notes in the header. The header also carries the SHA-256 of all
arrays, so that a shard can be verified by itself, and its own SHA-256 stands for the whole file.

A shard is named by the hash of what it holds. This is the one rule by which every extraction resumes: a shard that is
there and whole is done, whoever wrote it and whenever.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmkd.files import atomic_write_bytes, note_read

if TYPE_CHECKING:
    from torch import Tensor

NOTES = "shard"
HEADER_LIMIT_BYTES = 100_000_000  # the format's own
NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "BOOL": "?", "I64": "<i8"}
NUMPY_TYPES |= {"U16": "<u2", "U32": "<u4", "U64": "<u8"}


@dataclass(frozen=True)
class ShardHeader:
    """The header of a shard; reading it costs no more than opening the file.

    Attributes:
        start: the file up to its data.
        tensors: type, shape and place of each array.
        notes: what its writer noted.
    """

    start: bytes
    tensors: dict[str, dict[str, Any]]
    notes: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Checksum of the header, and thus of the file, since the header holds the checksum of the data."""
        return hashlib.sha256(self.start).hexdigest()

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.tensors["id_end"]["shape"][0])


class TensorMap:
    """All tensors of a safetensors file as read-only arrays on one memory map; bfloat16 as its 16 bits in uint16.

    Attributes:
        arrays: by name.
    """

    def __init__(self, path: Path, scattered: bool = False) -> None:
        """Map the file.

        Args:
            path: the file.
            scattered: single rows are read in random order: turn off read-ahead, which on a disk costs a hundred times
                the row.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is truncated, damaged, or holds a type that is not used here.
        """
        start, tensors, _ = read_tensors(path)
        with path.open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if scattered:
            self._advise("MADV_RANDOM")
        self._bytes = np.frombuffer(self._memory, dtype=np.uint8)
        data = self._bytes[len(start) :]
        self.arrays = {name: _array(data, entry, f"{path}: {name}") for name, entry in tensors.items()}

    def announce(self, rows: np.ndarray) -> None:
        """Announce that a range of an array is read whole, so that the system reads ahead."""
        begin = rows.ctypes.data - self._bytes.ctypes.data
        page = begin - begin % mmap.PAGESIZE
        self._advise("MADV_WILLNEED", page, begin - page + rows.nbytes)

    def _advise(self, advice: str, *part: int) -> None:
        if hasattr(mmap, advice):  # not on every system
            self._memory.madvise(getattr(mmap, advice), *part)


def shard_file(folder: Path, *content: Any, kind: str = "shard") -> Path:
    """The file of a shard with this content: JSON values that determine what is in it."""
    return folder / f"{kind}-{hashlib.sha256(json.dumps([kind, *content]).encode()).hexdigest()[:24]}.safetensors"


def is_whole(file: Path) -> bool:
    """Whether a shard exists and its checksum matches; otherwise it is written again."""
    try:
        return checksums_match(file, read_header(file))
    except (FileNotFoundError, ValueError):
        return False


def write_shard(
    path: Path,
    ids: Sequence[str],
    arrays: Mapping[str, Tensor | np.ndarray],
    fingerprints: np.ndarray | None = None,
    notes: dict[str, Any] | None = None,
) -> None:
    """Write a shard atomically.

    Args:
        path: the file.
        ids: of its n rows.
        arrays: tensors or arrays of n rows each, by name.
        fingerprints: (n,) of the pairs behind the rows, None where they are unknown.
        notes: JSON values for the header.

    Raises:
        ValueError: an array has another number of rows than there are ids, or an id is not Unicode text.
        OSError: the disk is full or the folder cannot be written; nothing is left of the file.
    """
    import torch  # here, so that shards are read without it
    from safetensors.torch import save

    encoded = [_encoded(id) for id in ids]
    tensors = {name: torch.as_tensor(array).detach().cpu().contiguous() for name, array in arrays.items()}
    if fingerprints is not None and any(fingerprints[name].any() for name in fingerprints.dtype.names or ()):
        tensors["fingerprints"] = torch.from_numpy(fingerprints.copy().view("<u2").reshape(-1, 2))
    for name, tensor in tensors.items():
        if len(tensor) != len(ids):
            raise ValueError(f"{path}: {name} has {len(tensor)} rows for {len(ids)} ids; give one of each")
    tensors["id_text"] = torch.from_numpy(np.frombuffer(b"".join(encoded), dtype=np.uint8).copy())
    tensors["id_end"] = torch.from_numpy(np.cumsum([0, *map(len, encoded)], dtype=np.int64)[1:])
    about = json.dumps({**(notes or {}), "sha256": _checksum({k: t.view(torch.uint8) for k, t in tensors.items()})})
    atomic_write_bytes(path, save(tensors, metadata={NOTES: about}))  # several entries would come in any order


def read_header(path: Path) -> ShardHeader:
    """Read the header of a shard.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, or not a shard of this version.
    """
    start, tensors, metadata = read_tensors(path)
    try:
        header = ShardHeader(start, tensors, json.loads(metadata[NOTES]))
        if header.rows >= 0 and isinstance(header.notes["sha256"], str):
            return header
    except (KeyError, IndexError, TypeError, ValueError, RecursionError):
        pass
    raise ValueError(f"{path} is not a shard of this version; remove it and extract again with `mmkd extract`")


def read_tensors(path: Path) -> tuple[bytes, dict[str, Any], dict[str, str]]:
    """The start of a safetensors file up to its data, the entries of its tensors, and its metadata.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is truncated, has bytes left over, or is not a safetensors file.
    """
    note_read(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; extract again with `mmkd extract`")
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        text = file.read(length) if 0 < length < HEADER_LIMIT_BYTES else b""
    try:
        tensors = json.loads(text)
        metadata = tensors.pop("__metadata__", {})
        entries = [([entry["dtype"]], entry["shape"], entry["data_offsets"]) for entry in tensors.values()]
        end = max((end for *_, (_, end) in entries), default=0)
        whole = path.stat().st_size == 8 + length + end and all(
            isinstance(part, list) and {type(value) for value in part} <= {kind}
            for entry in entries
            for part, kind in zip(entry, (str, int, int), strict=True)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(
            f"{path} is truncated, has bytes left over, or is not a safetensors file; remove it and extract again "
            "with `mmkd extract`"
        )
    return prefix + text, tensors, metadata


def checksums_match(path: Path, header: ShardHeader) -> bool:
    """Whether the checksum of a shard's arrays matches; every byte is read."""
    arrays = TensorMap(path).arrays
    return _checksum(arrays) == header.notes["sha256"]


def _checksum(arrays: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _array(data: np.ndarray, entry: dict[str, Any], name: str) -> np.ndarray:
    begin, end = entry["data_offsets"]
    dtype, shape = np.dtype(NUMPY_TYPES.get(entry["dtype"], "V0")), tuple(entry["shape"])
    if not dtype.itemsize or not 0 <= begin <= end or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} is {entry['dtype']} {shape} in {end - begin} bytes, which is impossible")
    return data[begin:end].view(dtype).reshape(shape)


def _encoded(id: str) -> bytes:
    try:
        return id.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"id {id!r} is not Unicode text ({error.reason}); give the pair another id") from None
