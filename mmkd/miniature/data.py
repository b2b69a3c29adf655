"""The miniature's collections, each a folder of real images with a list, read into one table with captions.

Where a collection has no captions they are made of its facts by several templates: a text tower that sees one wording
learns the wording. Groups keep their collection's name, so that equal case numbers of two collections stay apart.

Who sees which groups, and captions as wrong as those of figures.

Teachers' groups, the student's groups and those of the test are disjoint; validation groups are taken out of the
student's share, and every choice is made on them.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmkd.data.splits import hashed
from mmkd.data.table import Pair

Facts = dict[str, str]

COLUMNS = ("file", "modality", "label", "caption", "group", "source")


@dataclass(frozen=True)
class Collection:
    """How one folder is read.

    Attributes:
        modality: of all its images, or the column's own where empty.
        label: the class of a row, empty where it has none.
        templates: captions with the row's facts in braces; empty where the collection has captions of its own.
    """

    modality: str
    label: Callable[[Facts], str]
    templates: tuple[str, ...] = ()


def _none(_: Facts) -> str:
    return ""


def _own(facts: Facts) -> str:
    return facts["label"]


COLLECTIONS: dict[str, Collection] = {
    "medpix2": Collection("", lambda facts: facts["location_category"].lower()),
    "brain_mri": Collection(
        "MRI",
        _own,
        (
            "Brain MRI, {label}.",
            "MR imaging of the head: {label}.",
            "{label} on a magnetic resonance image of the brain.",
            "Cranial magnetic resonance imaging of a patient with {label}.",
        ),
    ),
    "covid_cxr_notes": Collection("", _none),
    "vqa_rad": Collection(
        "radiology",
        lambda facts: {"CHEST": "chest", "ABD": "abdomen", "HEAD": "head"}.get(facts["label"], ""),
        (
            "Radiology of the {label}.",
            "Radiologic image, {label}.",
            "The {label} in a radiologic examination.",
            "Image of the {label} from a radiology case.",
        ),
    ),
    "ham10000": Collection(
        "dermatoscopy",
        _own,
        (
            "Dermatoscopy of the {localization}: {label}.",
            "Skin lesion of a {age}-year-old {sex}, {label}.",
            "{label}, seen through a dermatoscope.",
            "Pigmented skin lesion on the {localization}; the diagnosis was {label}.",
        ),
    ),
    "lc25000_lung": Collection(
        "histopathology",
        _own,
        (
            "Lung tissue, H&E: {label}.",
            "Histology of the lung with {label}.",
            "{label} in a stained section.",
            "Micrograph of a lung specimen, {label}.",
        ),
    ),
    "dsb2018": Collection(
        "microscopy",
        _own,
        (
            "Cell nuclei, {label}.",
            "{label}: a field with {nuclei} nuclei.",
            "Microscopy of nuclei, {label}.",
            "About {nuclei} nuclei in a microscope field, {label}.",
        ),
    ),
    "bccd": Collection(
        "microscopy",
        _own,
        (
            "Blood smear with {rbc} red and {wbc} white cells.",
            "Stained blood smear, {rbc} erythrocytes and {platelets} platelets.",
            "Peripheral blood under the microscope.",
            "Red cells and leukocytes in a blood smear.",
        ),
    ),
    "kvasir_seg": Collection(
        "endoscopy",
        _own,
        (
            "Endoscopy of the bowel: {size} polyp.",
            "A {size} polyp seen in colonoscopy.",
            "Colonoscopic view, {size} polyp.",
            "{size} polyp of the colon.",
        ),
    ),
    "fundus": Collection(
        "fundus",
        _none,
        ("Color fundus photograph.", "Retinal vessels in a fundus photograph.", "Photograph of the ocular fundus."),
    ),
    "oct": Collection(
        "OCT",
        _none,
        ("Optical coherence tomography, {label}.", "OCT of the macula: {label}.", "Retinal OCT scan with {label}."),
    ),
}

MODALITIES = {"MR": "MRI", "radiology (X-ray/CT/MR)": "radiology"}  # one name for each


def write_table(data: Path, path: Path, smallest: int | None = None) -> list[str]:
    """Write the table that ``mmkd curate --table`` reads, files relative to `data`.

    Args:
        data: the folder of collections.
        path: of the CSV file.
        smallest: keep this many rows of each collection, evenly spread, for a quick try.

    Returns:
        The collections that were found.

    Raises:
        FileNotFoundError: `data` does not exist or holds fewer than two of the collections.
    """
    found = [name for name in COLLECTIONS if (data / name / "labels.csv").is_file()]
    if len(found) < 2:
        raise FileNotFoundError(f"--data {data}: at least two of {', '.join(COLLECTIONS)} are needed, found {found}")
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = medpix_cases(data)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for name in found:
            rows = read_facts(data / name / "labels.csv")
            step = max(1, len(rows) // smallest) if smallest else 1
            writer.writerows(_row(name, facts, cases) for facts in rows[::step])
    return found


def read_facts(path: Path) -> list[Facts]:
    """The rows of a ``labels.csv``."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def medpix_cases(data: Path) -> dict[str, str]:
    """Case of each MedPix image by its number there: VQA-RAD shows some of the same images."""
    path = data / "medpix2" / "labels.csv"
    if not path.is_file():
        return {}
    return {facts["file"].rpartition("_")[2]: facts["group"] for facts in read_facts(path)}


def _row(name: str, facts: Facts, cases: dict[str, str]) -> dict[str, str]:
    collection = COLLECTIONS[name]
    modality = collection.modality or MODALITIES.get(facts["modality"], facts["modality"])
    label = collection.label(facts)
    group = f"{name}/{facts['group']}" if facts["group"] else ""
    shared = cases.get(Path(facts["file"]).name) if name == "vqa_rad" else None
    return {
        "file": f"{name}/{facts['file']}",
        "modality": modality,
        "label": label,
        "caption": " ".join(facts["caption"].split())
        or _caption(collection, facts | {"label": label or facts["label"]}),
        "group": f"medpix2/{shared}" if shared else group,
        "source": name,
    }


def _caption(collection: Collection, facts: Facts) -> str:
    """One of the templates, chosen by the file's name, among those whose facts are all known."""
    facts = facts | {"label": collection.label(facts) or facts["label"]}
    facts = facts | {"size": "large" if float(facts.get("polyp_fraction") or 0) > 0.15 else "small"}
    known = {key: value for key, value in facts.items() if value and value != "unknown"}
    usable = []
    for template in collection.templates:
        try:
            usable.append(template.format(**known))
        except KeyError:
            continue
    if not usable:
        return ""
    number = int.from_bytes(hashlib.sha256(facts["file"].encode()).digest()[:8], "big")
    sentence = usable[number % len(usable)]
    return sentence[0].upper() + sentence[1:]


PARTS = ("teachers", "student", "validation", "test")

SHARES = {"teachers": 0.45, "student": 0.25, "validation": 0.10, "test": 0.20}

SHARES_OF = {"vqa_rad": {"teachers": 0.25, "student": 0.40, "validation": 0.10, "test": 0.25}}

VAGUE = (
    "Representative image.",
    "Figure panel, see text for details.",
    "Imaging of the patient.",
    "Findings at presentation.",
    "Typical case from our series.",
    "Image obtained during the examination.",
)


def deal(pairs: Sequence[Pair], seed: int) -> dict[str, list[Pair]]:
    """Pairs by part: whole groups, every label of every collection in the same shares.

    Args:
        pairs: all of them.
        seed: of the order in which the groups of a label are dealt out.
    """
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.group or f"pair {pair.id}"].append(pair)
    strata: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, members in groups.items():
        strata[members[0].source, members[0].label].append(name)
    dealt: dict[str, list[Pair]] = {part: [] for part in PARTS}
    for (source, _), names in sorted(strata.items()):
        names.sort(key=lambda name: hashed(seed, name))
        bounds = np.cumsum([SHARES_OF.get(source, SHARES)[part] for part in PARTS]) * len(names)
        for position, name in enumerate(names):
            part = PARTS[min(int(np.searchsorted(bounds, position + 0.5)), len(PARTS) - 1)]
            dealt[part] += groups[name]
    return dealt


def with_noise(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], dict[str, str]]:
    """The same pairs, a share of them with another pair's caption or one that says nothing.

    Args:
        pairs: the student's.
        share: of pairs whose caption is replaced, half of them by the caption of a pair drawn at random that has
            another caption, half by a vague sentence.
        seed: of the draw; a larger share keeps the replacements of a smaller one.

    Returns:
        The pairs, and pair id -> ``wrong`` or ``vague``.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(pairs))
    donors = generator.integers(0, len(pairs), len(pairs))
    changed = list(pairs)
    kinds: dict[str, str] = {}
    for turn, position in enumerate(order[: round(share * len(pairs))]):
        pair = pairs[position]
        donor = int(donors[position])
        while pairs[donor].caption == pair.caption:
            donor = (donor + 1) % len(pairs)
        wrong = turn % 2 == 0
        caption = pairs[donor].caption if wrong else VAGUE[turn // 2 % len(VAGUE)]
        changed[position] = dataclasses.replace(pair, caption=caption)
        kinds[pair.id] = "wrong" if wrong else "vague"
    return changed, kinds
