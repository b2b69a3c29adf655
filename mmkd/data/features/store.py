"""The vector store: rows of numbers by id, which opens at once and reads by id or row in microseconds per row.

`VectorStore` reads any shards (`mmkd.data.features.shards`): cached embeddings of an evaluation, outputs of frozen
towers and tokens are stores of that kind. A batch of random rows is a binary search for their ids and one fancy index
into each shard it touches: hundreds of times faster than one small file for each pair, at 2 bytes a number.

A *feature store* ``features/NAME/`` is finished: its index of ids lies beside the shards (``ids-*.safetensors``), and
``meta.json``, replaced last, names and pins all files. Opening reads these two, and shards are mapped when they are
first read, so that twenty million pairs open in a blink; a reader sees the old store or the new one. Its one array
``features`` is (n, 2, dim), image before text, so that a pair is one stretch of the file.

Lance and Arrow were compared on this access pattern (docs/log.md, 2026-11-30). Safetensors also has no code path that
trusts an offset in a file somebody else wrote.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmkd.data.features import FeatureType
from mmkd.data.features.index import FINGERPRINT, IdIndex, Ids, digests
from mmkd.data.features.shards import TensorMap, checksums_match, read_header
from mmkd.data.provenance import KEPT_METADATA
from mmkd.files import is_folder_name, read_json

if TYPE_CHECKING:
    from torch import Tensor

STORED_AS = {"float16": "F16", "float32": "F32", "bfloat16": "BF16"}
VERSION = 3
READ_AHEAD_ROWS = 256  # from here on neighbouring rows are read ahead together


class VectorStore:
    """Rows of several shards, one after another."""

    def __init__(self, shards: Sequence[Path], rows: Sequence[int] | None = None, keep_open: bool = True) -> None:
        """Take complete shards; nothing is mapped yet.

        Args:
            shards: the files.
            rows: of each of them, by default read from their headers.
            keep_open: whether a shard that was read stays mapped; thousands of shards cannot.

        Raises:
            FileNotFoundError: a shard is missing.
            ValueError: a shard is truncated.
        """
        self.files = list(shards)
        self._starts = np.cumsum([0, *(rows if rows is not None else (read_header(file).rows for file in shards))])
        self._keep_open = keep_open
        self._mapped: dict[int, TensorMap] = {}

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._starts[-1])

    @property
    def ids(self) -> Ids:
        """Ids in row order, a sequence on disk."""
        return Ids(len(self), self._take_ids)

    @cached_property
    def index(self) -> IdIndex:
        """The row of each id; of an id that occurs twice, one of them."""
        return IdIndex.of(digests(self.ids))

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """The row of each of n ids, (n,) int64; -1 if there is none."""
        return self.index.rows(digests(ids))

    def has(self, name: str) -> bool:
        """Whether any shard holds an array of this name."""
        return any(name in self._shard(k).arrays for k in range(len(self.files)))

    def gather(self, name: str, rows: np.ndarray, dtype: np.typing.DTypeLike | None = None) -> np.ndarray:
        """Rows (n,) of one array, by default in the type they are stored in; zeros where a row is -1.

        Where a shard lacks the array but others have it, its rows are NaN.
        """
        found: np.ndarray | None = None
        lacking = []
        for k, places, local in self._by_shard(rows):
            shard = self._shard(k)
            if name not in shard.arrays:
                lacking.append(places)
                continue
            array = shard.arrays[name]
            if found is None:
                found = np.zeros((len(rows), *array.shape[1:]), dtype=dtype or array.dtype)
            if len(local) >= READ_AHEAD_ROWS and local[-1] - local[0] < 2 * len(local):
                shard.announce(array[local[0] : local[-1] + 1])
            found[_slice(places)] = array[_slice(local)]
        if found is None:
            found = self._empty(name, len(rows), dtype)
        for places in lacking:
            found[places] = np.nan
        return found

    def fingerprints(self, rows: np.ndarray) -> np.ndarray:
        """Fingerprints of rows (n,), zeros where they are unknown or the row is -1; (n,) of `FINGERPRINT`."""
        found = np.zeros(len(rows), dtype=FINGERPRINT)
        for k, places, local in self._by_shard(rows):
            stored = self._shard(k).arrays.get("fingerprints")
            if stored is not None:
                found["caption"][places], found["image"][places] = stored[local].T
        return found

    def _by_shard(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each shard the positions of its rows, and these rows within the shard, ascending."""
        order = np.argsort(rows, kind="stable")
        order = order[np.searchsorted(rows[order], 0) :]
        if not len(order):
            return
        shards = np.searchsorted(self._starts, rows[order], side="right") - 1
        bounds = [0, *(np.flatnonzero(shards[1:] != shards[:-1]) + 1).tolist(), len(shards)]
        for begin, end in pairwise(bounds):
            k, places = int(shards[begin]), order[begin:end]
            yield k, places, rows[places] - self._starts[k]

    def _take_ids(self, rows: np.ndarray) -> list[str]:
        found = np.empty(len(rows), dtype=object)
        for k, places, local in self._by_shard(rows):
            arrays = self._shard(k).arrays
            text, ends = arrays["id_text"], arrays["id_end"]
            begins = np.where(local == 0, 0, ends[np.maximum(local - 1, 0)]).tolist()
            try:
                found[places] = [bytes(text[a:b]).decode() for a, b in zip(begins, ends[local].tolist(), strict=True)]
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.files[k]} is damaged: an id is no text ({error}); make it again") from None
        return found.tolist()

    def _empty(self, name: str, rows: int, dtype: Any) -> np.ndarray:
        for k in range(len(self.files)):
            if name in self._shard(k).arrays:
                array = self._shard(k).arrays[name]
                return np.zeros((rows, *array.shape[1:]), dtype=dtype or array.dtype)
        return np.zeros((rows, 0), dtype=dtype or np.float32)

    def _shard(self, k: int) -> TensorMap:
        if k not in self._mapped:
            mapped = self._map(k)
            if not self._keep_open:
                return mapped
            self._mapped[k] = mapped
        return self._mapped[k]

    def _map(self, k: int) -> TensorMap:
        return TensorMap(self.files[k], scattered=self._keep_open)


class FeatureStore(VectorStore):
    """The image and text features of one teacher.

    Attributes:
        path: its folder.
        name: the teacher.
        dim: width of its features.
        dtype: how numbers are stored.
        provenance: what the writer recorded about weights and preprocessing.
        checksum: SHA-256 of ``meta.json``, which holds those of all else.
        meta: its content.
    """

    def __init__(self, path: Path) -> None:
        """Read ``meta.json`` and check that every shard exists in full length.

        Raises:
            FileNotFoundError: the store is unfinished (no ``meta.json``) or a file is missing.
            ValueError: a file is damaged or does not belong to the store; see `faults`.
        """
        for fault in faults(path, every_byte=False):
            raise fault
        self.path = path
        self.meta = read_meta(path)
        self.checksum = meta_sha256(self.meta)
        self.name: str = self.meta["teacher"]
        self.dim: int = self.meta["dim"]
        self.dtype: FeatureType = self.meta["dtype"]
        self.provenance: dict[str, Any] = self.meta["provenance"]
        shards = self.meta["shards"]
        super().__init__([path / shard["file"] for shard in shards], [shard["rows"] for shard in shards])

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process maps the files again."""
        return FeatureStore, (self.path,)

    @cached_property
    def index(self) -> IdIndex:
        """See `VectorStore`; mapped."""
        return IdIndex.open(self.path / self.meta["ids"]["file"])

    def lookup(self, ids: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Features of n pairs.

        Returns:
            image (n, dim) float32, text (n, dim) float32, mask (n,) bool; a missing pair has mask false and zeros.
        """
        return self.read(self.rows(ids))

    def read(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Features by row number (n,) int64, -1 for none; returns as `lookup`."""
        import torch  # here, so that a store is searched without it

        stored = torch.from_numpy(self.gather("features", rows))
        stored = stored.view(torch.bfloat16) if self.dtype == "bfloat16" else stored
        both = torch.empty(2, len(rows), self.dim).copy_(stored.transpose(0, 1))
        return both[0], both[1], torch.from_numpy(rows >= 0)

    def _map(self, k: int) -> TensorMap:
        fault = _shard_fault(self.path, self.meta, self.meta["shards"][k])
        if fault is not None:
            raise fault
        return super()._map(k)


def faults(
    path: Path, every_byte: bool, progress: Callable[[int], object] = lambda rows: None
) -> Iterator[FileNotFoundError | ValueError]:
    """Faults of a feature store, which readers refuse and `mmkd features verify` reports.

    Args:
        path: the store.
        every_byte: compare all checksums, and the index with the ids of the shards; else only files and lengths.
        progress: called with the number of pairs of each shard that was verified.
    """
    try:
        meta = read_meta(path)
    except (FileNotFoundError, ValueError) as error:
        yield error
        return
    damaged = False
    for shard in meta["shards"]:
        fault = _length_fault(path, shard) or (_shard_fault(path, meta, shard, every_byte) if every_byte else None)
        if fault is not None:
            damaged = True
            yield fault
        progress(shard["rows"])
    file = path / meta["ids"]["file"]
    try:
        index = IdIndex.open(file)
    except (FileNotFoundError, ValueError) as error:
        yield error
        return
    if len(index) != meta["count"]:
        yield ValueError(f"{file} holds {len(index)} ids for {meta['count']} rows; extract again with `mmkd extract`")
    elif every_byte and hashlib.sha256(file.read_bytes()).hexdigest() != meta["ids"]["sha256"]:
        yield ValueError(f"{file}: its checksum does not match; extract again with `mmkd extract`")
    elif every_byte and not damaged:
        ids = VectorStore([path / shard["file"] for shard in meta["shards"]]).ids
        try:
            expected = IdIndex.of(digests(ids))
        except ValueError as error:
            yield ValueError(f"{path}: an id is not Unicode text ({error}); extract again with `mmkd extract`")
            return
        if any(not np.array_equal(getattr(index, part), getattr(expected, part)) for part in ("key", "check", "row")):
            yield ValueError(f"{file} does not belong to the ids of the shards; extract again with `mmkd extract`")


def _length_fault(path: Path, shard: dict[str, Any]) -> FileNotFoundError | ValueError | None:
    file = path / shard["file"]
    if not file.is_file():
        return FileNotFoundError(f"{file} is missing; extract again with `mmkd extract`")
    if file.stat().st_size != shard["bytes"]:
        return ValueError(
            f"{file} is truncated or has bytes left over; remove it and {path / 'meta.json'}, and extract again"
        )
    return None


def _shard_fault(
    path: Path, meta: dict[str, Any], shard: dict[str, Any], every_byte: bool = False
) -> FileNotFoundError | ValueError | None:
    file = path / shard["file"]
    try:
        header = read_header(file)
        if header.sha256 != shard["header_sha256"] or header.rows != shard["rows"]:
            return ValueError(f"{file}: its header does not match {path / 'meta.json'}; extract again")
        rows, found = shard["rows"], {name: (own["shape"], own["dtype"]) for name, own in header.tensors.items()}
        expected = {"features": ([rows, 2, meta["dim"]], STORED_AS[meta["dtype"]]), "id_end": ([rows], "I64")}
        expected |= {"id_text": (found.get("id_text", ([0], ""))[0][:1], "U8")}
        expected |= {"fingerprints": ([rows, 2], "U16")} if "fingerprints" in found else {}
        if any(found.get(name) != own for name, own in expected.items()):
            return ValueError(
                f"{file} does not hold {rows} pairs of {meta['dim']} {meta['dtype']} numbers and ids; extract again"
            )
        if every_byte and not checksums_match(file, header):
            return ValueError(f"{file}: its checksum does not match; remove it and extract again")
        if every_byte and not _is_finite(file, meta["dtype"]):
            return ValueError(f"{file} holds numbers that are not finite; extract again")
    except (FileNotFoundError, ValueError) as error:
        return error
    return None


def _is_finite(file: Path, dtype: str) -> bool:
    stored = TensorMap(file).arrays["features"]
    exponent = 0x7F80  # of bfloat16, which is mapped as its bits
    return bool(((stored & exponent) != exponent).all() if dtype == "bfloat16" else np.isfinite(stored).all())


def read_meta(path: Path) -> dict[str, Any]:
    """The ``meta.json`` of a store, verified by its own checksum and for impossible values.

    Raises:
        FileNotFoundError: the store is unfinished.
        ValueError: it is of another version, was changed, or names files outside its folder.
    """
    file = path / "meta.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a finished feature store (no meta.json); run `mmkd extract` again")
    meta = read_json(file)
    if not isinstance(meta, dict) or meta.get("version") != VERSION:
        raise ValueError(
            f"{file} is not of version {VERSION}, which this version of mmkd-clip reads; extract again with "
            "`mmkd extract`"
        )
    if meta.pop("sha256", None) != meta_sha256(meta):
        raise ValueError(f"{file} was changed after it was written; extract again with `mmkd extract`")
    if not is_folder_name(meta.get("teacher")):
        raise ValueError(f"{file}: the teacher is called {meta.get('teacher')!r}, which is not the name of a folder")
    try:
        shards = meta["shards"]
        names = [meta["ids"]["file"], meta["ids"]["sha256"]]
        names += [shard[key] for shard in shards for key in ("file", "header_sha256")]
        numbers = [meta["dim"], *(shard[key] for shard in shards for key in ("rows", "bytes"))]
        sound = all(map(is_folder_name, names)) and all(isinstance(n, int) and n > 0 for n in numbers)
        sound &= sum(shard["rows"] for shard in shards) == meta["count"] and meta["dtype"] in STORED_AS
        provenance = meta["provenance"]
        stated = [own.get(key) or "" for own in (provenance, provenance.get("raw") or {}) for key in KEPT_METADATA]
        sound &= all(isinstance(value, str) for value in stated)
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"{file} lacks entries or holds impossible ones; extract again with `mmkd extract`")
    return meta


def meta_sha256(meta: dict[str, Any]) -> str:
    """The checksum of ``meta.json``, and thus of the whole store."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def store_paths(folder: Path) -> list[Path]:
    """The finished feature stores in a folder, or the folder itself if it is one."""
    return [folder] if (folder / "meta.json").is_file() else sorted(p.parent for p in folder.glob("*/meta.json"))


def unfinished(folder: Path) -> dict[str, int]:
    """Unfinished feature stores: name -> number of shards."""
    found = {path.name: len(list(path.glob("shard-*.safetensors"))) for path in folder.iterdir() if path.is_dir()}
    return {
        name: count for name, count in sorted(found.items()) if count and not (folder / name / "meta.json").exists()
    }


def _slice(rows: np.ndarray) -> slice | np.ndarray:
    """Consecutive rows as a slice, which is copied at once; any others unchanged."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first == len(rows) - 1 and (len(rows) < 2 or bool((np.diff(rows) == 1).all())):
        return slice(first, last + 1)
    return rows
