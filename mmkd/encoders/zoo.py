"""The teachers by name, and the one function that loads any dual encoder by name, folder, Hub id or specification.

`TEACHERS` are the paper's nine and `NEWER_TEACHERS` those that appeared since, as ``mmkd/data/teachers.yaml`` lists
them. A user's YAML file has the same keys.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mmkd.command.settings import nearest
from mmkd.data.licenses import NON_COMMERCIAL, OWN_MODEL, terms
from mmkd.data.provenance import teachers_file
from mmkd.distributed import allow_tf32, chosen_device
from mmkd.encoders import hfclip, openclip, tower_pair
from mmkd.encoders import python as python_form
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.settings import Precision
from mmkd.encoders.spec import UNDECLARED, TeacherSpec, announce, read_spec
from mmkd.encoders.weights import fetch
from mmkd.files import read_object

OPENAI = "openai"  # the tag of open_clip's weights where none is given
TEACHERS = {name: TeacherSpec(name, **entry) for name, entry in teachers_file()["paper"].items()}
NEWER_TEACHERS = {name: TeacherSpec(name, **entry) for name, entry in teachers_file()["newer"].items()}
KNOWN = TEACHERS | NEWER_TEACHERS

# Words of ``--teacher`` that narrow the teachers down instead of naming one.
FILTERS: dict[str, Callable[[TeacherSpec], bool]] = {
    "ungated": lambda spec: not spec.gated,
    "commercial": lambda spec: terms(spec.license).strictness < NON_COMMERCIAL.strictness,
}

LOADERS: dict[str, Callable[[TeacherSpec, str], DualEncoder]] = {
    "openclip": openclip.load,
    "hfclip": hfclip.load,
    "ours": hfclip.load,
    "unimed": hfclip.load_unimed,
    "pmcclip": tower_pair.load_pmcclip,
    "medclip": tower_pair.load_medclip,
    "python": python_form.load,
    "towers": hfclip.load_towers,
}


def load_encoder(name_or_path: str, device: str = "cpu", weights: Path | None = None) -> DualEncoder:
    """Load a teacher, a student or any other dual encoder.

    Args:
        name_or_path: a teacher's name in any case; a folder of `MMKDClipModel`, transformers or open_clip; a Hub id
            (``owner/name``); ``open_clip:ARCHITECTURE[:PRETRAINED]``, a tag or a file, by default OpenAI's weights (a
            slash may stand for the second colon); ``python:module.function``; ``towers:FOLDER``, a student without its
            projections; or a YAML file.
        device: for the model; see `chosen_device`.
        weights: a local folder or file instead of the specification's weights.

    Raises:
        FileNotFoundError: weights are not there, or the Hub cannot be reached; the message says what to do.
        ValueError: an unknown name (with the known ones), or weights that do not fit the model.
    """
    device = chosen_device(device)
    spec = find_spec(name_or_path)
    if weights is not None:
        spec = dataclasses.replace(spec, weights=str(weights))
    encoder = LOADERS[spec.form](spec, device)
    if spec.dim and encoder.dim != spec.dim:
        raise ValueError(
            f"{spec.name} is {encoder.dim} wide, but its specification states dim {spec.dim}; are these its weights?"
        )
    announce(encoder.provenance)
    return encoder


def load_with_precision(source: str, device: str, precision: Precision, weights: Path | None = None) -> DualEncoder:
    """An encoder whose forward pass has a precision, which its provenance names; see `load_encoder`.

    Args:
        source: name or path.
        device: see `chosen_device`.
        precision: of the forward pass.
        weights: see `load_encoder`.
    """
    allow_tf32(precision == "tf32")
    device = chosen_device(device)
    encoder = load_encoder(source, device, weights)
    encoder.autocast = (device.partition(":")[0], torch.bfloat16) if precision == "bfloat16" else None
    encoder.provenance["precision"] = precision
    return encoder


def find_spec(name_or_path: str) -> TeacherSpec:
    """The specification of a name, folder, Hub id or YAML file; see `load_encoder`.

    Raises:
        FileNotFoundError: a path that is not there.
        ValueError: an unknown name; the message lists the known ones.
    """
    specs = {name.lower(): spec for name, spec in KNOWN.items()}
    if name_or_path.lower() in specs:
        return specs[name_or_path.lower()]
    path = Path(name_or_path)
    prefix, colon, rest = name_or_path.partition(":")
    if colon and prefix == "open_clip":
        architecture, _, pretrained = re.sub("[:/]", "\0", rest, count=1).partition("\0")
        pretrained = pretrained or OPENAI
        name = folder_name(f"{architecture}-{Path(pretrained).stem}")
        return TeacherSpec(name, "openclip", pretrained, architecture=architecture)
    if colon and prefix == "python":
        return TeacherSpec(rest, "python", rest)
    if colon and prefix == "towers":
        return dataclasses.replace(find_spec(rest), form="towers")
    if path.suffix in (".yaml", ".yml"):
        return read_spec(path)
    if path.is_dir():
        return _spec_of_folder(path.resolve().name, str(path), path)
    if path.is_absolute() or name_or_path.startswith(".") or path.exists() or name_or_path.count("/") > 1:
        raise FileNotFoundError(f"{name_or_path}: no such folder, and no YAML file of a teacher")
    if "/" in name_or_path:
        return _spec_of_folder(path.name, name_or_path, fetch(name_or_path, ["config.json", openclip.CONFIG_FILE]))
    raise ValueError(
        f"unknown encoder {name_or_path!r}{nearest(name_or_path.lower(), specs)}; known: {', '.join(KNOWN)}; or "
        f"give a folder, a Hub id (owner/name), open_clip:ARCHITECTURE[:PRETRAINED], or a YAML file"
    )


def named_sources(sources: list[str]) -> dict[str, str]:
    """Sources by the name of their feature store: the name before ``=``, else that of the specification.

    Args:
        sources: teachers, and words of `FILTERS`, all of which a teacher must pass. Filters alone choose among all
            known teachers.

    Raises:
        ValueError: none is given or left, or two have one name.
    """
    filters = [FILTERS[source] for source in sources if source in FILTERS]
    named = [source for source in sources if source not in FILTERS]
    if filters:
        specs = [(source, find_spec(source.rpartition("=")[2])) for source in named or KNOWN]
        named = [source for source, spec in specs if all(passes(spec) for passes in filters)]
    if not named:
        raise ValueError(f"no teacher is named, or none passes the filters; known: {', '.join(KNOWN)}")
    return by_name(named, lambda source: find_spec(source).name, "teacher")


def by_name(
    entries: Sequence[str], name_of: Callable[[str], str], what: str, taken: Sequence[str] = ()
) -> dict[str, str]:
    """Encoders of the command line by name, in the order given: each a source, or ``NAME=SOURCE``.

    Args:
        entries: of the command line.
        name_of: the name of a source without one.
        what: the kind of entry, for messages.
        taken: names that are reserved.

    Raises:
        ValueError: an entry has no name or no source, two have one name, or a name is reserved.
    """
    named: dict[str, str] = {}
    for entry in entries:
        before, equals, after = entry.partition("=")
        source = after if equals else before
        name = folder_name(before if equals or not source else name_of(source))
        if not name or not source or name in taken:
            other = f" with a name other than {' and '.join(taken)}" if taken else ""
            raise ValueError(f"{what} {entry!r}: give a source, or NAME=SOURCE{other}")
        if name.lower() in map(str.lower, named):
            raise ValueError(f"two {what}s are called {name!r}; distinguish them with NAME=SOURCE")
        named[name] = source
    return named


def folder_name(name: str) -> str:
    """A name fit for a folder: what is neither letter, digit, ``_``, ``.``, ``+`` nor ``-`` becomes a hyphen."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.")


def _spec_of_folder(name: str, weights: str, folder: Path) -> TeacherSpec:
    """The specification of a folder by its configuration file."""
    if (folder / openclip.CONFIG_FILE).is_file():
        return TeacherSpec(name, "openclip", weights)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds neither config.json nor {openclip.CONFIG_FILE}: its form is unknown; write a YAML file "
            "that states it"
        )
    if read_object(folder / "config.json").get("model_type") == "mmkd_clip":
        return TeacherSpec(name, "ours", weights, license=OWN_MODEL if Path(weights).is_dir() else UNDECLARED)
    return TeacherSpec(name, "hfclip", weights)
