"""HTML by small pure functions; every string that comes from a user passes through `text`."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from importlib import resources

# Nothing is loaded, and nothing runs but the script that `page` is given: a caption that gets past the escaping still
# cannot do anything.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def text(value: object) -> str:
    """A value as HTML text, also safe inside a quoted attribute."""
    return html.escape(str(value), quote=True)


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole document with its style inside.

    Args:
        title: of the document, text.
        body: HTML.
        style: CSS after that of every page.
        script: JavaScript of ours at the end; its hash is the only one that may run.
    """
    style = resources.files("mmkd.evaluation.report").joinpath("page.css").read_text(encoding="utf-8") + style
    allowed, ending = POLICY, ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        allowed, ending = f"{POLICY}; script-src 'sha256-{digest}'", f"\n<script>{script}</script>"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{text(allowed)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}{ending}\n</body>\n</html>\n"
    )


def section(anchor: str, heading: str, lead: str, *content: str) -> str:
    """A section with a heading and a leading sentence (HTML); empty if there is no content."""
    inner = "\n".join(part for part in content if part)
    if not inner:
        return ""
    return f'<section id="{anchor}">\n<h2>{text(heading)}</h2>\n<p class="lead">{lead}</p>\n{inner}\n</section>'


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "plain") -> str:
    """A table whose first column heads its rows; cells are HTML, caption and column names are text."""
    head = "".join(f'<th scope="col">{text(column)}</th>' for column in columns)
    body = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table class="{kind}">'
        f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def details(summary: str, content: str) -> str:
    """Content (HTML) that opens on a click."""
    return f"<details><summary>{text(summary)}</summary>\n{content}\n</details>"


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


def p_value(value: float | None) -> str:
    """A p-value as it is written."""
    if value is None:
        return "p unknown"
    return "p < 0.01" if value < 0.01 else f"p = {value:.2f}"
