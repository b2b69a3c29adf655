"""Captions: cleaned where there is one, and made of the facts in the list where there is none.

The sentences made here repeat the label and the modality and add nothing. Their wording varies, because a text tower
that sees one template learns the template.
"""

from __future__ import annotations

import hashlib
import unicodedata

BOTH_KNOWN: tuple[str, ...] = (
    "{modality} image: {label}.",
    "{label}, {modality}.",
    "{modality} image labeled {label}.",
    "An image of the class {label}, acquired by {modality}.",
    "{label} in a {modality} image.",
)
LABEL_KNOWN: tuple[str, ...] = (
    "{label}.",
    "A biomedical image of {label}.",
    "Image labeled {label}.",
    "{label} in a biomedical image.",
)
MODALITY_KNOWN: tuple[str, ...] = (
    "{modality} image.",
    "An image acquired by {modality}.",
    "Biomedical image, {modality}.",
)
UNKNOWN = "unknown"


def clean_text(text: str) -> str:
    """Unicode in composed form, without control characters, white space as single blanks."""
    normal = unicodedata.normalize("NFC", text)
    if not normal.isprintable():
        normal = "".join(c if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs") else " " for c in normal)
    return " ".join(normal.split())


def caption_from_facts(label: str, modality: str, key: str) -> str:
    """A sentence that states the label and the modality, or an empty one where neither is known.

    Args:
        label: may be empty.
        modality: may be empty or ``unknown``.
        key: chooses the wording; the same key always gives the same one.
    """
    known_modality = "" if modality.lower() == UNKNOWN else modality
    if label and known_modality and label.casefold() != known_modality.casefold():
        templates = BOTH_KNOWN
    elif label:
        templates = LABEL_KNOWN if not known_modality else MODALITY_KNOWN
    elif known_modality:
        templates = MODALITY_KNOWN
    else:
        return ""
    choice = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") % len(templates)
    sentence = templates[choice].format(label=label, modality=known_modality)
    return sentence[0].upper() + sentence[1:]
