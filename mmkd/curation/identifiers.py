"""Obvious identifiers of people, taken out of captions: a net with wide meshes, no de-identification.

Published captions seldom hold any; reports and notes of one's own do. What a pattern can find is replaced by its kind
in square brackets. Names without a title, places and rare diseases are not found: have such texts de-identified by a
tool made for it before they are curated.
"""

from __future__ import annotations

import re

MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?"
PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("email", re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")),
    ("url", re.compile(r"\bhttps?://\S+|\bwww\.\S+", re.IGNORECASE)),
    ("id", re.compile(
        r"\b(?:MRN|NHS|SSN|DOB|PID|patient[ -]?(?:id|number|no\.?)|medical record(?: number)?"
        r"|accession(?: number| no\.?)?"
        r"|case (?:number|no\.?)|hospital (?:number|no\.?)|study id)\s{0,3}[:#=]?\s{0,3}(?=\S*\d)[\w./-]{3,40}",
        re.IGNORECASE)),
    ("id", re.compile(r"\b\d{3}-\d{2}-\d{4}\b")),
    ("date", re.compile(r"\b(?:19|20)\d{2}[-/.](?:0?[1-9]|1[0-2])[-/.](?:0?[1-9]|[12]\d|3[01])\b")),
    ("date", re.compile(r"\b(?:0?[1-9]|[12]\d|3[01])[-/.](?:0?[1-9]|[12]\d|3[01])[-/.](?:19|20)?\d{2}\b")),
    ("date", re.compile(
        rf"\b(?:\d{{1,2}}(?:st|nd|rd|th)?\s{MONTH},?|{MONTH}\s\d{{1,2}}(?:st|nd|rd|th)?,?)\s(?:19|20)\d{{2}}\b",
        re.IGNORECASE)),
    ("phone", re.compile(r"(?<![\w.])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\)[ .-]?|\d{3}[.-])\d{3}[ .-]?\d{4}(?!\w)")),
    ("name", re.compile(r"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof)\.?\s[A-Z][\w'’-]+(?:\s[A-Z][\w'’-]+)?")),
    ("name", re.compile(
        r"(?i:\b(?:patient(?:'s)? name|name of (?:the )?patient)\s*[:=]\s*)"
        r"[A-Z][\w'’.-]*(?:,?\s[A-Z][\w'’.-]*){0,3}")),
)  # fmt: skip


def scrub_identifiers(text: str) -> tuple[str, int]:
    """A caption with e-mail and web addresses, record numbers, full dates, telephone numbers and titled names replaced.

    Returns:
        The text, and how many places were replaced.

    >>> scrub_identifiers("Chest film of Mr. Smith, MRN 123456, taken on 3 May 2019.")
    ('Chest film of [name], [id], taken on [date].', 3)
    """
    total = 0
    for kind, pattern in PATTERNS:
        text, count = pattern.subn(f"[{kind}]", text)
        total += count
    return text, total
