"""What goes to the Hub: a card and files by their place in the repository, gathered without copying them.

A publication is put together from what a stage left in its folder. Files are named one by one, never "all that is
there": a note, a log or a list of patients that happens to lie in the folder stays where it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmkd.data.pair_table import TABLE_FILE
from mmkd.data.published import META_FILE
from mmkd.data.records import FOLDER_FILE, MANIFEST_FILE
from mmkd.files import read_json

Kind = Literal["model", "adapter", "features", "pairs"]
CARD_FILE = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
KINDS = (
    "a model (config.json and safetensors, from pretrain, distill or convert), an adapter (adapter_config.json, from "
    "finetune), features (meta.json, from extract or align) or pairs (manifest.jsonl, from curate or screen)"
)


@dataclass(frozen=True)
class Item:
    """One file of a publication.

    Attributes:
        size: in bytes.
        write: puts it where it is told.
    """

    size: int
    write: Callable[[Path], Any]


@dataclass
class Publication:
    """A repository to be.

    Attributes:
        repo_type: model or dataset.
        card: the text of ``README.md``, its metadata included.
        items: files by their path in the repository, the card not among them.
        left_out: what the folder holds and is not uploaded.
        notes: what the publisher should know before it is public.
        owned: patterns of files that an earlier upload may have left and this one replaces.
    """

    repo_type: Literal["model", "dataset"]
    card: str
    items: dict[str, Item]
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    owned: list[str] = field(default_factory=list)


def kind_of(folder: Path) -> Kind:
    """What a folder holds.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds nothing that can be published; the message says what was found and what to do.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give {KINDS}")
    if folder.name.endswith(".partial"):
        raise ValueError(f"{folder} is an unfinished run; start its command again to finish it")
    if (folder / FOLDER_FILE).is_file() and any((folder / name).is_file() for name in (MANIFEST_FILE, TABLE_FILE)):
        return "pairs"
    if (folder / "meta.json").is_file() or any(folder.glob("*/meta.json")):
        return "features"
    if (folder / "config.json").is_file():
        return _require_model(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return "adapter"
    if (folder / META_FILE).is_file():
        raise ValueError(f"{folder} holds the authors' published data, which is theirs to publish")
    if (folder / "summary.json").is_file():
        raise ValueError(f"{folder} holds results; push the model they are of, with --results {folder}")
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise ValueError(f"{folder} holds {found}; it should hold {KINDS}")


def existing(path: Path) -> Item:
    """A file as it lies on the disk; linked where the disk can, copied where not."""

    def write(target: Path) -> None:
        try:
            target.symlink_to(path.resolve())
        except OSError:
            shutil.copyfile(path, target)

    return Item(path.stat().st_size, write)


def made(text: str) -> Item:
    """A file that is made for the publication."""
    data = text.encode("utf-8")
    return Item(len(data), lambda target: target.write_bytes(data))


def gather(publication: Publication, folder: Path) -> None:
    """Put card and files into an empty folder, as the repository shall hold them."""
    for name, item in {CARD_FILE: made(publication.card), **publication.items}.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        item.write(target)


def not_taken(folder: Path, items: dict[str, Item]) -> list[str]:
    """Names at the top of a folder of which nothing is published; a card of ours replaces what is called like it."""
    taken = {name.split("/")[0] for name in items} | {CARD_FILE}
    return sorted(path.name for path in folder.iterdir() if path.name not in taken)


def _require_model(folder: Path) -> Kind:
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != "mmkd_clip":
        raise ValueError(f"{folder} holds a model of type {model_type!r}; only those of type 'mmkd_clip' are pushed")
    return "model"
