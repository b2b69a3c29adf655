"""Encoding a user's images for the commands: in parts, with what could not be read, and what is recorded of a run."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from mmkd.data.provenance import installed_versions
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.extraction import EncodingTask, Readable, encode_shards
from mmkd.files import write_json


class Identified(Protocol):
    """Something with an id: an image file, a pair."""

    @property
    def id(self) -> str:
        """Under which it is named to the user."""


Item = TypeVar("Item", bound=Identified)

PART_ITEMS = 1024  # images whose vectors are handed on together; the most that a killed `mmkd index` loses
SHOWN = 20  # unreadable images that are listed one by one

Take = Callable[[list[Item], Tensor], None]


class VectorTask(EncodingTask[Item]):
    """Image vectors, handed on part by part."""

    def __init__(self, encoder: DualEncoder, take: Take[Item]) -> None:
        """Encode with this encoder, for this function; see `encode_items`."""
        super().__init__(encoder)
        self.take = take
        self.skipped: dict[str, str] = {}

    def has(self, shard: int) -> bool:
        """See `EncodingTask`."""
        return False

    def encode(self, prepared: list[Any]) -> dict[str, Tensor]:
        """See `EncodingTask`."""
        return {"image": self.encoder.encode_prepared(prepared)}

    def write(self, shard: int, items: list[Item], arrays: dict[str, Tensor], skipped: list[tuple[Item, str]]) -> None:
        """See `EncodingTask`."""
        self.skipped.update((item.id, reason) for item, reason in skipped)
        self.take(items, arrays.get("image", torch.zeros(0, self.encoder.dim)))


def encode_items(
    encoder: DualEncoder,
    items: Sequence[Item],
    read: Callable[[Item], Readable | str],
    take: Take[Item],
    title: str = "encoding",
    workers: int = 0,
    quiet: bool = False,
) -> dict[str, str]:
    """Encode the images of items, which threads read meanwhile; unreadable ones are listed on standard error.

    Args:
        encoder: takes `DualEncoder.batch_size` images at a time.
        items: files, pairs ...
        read: the image of an item, or the reason why there is none.
        take: gets the readable items of each part and their vectors ``(n, dim)``, unit length.
        title: of the progress bar.
        workers: threads that read and prepare; 0 for this process' share of the cores.
        quiet: no progress bar.

    Returns:
        Id of each item that could not be read -> reason.
    """
    starts = range(0, len(items), PART_ITEMS)
    parts = [(number, items[start : start + PART_ITEMS]) for number, start in enumerate(starts)]
    task = VectorTask(encoder, take)
    with tqdm(total=len(items), desc=title, unit="image", disable=quiet or len(items) < 2) as bar:
        encode_shards([task], parts, read, encoder.batch_size, workers, bar.update)
    _warn_skipped(task.skipped)
    return task.skipped


def _warn_skipped(skipped: Mapping[str, str]) -> None:
    """Name images that could not be read on standard error, the first ones by id, and all by reason."""
    for id, reason in list(skipped.items())[:SHOWN]:
        print(f"left out {id}: {reason}", file=sys.stderr)
    if skipped:
        print(f"left out {len(skipped)}: {counted(skipped)}", file=sys.stderr)


def counted(skipped: Mapping[str, str]) -> str:
    """Images that could not be read, by reason: ``corrupt 2, unsupported 1``."""
    return ", ".join(f"{reason} {count}" for reason, count in sorted(Counter(skipped.values()).items()))


def write_log(path: Path, command: str, encoder: DualEncoder, output: Path | None, **facts: Any) -> None:
    """Write what a run was made with, as JSON: weights, preprocessing, versions, hash of the output.

    Folder names of this machine are no part of it.

    Args:
        path: the file.
        command: name of the command.
        encoder: that was used.
        output: file that was written; None for standard output.
        facts: further JSON values.
    """
    content = {
        "command": command,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": encoder.provenance,
        "versions": {
            "python": platform.python_version(),
            **installed_versions(["mmkd-clip", "torch", "transformers", "pillow", "pydicom", "nibabel", "usearch"]),
        },
        "output": output and {"file": output.name, "sha256": hashlib.sha256(output.read_bytes()).hexdigest()},
        **facts,
    }
    write_json(path, content)
