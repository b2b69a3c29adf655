"""A search index: image vectors of one model by id, which grows, shrinks and is searched by vectors.

The vectors lie in the one vector store (`mmkd.data.features`), as shards in half precision that never change: rows are
added at the end (the last shard is written again until it is full), and a row whose image has changed or gone is marked
as removed. ``index.json``, replaced last, names all files; a killed writer leaves the index as it was after the last
`add`. Writers exclude one another, readers see the old index or the new one.

Search is exact up to `GRAPH_ROWS` rows: one product with all vectors. Larger indices get a graph (HNSW, Malkov and
Yashunin 2018, by usearch), memory-mapped; rows that came after it are searched exactly until they are many, and the
similarities of what it finds are computed again from the store. The graph holds a second copy of the vectors, because
its neighbours must lie beside them. It is derived: a damaged one is made again by `optimize`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import safetensors.numpy
from numpy.typing import ArrayLike, NDArray

from mmkd.data.features import IDENTITY
from mmkd.data.features.shards import TensorMap, checksums_match, read_header, shard_file, write_shard
from mmkd.data.features.store import VectorStore
from mmkd.data.pixel_rules import Window, WindowPreset
from mmkd.files import atomic_write_bytes, exclusive, is_folder_name, read_json, write_json

INDEX_FILE = "index.json"
VERSION = 1
SHARD_ROWS = 8192
GRAPH_ROWS = 200_000  # live rows from which on a graph is made
TAIL_ROWS = 20_000  # rows after the graph that are searched exactly before it is extended
REMOVED_SHARE = 0.3  # of all rows, from which on the index is rewritten
CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH = 24, 64, 192
SAMPLED_BYTES = 1 << 20  # of the beginning and the end of the graph, which are checked when it is opened
SPARE = 16  # answers beyond k that the graph gives, for rows that were removed since
PATTERNS = ("vectors-*.safetensors", "removed-*.safetensors", "graph-*.usearch", ".*.tmp", ".lock")

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Hit:
    """A result of a search.

    Attributes:
        id: of the image, its path relative to the folder that was indexed.
        score: cosine with the query.
    """

    id: str
    score: float


@dataclass(frozen=True)
class FileStates:
    """What the index knows of n files, to see which have changed.

    Attributes:
        known: whether the index holds them, ``(n,)``.
        stamps: size in bytes and time of change in nanoseconds, ``(n, 2)``; zeros where unknown.
        sha256: of their content, ``(n, 32)`` bytes; zeros where unknown.
    """

    known: NDArray[np.bool_]
    stamps: NDArray[np.int64]
    sha256: NDArray[np.uint8]


class SearchIndex:
    """An index on disk; use `create` or `open`.

    Attributes:
        path: its folder.
        meta: content of ``index.json``.
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        """Map the files that ``meta`` names."""
        self.path = path
        self._whole: set[str] = set()  # files of which every byte was compared
        self._load(meta)

    @classmethod
    def create(
        cls, path: Path, provenance: Mapping[str, Any], dim: int, source: str = "", window: WindowPreset = "auto"
    ) -> SearchIndex:
        """Make an empty index.

        Args:
            path: a folder that does not exist, is empty, or holds what a killed run left.
            provenance: of the encoder; what identifies its vectors is kept.
            dim: width of its vectors.
            source: where the encoder is loaded from: a Hub id, a name, or its folder relative to the index.
            window: in which CT images are read.

        Raises:
            FileExistsError: the folder holds something else.
        """
        own = (*PATTERNS, f".{INDEX_FILE}.lock")  # of a killed run; the first commit removes them
        if path.exists() and not (path.is_dir() and all(any(map(file.match, own)) for file in path.iterdir())):
            raise FileExistsError(f"{path} exists and is no index; choose another --output")
        model = {"name": provenance.get("teacher"), "source": source, **{key: provenance.get(key) for key in IDENTITY}}
        path.mkdir(parents=True, exist_ok=True)
        meta = {"version": VERSION, "model": model, "dim": dim, "window": window}
        meta |= {"shards": [], "removed": None, "graph": None}
        write_json(path / INDEX_FILE, meta)
        return cls(path, meta)

    @classmethod
    def open(cls, path: Path) -> SearchIndex:
        """Open an index: up to `GRAPH_ROWS` rows, which a search reads anyway, by every byte; else in milliseconds.

        Raises:
            FileNotFoundError: there is no index, or a file of it is missing.
            ValueError: a file is damaged.
        """
        for _ in range(2):
            meta = _read_meta(path)
            try:
                return cls(path, meta)
            except FileNotFoundError:
                if _read_meta(path) == meta:
                    raise
        return cls(path, _read_meta(path))  # a writer has replaced it twice since

    def __len__(self) -> int:
        """Number of images that can be found."""
        return len(self._store) - len(self._removed)

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return int(self.meta["dim"])

    @property
    def window(self) -> Window:
        """In which CT images were read, and those of queries are."""
        return Window(self.meta["window"])

    def require_window(self, preset: str | None) -> None:
        """Refuse another window than that of the index.

        Raises:
            ValueError: the message names both.
        """
        if preset is not None and preset != self.window.preset:
            raise ValueError(
                f"{self.path} was made with --window {self.window.preset}, not {preset}; leave it out, or make another"
            )

    @property
    def model_source(self) -> str:
        """What `load_encoder` takes for the model of the index; see `create`.

        Raises:
            ValueError: the index does not name it.
        """
        source = str(self.meta["model"].get("source") or "")
        if not source:
            raise ValueError(f"{self.path} does not name its model; give it as --model")
        return str(self.path / source) if (self.path / source).exists() else source

    @property
    def ids(self) -> list[str]:
        """All ids, in the order in which they were added."""
        return self._store.ids.take(self._live)

    def require_model(self, provenance: Mapping[str, Any]) -> None:
        """Refuse an encoder whose vectors cannot be compared with those of the index.

        Raises:
            ValueError: other weights, preprocessing, tokenizer, context or pooling.
        """
        differing = [key for key in IDENTITY if self.meta["model"].get(key) != provenance.get(key)]
        if differing:
            what = "weights" if differing[0] == "fingerprint" else ", ".join(differing)
            raise ValueError(
                f"{self.path} was made with other {what} (model {self.meta['model'].get('name')}); give that --model, "
                "or make another index"
            )

    def states(self, ids: Sequence[str]) -> FileStates:
        """What the index knows of the files of n ids."""
        rows = self._rows(ids)
        if not len(self._store):
            return FileStates(rows >= 0, *_unknown_files(len(ids)))
        return FileStates(rows >= 0, self._store.gather("stamps", rows), self._store.gather("sha256", rows))

    def vectors(self, ids: Sequence[str]) -> Vectors:
        """The vectors ``(n, dim)`` of n ids; zeros where the index lacks one."""
        if not len(self._store):
            return np.zeros((len(ids), self.dim), np.float32)
        return self._store.gather("vectors", self._rows(ids), np.float32)

    def add(self, ids: Sequence[str], vectors: ArrayLike, files: FileStates | None = None) -> None:
        """Add images, or replace those of the same ids; whole or not at all.

        Args:
            ids: of n images, each once.
            vectors: ``(n, dim)``, unit length.
            files: their state; None where it is unknown.

        Raises:
            ValueError: other shapes, an id twice, or numbers that are not finite.
            OutputInUseError: another writer is at work.
        """
        wide = np.asarray(vectors, np.float32)
        if wide.shape != (len(ids), self.dim) or len(set(ids)) != len(ids) or not np.isfinite(wide).all():
            raise ValueError(
                f"{len(ids)} ids, {len(set(ids))} of them different, and vectors {wide.shape} were given; the "
                f"index takes different ids and finite vectors (n, {self.dim})"
            )
        if not ids:
            return
        stamps, sha256 = (files.stamps, files.sha256) if files else _unknown_files(len(ids))
        arrays: Arrays = {"vectors": wide.astype(np.float16), "stamps": stamps, "sha256": sha256}
        with self._writing():
            old = self._rows(ids)
            removed = np.union1d(self._removed, old[old >= 0])
            places, begin = self._row_of, len(self._store)
            shards, first = self._full_shards()
            written = list(ids)
            if first < begin:  # the last shard is written again
                before, tail = self._part(np.arange(first, begin))
                written = before + written
                arrays = {name: np.concatenate([tail[name], own]) for name, own in arrays.items()}
            for start in range(0, len(written), SHARD_ROWS):
                part = slice(start, start + SHARD_ROWS)
                shards.append(self._write_shard(written[part], {name: own[part] for name, own in arrays.items()}))
            self._commit(shards, removed, self.meta["graph"])
            places.update(zip(ids, range(begin, begin + len(ids)), strict=True))
            self._row_of = places

    def delete(self, ids: Sequence[str]) -> int:
        """Remove images; returns how many of the ids were there.

        Raises:
            OutputInUseError: another writer is at work.
        """
        with self._writing():
            places = self._row_of
            gone = {id: places[id] for id in ids if id in places}
            if gone:
                removed = np.union1d(self._removed, np.array(list(gone.values())))
                self._commit(self.meta["shards"], removed, self.meta["graph"])
                self._row_of = {id: row for id, row in places.items() if id not in gone}
            return len(gone)

    def search(self, vectors: ArrayLike, k: int) -> list[list[Hit]]:
        """The most similar images of each query.

        Args:
            vectors: queries ``(q, dim)`` of the same model, unit length.
            k: answers to each; an index of fewer images gives all.

        Returns:
            For each query its answers, the most similar first.

        Raises:
            ValueError: ``k`` below 1, or queries of another shape or that are not finite.
        """
        queries = np.asarray(vectors, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim or not np.isfinite(queries).all():
            raise ValueError(f"queries are {queries.shape}; the index takes finite vectors (q, {self.dim})")
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1")
        k = min(k, len(self))
        if not k or not len(queries):
            return [[] for _ in queries]
        covered = self.meta["graph"]["rows"] if self._graph is not None else 0
        scores, rows = self._exact(queries, k, covered)
        found = []
        for query, own_scores, own_rows in zip(queries, scores, rows, strict=True):
            if covered:
                near = self._from_graph(query, k)
                own_rows = np.concatenate([own_rows, near])
                own_scores = np.concatenate([own_scores, self._store.gather("vectors", near, np.float32) @ query])
            best = np.argsort(-own_scores, kind="stable")[:k]
            ids = self._store.ids.take(own_rows[best])
            pairs = zip(ids, own_scores[best].tolist(), strict=True)
            found.append([Hit(id, min(1.0, score)) for id, score in pairs if score > -np.inf])
        return found

    def optimize(self, threads: int = 0) -> None:
        """Rewrite the index where much of it is removed, and make or extend the graph where it is large.

        Args:
            threads: of the graph; 0 for all cores.

        Raises:
            ModuleNotFoundError: usearch is not installed.
            OutputInUseError: another writer is at work.
        """
        with self._writing():
            if len(self._removed) > REMOVED_SHARE * len(self._store):
                live = np.split(self._live, range(SHARD_ROWS, len(self._live), SHARD_ROWS))
                self._commit([self._write_shard(*self._part(rows)) for rows in live if len(rows)], _NONE, None)
            covered = self.meta["graph"]["rows"] if self._graph is not None else 0
            if len(self) >= GRAPH_ROWS and len(self._store) - covered > (TAIL_ROWS if covered else 0):
                self._commit(self.meta["shards"], self._removed, self._write_graph(covered, threads))

    @cached_property
    def _live(self) -> Rows:
        """Rows that are not removed, ascending."""
        return np.setdiff1d(np.arange(len(self._store)), self._removed, assume_unique=True)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        """The live row of each id; writers carry it on, because it takes a second for each million ids."""
        return dict(zip(self.ids, self._live.tolist(), strict=True))

    def _rows(self, ids: Sequence[str]) -> Rows:
        """The live row of each id, ``(n,)``; -1 if there is none."""
        return np.fromiter((self._row_of.get(id, -1) for id in ids), np.int64, len(ids))

    def _load(self, meta: dict[str, Any]) -> None:
        """Map the files of an ``index.json`` and forget those of the one before."""
        self.meta = meta
        for name in ("_live", "_row_of"):
            self.__dict__.pop(name, None)
        counts = [shard["rows"] for shard in meta["shards"]]
        files = [self.path / shard["file"] for shard in meta["shards"]]
        for file, shard in zip(files, meta["shards"], strict=True):
            every_byte = sum(counts) < GRAPH_ROWS and shard["file"] not in self._whole
            _check_shard(file, shard, meta["dim"], every_byte)
            self._whole |= {shard["file"]} if every_byte else set()
        self._store = VectorStore(files, counts)
        if files:  # mapped now, a file stays readable after a writer has removed its name
            self._store.gather("vectors", np.cumsum([0, *counts[:-1]]))
        self._removed: Rows = _removed_rows(self.path / meta["removed"], sum(counts)) if meta["removed"] else _NONE
        self._graph = self._open_graph(meta["graph"])

    def _open_graph(self, entry: dict[str, Any] | None) -> Any:
        """The mapped graph; None where there is none, or it is damaged."""
        if entry is None:
            return None
        file = self.path / entry["file"]
        if not file.is_file() or _sample(file) != entry["sample"]:
            return None
        from usearch.index import Index

        graph: Any = Index.restore(str(file), view=True)
        graph.expansion_search = EXPANSION_SEARCH
        return graph

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Exclude other writers, and start from what they have left."""
        with exclusive(self.path / INDEX_FILE):
            meta = _read_meta(self.path)
            if meta != self.meta:
                self._load(meta)
            yield

    def _full_shards(self) -> tuple[list[dict[str, Any]], int]:
        """The shards that stay, and the row after them: all but a last one that is not full and not in the graph."""
        shards = list(self.meta["shards"])
        covered = self.meta["graph"]["rows"] if self.meta["graph"] else 0
        if shards and shards[-1]["rows"] < SHARD_ROWS and len(self._store) - shards[-1]["rows"] >= covered:
            shards.pop()
        return shards, sum(shard["rows"] for shard in shards)

    def _part(self, rows: Rows) -> tuple[list[str], Arrays]:
        """Ids and arrays of some rows."""
        arrays = {name: self._store.gather(name, rows) for name in ("vectors", "stamps", "sha256")}
        return self._store.ids.take(rows), arrays

    def _write_shard(self, ids: list[str], arrays: Arrays) -> dict[str, Any]:
        content = hashlib.sha256(arrays["vectors"].tobytes() + arrays["stamps"].tobytes()).hexdigest()
        file = shard_file(self.path, VERSION, ids, content, kind="vectors")
        write_shard(file, ids, arrays)
        return {"file": file.name, "rows": len(ids), "header_sha256": read_header(file).sha256}

    def _commit(self, shards: Sequence[dict[str, Any]], removed: Rows, graph: dict[str, Any] | None) -> None:
        """Replace ``index.json``, and remove what it no longer names."""
        name = None
        if len(removed):
            data = safetensors.numpy.save({"rows": np.sort(removed).astype(np.int64)})
            name = f"removed-{hashlib.sha256(data).hexdigest()[:24]}.safetensors"
            atomic_write_bytes(self.path / name, data)
        meta = {**self.meta, "shards": list(shards), "removed": name, "graph": graph}
        write_json(self.path / INDEX_FILE, meta)
        self._load(meta)
        named = {INDEX_FILE, name, *(shard["file"] for shard in shards), (graph or {}).get("file")}
        for pattern in PATTERNS:
            for file in self.path.glob(pattern):
                if file.name not in named:
                    file.unlink(missing_ok=True)

    def _write_graph(self, covered: int, threads: int) -> dict[str, Any]:
        """Make the graph of all rows from the one of the first ``covered`` rows, which may be none."""
        from usearch.index import Index

        graph: Any
        if covered:
            graph = Index.restore(str(self.path / self.meta["graph"]["file"]), view=False)
        else:
            graph = Index(ndim=self.dim, metric="ip", dtype="f16", connectivity=CONNECTIVITY)
        graph.expansion_add = EXPANSION_ADD
        fresh = self._live[np.searchsorted(self._live, covered) :]
        fresh = np.random.default_rng(0).permutation(fresh)  # in the order of patients, less would be found
        for rows in np.split(fresh, range(SHARD_ROWS, len(fresh), SHARD_ROWS)):
            graph.add(rows.astype(np.uint64), self._store.gather("vectors", rows), threads=threads)
        total = len(self._store)
        temporary = self.path / f".graph-{total}.tmp"
        graph.save(str(temporary))
        sample = _sample(temporary)
        file = self.path / f"graph-{total}-{sample[:16]}.usearch"
        temporary.replace(file)
        return {"file": file.name, "rows": total, "sample": sample}

    def _exact(self, queries: Vectors, k: int, first: int) -> tuple[Vectors, Rows]:
        """Scores and rows ``(q, <=k)`` of the best live rows from ``first`` on, by a product with all of them."""
        scores: Vectors = np.zeros((len(queries), 0), np.float32)
        rows: Rows = np.zeros((len(queries), 0), np.int64)
        for start in range(first, len(self._store), SHARD_ROWS):
            part = np.arange(start, min(start + SHARD_ROWS, len(self._store)))
            found = queries @ self._store.gather("vectors", part, np.float32).T
            gone = self._removed[np.searchsorted(self._removed, start) : np.searchsorted(self._removed, part[-1] + 1)]
            found[:, gone - start] = -np.inf
            scores = np.concatenate([scores, found], axis=1)
            rows = np.concatenate([rows, np.broadcast_to(part, found.shape)], axis=1)
            if scores.shape[1] > k:
                best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
                scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
        return scores, rows

    def _from_graph(self, query: Vectors, k: int) -> Rows:
        """At most k live rows near a query ``(dim,)``, from the graph."""
        count = k + SPARE
        while True:
            found: Rows = self._graph.search(query, min(count, len(self._graph))).keys.astype(np.int64)
            found = found[~np.isin(found, self._removed)][:k]
            if len(found) == k or count >= len(self._graph):
                return found
            count *= 4


_NONE: Rows = np.zeros(0, dtype=np.int64)


def _unknown_files(count: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    return np.zeros((count, 2), np.int64), np.zeros((count, 32), np.uint8)


def _read_meta(path: Path) -> dict[str, Any]:
    if not (path / INDEX_FILE).is_file():
        raise FileNotFoundError(f"{path} is no index; make one with `mmkd index DIR --model MODEL --output {path}`")
    meta = read_json(path / INDEX_FILE)
    try:
        graph = [] if meta["graph"] is None else [meta["graph"]]
        named = [entry["file"] for entry in [*meta["shards"], *graph]] + [meta["removed"]] * bool(meta["removed"])
        numbers = [meta["dim"], *(shard["rows"] for shard in meta["shards"])]
        digests = [*(shard["header_sha256"] for shard in meta["shards"]), *(entry["sample"] for entry in graph)]
        right = meta["version"] == VERSION and isinstance(meta["model"], dict)
        right = right and meta["window"] in get_args(WindowPreset)
        right = right and all(map(is_folder_name, named))
        right = right and all(isinstance(digest, str) for digest in digests)
        right = right and all(isinstance(number, int) and number >= 0 for number in numbers)
        right = right and all(entry["rows"] <= sum(numbers[1:]) for entry in graph)
    except (TypeError, KeyError, AttributeError):
        right = False
    if not right:
        raise ValueError(f"{path / INDEX_FILE} is damaged, or of another version; make the index again")
    return dict(meta)


def _removed_rows(file: Path, total: int) -> Rows:
    """The removed rows among all, ascending.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged, or names rows that are not there.
    """
    rows = np.array(TensorMap(file).arrays.get("rows", _NONE[None]))
    if rows.dtype != np.int64 or rows.ndim != 1 or (np.diff(rows, prepend=-1, append=total) < 1).any():
        raise ValueError(f"{file} is damaged; make the index again: remove its folder and run `mmkd index`")
    return rows


def _check_shard(file: Path, entry: dict[str, Any], dim: int, every_byte: bool) -> None:
    """Refuse a shard that is missing, truncated, or not the one that ``index.json`` names, as far as is asked."""
    again = "make the index again: remove its folder and run `mmkd index`"
    try:
        header = read_header(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing; {again}") from None
    except ValueError:
        raise ValueError(f"{file} is truncated or damaged; {again}") from None
    rows, found = entry["rows"], {name: (own["dtype"], own["shape"]) for name, own in header.tensors.items()}
    expected = {"vectors": ("F16", [rows, dim]), "stamps": ("I64", [rows, 2]), "sha256": ("U8", [rows, 32])}
    expected |= {"id_end": ("I64", [rows]), "id_text": ("U8", found.get("id_text", ("", [0]))[1][:1])}
    if header.sha256 != entry["header_sha256"] or found != expected:
        raise ValueError(f"{file} is not the file that {INDEX_FILE} names; {again}")
    if every_byte and not checksums_match(file, header):
        raise ValueError(f"{file} is damaged: its checksum does not match; {again}")


def _sample(file: Path) -> str:
    """SHA-256 over the size, the beginning and the end of a file, which shows a truncated one without reading it."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        beginning = opened.read(SAMPLED_BYTES)
        opened.seek(max(0, size - SAMPLED_BYTES))
        return hashlib.sha256(str(size).encode() + beginning + opened.read()).hexdigest()
