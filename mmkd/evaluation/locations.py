"""Where the files of a manifest lie on this machine, or where they are to be had."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmkd.evaluation.manifest import SOURCES, Manifest

PLACE, VARIABLE = "${DATA}", "MMKD_DATA"
TIERS = {"A": "download it from", "B": "register for it at", "C": "it needs credentials and an agreement, see"}
SHOWN = 5


class Absent(Exception):
    """The data are not on this machine; the message says where they are to be had."""


def source_kind(manifest: Manifest) -> str:
    """The kind of a manifest's source."""
    return next(key for key in manifest.source if key in SOURCES)


def locate(manifest: Manifest, data: Path | None = None) -> list[Path]:
    """Where the files of a manifest lie; see `open_collection`.

    Raises:
        Absent: some are not there, or there is no folder for ``${DATA}``.
    """
    kind = source_kind(manifest)
    folder = str(data) if data is not None else os.environ.get(VARIABLE, "")
    given = manifest.source[kind]
    texts = [str(text) for text in (given if isinstance(given, list) else [given])]
    if any(PLACE in text for text in texts) and not folder:
        raise Absent(f"no folder of data is given: --data DIR or {VARIABLE}; {where_to_get(manifest)}")
    paths = [Path(text.replace(PLACE, folder)).expanduser() for text in texts]
    if kind == "medmnist":
        paths = [_sized(paths[0], manifest.source.get("size"))]
    lacking = [path for path in paths if not path.exists()]
    if kind == "bags" and not lacking:
        table = paths[0] / str(manifest.source.get("table", "labels.csv"))
        lacking = [] if table.is_file() else [table]
    is_hub_name = kind == "hf" and PLACE not in texts[0] and texts[0].count("/") == 1
    if lacking and not is_hub_name:
        raise Absent(f"not at {', '.join(map(str, lacking[:SHOWN]))}; {where_to_get(manifest)}")
    return paths


def _sized(stem: Path, size: Any) -> Path:
    """MedMNIST's file of a size, by default the largest that is there."""
    ending = {224: "_224.npz", 128: "_128.npz", 64: "_64.npz", 28: ".npz"}
    if size is not None and size not in ending:
        raise ValueError(f"source: size is {size!r}; MedMNIST has {', '.join(map(str, ending))}")
    found = [stem.with_name(stem.name + ending[own]) for own in ([size] if size else ending)]
    return next((path for path in found if path.is_file()), found[0])


def where_to_get(manifest: Manifest) -> str:
    """Where a dataset is to be had, as a part of a sentence."""
    if not manifest.register:
        return "its manifest does not say where it is to be had"
    return f"{TIERS[manifest.tier]} {manifest.register}"
