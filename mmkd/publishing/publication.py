"""What goes to the Hub: a card and files by their place in the repository, gathered without copying them.

A publication is put together from what a stage left in its folder. Files are named one by one, never "all that is
there": a note, a log or a list of patients that happens to lie in the folder stays where it is.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from mmkd.data.published import META_FILE
from mmkd.data.table import TABLE_FILE
from mmkd.files import read_json

Kind = Literal["model", "adapter", "features", "pairs"]

CARD_FILE = "README.md"

ADAPTER_CONFIG = "adapter_config.json"

KINDS = (
    "a model (config.json and safetensors, from pretrain, distill or convert), an adapter (adapter_config.json, from "
    "finetune), features (meta.json, from extract or align) or pairs (manifest.arrow, from curate or screen)"
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
    if (folder / TABLE_FILE).is_file():
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


# Section: Weights of a model as safetensors in files of bounded size, written anew only where a file is larger.


WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

PATTERN = "model{suffix}.safetensors"

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

Tensors = dict[str, tuple[Path, str, tuple[int, ...]]]


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB``.

    Raises:
        ValueError: it is not a number with KB, MB or GB.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]B)\s*", text.upper())
    if match is None or not float(match[1]):
        raise ValueError(f"--max_shard_size {text!r} must be a size such as 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2]])


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model.

    Raises:
        FileNotFoundError: there are none, or one that the index names is missing.
    """
    if (folder / INDEX_FILE).is_file():
        names = sorted(set(read_json(folder / INDEX_FILE)["weight_map"].values()))
    else:
        names = [WEIGHTS_FILE]
    for name in names:
        if not (folder / name).is_file():
            pickled = " (pickled weights are not pushed; load the model and save_pretrained it)"
            also = pickled if any(folder.glob("*.bin")) else ""
            raise FileNotFoundError(f"{folder} has no {name}{also}; is the folder whole?")
    return [folder / name for name in names]


def read_headers(files: Sequence[Path]) -> Tensors:
    """Place, type and shape of every tensor; no numbers are read.

    Raises:
        ValueError: a file is damaged.
    """
    tensors: Tensors = {}
    for path in files:
        try:
            with safe_open(path, "np") as opened:
                for name in opened.keys():  # noqa: SIM118  # not a dictionary
                    part = opened.get_slice(name)
                    tensors[name] = (path, part.get_dtype(), tuple(part.get_shape()))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    return tensors


def count_parameters(tensors: Tensors) -> int:
    """Numbers in all tensors."""
    return sum(math.prod(shape) for _, _, shape in tensors.values())


def weight_items(folder: Path, limit: int) -> dict[str, Item]:
    """The files of the weights: those of the folder, or shards of at most ``limit`` bytes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    files = weight_files(folder)
    tensors = read_headers(files)
    if all(file.stat().st_size <= limit for file in files):
        index = {INDEX_FILE: existing(folder / INDEX_FILE)} if (folder / INDEX_FILE).is_file() else {}
        return {file.name: existing(file) for file in files} | index
    plan = split_state_dict_into_shards_factory(
        dict(tensors), get_storage_size=_size, filename_pattern=PATTERN, max_shard_size=limit
    )
    items = {
        name: Item(sum(_size(tensors[key]) for key in keys), partial(_write_shard, tensors, keys))
        for name, keys in plan.filename_to_tensors.items()
    }
    listing = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    return items | ({INDEX_FILE: made(json.dumps(listing, indent=2) + "\n")} if plan.is_sharded else {})


def _size(tensor: tuple[Path, str, tuple[int, ...]]) -> int:
    _, dtype, shape = tensor
    return BYTES.get(dtype, 1) * math.prod(shape)


def _write_shard(tensors: Tensors, keys: Sequence[str], target: Path) -> None:
    from safetensors.torch import save_file  # torch knows bfloat16; it is loaded only where shards are written

    chosen: dict[str, Any] = {}
    for key in keys:
        with safe_open(tensors[key][0], "pt") as opened:
            chosen[key] = opened.get_tensor(key)
    save_file(chosen, target, metadata={"format": "pt"})
