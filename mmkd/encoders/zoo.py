"""The teachers by name, and the one function that loads any dual encoder by name, folder, Hub id or specification.

`TEACHERS` are the paper's nine, under the authors' spelling in ``available_clips``; `NEWER_TEACHERS` appeared since.
Inferred and open points of a specification are in its note, go into the provenance of every feature made with it, and
can be changed by a YAML file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mmkd.command.settings import nearest
from mmkd.data.licenses import NON_COMMERCIAL, OWN_MODEL, UNSTATED, terms
from mmkd.data.published import META_FILE, read_published
from mmkd.encoders import hfclip, medclip, openclip, pmcclip
from mmkd.encoders import python as python_form
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.spec import UNDECLARED, TeacherSpec, announce, read_spec
from mmkd.encoders.weights import fetch
from mmkd.files import read_json

BIOMEDBERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
PUBMEDBERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext"
OPENAI = "openai"  # the tag of open_clip's weights where none is given
# Of a teacher's provenance, what a student's provenance keeps.
KEPT_METADATA = ("teacher", "form", "weights", "revision", "fingerprint", "license", "note")

TEACHERS = {
    "BMCA": TeacherSpec(
        name="BMCA",
        form="openclip",
        weights="BIOMEDICA/BMC_CLIP_CF",
        files=["BMC_CLIP_CF.pt"],
        architecture="ViT-L-14",
        dim=768,
        license="MIT",
        gated=True,
        note="preprocessing inferred: OpenAI's; gate unknown",
    ),
    "BiomedCLIP": TeacherSpec(
        name="BiomedCLIP",
        form="openclip",
        weights="microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        dim=512,
        context=256,
        license="MIT",
    ),
    "UniMedCLIP": TeacherSpec(
        name="UniMedCLIP",
        form="unimed",
        weights="UzairK/unimed-clip-vit-b16",
        files=["unimed-clip-vit-b16.pt"],
        text_model=BIOMEDBERT,
        dim=512,
        context=256,
        license="CC BY-NC 4.0",
    ),
    "QuiltNet": TeacherSpec(
        name="QuiltNet",
        form="openclip",
        weights="wisdomik/QuiltNet-B-32",
        dim=512,
        license="MIT",
        note="which of QuiltNet-B-32, -B-16 and -B-16-PMB the authors used is unknown",
    ),
    "GenMedClip": TeacherSpec(
        name="GenMedClip",
        form="openclip",
        weights="wisdomik/GenMedClip",
        dim=512,
        license="MIT",
        note="which of GenMedClip, -B-32 and -B-16-PMB the authors used is inferred",
    ),
    "PLIP": TeacherSpec(name="PLIP", form="hfclip", weights="vinid/plip", dim=512, context=77),
    "PUBMEDCLIP": TeacherSpec(
        name="PUBMEDCLIP",
        form="hfclip",
        weights="flaviagiammarino/pubmed-clip-vit-base-patch32",
        dim=512,
        context=77,
        license="MIT",
    ),
    "PMCCLIP": TeacherSpec(
        name="PMCCLIP",
        form="pmcclip",
        weights="axiong/pmc_oa",
        repo_type="dataset",
        text_model=PUBMEDBERT,
        dim=768,
        context=77,
        license="not declared for the weights; code MIT",
        note="32 heads in the attention pool by the training configuration, 8 in a public port",
    ),
    "MedCLIP": TeacherSpec(
        name="MedCLIP",
        form="medclip",
        weights="https://storage.googleapis.com/pytrial/medclip-vit-pretrained.zip",
        text_model="emilyalsentzer/Bio_ClinicalBERT",
        vision_model="microsoft/swin-tiny-patch4-window7-224",
        dim=512,
        context=77,
        mean=[0.5862785803043838],
        std=[0.27950088968644304],
        license="BSD (the code's)",
        note="inferred to be the ninth teacher; its features are in none of the published samples",
    ),
}

NEWER_TEACHERS = {
    "OpenPMC18M": TeacherSpec(
        name="OpenPMC18M",
        form="openclip",
        weights="vector-institute/open-pmc-18m-clip",
        dim=512,
        context=256,
        note="licence unconfirmed (that of its predecessor open-pmc-clip is MIT)",
    ),
    "MedPMC": TeacherSpec(
        name="MedPMC",
        form="openclip",
        weights="Yale-BIDS-Chen/medpmc-clip-l-14_jun24_v1",
        note="form inferred from its name; dim, context, licence and gate unconfirmed",
    ),
    "BMCLongCLIP": TeacherSpec(
        name="BMCLongCLIP",
        form="openclip",
        weights="BIOMEDICA/BMC-LongCLIP",
        context=512,
        note="form, dim, licence and gate unconfirmed",
    ),
    "MONET": TeacherSpec(
        name="MONET",
        form="hfclip",
        weights="suinleelab/monet",
        dim=768,
        context=77,
        note="licence unconfirmed",
    ),
    "DermLIP": TeacherSpec(
        name="DermLIP",
        form="openclip",
        weights="redlessone/DermLIP_ViT-B-16",
        dim=512,
        license="CC BY-NC-ND 4.0",
        note="context unconfirmed; the variant with PanDerm needs a modified open_clip",
    ),
    "MedSigLIP": TeacherSpec(
        name="MedSigLIP",
        form="hfclip",
        weights="google/medsiglip-448",
        dim=1152,
        context=64,
        license="Health AI Developer Foundations terms of use",
        gated=True,
    ),
}

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
    "pmcclip": pmcclip.load,
    "medclip": medclip.load,
    "python": python_form.load,
}


def load_encoder(name_or_path: str, device: str = "cpu", weights: Path | None = None) -> DualEncoder:
    """Load a teacher, a student or any other dual encoder.

    Args:
        name_or_path: a teacher's name in any case; a folder of `MMKDClipModel`, transformers or open_clip; a Hub id
            (``owner/name``); ``open_clip:ARCHITECTURE[:PRETRAINED]``, a tag or a file, by default OpenAI's weights (a
            slash may stand for the second colon); ``python:module.function``; or a YAML file.
        device: for the model.
        weights: a local folder or file instead of the specification's weights.

    Raises:
        FileNotFoundError: weights are not there, or the Hub cannot be reached; the message says what to do.
        ValueError: an unknown name (with the known ones), or weights that do not fit the model.
    """
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


def find_spec(name_or_path: str) -> TeacherSpec:
    """The specification of a name, folder, Hub id or YAML file; see `load_encoder`.

    Raises:
        FileNotFoundError: a path that is not there.
        ValueError: an unknown name; the message lists the known ones.
    """
    specs = {name.lower(): spec for name, spec in known_teachers().items()}
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
    if path.suffix in (".yaml", ".yml"):
        return read_spec(path)
    if path.is_dir():
        return _spec_of_folder(path.resolve().name, str(path), path)
    if path.is_absolute() or name_or_path.startswith(".") or path.exists() or name_or_path.count("/") > 1:
        raise FileNotFoundError(f"{name_or_path}: no such folder, and no YAML file of a teacher")
    if "/" in name_or_path:
        return _spec_of_folder(path.name, name_or_path, fetch(name_or_path, ["config.json", openclip.CONFIG_FILE]))
    raise ValueError(
        f"unknown encoder {name_or_path!r}{nearest(name_or_path.lower(), specs)}; known: {_names()}; or "
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
        specs = [(source, find_spec(source.rpartition("=")[2])) for source in named or known_teachers()]
        named = [source for source, spec in specs if all(passes(spec) for passes in filters)]
    if not named:
        raise ValueError(f"no teacher is named, or none passes the filters; known: {_names()}")
    return by_name(named, lambda source: find_spec(source).name, "teacher")


def known_teachers() -> dict[str, TeacherSpec]:
    """The paper's teachers and the newer ones by name."""
    return TEACHERS | NEWER_TEACHERS


def _names() -> str:
    return ", ".join(known_teachers())


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
            raise ValueError(f"two {what}s are called {name!r}; tell them apart with NAME=SOURCE")
        named[name] = source
    return named


def folder_name(name: str) -> str:
    """A name fit for a folder: what is neither letter, digit, ``_``, ``.``, ``+`` nor ``-`` becomes a hyphen."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.")


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


def _teachers_in(folder: Path) -> list[dict[str, Any]]:
    if (folder / META_FILE).is_file():
        return _published_teachers(folder)
    files = [folder / "meta.json"] if (folder / "meta.json").is_file() else sorted(folder.glob("*/meta.json"))
    return [store_teacher(read_json(file)) for file in files]


def _published_teachers(folder: Path) -> list[dict[str, Any]]:
    """The teachers in the authors' list, with the metadata of those that are known here."""
    used = {name for sample in read_published(folder) for name in sample.teachers}
    metadata = {
        name: {"weights": spec.weights, "license": spec.license, "note": spec.note} for name, spec in TEACHERS.items()
    }
    return [{"teacher": name, **metadata.get(name, {"license": UNSTATED})} for name in sorted(used)]


def _spec_of_folder(name: str, weights: str, folder: Path) -> TeacherSpec:
    """The specification of a folder by its configuration file."""
    if (folder / openclip.CONFIG_FILE).is_file():
        return TeacherSpec(name, "openclip", weights)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds neither config.json nor {openclip.CONFIG_FILE}: its form is unknown; write a YAML file "
            "that states it"
        )
    config: dict[str, Any] = read_json(folder / "config.json")
    if config.get("model_type") == "mmkd_clip":
        return TeacherSpec(name, "ours", weights, license=OWN_MODEL if Path(weights).is_dir() else UNDECLARED)
    return TeacherSpec(name, "hfclip", weights)
