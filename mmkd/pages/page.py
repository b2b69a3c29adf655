"""One model of a page, and its two forms: a self-contained HTML file, and Markdown with the same numbers.

A report is built as data (sections of tables, charts and notes) and rendered by Jinja, which escapes every string. A
room whose section needs markup of its own adds a template and names it in the section. An HTML page loads nothing; the
one script it holds sorts and filters tables, and its content policy allows no other by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from mmkd.files import atomic_write_text
from mmkd.pages.charts import Chart

ROOT = Path(__file__).parents[1]
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
MARKDOWN_SPECIAL = "\\`*_[]<>#|~&"


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it holds.
        note: small, below it: an interval, a reason.
        value: number to sort by, where it is not the text.
        role: its color, such as student or ahead.
        best: whether it carries the mark of the best.
        warning: reason behind a dagger; empty for none.
        tint: 0 to 1, how strong its ground is in a heat table.
    """

    text: str
    note: str = ""
    value: float | None = None
    role: str = ""
    best: bool = False
    warning: str = ""
    tint: float | None = None


@dataclass(frozen=True)
class Row:
    """A row of a table; the first cell is its head.

    Attributes:
        cells: strings, numbers or cells.
        role: its color.
        data: attributes for the script.
        hidden: shown by the script alone.
    """

    cells: Sequence[Cell | str | int]
    role: str = ""
    data: Mapping[str, str] = field(default_factory=dict)
    hidden: bool = False


@dataclass(frozen=True)
class Column:
    """The head of a column that the script shows or hides; see `Row`."""

    name: str
    data: Mapping[str, str] = field(default_factory=dict)
    hidden: bool = False


@dataclass
class Table:
    """A sortable table; ``kind`` is ``plain`` or ``heat``. A column may be its name, and a row its cells."""

    block: ClassVar[str] = "table"
    caption: str
    columns: Sequence[Column | str]
    rows: Sequence[Row | Sequence[Cell | str | int]]
    kind: str = "plain"
    anchor: str = ""

    def __post_init__(self) -> None:
        """Make columns of names, and rows of cells."""
        self.columns = [Column(own) if isinstance(own, str) else own for own in self.columns]
        self.rows = [own if isinstance(own, Row) else Row(own) for own in self.rows]


@dataclass(frozen=True)
class Notes:
    """A small list under a sentence."""

    block: ClassVar[str] = "notes"
    title: str
    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """A file's text; in HTML alone."""

    block: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Filters:
    """Choices for the script: name -> (title, value -> what is shown); in HTML alone."""

    block: ClassVar[str] = "filters"
    choices: Mapping[str, tuple[str, Mapping[str, str]]]


@dataclass(frozen=True)
class Grid:
    """Blocks side by side where there is room."""

    block: ClassVar[str] = "grid"
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Fold:
    """Blocks that open on a click."""

    block: ClassVar[str] = "fold"
    title: str
    blocks: Sequence[Block]


Block = Table | Chart | Notes | Code | Filters | Grid | Fold


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        anchor: its id.
        heading: its title.
        lead: a sentence or two.
        blocks: what it shows.
        template: file of a template below the package for a section with markup of its own, in HTML alone.
        content: what that template shows.
    """

    anchor: str
    heading: str
    lead: str = ""
    blocks: Sequence[Block] = ()
    template: str = ""
    content: Any = None


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: its first sentence.
        claims: sentences below it.
        facts: name and value of what a reader has to know first.
        caveat: how to read it; empty for none.
        sections: in order.
        footer: who made it.
    """

    title: str
    sections: Sequence[Section]
    claims: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    caveat: str = ""
    footer: str = ""


def write_page(path: Path, page: Page) -> None:
    """Write a page: HTML, or Markdown where the name ends in ``.md``."""
    atomic_write_text(path, to_markdown(page) if path.suffix == ".md" else to_html(page))


def to_html(page: Page) -> str:
    """The page as one HTML document."""
    style, script = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"{POLICY}; script-src 'sha256-{digest}'"
    return _render("pages/page.html.j2", page=page, style=style, script=script, policy=policy)


def to_markdown(page: Page) -> str:
    """The page as Markdown, its charts as links to their files where they have one."""
    return _render("pages/page.md.j2", page=page)


def number(value: float | None, digits: int = 2) -> str:
    """A score, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 2) -> str:
    """A difference with its sign."""
    if value is None:
        return "–"
    if not round(value, digits):
        return f"{0:.{digits}f}"
    return f"{value:+.{digits}f}".replace("-", "−")


def counted(count: int, noun: str) -> str:
    """A number with its noun."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _render(template: str, **values: Any) -> str:
    return _environment(template.endswith(".md.j2")).get_template(template).render(**values)


def macros(template: str) -> Any:
    """The macros of a template of HTML below the package, as functions that escape what they are given."""
    return _environment(False).get_template(template).module


@lru_cache(maxsize=2)
def _environment(markdown: bool) -> Any:
    """Templates of the whole package; every string is escaped, for Markdown by what Jinja calls on each value."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def escaped(value: Any) -> Any:
        """A string as Markdown text within one line."""
        if not isinstance(value, str) or isinstance(value, Markup):
            return value
        return Markup("".join(f"\\{sign}" if sign in MARKDOWN_SPECIAL else sign for sign in " ".join(value.split())))

    return Environment(
        loader=FileSystemLoader(ROOT),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=escaped if markdown else None,
        trim_blocks=True,
        lstrip_blocks=True,
    )
