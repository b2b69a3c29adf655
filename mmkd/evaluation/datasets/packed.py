"""Sources that are packed: MedMNIST's arrays and WebDataset tars, read where they lie and never unpacked beside it."""

from __future__ import annotations

import shutil
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmkd.data.archives import ArchivedFile
from mmkd.data.images import UnreadableImageError, check_size
from mmkd.data.readers import tar_members
from mmkd.data.splits import meaning_of
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.datasets.source import Members, Reading, Sample, Store, cut

PARTS = {"train": "train", "val": "validation", "test": "test"}
MOST_BYTES = 64 * 1024**3
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")
LARGEST_TEXT = 1 << 20
COPIED_BYTES = 1 << 22


class Arrays(Store):
    """Pictures of an ``.npz``: arrays ``(n, height, width)`` or ``(n, height, width, 3)`` of one byte each.

    The array of a split is unpacked when its first picture is asked for, into a temporary file that is mapped: several
    gigabytes need no memory, and who asks for none waits for none.
    """

    def __init__(self, path: Path) -> None:
        """Keep the path; nothing is unpacked yet."""
        self.path = path
        self._arrays: dict[str, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()  # images are read by several threads, and an array is unpacked once

    def data(self, name: str) -> bytes:
        """The bytes of a picture."""
        return self._picture(name).tobytes()

    def image(self, name: str) -> Image.Image:
        """The picture as RGB."""
        return Image.fromarray(self._picture(name)).convert("RGB")

    def _picture(self, name: str) -> NDArray[np.uint8]:
        part, _, row = name.partition("/")
        with self._lock:
            if part not in self._arrays:
                try:
                    with zipfile.ZipFile(self.path) as zipped:
                        self._arrays[part] = _array(zipped, f"{part}_images", self.path)
                except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
                    raise UnreadableImageError("corrupt", f"{self.path}: {part}_images: {error}") from error
        return np.asarray(self._arrays[part][int(row)])


def read_medmnist(manifest: Manifest, paths: Sequence[Path]) -> Reading:
    """A MedMNIST ``.npz``; a label is the number of a class in their order, a row of zeros and ones several.

    Raises:
        ValueError: the file is not of this form, or a label is beyond the classes.
    """
    path = paths[0]
    names = list(manifest.classes)
    samples: list[Sample] = []
    sides: set[str] = set()
    try:
        with zipfile.ZipFile(path) as zipped:
            for part, split in PARTS.items():
                labels = _array(zipped, f"{part}_labels", path)
                member = _member(zipped, f"{part}_images", path)
                with zipped.open(member) as packed:
                    shape, _, kind = _header(packed, f"{path}: {part}_images")
                _check_pictures(shape, kind, len(labels), f"{path}: {part}_images")
                sides.add(f"{shape[2]} x {shape[1]}")
                samples += [
                    Sample(f"{part}/{row}", _numbered(value, names, manifest, path), split=split)
                    for row, value in enumerate(labels.reshape(len(labels), -1).tolist())
                ]
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no .npz file, or a damaged one: {error}") from error
    return Reading(samples, Arrays(path), notes=[f"images of {', '.join(sorted(sides))} pixels"])


def _member(zipped: zipfile.ZipFile, name: str, path: Path) -> zipfile.ZipInfo:
    try:
        member = zipped.getinfo(f"{name}.npy")
    except KeyError:
        raise ValueError(f"{path} holds no {name}; it has {', '.join(zipped.namelist())}") from None
    if member.file_size > MOST_BYTES:
        raise ValueError(f"{path}: {name} unpacks to more than {MOST_BYTES} bytes; refused")
    return member


def _array(zipped: zipfile.ZipFile, name: str, path: Path) -> NDArray[Any]:
    """An array of an ``.npz``, mapped from a temporary file that vanishes with it."""
    with tempfile.TemporaryFile() as file, zipped.open(_member(zipped, name, path)) as packed:
        shutil.copyfileobj(packed, file, COPIED_BYTES)
        file.seek(0)
        shape, by_columns, kind = _header(file, f"{path}: {name}")
        order: Literal["F", "C"] = "F" if by_columns else "C"
        return np.memmap(file, kind, "r", file.tell(), shape, order)


def _header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type of an array that begins here."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, kind = read(file)
        if kind.hasobject:
            raise ValueError("it holds Python objects")
    except ValueError as error:
        raise ValueError(f"{name} is no array of numbers: {error}") from error
    return shape, by_columns, kind


def _check_pictures(shape: tuple[int, ...], kind: np.dtype[Any], labels: int, name: str) -> None:
    is_flat = len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)
    if kind != np.uint8 or not is_flat:
        raise ValueError(f"{name} is {kind} {shape}; needed: uint8 (n, height, width[, 3])")
    if labels != shape[0]:
        raise ValueError(f"{name} has {shape[0]} rows, its labels {labels}")
    check_size((shape[2], shape[1]), name, 1)


def _numbered(values: list[int], names: list[str], manifest: Manifest, path: Path) -> list[str]:
    if manifest.task == "multilabel":
        if len(values) != len(names):
            raise ValueError(f"{path} has {len(values)} findings, the manifest {len(names)} classes")
        if not set(values) <= {0, 1}:
            raise ValueError(f"{path}: findings {values} are not zeros and ones")
        return [name for name, value in zip(names, values, strict=True) if value]
    if len(values) != 1 or values[0] not in range(len(names)):
        raise ValueError(f"{path}: label {values} is not the number of one of the manifest's {len(names)} classes")
    return [names[int(values[0])]]


def read_wds(manifest: Manifest, paths: Sequence[Path]) -> Reading:
    """WebDataset tars as clip-benchmark lays them out: picture beside ``.cls`` or ``.txt``, splits as folders.

    ``.cls`` is a name, or a number in ``classnames.txt``, else in the order of the manifest's classes. Of a ``.txt``
    each line is a caption, where captions are asked for.

    Raises:
        ValueError: there is no tar, one is damaged, or a number is beyond the classes.
    """
    root = paths[0]
    tars = sorted(root.rglob("*.tar")) if root.is_dir() else [root]
    if not tars:
        raise ValueError(f"{root} holds no .tar files")
    listed = root / "classnames.txt"
    names = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else list(manifest.classes)
    places: dict[str, ArchivedFile] = {}
    samples = []
    for tar in tars:
        where = tar.relative_to(root).as_posix() if root.is_dir() else tar.name
        folders = PurePosixPath(where).parts[:-1] or (tar.stem,)
        split = next((part for part in folders if meaning_of(part)), "")
        for name, picture, notes in _grouped(tar):
            key = f"{where}/{name}"
            places[key] = picture
            labels = cut(manifest, _class_name(notes[".cls"], names, tar)) if ".cls" in notes else []
            captions = notes.get(".txt", "").splitlines() if manifest.task == "retrieval" else []
            for caption in captions or [""]:
                samples.append(Sample(key, labels, " ".join(caption.split()), split=split))
    return Reading(samples, Members(places))


def _grouped(tar: Path) -> Iterator[tuple[str, ArchivedFile, dict[str, str]]]:
    """Key, picture and texts of each sample whose members stand together."""
    key = ""
    picture: ArchivedFile | None = None
    notes: dict[str, str] = {}
    for member in tar_members(tar):
        ending = f".{member.suffix}"
        if member.fault or not (ending in PICTURES or ending in (".cls", ".txt")):
            continue
        if member.key != key:
            if picture is not None:
                yield key, picture, notes
            key, picture, notes = member.key, None, {}
        if ending in PICTURES:
            picture = member.file
        elif member.file.size <= LARGEST_TEXT:
            notes[ending] = member.file.read_bytes().decode("utf-8", "replace")
    if picture is not None:
        yield key, picture, notes


def _class_name(text: str, names: Sequence[str], tar: Path) -> str:
    text = text.strip()
    if not text.isdigit() or text in names:
        return text
    if int(text) >= len(names):
        raise ValueError(f"{tar}: class number {text} is beyond the {len(names)} classes")
    return names[int(text)]
