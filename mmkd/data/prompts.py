"""Prompts: several plain sentences for each class and modality.

A collection names its modality in its own words ("MRI", "x-ray radiography"), so a modality is recognised by the words
in its name. Classes are described by the mean of their sentences, which is steadier than any one of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray


@dataclass(frozen=True)
class Family:
    """A family of modalities in ``prompts.yaml``: a pattern for their names, and sentences; {} stands for a finding."""

    words: str
    modality: list[str]
    finding: list[str]


_FILE = Path(__file__).with_suffix(".yaml")
FAMILIES = {name: Family(**entry) for name, entry in yaml.safe_load(_FILE.read_text(encoding="utf-8")).items()}
ANY_MODALITY = ("a biomedical image of {}", "an image showing {}", "medical image, {}")
# What is put into the templates of a modality to describe images with and without any finding.
NORMAL = ("a normal finding", "no abnormality", "healthy anatomy")
ABNORMAL = ("an abnormal finding", "an abnormality", "disease")
ARTICLE = re.compile(r"^(an?|the) ")


def modality_prompts(modality: str) -> list[str]:
    """Sentences that name a modality: in the collection's own words, and in those of its family if it is known."""
    name = _plain(modality)
    kin = family(modality)
    known = FAMILIES[kin].modality if kin else []
    return [f"a {name} image", f"biomedical image, {name}", *known]


def label_prompts(label: str, modality: str) -> list[str]:
    """Sentences that name a finding in images of this modality; of any modality if it is empty or unknown."""
    return fill(templates_of(modality), label)


def absence_prompts(label: str, modality: str) -> list[str]:
    """Sentences that negate a finding, in the templates of `label_prompts`; see `fill_absence`."""
    return fill_absence(templates_of(modality), label)


def templates_of(modality: str) -> Sequence[str]:
    """The sentences of a modality, which take the finding as {}; those of any modality if it is empty or unknown."""
    kin = family(modality)
    return FAMILIES[kin].finding if kin else ANY_MODALITY


def fill(templates: Iterable[str], label: str) -> list[str]:
    """Sentences that name a finding."""
    return [template.replace("{}", _plain(label)) for template in templates]


def fill_absence(templates: Iterable[str], label: str) -> list[str]:
    """Sentences that negate a finding.

    "radiograph of a lung nodule" becomes "radiograph without lung nodule", elsewhere "a lung nodule" "no lung nodule".
    """
    return [text.replace(" of no ", " without ") for text in fill(templates, f"no {ARTICLE.sub('', label)}")]


def class_vector(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit mean ``(dim,)`` of unit prompt vectors ``(prompts, dim)``."""
    mean = vectors.mean(axis=0)
    return mean / max(float(np.linalg.norm(mean)), np.finfo(np.float32).tiny)


def family(modality: str) -> str | None:
    """The first family whose words occur in the name of a modality; None if there is none."""
    lowered = modality.lower()
    return next((name for name, own in FAMILIES.items() if re.search(own.words, lowered)), None)


def _plain(name: str) -> str:
    """A name from a table as words: underscores become spaces."""
    return " ".join(name.replace("_", " ").split())
