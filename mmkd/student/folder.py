"""``provenance.json`` beside a trained model: what it was made from, as far as the stages know it.

Each training stage writes down its teachers, data and starting weights with their licences, and keeps what the folder
it started from says of itself, so that the whole chain can be told when the model is published. Folder names of this
machine are left out; settings stand in ``settings.yaml`` beside.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmkd.data.folder import PairFolder
from mmkd.data.licenses import OTHERS, UNSTATED
from mmkd.data.table import in_columns
from mmkd.encoders.hfclip import CONFIG_FILES
from mmkd.encoders.weights import fetch, load_transformers, quiet_transformers
from mmkd.files import read_json, write_json
from modeling_mmkd import MMKDClipModel, MMKDClipProcessor

PROVENANCE_FILE = "provenance.json"

MOST_VALUES = 40  # values of a column that are listed by name

PACKAGES = ("mmkd-clip", "torch", "transformers")

PACKAGED_LICENSES = {
    "packaged:efficientnet-lite0": "Apache-2.0 (the original's; the package declares none)",
    "packaged:all-minilm-l6-v2": "Apache-2.0 (the original's; the package declares none)",
    "random:tiny": "own model",
}


def training_provenance(
    stage: str,
    pairs: PairFolder,
    started_from: Sequence[str],
    teachers: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """What a training stage knows of its model.

    Args:
        stage: name of the recipe.
        pairs: what it is trained on.
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
    """What is known of a converted model: the file it was, whose licence and training the file does not state."""
    weights = {"weights": checkpoint, "fingerprint": fingerprint, "license": UNSTATED}
    return {"stage": "convert", "teachers": [], "started_from": [weights], "versions": installed_versions(PACKAGES)}


def write_provenance(folder: Path, provenance: dict[str, Any]) -> None:
    """Write ``provenance.json``."""
    write_json(folder / PROVENANCE_FILE, provenance)


def read_provenance(folder: Path) -> dict[str, Any]:
    """What a model's folder says of itself, nothing where it says nothing.

    Raises:
        ValueError: ``provenance.json`` is there but not an object of JSON.
    """
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(found).__name__}")
    return found


def describe_pairs(folder: PairFolder) -> dict[str, Any]:
    """Number of pairs and groups, and counts by license, source, modality and split; no ids, captions or paths."""
    columns = ("license", "source", "modality", "split")
    counts: dict[str, Counter[str]] = {name: Counter() for name in columns}
    groups = set()
    for ids, own_groups, *values in in_columns(folder.pairs, ("id", "group", *columns)):  # may be millions, on disk
        groups |= {group or id for id, group in zip(ids, own_groups, strict=True)}
        for name, column in zip(columns, values, strict=True):
            counts[name].update(column)
    for own in counts.values():
        if "" in own:
            own[UNSTATED] += own.pop("")
    return {
        "pairs": len(folder.pairs),
        "groups": len(groups),
        "licenses": _most(counts["license"]),
        "sources": _most(counts["source"]),
        "modalities": _most(counts["modality"]),
        "splits": _most(counts["split"]),
    }


def starting_weights(name: str) -> dict[str, Any]:
    """A name, folder or Hub id with its license, and the provenance of a folder that has one."""
    if name in PACKAGED_LICENSES:
        return {"weights": name, "license": PACKAGED_LICENSES[name]}
    path = Path(name)
    if not path.exists():
        return {"weights": name, "license": UNSTATED}
    before = read_provenance(path) if path.is_dir() else {}
    own = {"license": "own model", "provenance": before} if before else {"license": UNSTATED}
    return {"weights": path.resolve().name, **own}


def _most(counts: Counter[str]) -> dict[str, int]:
    """Counts by value, the most frequent first; what is beyond the limit is put together."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[MOST_VALUES:])
    return dict(ordered[:MOST_VALUES]) | ({OTHERS: rest} if rest else {})


# Section: Which versions of packages are installed here, for whatever is written down about a result.


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of each distribution that is installed; others are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# Section: The student as a folder: read to go on training it, written when it is trained.


def load_student(name: str) -> tuple[MMKDClipModel, Any]:
    """Read model and processor from a ``from_pretrained`` folder or Hub id, in fp32.

    Raises:
        FileNotFoundError: there is no such folder, or no Hub id that can be reached.
        ValueError: weights that are damaged or not those of the model; the message lists the keys.
    """
    path = Path(name)
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise FileNotFoundError(f"--model {name}: no such folder; `mmkd pretrain --output {name}` writes one")
    folder = fetch(name, [*CONFIG_FILES, "*.safetensors", "*.safetensors.index.json"])
    return load_transformers(MMKDClipModel, name, folder), MMKDClipProcessor.from_pretrained(folder)


def save_student(folder: Path, model: MMKDClipModel, processor: Any, provenance: dict[str, Any] | None = None) -> None:
    """Write what ``from_pretrained`` reads and, where it is known, what the student was made from."""
    with quiet_transformers():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    if provenance is not None:
        write_provenance(folder, provenance)
