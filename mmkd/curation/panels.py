"""Compound captions by panel, and the sentences of an article that mention a figure: settings, off by default."""

from __future__ import annotations

import re
from typing import Any

from mmkd.curation.wording import clean_caption

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MARK = re.compile(r"(?:(?<=^)|(?<=[\s.;:,]))[(\[]([A-Za-z](?:\s?(?:[-–,&]|and)\s?[A-Za-z])*)[)\]]:?\s+")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(\[])")
LONGEST_PARAGRAPH = 50_000
FEWEST_PANELS = 2


def split_panels(caption: str) -> list[str]:
    """One caption for each panel of a compound one; a list of the caption alone where it names no panels.

    Panels are marked ``(A)``, ``(b)``, ``(A, B)`` or ``(a-c)`` before their text and must begin with the first letter
    and go on in order. What stands before the first mark belongs to all of them.

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
    """The panels a mark names, as numbers: ``a-c`` is 0, 1, 2."""
    numbers = [LETTERS.index(letter) for letter in re.findall(r"\b[a-z]\b", mark.lower())]
    if len(numbers) == 2 and re.search(r"[-–]", mark):
        return list(range(numbers[0], numbers[1] + 1))
    return numbers
