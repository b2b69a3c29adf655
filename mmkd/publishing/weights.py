"""Weights of a model as safetensors in files of bounded size, written anew only where a file is larger."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from mmkd.files import read_json
from mmkd.publishing.publication import Item, existing, made

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
