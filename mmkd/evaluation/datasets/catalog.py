"""The catalog of datasets of the package, suites of them, and a user's own manifests.

``mmkd/evaluation/catalog/`` holds one manifest a file, ``suites.yaml``, ``training_data.yaml``, and in
``publications.yaml`` where each dataset was published and which public text its counts and classes were compared with.
Manifests that `mmkd datasets add` has checked lie in ``~/.config/mmkd/datasets``, or in the folder that
``MMKD_CATALOG`` names.
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mmkd.command.settings import nearest
from mmkd.evaluation.datasets.manifest import Manifest, read_manifest

CATALOG = Path(str(importlib.resources.files("mmkd.evaluation.datasets"))) / "catalog"
SUITES, TRAINING, PUBLICATIONS = "suites.yaml", "training_data.yaml", "publications.yaml"
OWN_CATALOG, OWN_VARIABLE = "~/.config/mmkd/datasets", "MMKD_CATALOG"


def own_catalog() -> Path:
    """The folder of a user's own manifests."""
    return Path(os.environ.get(OWN_VARIABLE) or OWN_CATALOG).expanduser()


def catalog(own: Path | None = None) -> dict[str, Manifest]:
    """All manifests by id, those of the package first.

    Args:
        own: a user's folder of manifests, by default `own_catalog`.

    Raises:
        ValueError: a manifest of the user is broken, or has the id of another.
    """
    found = dict(_packaged())
    for path in sorted((own or own_catalog()).glob("*.yaml")):
        manifest = read_manifest(path)
        if manifest.id in found:
            raise ValueError(f"{path}: id {manifest.id!r} is taken; choose another")
        found[manifest.id] = manifest
    return found


def suite_names() -> list[str]:
    """Names of the suites."""
    return list(_read(SUITES))


def load_suite(name: str) -> list[Manifest]:
    """The manifests of a suite, in its order.

    Raises:
        ValueError: there is no such suite.
    """
    suites = _read(SUITES)
    if name not in suites:
        raise ValueError(f"no suite {name!r}{nearest(name, suites)}; there are {', '.join(suites)}")
    return [_packaged()[id] for id in suites[name]]


def find_manifests(names: str | Sequence[str], own: Path | None = None) -> list[Manifest]:
    """Manifests by YAML file, id or suite, each once.

    Args:
        names: of any of these, several perhaps joined by commas.
        own: a user's folder of manifests, by default `own_catalog`.

    Raises:
        FileNotFoundError: a YAML file that is not there.
        ValueError: a name that is none of them, a broken manifest, or two manifests with one id.
    """
    listed = names.split(",") if isinstance(names, str) else list(names)
    found: dict[str, Manifest] = {}
    for name in [name.strip() for name in listed if name.strip()]:
        for manifest in _named(name, own):
            if found.setdefault(manifest.id, manifest) != manifest:
                raise ValueError(f"{name}: another manifest with the id {manifest.id!r} is given, too")
    return list(found.values())


def contaminated(encoder: str, manifest: Manifest) -> bool:
    """Whether an encoder is known to have trained on a dataset, or on what it was made from.

    False only means that its publication does not state it.

    Args:
        encoder: name of a teacher of the zoo, in any case.
        manifest: of the dataset.
    """
    trained = {name.lower(): corpora for name, corpora in _read(TRAINING).items()}.get(encoder.lower(), [])
    seen = {str(corpus).lower() for corpus in trained}
    return bool(seen & {manifest.id.lower(), manifest.title.lower(), *(name.lower() for name in manifest.derived_from)})


def compared_with(id: str) -> str:
    """The public text that counts and classes of a packaged dataset were compared with; empty where none was found."""
    return str(_read(PUBLICATIONS).get(id, {}).get("compared", ""))


def _named(name: str, own: Path | None) -> list[Manifest]:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise FileNotFoundError(f"{name}: no such file; `mmkd datasets ls` lists those that need none")
        return [read_manifest(Path(name))]
    if name in _read(SUITES):
        return load_suite(name)
    known = catalog(own)
    if name in known:
        return [known[name]]
    near = nearest(name, [*known, *suite_names()])
    raise ValueError(f"no dataset or suite {name!r}{near}; `mmkd datasets ls` lists them, FILE.yaml names one of yours")


@cache
def _packaged() -> dict[str, Manifest]:
    paths = sorted(path for path in CATALOG.glob("*.yaml") if path.name not in (SUITES, TRAINING, PUBLICATIONS))
    cited = {id: own.get("citation", "") for id, own in _read(PUBLICATIONS).items()}
    manifests = map(read_manifest, paths)
    return {own.id: replace(own, citation=own.citation or cited.get(own.id, "")) for own in manifests}


@cache
def _read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CATALOG / name).read_text(encoding="utf-8"))
    return loaded
