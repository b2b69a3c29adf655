"""Which image files a user names: files, folders and patterns, as sorted paths with ids that are relative.

Every file of a folder is taken that is not hidden and not plainly something else (`OTHER_SUFFIXES`), because DICOM
files often have no suffix; whether it is an image shows when it is read. Linked folders are not entered, and a linked
file that leaves the folder is refused.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmkd.data.images import open_image
from mmkd.data.pixel_rules import DEFAULT_WINDOW, Window
from mmkd.data.readers import list_files
from mmkd.encoders.extraction import Readable
from mmkd.files import leads_inside

URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
OTHER_SUFFIXES = frozenset((".txt", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".xml", ".html", ".md", ".pdf"))
OTHER_SUFFIXES |= {".zip", ".tar", ".tgz", ".py", ".ipynb", ".log", ".parquet", ".npy", ".npz", ".safetensors", ".pt"}
OTHER_NAMES = frozenset(("DICOMDIR",))
OUTSIDE = "outside"  # reason of a link that leaves its folder


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file that may be an image.

    Attributes:
        id: its path relative to the folder that is given, with forward slashes.
        path: of the file.
        reason: why it is not opened; empty if it is.
    """

    id: str
    path: Path
    reason: str = ""


def find_images(sources: Sequence[str | Path]) -> list[ImageFile]:
    """The files that a user names, each once, sorted by id.

    Ids are relative to the folder that is given, or to the folder that all sources share. A folder is taken with all
    below it; a pattern such as ``scans/**/*.dcm`` is matched here where the shell has not done it.

    Raises:
        ValueError: nothing is named, a source is a URL, or a folder holds no file that may be an image.
        FileNotFoundError: a file is not there, or a pattern matches nothing.
    """
    found = [file for source in sources for file in _named_by(str(source))]
    if not found:
        raise ValueError("no image is named; give files, folders or patterns")
    folders = {os.path.abspath(root) for root, _, _ in found}  # noqa: PTH100  links stay as the user wrote them
    common = Path(os.path.commonpath(folders))
    files: dict[str, ImageFile] = {}
    for _, path, reason in found:
        id = Path(os.path.abspath(path)).relative_to(common).as_posix()  # noqa: PTH100
        files.setdefault(id, ImageFile(id, path, reason))
    return [files[id] for id in sorted(files)]


def read_image(file: ImageFile, window: Window = DEFAULT_WINDOW) -> Readable | str:
    """The image as 8-bit RGB, or the reason why it cannot be read; for `encode_shards`."""
    return file.reason or open_image(file.path, window=window)


def _named_by(source: str) -> list[tuple[Path, Path, str]]:
    """Folder, path and reason of the files that one source names."""
    if URL.match(source):
        raise ValueError(f"{source} is a URL; nothing is downloaded here: download the images, and give their folder")
    path = Path(source)
    if path.is_dir():
        inside = [file for file in list_files(path) if _may_be_image(file)]
        if not inside:
            raise ValueError(f"{source} holds no file that may be an image")
        return _within(path, inside)
    if path.exists():
        return [(path.parent, path, "")]
    if glob.has_magic(source):
        root = _fixed_part(path)
        matched = [Path(name) for name in sorted(glob.glob(source, recursive=True))]  # noqa: PTH207  one text, any root
        below = [file for match in matched for file in (list_files(match) if match.is_dir() else [match])]
        inside = [file for file in below if _may_be_image(file)]
        if not inside:
            raise FileNotFoundError(f"{source} matches no file that may be an image")
        return _within(root, inside)
    raise FileNotFoundError(f"{source}: no such file or folder")


def _within(root: Path, files: Iterable[Path]) -> list[tuple[Path, Path, str]]:
    return [(root, file, "" if leads_inside(root, file) else OUTSIDE) for file in files]


def _may_be_image(file: Path) -> bool:
    return file.suffix.lower() not in OTHER_SUFFIXES and file.name not in OTHER_NAMES


def _fixed_part(pattern: Path) -> Path:
    """The folder that a pattern starts in."""
    fixed = Path()
    for part in pattern.parts:
        if glob.has_magic(part):
            break
        fixed = fixed / part
    return fixed
