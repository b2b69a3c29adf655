"""The restrictions of a licence by its name: enough to find the strictest of many, not legal advice.

Licences are recognised by their words, since model cards, manifests and package metadata spell them in many ways. A
licence that is not recognised counts as restrictive: to overlook a restriction is the worse mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

OWN_MODEL = "own model"
UNDECLARED = ("", "unknown", "none", "not declared", "not stated", "undeclared", "unlicensed")


@dataclass(frozen=True)
class Terms:
    """Strictness of a licence.

    Attributes:
        strictness: 0 for licences that require credit at most; the higher, the stricter.
        restrictions: in words.
    """

    strictness: int
    restrictions: str


OPEN = Terms(0, "none (credit required at most)")
SHARE_ALIKE = Terms(1, "derivatives keep the licence")
USE_LIST = Terms(2, "uses that the licence excludes")
NO_DERIVATIVES = Terms(3, "no derivatives")
NON_COMMERCIAL = Terms(4, "no commercial use")
NON_COMMERCIAL_NO_DERIVATIVES = Terms(5, "no commercial use, no derivatives")
UNREAD = Terms(6, "not recognised: read the licence before any use")
NONE_DECLARED = Terms(7, "no licence declared: ask the owners before any use")

HUB_IDS = {
    "apache 2 0": "apache-2.0",
    "mit": "mit",
    "bsd 3 clause": "bsd-3-clause",
    "bsd 2 clause": "bsd-2-clause",
    "isc": "isc",
    "cc0 1 0": "cc0-1.0",
    "cc0": "cc0-1.0",
    **{
        f"cc {kind} {version}": f"cc-{kind.replace(' ', '-')}-{version.replace(' ', '.')}"
        for kind in ("by", "by sa", "by nc", "by nd", "by nc sa", "by nc nd")
        for version in ("3 0", "4 0")
    },
}


def terms(license: str) -> Terms:
    """The terms of a licence by its name or by the words its owner uses."""
    plain = _plain(license)
    words = set(plain.split())
    if plain in UNDECLARED or plain.startswith(UNDECLARED[3:6]):
        return NONE_DECLARED
    non_commercial = "nc" in words or "noncommercial" in words or "non commercial" in plain or "research" in words
    if non_commercial and "nd" in words:
        return NON_COMMERCIAL_NO_DERIVATIVES
    if non_commercial or "academic" in words:
        return NON_COMMERCIAL
    if "nd" in words:
        return NO_DERIVATIVES
    if words & {"openrail", "rail", "gemma", "llama", "llama2", "llama3"}:
        return USE_LIST
    if "sa" in words or any(word.startswith(("gpl", "agpl", "lgpl")) for word in words):
        return SHARE_ALIKE
    is_open = plain.startswith(("mit", "apache", "bsd", "cc0", "cc by", "isc", "pddl", "unlicense", "public domain"))
    return OPEN if is_open or plain.startswith(OWN_MODEL) else UNREAD


def strictest(licenses: Iterable[str]) -> Terms:
    """The strictest terms of several licences; of none, the open ones."""
    return max(map(terms, licenses), key=lambda found: found.strictness, default=OPEN)


def is_open(license: str) -> bool:
    """Whether a licence is declared and restricts no use; a licence that is not known to be open is not."""
    return terms(license) == OPEN


def hub_id(license: str) -> str | None:
    """The Hub's identifier of a licence; None if it has none."""
    return HUB_IDS.get(_plain(license))


def _plain(license: str) -> str:
    """Lower case, words and digits only: ``CC-BY-NC 4.0`` becomes ``cc by nc 4 0``."""
    return " ".join(re.findall(r"[a-z]+[0-9]*|[0-9]+", license.lower()))
