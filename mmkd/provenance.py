"""``provenance.json`` beside a trained model: what it was made from, as far as the stages know it.

Each training stage writes down its teachers, data and starting weights with their licences, and keeps what the folder
it started from says of itself, so that the whole chain can be told when the model is published. Folder names of this
machine are left out; settings stand in ``settings.yaml`` beside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmkd.data.pair_table import in_columns
from mmkd.data.published import META_FILE, read_published
from mmkd.data.records import PairFolder
from mmkd.files import read_json, write_json
from mmkd.versions import installed_versions

PROVENANCE_FILE = "provenance.json"
TEACHER_FACTS = ("teacher", "form", "weights", "revision", "fingerprint", "license", "note")
MOST_VALUES = 40  # values of a column that are listed by name
UNSTATED, OTHERS = "not stated", "others"
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


def teachers_of(folders: Iterable[Path | None], names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The teachers behind folders of features, raw or aligned, each once.

    Args:
        folders: of one store or of several, or the authors' published folder; None is passed over.
        names: only these, by default all.
    """
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for teacher in _teachers_in(folder) if folder is not None else ():
            if not names or teacher["teacher"] in names:
                found.setdefault(teacher["teacher"], teacher)
    return list(found.values())


def store_teacher(meta: dict[str, Any]) -> dict[str, Any]:
    """The teacher of a store by its ``meta.json``; aligned stores carry that of the raw ones."""
    provenance = meta.get("provenance") or {}
    facts = {"teacher": meta.get("teacher"), **provenance, **(provenance.get("raw") or {})}
    return {"license": UNSTATED} | {key: facts[key] for key in TEACHER_FACTS if facts.get(key)}


def _teachers_in(folder: Path) -> list[dict[str, Any]]:
    if (folder / META_FILE).is_file():
        return _published_teachers(folder)
    files = [folder / "meta.json"] if (folder / "meta.json").is_file() else sorted(folder.glob("*/meta.json"))
    return [store_teacher(read_json(file)) for file in files]


def _published_teachers(folder: Path) -> list[dict[str, Any]]:
    """The teachers that the authors' list names, as far as they are known here."""
    from mmkd.teachers.zoo import TEACHERS  # here, because it loads torch, which publishing does not need

    used = {name for sample in read_published(folder) for name in sample.teachers}
    known = {name: row for name, row in TEACHERS.items() if name in used}
    facts = {name: {"weights": row.weights, "license": row.license, "note": row.note} for name, row in known.items()}
    return [{"teacher": name, **facts.get(name, {"license": UNSTATED})} for name in sorted(used)]


def _most(counts: Counter[str]) -> dict[str, int]:
    """Counts by value, the most frequent first; what is beyond the limit is put together."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[MOST_VALUES:])
    return dict(ordered[:MOST_VALUES]) | ({OTHERS: rest} if rest else {})
