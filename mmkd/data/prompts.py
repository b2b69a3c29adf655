"""Prompts: several plain sentences for each class and modality.

A collection names its modality in its own words ("MRI", "x-ray radiography"), so a modality is recognised by the words
in its name. Classes are described by the mean of their sentences, which is steadier than any one of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

# The first family one of whose words occurs in the name of the modality decides. Sentences take the finding as {}.
FAMILIES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "x-ray": (
        r"x-?ray|xray|radiograph|mammogra|\bcr\b|\bdx\b",
        ("an X-ray image", "a plain radiograph"),
        ("an X-ray image showing {}", "radiograph of {}", "plain film with {}"),
    ),
    "optical coherence tomography": (
        r"\boct\b|optical coherence",
        ("an optical coherence tomography (OCT) scan", "an OCT B-scan of the retina"),
        ("an OCT scan showing {}", "optical coherence tomography of a retina with {}", "retinal B-scan, {}"),
    ),
    "immunohistochemistry": (
        r"immunohisto|\bihc\b",
        ("an immunohistochemistry image", "immunohistochemically stained tissue"),
        ("an immunohistochemistry image of {}", "immunostained tissue showing {}", "IHC staining, {}"),
    ),
    "histopathology": (
        r"histo|patholog|h&e|whole.?slide",
        ("a histopathology image", "a stained tissue section under the microscope"),
        ("a histopathology image of {}", "H&E stained tissue section showing {}", "microscopic section with {}"),
    ),
    "clinical photography": (
        r"clinical photo|smartphone",
        ("a clinical photograph", "a photograph taken by a phone"),
        ("a clinical photograph of {}", "close photograph of skin with {}", "smartphone photograph showing {}"),
    ),
    "dermatology": (
        r"dermato|dermo|skin",
        ("a dermatoscopic image of a skin lesion", "a close photograph of skin"),
        ("a dermatoscopic image of {}", "skin lesion diagnosed as {}", "dermatoscopy showing {}"),
    ),
    "fundus photography": (
        r"fundus|retina|\beye",
        ("a color fundus photograph", "a photograph of the retina"),
        ("a fundus photograph showing {}", "retinal image with {}", "color photograph of the fundus, {}"),
    ),
    "endoscopy": (
        r"endoscop|colonoscop|laryngoscop|gastroscop",
        ("an endoscopy image", "an image from the camera of an endoscope"),
        ("an endoscopy image showing {}", "endoscopic view of {}", "endoscopic finding: {}"),
    ),
    "ultrasound": (
        r"ultraso|sonogra|echocard|\bus\b",
        ("an ultrasound image", "a sonogram"),
        ("an ultrasound image showing {}", "sonogram of {}", "ultrasonography with {}"),
    ),
    "nuclear medicine": (
        r"nuclear|scintigra|bone scan|\bpet\b|\bspect\b|positron",
        ("a nuclear medicine scan", "an image of tracer uptake"),
        ("a nuclear medicine scan, {}", "tracer uptake in {}", "scintigraphy: {}"),
    ),
    "microscopy": (
        r"microscop|blood smear|cytolog|fluorescen",
        ("a microscopy image", "a micrograph of cells"),
        ("a microscopy image of {}", "micrograph showing {}", "{} under the microscope"),
    ),
    "magnetic resonance imaging": (
        r"\bmri?\b|magnetic|\bt[12]\b|\bflair\b",
        ("a magnetic resonance image (MRI)", "an MR scan"),
        ("an MRI scan showing {}", "magnetic resonance image of {}", "MR imaging, {}"),
    ),
    "computed tomography": (
        r"\bct\b|tomogra",
        ("a computed tomography (CT) image", "an axial CT slice"),
        ("a CT scan showing {}", "computed tomography image of {}", "CT slice, {}"),
    ),
}
ANY_MODALITY = ("a biomedical image of {}", "an image showing {}", "medical image, {}")
# What is put into the templates of a modality to describe images with and without any finding.
NORMAL = ("a normal finding", "no abnormality", "healthy anatomy")
ABNORMAL = ("an abnormal finding", "an abnormality", "disease")
ARTICLE = re.compile(r"^(an?|the) ")


def modality_prompts(modality: str) -> list[str]:
    """Sentences that name a modality: in the collection's own words, and in those of its family if it is known."""
    name = _plain(modality)
    kin = family(modality)
    known = list(FAMILIES[kin][1]) if kin else []
    return [f"a {name} image", f"biomedical image, {name}", *known]


def label_prompts(label: str, modality: str) -> list[str]:
    """Sentences that name a finding in images of this modality; of any modality if it is empty or unknown."""
    return fill(templates_of(modality), label)


def absence_prompts(label: str, modality: str) -> list[str]:
    """Sentences that negate a finding, in the templates of `label_prompts`; see `fill_absence`."""
    return fill_absence(templates_of(modality), label)


def templates_of(modality: str) -> tuple[str, ...]:
    """The sentences of a modality, which take the finding as {}; those of any modality if it is empty or unknown."""
    kin = family(modality)
    return FAMILIES[kin][2] if kin else ANY_MODALITY


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
    return next((name for name, (words, _, _) in FAMILIES.items() if re.search(words, lowered)), None)


def _plain(name: str) -> str:
    """A name from a table as words: underscores become spaces."""
    return " ".join(name.replace("_", " ").split())
