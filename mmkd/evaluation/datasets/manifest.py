"""The manifest of a dataset: at most ten lines of YAML for its task, its source and its classes; and their catalog.

``mmkd/evaluation/datasets/catalog/`` holds one manifest a file, ``suites.yaml``, ``training_data.yaml``, and in
``publications.yaml`` where each dataset was published and which public text its counts and classes were compared with.
Manifests that `mmkd datasets add` has checked lie in ``~/.config/mmkd/datasets``, or in the folder that
``MMKD_CATALOG`` names.
"""

from __future__ import annotations

import importlib.resources
import os
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from mmkd.command.settings import convert, nearest
from mmkd.data.prompts import FAMILIES, absence_prompts, family, label_prompts
from mmkd.data.readers import DATA_PLACE, DATA_VARIABLE
from mmkd.files import read_yaml

DatasetTask = Literal["classification", "multilabel", "ordinal", "retrieval", "vqa", "survival", "diagnosis"]
TASKS: tuple[str, ...] = get_args(DatasetTask)

PRIMARY_METRICS: dict[str, str] = {  # of a dataset whose manifest names none
    "classification": "balanced_accuracy",
    "multilabel": "macro_auroc",
    "ordinal": "quadratic_kappa",
    "retrieval": "mean_recall",
    "vqa": "accuracy",
    "survival": "c_index",
    "diagnosis": "balanced_accuracy",
}

OF_CLASSES = ("classification", "multilabel", "ordinal")  # tasks whose images have classes that sentences describe
HELD_OUT, ASSIGNED = "held-out", "assigned"  # in place of the column of the split
COUNTS = ("n", "n_train", "n_validation", "n_test", "n_questions", "n_test_questions", "n_cases")

SOURCES: dict[str, tuple[str, ...]] = {  # kind of source -> its keys beside the path; ROW_KEYS go with every kind
    "imagefolder": ("skip",),
    "csv": ("file", "label", "caption", "images", "where"),
    "parquet": ("image", "label", "caption", "images", "where", "question", "answer"),
    "hf": ("config", "image", "label", "caption"),
    "wds": (),
    "medmnist": ("size",),
    "bags": ("table", "slide", "case", "site", "label", "time", "event", "censored"),
    "questions": ("images",),
}

ROW_KEYS = ("group", "split", "rename", "splits", "group_pattern", "separator", "window")
TIERS = {"A": "download it from", "B": "register for it at", "C": "it needs credentials and an agreement, see"}
SHOWN = 5
CATALOG = Path(str(importlib.resources.files("mmkd.evaluation.datasets"))) / "catalog"
SUITES, TRAINING, PUBLICATIONS = "suites.yaml", "training_data.yaml", "publications.yaml"
OWN_CATALOG, OWN_VARIABLE = "~/.config/mmkd/datasets", "MMKD_CATALOG"


@dataclass(frozen=True)
class Manifest:
    """One dataset.

    Attributes:
        id: short name, letters, digits and hyphens.
        task: what it is evaluated on; of an ordinal task ``classes`` are in the order of the grades.
        modality: for macro means and for the sentences that describe classes.
        source: kind of source -> where it lies, and the columns of a table.
        license: as its publisher states it.
        title: for people.
        classes: name of the class in the data -> phrases that describe it in prompts.
        templates: family of sentences (`prompts.FAMILIES`); empty = that of the modality.
        primary_metric: metric that represents the dataset; empty = that of `PRIMARY_METRICS`.
        expects: counts that are publicly stated, such as ``n_test``; another count is an error.
        group: column of patient, case or slide.
        split: column of the split; ``held-out`` where all of it is for testing, ``assigned`` where a column
            of that name is not read and groups are assigned by hash.
        derived_from: data it was made from, for the marks of contamination.
        citation: where it was published.
        sha256: of the file it is read from.
        tier: A = open, B = after registration, C = after credentials and an agreement.
        register: where one registers or downloads.
    """

    id: str
    task: DatasetTask
    modality: str
    source: dict[str, Any]
    license: str
    title: str = ""
    classes: dict[str, list[str]] = field(default_factory=dict)
    templates: str = ""
    primary_metric: str = ""
    expects: dict[str, int] = field(default_factory=dict)
    group: str = ""
    split: str = ""
    derived_from: list[str] = field(default_factory=list)
    citation: str = field(default="", compare=False)
    sha256: str = ""
    tier: Literal["A", "B", "C"] = "A"
    register: str = ""

    @property
    def measure(self) -> str:
        """The primary metric: the manifest's own, else that of its task."""
        return self.primary_metric or PRIMARY_METRICS[self.task]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of task that the dataset is evaluated by."""
        return ("zeroshot", "probe") if self.task in OF_CLASSES else (self.task,)

    @property
    def dataset(self) -> str:
        """The dataset that this describes."""
        return self.id

    @property
    def target_is_modality(self) -> bool:
        """Whether the classes are the modalities of the images."""
        return False

    def prompts(self) -> dict[str, list[str]]:
        """Sentences of every class, in the order of ``classes``: each phrase in each template."""
        return self._sentences(label_prompts)

    def negative_prompts(self) -> dict[str, list[str]]:
        """Sentences that negate each class, in the templates of `prompts`."""
        return self._sentences(absence_prompts)

    def _sentences(self, of: Callable[[str, str], list[str]]) -> dict[str, list[str]]:
        templates = self.templates or self.modality
        return {
            name: [text for phrase in phrases or [name] for text in of(phrase, templates)]
            for name, phrases in self.classes.items()
        }


def read_manifest(path: Path) -> Manifest:
    """A manifest from its YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, a key is unknown (the nearest known one is named) or a value is not allowed.
    """
    values = read_yaml(path)
    try:
        return make_manifest(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def make_manifest(values: Any) -> Manifest:
    """A manifest from the mapping that a YAML file holds; see `read_manifest` for errors."""
    if not isinstance(values, dict):
        raise ValueError(f"a manifest holds `key: value` lines, not a {type(values).__name__}")
    hints = typing.get_type_hints(Manifest)
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"unknown key {key!r}{nearest(str(key), hints)}; allowed: {', '.join(hints)}")
        given[key] = _classes(value) if key == "classes" else convert(key, value, hints[key])
    required = [
        field.name for field in fields(Manifest) if field.default is MISSING and field.default_factory is MISSING
    ]
    missing = [key for key in required if key not in given]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}; a manifest needs {', '.join(required)}")
    source = given["source"]
    for key in ("group", "split"):  # columns like those beside them
        if key in source and key not in given:
            given[key] = str(source[key])
    manifest = Manifest(**given)
    _check(manifest)
    return manifest


def _classes(value: Any) -> dict[str, list[str]]:
    """Classes as a list of names, or as name -> phrase, phrases or nothing."""
    entries = dict.fromkeys(value) if isinstance(value, list) else value
    if not isinstance(entries, dict):
        raise ValueError(f"classes must be a list or a mapping such as {{benign: [benign lesion]}}, not {value!r}")
    classes: dict[str, list[str]] = {}
    for name, phrases in entries.items():
        if isinstance(name, bool) or name is None:
            raise ValueError(f"class {name!r}: YAML reads yes, no, on, off and null as values; put the name in quotes")
        listed = [phrases] if isinstance(phrases, str) else phrases or []
        if not isinstance(listed, list) or not all(isinstance(phrase, str) and phrase.strip() for phrase in listed):
            raise ValueError(f"class {name}: phrases must be texts, not {phrases!r}")
        if "|" in str(name):
            raise ValueError(f"class {name!r}: | joins the findings of an image and cannot be part of a name")
        classes[str(name)] = listed
    return classes


def _check(manifest: Manifest) -> None:
    """Raise on values that no type excludes."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", manifest.id):
        raise ValueError(f"id {manifest.id!r} must be lower-case letters, digits and hyphens")
    kinds = [key for key in manifest.source if key in SOURCES]
    if len(kinds) != 1:
        tried = next(iter(manifest.source), "")
        raise ValueError(
            f"source must name one of {', '.join(SOURCES)}{nearest(tried, SOURCES)}, not {manifest.source}"
        )
    allowed = (*SOURCES[kinds[0]], *ROW_KEYS)
    for key in manifest.source:
        if key != kinds[0] and key not in allowed:
            raise ValueError(
                f"source: {kinds[0]} has no key {key!r}{nearest(key, allowed)}; allowed: {', '.join(allowed)}"
            )
    if manifest.task in OF_CLASSES and len(manifest.classes) < 2:
        raise ValueError(f"a {manifest.task} needs at least two classes, not {list(manifest.classes)}")
    wrong = next((key for key in manifest.expects if key not in COUNTS), None)
    if wrong is not None:
        raise ValueError(f"expects has no key {wrong!r}{nearest(wrong, COUNTS)}; allowed: {', '.join(COUNTS)}")
    if manifest.templates and not family(manifest.templates):
        raise ValueError(f"templates {manifest.templates!r} are none of {', '.join(FAMILIES)}")


class DatasetNotFoundError(Exception):
    """The data are not on this machine; the message states where to get them."""


def source_kind(manifest: Manifest) -> str:
    """The kind of a manifest's source."""
    return next(key for key in manifest.source if key in SOURCES)


def locate(manifest: Manifest, data: Path | None = None) -> list[Path]:
    """Where the files of a manifest lie; see `open_dataset`.

    Raises:
        DatasetNotFoundError: some are not there, or there is no folder for ``${DATA}``.
    """
    kind = source_kind(manifest)
    folder = str(data) if data is not None else os.environ.get(DATA_VARIABLE, "")
    given = manifest.source[kind]
    texts = [str(text) for text in (given if isinstance(given, list) else [given])]
    if any(DATA_PLACE in text for text in texts) and not folder:
        raise DatasetNotFoundError(
            f"no folder of data is given: --data DIR or {DATA_VARIABLE}; {where_to_get(manifest)}"
        )
    paths = [Path(text.replace(DATA_PLACE, folder)).expanduser() for text in texts]
    if kind == "medmnist":
        paths = [_sized(paths[0], manifest.source.get("size"))]
    lacking = [path for path in paths if not path.exists()]
    if kind == "bags" and not lacking:
        table = paths[0] / str(manifest.source.get("table", "labels.csv"))
        lacking = [] if table.is_file() else [table]
    is_hub_name = kind == "hf" and DATA_PLACE not in texts[0] and texts[0].count("/") == 1
    if lacking and not is_hub_name:
        raise DatasetNotFoundError(f"not at {', '.join(map(str, lacking[:SHOWN]))}; {where_to_get(manifest)}")
    return paths


def _sized(stem: Path, size: Any) -> Path:
    """MedMNIST's file of a size, by default the largest that is there."""
    ending = {224: "_224.npz", 128: "_128.npz", 64: "_64.npz", 28: ".npz"}
    if size is not None and size not in ending:
        raise ValueError(f"source: size is {size!r}; MedMNIST has {', '.join(map(str, ending))}")
    found = [stem.with_name(stem.name + ending[own]) for own in ([size] if size else ending)]
    return next((path for path in found if path.is_file()), found[0])


def where_to_get(manifest: Manifest) -> str:
    """Where to get a dataset, as a part of a sentence."""
    if not manifest.register:
        return "its manifest does not state where to get it"
    return f"{TIERS[manifest.tier]} {manifest.register}"


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
