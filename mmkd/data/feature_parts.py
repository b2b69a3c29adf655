"""An extraction under way: parts of fixed pairs, written whole by any process, that become one feature store.

A part is named by what it holds (the teacher's identity and the ids of its pairs): a part that is there is done,
whoever made it and whenever, and one of other weights is never taken for it. Whichever process finds all parts closes
the store; no process waits for another. The bytes of the store depend on the pairs and the teacher alone, not on how
many processes there were or how often they were killed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from mmkd.data.features import SHARD_SIZE, FeatureStore, FeatureType, FeatureWriter
from mmkd.files import atomic_write_bytes, atomic_write_text, read_json, rename_folder

IDENTITY = ("fingerprint", "preprocessing", "tokenizer", "context", "pooling")
SKIPPED_FILE = "skipped.jsonl"


class FeatureParts:
    """What is still to be extracted for one store.

    Attributes:
        path: the finished store; parts lie in ``PATH.parts`` beside it.
        parts: ids of the pairs of each part; pairs that the store holds already are in none.
    """

    def __init__(
        self, path: Path, name: str, ids: Sequence[str], provenance: dict[str, Any], dtype: FeatureType, part_size: int
    ) -> None:
        """Compare what is there with what is wanted; nothing is written yet.

        Args:
            path: the store.
            name: the teacher.
            ids: the pairs that the store shall hold.
            provenance: of the teacher.
            dtype: how numbers are stored.
            part_size: pairs a part.

        Raises:
            ValueError: the store is there, but from other weights or preprocessing, or in another dtype.
        """
        self.path, self.name, self.provenance, self.dtype = path, name, provenance, dtype
        self._folder = path.with_name(f"{path.name}.parts")
        self._meta_before = self._meta()
        self._store = FeatureStore(path) if self._meta_before else None
        if self._store is not None:
            self._refuse_other(self._store)
        known = set(self._store.ids) if self._store is not None else set()
        new = [id for id in ids if id not in known]
        self.parts = [new[start : start + part_size] for start in range(0, len(new), part_size)]
        self._identity = json.dumps([dtype, *(provenance[key] for key in IDENTITY)])

    def has(self, part: int) -> bool:
        """Whether a part is done, or another process has closed the store since."""
        return self._file(part).is_file() or self._meta() != self._meta_before

    def write(self, part: int, ids: Sequence[str], image: Tensor, text: Tensor, skipped: dict[str, str]) -> None:
        """Write a part whole.

        Args:
            part: its number.
            ids: those of its pairs that could be encoded, in their order.
            image: (n, dim), unit length.
            text: (n, dim), unit length.
            skipped: id -> reason for the others.
        """
        dtype = torch.float16 if self.dtype == "float16" else torch.float32
        tensors = {"image": image.to(dtype).contiguous(), "text": text.to(dtype).contiguous()}
        metadata = {"ids": json.dumps(list(ids)), "skipped": json.dumps(skipped)}
        atomic_write_bytes(self._file(part), save(tensors, metadata=metadata))

    def close(self) -> dict[str, str] | None:
        """Make the store of all parts, if they are all there and it has not been made.

        Returns:
            id -> reason of the pairs that were left out, or None when it was not this process that closed the store.

        Raises:
            ValueError: no pair could be encoded.
        """
        if not self.parts or not all(self._file(part).is_file() for part in range(len(self.parts))):
            return None
        staged = self._folder / "store"
        try:
            skipped = self._write_store(staged)
            rename_folder(staged, self.path)
        except OSError:
            if self._meta() != self._meta_before:  # another process closed it at the same moment and cleared the parts
                return None
            raise
        shutil.rmtree(self._folder, ignore_errors=True)
        return skipped

    def _write_store(self, staged: Path) -> dict[str, str]:
        """Old rows, then new ones in the order of the pairs, in full shards."""
        ids = list(self._store.ids) if self._store is not None else []
        skipped: dict[str, str] = {}
        for part in range(len(self.parts)):
            with safe_open(self._file(part), "pt") as file:
                ids += json.loads(file.metadata()["ids"])
                skipped |= json.loads(file.metadata()["skipped"])
        if not ids:
            reasons = ", ".join(sorted(set(skipped.values())))
            raise ValueError(f"{self.path}: none of the {len(skipped)} images could be read ({reasons})")
        shutil.rmtree(staged, ignore_errors=True)
        writer = FeatureWriter(staged, self.name, self.dtype)
        for shard, (image, text) in enumerate(in_shards(self._blocks(), SHARD_SIZE)):
            writer.write_shard(shard, image, text)
        lines = [json.dumps({"id": id, "reason": reason}) + "\n" for id, reason in skipped.items()]
        atomic_write_text(staged / SKIPPED_FILE, "".join(lines))
        writer.finish(ids, self._store.provenance if self._store is not None else self.provenance)
        return skipped

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Image and text features (n, dim) of the store as it is, then of every part."""
        if self._store is not None:
            for start in range(0, len(self._store.ids), SHARD_SIZE):
                image, text, _ = self._store.lookup(self._store.ids[start : start + SHARD_SIZE])
                yield image, text
        for part in range(len(self.parts)):
            with safe_open(self._file(part), "pt") as file:
                yield file.get_tensor("image").float(), file.get_tensor("text").float()

    def _file(self, part: int) -> Path:
        content = json.dumps([self._identity, self.parts[part]])
        return self._folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.safetensors"

    def _meta(self) -> bytes:
        """The bytes of ``meta.json``, none when the store is unfinished."""
        try:
            return (self.path / "meta.json").read_bytes()
        except FileNotFoundError:
            return b""

    def _refuse_other(self, store: FeatureStore) -> None:
        differing = [key for key in IDENTITY if store.provenance.get(key) != self.provenance[key]]
        dtype = read_json(self.path / "meta.json")["dtype"]
        if store.name != self.name:
            differing.append("teacher")
        if dtype != self.dtype:
            differing.append("dtype")
        if differing:
            raise ValueError(
                f"{self.path} was extracted with another {', '.join(differing)}; choose another --output, or remove it"
            )


def in_shards(blocks: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same rows in blocks of exactly ``size``, the last one excepted."""
    waiting: list[tuple[Tensor, Tensor]] = []
    rows = 0
    for block in blocks:
        waiting.append(block)
        rows += len(block[0])
        while rows >= size:
            image, text = (torch.cat(side) for side in zip(*waiting, strict=True))
            yield image[:size], text[:size]
            waiting, rows = [(image[size:], text[size:])], rows - size
    if rows:
        image, text = (torch.cat(side) for side in zip(*waiting, strict=True))
        yield image, text
