"""Index the images of a folder for `mmkd search`, or bring such an index up to date.

An index that exists is updated: images that are new or have changed are encoded, those that are gone are removed. A
file counts as changed if its size or time differs and then its SHA-256 does. The index can be searched at any time; a
killed run keeps what was added; run the same command again to resume.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mmkd.command.settings import check_arguments, run, setting
from mmkd.data.pixel_rules import WindowPreset


@dataclass
class IndexSettings:
    """Index the images of a folder for search, or update the index.

    Example:
        mmkd index scans --model mmkd-clip --output scans.index
    """

    GROUPS: ClassVar[dict[str, str]] = {"computing": "batch_size workers threads device quiet"}

    folder: Path = setting(help="folder of images", positional=True)
    model: str = setting(help="folder or Hub id of a model, or the name of a teacher")
    output: Path = setting(help="folder of the index; one that exists is updated")
    window: WindowPreset | None = setting(
        None, "window of CT: auto, lung, soft, bone, brain or three; by default that of the index, auto for a new one"
    )
    batch_size: int = setting(32, "images at a time", least=1)
    workers: int = setting(0, "threads that read images; 0 takes this process' share of the cores", least=0)
    threads: int = setting(0, "threads that make the graph of a large index; 0 takes all cores", least=0)
    device: str = setting("auto", "cpu, cuda, cuda:1 ...; auto = a GPU if there is one")
    quiet: bool = setting(False, "no progress bar, print nothing")


if __name__ == "__main__":
    check_arguments(IndexSettings)  # before the imports that take seconds

import os
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.extraction import Readable
from mmkd.encoders.zoo import load_encoder
from mmkd.files import content_sha256, leads_inside
from mmkd.serving.encoding import counted, encode_items
from mmkd.serving.images import ImageFile, find_images, read_image
from mmkd.serving.index import GRAPH_ROWS, INDEX_FILE, FileStates, SearchIndex


def main(settings: IndexSettings) -> None:
    """Compare folder and index, and encode what differs.

    Raises:
        FileNotFoundError: the folder or the model is not there.
        FileExistsError: OUTPUT holds something else.
        ValueError: settings that cannot work, an index of another model or a damaged one, or no readable image.
    """
    if not settings.folder.is_dir():
        raise FileNotFoundError(f"{settings.folder}: no such folder")
    files = [file for file in find_images([settings.folder]) if not leads_inside(settings.output, file.path)]
    existing = SearchIndex.open(settings.output) if (settings.output / INDEX_FILE).is_file() else None
    encoder = load_encoder(settings.model, settings.device)
    encoder.batch_size = settings.batch_size
    if existing is not None:  # perhaps without an image yet
        existing.require_model(encoder.provenance)
        existing.require_window(settings.window)
        index = existing
    else:
        source = source_of_model(settings.model, settings.output)
        index = SearchIndex.create(settings.output, encoder.provenance, encoder.dim, source, settings.window or "auto")
    update(index, files, encoder, settings)
    if len(index) >= GRAPH_ROWS and not settings.quiet:
        print("bringing the graph up to date; the index can be searched meanwhile")
    index.optimize(settings.threads)


def source_of_model(model: str, output: Path) -> str:
    """The model as the index records it: a folder by its path from the index, so that both can be moved together."""
    if not Path(model).exists():
        return model
    return Path(os.path.relpath(Path(model).resolve(), output.resolve())).as_posix()


def update(index: SearchIndex, files: Sequence[ImageFile], encoder: DualEncoder, settings: IndexSettings) -> None:
    """Remove what is gone, and add what is new or has changed.

    Raises:
        ValueError: no image could be read, and the index would be empty.
    """
    removed = index.delete(sorted(set(index.ids) - {file.id for file in files}))
    stamps = {file.id: stamp_of(file) for file in files}
    states = index.states([file.id for file in files])
    current = np.array(list(stamps.values()), np.int64).reshape(-1, 2)
    differing = np.flatnonzero(~states.known | (states.stamps != current).any(axis=1)).tolist()
    hashes: dict[str, bytes] = {}
    touched: list[ImageFile] = []
    changed: list[ImageFile] = []
    for k in differing:
        same = states.known[k] and sha256_of(files[k], hashes) == states.sha256[k].tobytes()
        (touched if same else changed).append(files[k])
    if touched:  # only the time of change differs
        ids = [file.id for file in touched]
        index.add(ids, index.vectors(ids), file_states(ids, stamps, hashes))

    def read(file: ImageFile) -> Readable | str:
        image = read_image(file, index.window)
        if not isinstance(image, str):
            sha256_of(file, hashes)
        return image

    def take(items: list[ImageFile], vectors: Tensor) -> None:
        ids = [item.id for item in items]
        index.add(ids, vectors, file_states(ids, stamps, hashes))

    skipped = encode_items(encoder, changed, read, take, "indexing", settings.workers, settings.quiet)
    index.delete(list(skipped))
    if not len(index):
        raise ValueError(f"none of the {len(files)} images could be read ({counted(skipped)}); the index is empty")
    if not settings.quiet:
        added = len(changed) - len(skipped)
        print(f"{settings.output}: {len(index)} images; {added} added or changed, {removed} removed")


def stamp_of(file: ImageFile) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds; zeros where the file is not opened, or gone."""
    try:
        status = file.path.stat() if not file.reason else None
    except OSError:
        status = None
    return (status.st_size, status.st_mtime_ns) if status else (0, 0)


def sha256_of(file: ImageFile, known: dict[str, bytes]) -> bytes:
    """SHA-256 of a file, which is noted; of no bytes where it cannot be read."""
    if file.id not in known:
        try:
            digest = content_sha256(*([] if file.reason else [file.path]))
        except OSError:
            digest = content_sha256()
        known[file.id] = bytes.fromhex(digest)
    return known[file.id]


def file_states(ids: Sequence[str], stamps: dict[str, tuple[int, int]], hashes: dict[str, bytes]) -> FileStates:
    """The state of n files as the index keeps it."""
    hashed = np.frombuffer(b"".join(hashes[id] for id in ids), np.uint8).reshape(-1, 32).copy()
    return FileStates(np.ones(len(ids), bool), np.array([stamps[id] for id in ids], np.int64).reshape(-1, 2), hashed)


if __name__ == "__main__":
    run(IndexSettings, main)
