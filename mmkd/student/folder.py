"""Read and write the student's folder, with ``provenance.json`` beside the weights.

Each training stage records its teachers, data and starting weights with their licences, and keeps the provenance of the
folder that it started from, so that a published model documents the whole chain. Folder names of this machine are left
out; settings are in ``settings.yaml`` in the same folder.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmkd.data.folder import PairFolder
from mmkd.data.provenance import OTHERS, UNSTATED, installed_versions
from mmkd.data.table import in_columns, value_counts
from mmkd.encoders.weights import (
    CONFIG_FILES,
    fetch,
    indexed_files,
    load_transformers,
    quiet_transformers,
    read_processor,
    read_tensors,
)
from mmkd.files import read_object, write_json
from modeling_mmkd import MMKDClipModel, MMKDClipProcessor

PROVENANCE_FILE = "provenance.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MOST_VALUES = 40  # values of a column that are listed by name
PACKAGES = ("mmkd-clip", "torch", "transformers")
SENTENCE_TRANSFORMERS = Path(__file__).with_name("sentence_transformers.json")  # file of a model's folder -> content
PACKAGED_LICENSES = {
    "packaged:efficientnet-lite0": "Apache-2.0 (the original's; the package declares none)",
    "packaged:all-minilm-l6-v2": "Apache-2.0 (the original's; the package declares none)",
    "random:tiny": "own model",
}


def load_student(name: str) -> tuple[MMKDClipModel, Any]:
    """Read model and processor from a ``from_pretrained`` folder or Hub id, in fp32.

    Raises:
        FileNotFoundError: there is no such folder, or no Hub id that can be reached.
        ValueError: weights that are damaged or do not fit the model; the message lists the keys.
    """
    path = Path(name)
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise FileNotFoundError(f"--model {name}: no such folder; `mmkd pretrain --output {name}` writes one")
    folder = fetch(name, [*CONFIG_FILES, "*.safetensors", "*.safetensors.index.json"])
    processor = read_processor(MMKDClipProcessor, folder, backend="pil")
    model = load_transformers(MMKDClipModel, name, folder)
    tokenizer = processor.tokenizer
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.text_limit)  # files may not state it
    return model, processor


def save_student(folder: Path, model: MMKDClipModel, processor: Any, provenance: dict[str, Any] | None = None) -> None:
    """Write a ``from_pretrained`` folder and, if given, the provenance of the student; no path of this machine."""
    for config in (model.config, model.config.vision_config, model.config.text_config):
        config.name_or_path = ""
    for part in (model.config.vision_config, model.config.text_config):
        vars(part).pop("auto_map", None)  # code of others, which users of the folder would be asked to run
    processor.tokenizer.init_kwargs.pop("auto_map", None)
    with quiet_transformers():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    write_sentence_transformers(folder)
    if provenance is not None:
        write_provenance(folder, provenance)


def write_sentence_transformers(folder: Path) -> None:
    """Write the files by which sentence-transformers and mteb read a model's folder, and the modalities it has."""
    for name, values in json.loads(SENTENCE_TRANSFORMERS.read_text(encoding="utf-8")).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, values)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model.

    Raises:
        FileNotFoundError: there are none, or one that the index names is missing.
        ValueError: the index is damaged, or names a file in another folder.
    """
    index = folder / INDEX_FILE
    names = indexed_files(index) if index.is_file() else [WEIGHTS_FILE]
    for name in names:
        if not (folder / name).is_file():
            pickled = " (pickled weights are not read; load the model and save it with save_pretrained)"
            also = pickled if any(folder.glob("*.bin")) else ""
            raise FileNotFoundError(f"{folder} has no {name}{also}; is the folder complete?")
    return [folder / name for name in names]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model in the precision they are stored in.

    Raises:
        FileNotFoundError: there are none, or one that the index names is missing.
        ValueError: a file is damaged.
    """
    return {name: tensor for path in weight_files(folder) for name, tensor in read_tensors(path).items()}


def training_provenance(
    stage: str,
    pairs: PairFolder,
    started_from: Sequence[str],
    teachers: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The provenance of a model that a training stage writes.

    Args:
        stage: name of the recipe.
        pairs: of the training.
        started_from: names, folders or Hub ids of the starting weights.
        teachers: from `teachers_of`.

    Returns:
        JSON values.
    """
    return {
        "stage": stage,
        "data": describe_pairs(pairs),
        "teachers": list(teachers),
        "started_from": [starting_weights(name) for name in started_from],
        "versions": installed_versions(PACKAGES),
    }


def conversion_provenance(checkpoint: str, fingerprint: str) -> dict[str, Any]:
    """The provenance of a converted model: its checkpoint file, which states neither licence nor training."""
    weights = {"weights": checkpoint, "fingerprint": fingerprint, "license": UNSTATED}
    return {"stage": "convert", "teachers": [], "started_from": [weights], "versions": installed_versions(PACKAGES)}


def write_provenance(folder: Path, provenance: dict[str, Any]) -> None:
    """Write ``provenance.json``."""
    write_json(folder / PROVENANCE_FILE, provenance)


def read_provenance(folder: Path) -> dict[str, Any]:
    """The provenance in a model's folder; empty if there is none.

    Raises:
        ValueError: ``provenance.json`` is there but not an object of JSON.
    """
    path = folder / PROVENANCE_FILE
    return read_object(path) if path.is_file() else {}


def describe_pairs(folder: PairFolder) -> dict[str, Any]:
    """Number of pairs and groups, and counts by license, source, modality and split; no ids, captions or paths."""
    counts = value_counts(folder.pairs, ("license", "source", "modality", "split"))
    columns = in_columns(folder.pairs, ("id", "group"))  # may be millions, on disk
    groups = {group or id for ids, own in columns for id, group in zip(ids, own, strict=True)}
    for own in counts.values():
        if "" in own:
            own[UNSTATED] += own.pop("")
    named = {"licenses": "license", "sources": "source", "modalities": "modality", "splits": "split"}
    described = {plural: _most(counts[name]) for plural, name in named.items()}
    return {"pairs": len(folder.pairs), "groups": len(groups), **described}


def starting_weights(name: str) -> dict[str, Any]:
    """Name, folder or Hub id of starting weights with their license, and the folder's provenance if it has one."""
    if name in PACKAGED_LICENSES:
        return {"weights": name, "license": PACKAGED_LICENSES[name]}
    path = Path(name)
    if not path.exists():
        return {"weights": name, "license": UNSTATED}
    before = read_provenance(path) if path.is_dir() else {}
    own = {"license": "own model", "provenance": before} if before else {"license": UNSTATED}
    return {"weights": path.resolve().name, **own}


def _most(counts: Counter[str]) -> dict[str, int]:
    """Counts by value, the most frequent first; values beyond the limit are counted together."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[MOST_VALUES:])
    return dict(ordered[:MOST_VALUES]) | ({OTHERS: rest} if rest else {})
