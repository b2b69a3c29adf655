"""Captions as running text: encodings found out, XML and LaTeX remains undone, panel letters kept.

PubMed Central's captions carry what its XML left behind: entities, tags around references and italics, and formulas as
whole LaTeX documents. Tags go and their text stays; formulas become Unicode through pylatexenc.
"""

from __future__ import annotations

import codecs
import html
import re
from functools import cache
from typing import Any

from mmkd.data.captions import clean_text

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


class WrongCaption(ValueError):
    """A caption that is no text; ``reason`` says how it is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_caption(data: str | bytes | None) -> tuple[str, bool]:
    """A caption as text, and whether its encoding had to be guessed.

    Raises:
        WrongCaption: there is none, or its bytes are no text.
    """
    if data is None:
        raise WrongCaption("no_caption")
    if isinstance(data, str):
        return data, False
    guessed = False
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        guessed = True
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        try:
            text = data.decode("utf-16" if wide else "cp1252")
        except UnicodeDecodeError as error:
            raise WrongCaption("caption_not_text") from error
    if BINARY.search(text):
        raise WrongCaption("caption_not_text")
    return text, guessed


def clean_caption(text: str) -> str:
    """A caption without markup, in composed Unicode, white space as single blanks; panel letters stay."""
    if "&" in text:
        for _ in range(MOST_ENTITY_ROUNDS):  # "&amp;lt;" is common
            text = html.unescape(text)
    if "\\" in text or "$" in text:
        text = _without_latex(text)
    if "<" in text:
        text = TAG.sub("", text)
        text = EMPTY_BRACKETS.sub("", text)
    return SPACE_BEFORE.sub(r"\1", clean_text(text))


def language_of(text: str, wanted: tuple[str, ...] = ()) -> str:
    """The most likely language of a caption among those of publication and those wanted, as an ISO 639-1 code.

    Raises:
        ValueError: a wanted language is not known.
    """
    return str(_identifier(wanted).classify(text)[0])


@cache
def _identifier(wanted: tuple[str, ...]) -> Any:
    import py3langid

    py3langid.set_languages(sorted({*PUBLICATION_LANGUAGES, *wanted}))
    return py3langid


def _without_latex(text: str) -> str:
    text = LATEX_DOCUMENT.sub(r"\1", text).replace("$$", "$")
    if not LATEX_COMMAND.search(text):
        return text
    return str(_latex_reader().latex_to_text(text))


@cache
def _latex_reader() -> Any:
    from pylatexenc.latex2text import LatexNodes2Text

    return LatexNodes2Text(math_mode="text", keep_comments=True)
