"""Provenance of data and weights: versions of code, and the teachers of feature stores with their licences.

``teachers.yaml`` beside this file lists the teachers known by name: their loaders read it in `mmkd.encoders.zoo`, and
the authors' published features, which state nothing about their teachers, take weights, licence and note from it.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mmkd.data.folder import META_FILE, read_published
from mmkd.files import is_inside, read_json

PACKAGE = Path(__file__).resolve().parents[2]  # the checkout, or site-packages
UNSTATED, OTHERS = "not stated", "others"  # a licence or source that is not stated; those beyond the listed ones
TEACHERS_FILE = Path(__file__).with_name("teachers.yaml")
# Of a teacher's provenance, what a student's provenance keeps.
KEPT_METADATA = ("teacher", "form", "weights", "revision", "fingerprint", "license", "note")
KEPT_OF_PUBLISHED = ("weights", "license", "note")


@cache
def teachers_file() -> dict[str, dict[str, dict[str, Any]]]:
    """The teachers of ``teachers.yaml``: group (``paper`` or ``newer``) -> name -> entry."""
    found: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(TEACHERS_FILE.read_text(encoding="utf-8"))
    return found


def teachers_of(folders: Iterable[Path | None], names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The metadata of the teachers of feature stores, raw or aligned, each teacher once.

    Args:
        folders: of one store or of several, or the authors' published folder; None is skipped.
        names: only these, by default all.
    """
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for teacher in _teachers_in(folder) if folder is not None else ():
            if not names or teacher["teacher"] in names:
                found.setdefault(teacher["teacher"], teacher)
    return list(found.values())


def store_teacher(meta: dict[str, Any]) -> dict[str, Any]:
    """The teacher's metadata in a store's ``meta.json``; aligned stores carry that of the raw ones."""
    provenance = meta.get("provenance") or {}
    metadata = {"teacher": meta.get("teacher"), **provenance, **(provenance.get("raw") or {})}
    return {"license": UNSTATED} | {key: metadata[key] for key in KEPT_METADATA if metadata.get(key)}


def published_teacher(name: str) -> dict[str, Any]:
    """The metadata of a teacher in the authors' published folder; one that is not known has no stated licence."""
    entry = teachers_file()["paper"].get(name)
    if entry is None:
        return {"teacher": name, "license": UNSTATED}
    return {"teacher": name} | {key: entry.get(key, "") for key in KEPT_OF_PUBLISHED}


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of each distribution that is installed; others are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit(folder: Path) -> str | None:
    """Commit that is checked out in a folder with a ``.git``; None elsewhere.

    The files of git are read and git itself is never started: the configuration of a repository can name programs that
    git then runs, and the folder may be anybody's.
    """
    place = folder / ".git"
    try:
        if place.is_file():  # a worktree or submodule: ``gitdir: FOLDER``
            place = folder / place.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        head = (place / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return _commit(head)
        reference = head.removeprefix("ref: ")
        shared = place / "commondir"
        common = place / shared.read_text(encoding="utf-8").strip() if shared.is_file() else place
        if is_inside(reference) and (common / reference).is_file():
            return _commit((common / reference).read_text(encoding="utf-8").strip())
        packed = (common / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next((_commit(line.split()[0]) for line in packed if line.endswith(f" {reference}")), None)
    except (OSError, ValueError):
        return None


def _commit(text: str) -> str | None:
    return text if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) else None


def _teachers_in(folder: Path) -> list[dict[str, Any]]:
    if (folder / META_FILE).is_file():
        return [published_teacher(name) for name in sorted({n for s in read_published(folder) for n in s.teachers})]
    files = [folder / "meta.json"] if (folder / "meta.json").is_file() else sorted(folder.glob("*/meta.json"))
    return [store_teacher(read_json(file)) for file in files]
