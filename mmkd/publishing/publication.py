"""A publication: a staging folder that holds exactly the files of a repository, the card among them.

Files are named one by one, never "all that is there": a note, a log or a list of patients in the folder of a run is not
staged. Large files are hard links where the file system allows, so that staging a model takes no space.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmkd.data.folder import META_FILE
from mmkd.data.table import TABLE_FILE
from mmkd.files import leads_inside, read_json, read_object, write_json

Kind = Literal["model", "adapter", "features", "pairs"]

CARD_FILE = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
READ_FROM = ("_name_or_path", "name_or_path", "local_files_only", "is_local", "backend")  # how a file was read here
PLACE = re.compile(r"(\w{2,}:)?(~?/(?!/)|\.{1,2}/|[A-Za-z]:[\\/]|\\\\)")
KINDS = (
    "a model (config.json and safetensors, from pretrain, distill or convert), an adapter (adapter_config.json, from "
    "finetune), features (meta.json, from extract or align) or pairs (manifest.arrow, from curate or screen)"
)


@dataclass(frozen=True)
class Draft:
    """The content to publish, with its name, card template and licence.

    Attributes:
        folder: with the content.
        staged: an empty folder, which gets the files of the repository.
        repo: ``user/name``.
        template: of the card, in Jinja.
        license: under which the publisher offers the content; None states no licence.
    """

    folder: Path
    staged: Path
    repo: str
    template: str
    license: str | None

    def write_card(self, card: str) -> None:
        """Write ``README.md``."""
        (self.staged / CARD_FILE).write_text(card, encoding="utf-8")


@dataclass
class Publication:
    """A repository, ready for upload.

    Attributes:
        repo_type: model or dataset.
        staged: folder with its files.
        notes: what the publisher should read before the repository is public.
        replaces: patterns of files that an earlier upload may have left and this one removes.
    """

    repo_type: Literal["model", "dataset"]
    staged: Path
    notes: list[str] = field(default_factory=list)
    replaces: list[str] = field(default_factory=list)

    @property
    def card(self) -> str:
        """The text of ``README.md``."""
        return (self.staged / CARD_FILE).read_text(encoding="utf-8")

    def sizes(self) -> dict[str, int]:
        """Bytes of each file by its path in the repository."""
        files = sorted(path for path in self.staged.rglob("*") if path.is_file())
        return {path.relative_to(self.staged).as_posix(): path.stat().st_size for path in files}

    def left_out(self, folder: Path) -> list[str]:
        """Top-level names of the published folder that are not staged."""
        staged = {path.name for path in self.staged.iterdir()}
        return sorted(path.name for path in folder.iterdir() if path.name not in staged)


def kind_of(folder: Path) -> Kind:
    """The kind of content of a folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds nothing that can be published, or a link out of it; the message says what to do.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give {KINDS}")
    if folder.name.endswith(".partial"):
        raise ValueError(f"{folder} is an unfinished run; run its command again to finish it")
    refuse_links(folder)
    if (folder / TABLE_FILE).is_file():
        return "pairs"
    if (folder / "meta.json").is_file() or any(folder.glob("*/meta.json")):
        return "features"
    if (folder / "config.json").is_file():
        model_type = read_object(folder / "config.json").get("model_type")
        if model_type != "mmkd_clip":
            raise ValueError(f"{folder} holds a model of type {model_type!r}; only type 'mmkd_clip' is pushed")
        return "model"
    if (folder / ADAPTER_CONFIG).is_file():
        return "adapter"
    if (folder / META_FILE).is_file():
        raise ValueError(f"{folder} holds the authors' published data, which only the authors publish")
    if (folder / "summary.json").is_file():
        raise ValueError(f"{folder} holds results; push the evaluated model with --results {folder}")
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise ValueError(f"{folder} holds {found}; expected {KINDS}")


def refuse_links(folder: Path) -> None:
    """Refuse links out of a folder that others may have made: what they name would be published.

    Raises:
        ValueError: there is one; those of the Hub's cache, from ``snapshots/REVISION`` to ``blobs``, are its own files.
    """
    blobs = folder.resolve().parent.parent / "blobs"
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if path.is_symlink() and not (leads_inside(folder, path) or leads_inside(blobs, path)):
            raise ValueError(f"{path} is a link out of the folder; put a copy of the file in its place, or remove it")


def stage_file(source: Path, target: Path) -> None:
    """Put a file into the staging folder: a hard link, or a copy where the file system has none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or a file of another owner
        shutil.copyfile(source, target)


def stage_json(source: Path, target: Path, **defaults: Any) -> None:
    """Write a JSON file into the staging folder, without folders of this machine and with the keys that it lacks."""
    write_json(target, defaults | without_places(read_json(source)))


def without_places(value: Any) -> Any:
    """JSON values without folders of this machine: these are given by their last name; text and Hub ids stay."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items() if key not in READ_FROM}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    if isinstance(value, str) and (place := PLACE.match(value)):
        return (place[1] or "") + Path(value.replace("\\", "/")).name
    return value
