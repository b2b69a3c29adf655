"""Captions: decoded and cleaned, split by panel, with identifiers removed, or made from label and modality.

PubMed Central's captions carry what its XML left behind: entities, tags around references and italics, and formulas as
whole LaTeX documents. Tags go and their text stays; formulas become Unicode through pylatexenc; panel letters stay.
Where a collection has no captions, a sentence repeats the label and the modality and adds nothing; the sentences vary,
because a text tower that sees one template learns the template.

Identifiers are searched by patterns. Published captions seldom hold any; reports and notes do. Names without a title,
places and rare diseases are not found: de-identify such texts with a tool made for it before they are curated.
"""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mmkd.curation.samples import DroppedError
from mmkd.data.readers import decode
from mmkd.data.table import UNKNOWN


@cache
def sentences() -> dict[str, list[str]]:
    """The sentences of ``captions.yaml``, by what is known of an image: its ``label``, its ``modality`` or ``both``."""
    found: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return found


def clean_text(text: str) -> str:
    """Text in composed Unicode, without control characters, with single spaces."""
    normal = unicodedata.normalize("NFC", text)
    if not normal.isprintable():
        normal = "".join(c if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs") else " " for c in normal)
    return " ".join(normal.split())


def caption_from_labels(label: str, modality: str, key: str) -> str:
    """A sentence that states the label and the modality; empty if there is neither.

    Args:
        label: may be empty.
        modality: may be empty or ``unknown``.
        key: selects the sentence; the same key always gives the same one.
    """
    known_modality = "" if modality.lower() == UNKNOWN else modality
    if not label and not known_modality:
        return ""
    known = "modality" if known_modality else "label"
    if label and known_modality and label.casefold() != known_modality.casefold():
        known = "both"
    templates = sentences()[known]
    choice = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") % len(templates)
    sentence = templates[choice].format(label=label, modality=known_modality)
    return sentence[0].upper() + sentence[1:]


TAG = re.compile(r"</?[A-Za-z][\w:.-]*(?:\s[^<>]{0,2000})?/?>|<!--.{0,2000}?-->", re.DOTALL)
LATEX_DOCUMENT = re.compile(r"\\documentclass.{0,4000}?\\begin\{document\}(.{0,4000}?)\\end\{document\}", re.DOTALL)
LATEX_COMMAND = re.compile(r"\\[A-Za-z]+|\$[^$]{0,200}[\\^_][^$]{0,200}\$")
EMPTY_BRACKETS = re.compile(r"\s*[(\[][\s,;.]*[)\]]")
SPACE_BEFORE = re.compile(r"\s+([,.;:)\]])")
BINARY = re.compile(r"[\x00-\x08\x0e-\x1f]")
MOST_ENTITY_ROUNDS = 2
PUBLICATION_LANGUAGES = (
    "ar", "cs", "de", "en", "es", "fa", "fr", "hu", "it", "ja", "ko", "nl", "pl", "pt", "ro", "ru", "sv", "tr", "zh",
)  # fmt: skip


def decode_caption(data: str | bytes | None) -> tuple[str, bool]:
    """A caption as text, and whether its encoding had to be guessed.

    Raises:
        DroppedError: there is none, or its bytes are not text.
    """
    if data is None:
        raise DroppedError("no_caption")
    if isinstance(data, str):
        return data, False
    try:
        text, guessed = decode(data)
    except UnicodeDecodeError as error:
        raise DroppedError("caption_not_text") from error
    if BINARY.search(text):
        raise DroppedError("caption_not_text")
    return text, guessed


def clean_caption(text: str) -> str:
    """A caption without markup, in composed Unicode, with single spaces; panel letters stay."""
    if "&" in text:
        for _ in range(MOST_ENTITY_ROUNDS):  # "&amp;lt;" is common
            text = html.unescape(text)
    if "\\" in text or "$" in text:
        text = _without_latex(text)
    if "<" in text:
        text = clean_text(TAG.sub("", text))  # single spaces, or the next pattern is quadratic in a run of them
        text = EMPTY_BRACKETS.sub("", text)
    return SPACE_BEFORE.sub(r"\1", clean_text(text))


def language_of(text: str, requested: tuple[str, ...] = ()) -> str:
    """The most likely language of a caption among languages of publication and requested ones, as an ISO 639-1 code.

    Raises:
        ValueError: a requested language is unknown.
    """
    return str(_identifier(requested).classify(text)[0])


@cache
def _identifier(requested: tuple[str, ...]) -> Any:
    import py3langid

    try:
        py3langid.set_languages(sorted({*PUBLICATION_LANGUAGES, *requested}))
    except ValueError as error:
        raise ValueError(f"languages of the rules are {', '.join(requested)}: {error}") from error
    return py3langid


def _without_latex(text: str) -> str:
    text = LATEX_DOCUMENT.sub(r"\1", text).replace("$$", "$")
    if not LATEX_COMMAND.search(text):
        return text
    try:
        return str(_latex_reader().latex_to_text(text))
    except RecursionError:  # braces nested deeper than in any formula
        return text


@cache
def _latex_reader() -> Any:
    from pylatexenc.latex2text import LatexNodes2Text

    return LatexNodes2Text(math_mode="text", keep_comments=True)


LETTERS = "abcdefghijklmnopqrstuvwxyz"
MARK = re.compile(r"(?:(?<=^)|(?<=[\s.;:,]))[(\[]([A-Za-z](?:\s?(?:[-–,&]|and)\s?[A-Za-z])*)[)\]]:?\s+")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(\[])")
LONGEST_PARAGRAPH = 50_000
FEWEST_PANELS = 2


def split_panels(caption: str) -> list[str]:
    """One caption for each panel of a compound caption, or the caption itself if it names no panels.

    Panels are marked ``(A)``, ``(b)``, ``(A, B)`` or ``(a-c)`` before their text and must begin with the first letter
    and continue in order. The text before the first mark belongs to all of them.

    >>> split_panels("CT of the chest. (A) Axial view. (B) Coronal view.")
    ['CT of the chest. (A) Axial view.', 'CT of the chest. (B) Coronal view.']
    """
    marks, following = [], 0
    for match in MARK.finditer(caption):
        named = _letters(match[1])
        if named and named[0] == following:
            marks.append(match)
            following = named[-1] + 1
    if len(marks) < FEWEST_PANELS:
        return [caption]
    shared = caption[: marks[0].start()].strip()
    ends = [match.start() for match in marks[1:]] + [len(caption)]
    texts = [caption[match.start() : end].strip(" ;,") for match, end in zip(marks, ends, strict=True)]
    if any(len(text) <= len(match[0].strip()) for text, match in zip(texts, marks, strict=True)):
        return [caption]  # letters that refer to panels, as in "shown in (A) and (B)"
    return [f"{shared} {text}".strip() for text in texts]


def mention_sentences(context: dict[str, Any], figure: str, most: int) -> list[str]:
    """The first sentences of an article that refer to a figure.

    Args:
        context: ``image_context``: figure -> paragraphs that mention it, with ``<xref rid="FIGURE">`` at the mention.
        figure: the figure's id.
        most: sentences to return.
    """
    paragraphs = context.get(figure)
    found: list[str] = []
    for paragraph in paragraphs if isinstance(paragraphs, list) else [paragraphs]:
        if not isinstance(paragraph, str):
            continue
        for sentence in SENTENCE_END.split(paragraph[:LONGEST_PARAGRAPH]):
            cleaned = clean_caption(sentence)
            if f'rid="{figure}"' in sentence and cleaned and cleaned not in found:
                found.append(cleaned)
                if len(found) == most:
                    return found
    return found


def _letters(mark: str) -> list[int]:
    """The panels that a label names, as numbers: ``a-c`` is 0, 1, 2."""
    numbers = [LETTERS.index(letter) for letter in re.findall(r"\b[a-z]\b", mark.lower())]
    if len(numbers) == 2 and re.search(r"[-–]", mark):
        return list(range(numbers[0], numbers[1] + 1))
    return numbers


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
