"""Draw the whole method as ``method.svg``, beside this file: ``python docs/figures/method.py``.

Plain SVG, written by hand-sized helpers; nothing random, so that the same code gives the same bytes.
"""

from __future__ import annotations

import math
from pathlib import Path

INK, SOFT, LINE, PAPER, CARD = "#1d2733", "#5c6b7a", "#c9d1da", "#f7f8fa", "#ffffff"
ACCENT, ACCENT_SOFT = "#0f766e", "#d5efeb"
HUES = ["#2563eb", "#0891b2", "#059669", "#65a30d", "#ca8a04", "#ea580c", "#dc2626", "#c026d3", "#7c3aed"]
TEACHERS = ["BMCA", "BiomedCLIP", "UniMedCLIP", "QuiltNet", "GenMedClip", "PLIP", "PubMedCLIP", "PMC-CLIP", "MedCLIP"]
KNOWN = ["110111011", "101110111", "111011101", "011111110", "110101111", "101111011"]


def text(x: float, y: float, words: str, size: int = 15, fill: str = INK, anchor: str = "start", more: str = "") -> str:
    """One line of text."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" {more}>{words}</text>'


def box(x: float, y: float, w: float, h: float, fill: str = CARD, stroke: str = LINE, r: float = 14) -> str:
    """A rounded rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{r:g}" fill="{fill}" stroke="{stroke}"/>'


def dot(x: float, y: float, r: float, fill: str, more: str = "") -> str:
    """A disc."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}" fill="{fill}" {more}/>'


def path(d: str, stroke: str = SOFT, width: float = 2, more: str = "") -> str:
    """A line without filling."""
    return f'<path d="{d}" fill="none" stroke="{stroke}" stroke-width="{width:g}" stroke-linecap="round" {more}/>'


def arrow(d: str, color: str = SOFT) -> str:
    """A line with a head; the head's color is the line's."""
    return path(d, color, 2.5, f'marker-end="url(#{"accent" if color == ACCENT else "head"})"')


def heading(x: float, y: float, number: str, title: str, note: str) -> str:
    """A numbered title with a line below that says more."""
    mark = dot(x + 13, y - 6, 13, INK) + text(x + 13, y - 1, number, 14, "#fff", "middle", 'font-weight="700"')
    return mark + text(x + 36, y, title, 19, more='font-weight="700"') + text(x, y + 28, note, 14, SOFT)


def pairs(x: float, y: float) -> str:
    """Three pictures with their captions."""
    out = []
    for row in range(3):
        top = y + row * 76
        out.append(box(x, top, 62, 62, "#18212c", "#18212c", 8))
        for line, width in enumerate((128, 104, 72)):
            out.append(box(x + 76, top + 9 + 18 * line, width, 8, "#d7dde4", "none", 4))
    cx = x + 31
    out.append(f'<ellipse cx="{cx}" cy="{y + 31}" rx="20" ry="24" fill="#8b97a5"/>')
    out.append(
        path(
            f"M{cx} {y + 9}v44M{cx - 12} {y + 20}q7 6 0 12q-5 6 2 12M{cx + 12} {y + 20}q-7 6 0 12q5 6 -2 12", "#dfe5ec"
        )
    )
    ribs = "".join(f"M{cx - 4} {y + 92 + 9 * k}q-17 0 -19 10M{cx + 4} {y + 92 + 9 * k}q17 0 19 10" for k in range(4))
    out.append(path(ribs + f"M{cx} {y + 84}v46", "#b9c3ce", 2.5))
    for k in range(13):
        a, r = 2.4 * k, 4.2 + 6.4 * math.sqrt(k)
        px, py = cx + r * math.cos(a) * 0.98, y + 183 + r * math.sin(a) * 0.98
        out.append(dot(px, py, 4.6, "#e8a0c0") + dot(px, py, 2, "#7a2f63"))
    return "".join(out)


def teachers(x: float, y: float) -> str:
    """Nine chips."""
    out = []
    for k, (name, hue) in enumerate(zip(TEACHERS, HUES, strict=True)):
        left, top = x + k % 3 * 114, y + k // 3 * 76
        out.append(box(left, top, 104, 62, CARD, hue, 12))
        out.append(f'<path d="M{left + 36} {top + 10}h32l-7 17h-18z" fill="{hue}" opacity=".9"/>')
        out.append(text(left + 52, top + 49, name, 13, INK, "middle", 'font-weight="600"'))
    return "".join(out)


def features(x: float, y: float) -> str:
    """Pairs by teachers; each cell an image and a text feature, missing where a teacher does not fit."""
    out = []
    for row, known in enumerate(KNOWN):
        for k, hue in enumerate(HUES):
            left, top = x + 36 * k, y + 37 * row
            if known[k] == "1":
                out.append(box(left, top, 27, 12, hue, "none", 4))
                out.append(f'<g opacity=".45">{box(left, top + 14, 27, 12, hue, "none", 4)}</g>')
            else:
                out.append(
                    box(left + 0.5, top + 0.5, 26, 25, "none", LINE, 5).replace("/>", ' stroke-dasharray="3 3"/>')
                )
    return "".join(out)


def panel(x: float, y: float, title: str, key: str, lines: tuple[str, str], drawing: str) -> str:
    """One loss: its name in the settings, a drawing and two lines."""
    head = text(x + 18, y + 34, title, 17, more='font-weight="700"')
    code = text(
        x + 18, y + 56, key, 13, ACCENT, more='font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"'
    )
    notes = "".join(text(x + 18, y + 236 + 20 * k, line, 13.5, SOFT) for k, line in enumerate(lines))
    return box(x, y, 252, 276) + head + code + drawing + notes


def affinity(x: float, y: float) -> str:
    """Three teachers' distributions over captions, and their mean."""
    rows = [(HUES[0], (9, 34, 14, 6, 4)), (HUES[3], (4, 26, 8, 21, 5)), (HUES[6], (6, 38, 5, 9, 3))]
    out = []
    for k, (hue, heights) in enumerate(rows):
        for j, height in enumerate(heights):
            out.append(box(x + 18 + 13 * j, y + 100 + 44 * k - height + 10, 9, height, hue, "none", 2))
    out.append(arrow(f"M{x + 98} {y + 138}h36"))
    out.append(text(x + 113, y + 126, "mean", 12, SOFT, "middle"))
    for j in range(5):
        height = 2.1 * sum(heights[j] for _, heights in rows) / 3
        out.append(box(x + 146 + 18 * j, y + 176 - height, 13, height, ACCENT, "none", 3))
    out.append(path(f"M{x + 142} {y + 178}h96", LINE, 1.5))
    out.append(text(x + 190, y + 196, "p(caption | image)", 12, SOFT, "middle"))
    return "".join(out)


def aligned(x: float, y: float) -> str:
    """Teachers as clusters become samples as clusters."""
    out = []
    shapes = [(0, -13), (11, 8), (-12, 6)]
    for k, hue in enumerate((HUES[0], HUES[3], HUES[6])):
        cx, cy = x + 56 + (-27, 24, 0)[k], y + 132 + (-20, -8, 34)[k]
        for dx, dy in shapes:
            turn = 1.1 * k
            out.append(
                dot(
                    cx + dx * math.cos(turn) - dy * math.sin(turn),
                    cy + dx * math.sin(turn) + dy * math.cos(turn),
                    5,
                    hue,
                )
            )
    out.append(arrow(f"M{x + 110} {y + 138}h32"))
    out.append(text(x + 125, y + 126, "rotate", 12, SOFT, "middle"))
    for cx, cy in ((x + 194, y + 98), (x + 222, y + 160), (x + 166, y + 156)):
        for k, hue in enumerate((HUES[0], HUES[3], HUES[6])):
            angle = 2.1 * k
            out.append(dot(cx + 9 * math.cos(angle), cy + 9 * math.sin(angle), 5, hue))
        out.append(f'<circle cx="{cx}" cy="{cy}" r="18" fill="none" stroke="{ACCENT}" stroke-width="2"/>')
    out.append(
        text(x + 56, y + 204, "by teacher", 12, SOFT, "middle")
        + text(x + 194, y + 204, "by sample", 12, SOFT, "middle")
    )
    return "".join(out)


def relational(x: float, y: float) -> str:
    """Images joined as strongly as teachers find them alike."""
    points = [(60, 110), (128, 86), (196, 116), (92, 178), (170, 184)]
    bonds = [(0, 1, 7), (0, 3, 5), (1, 2, 2.5), (2, 4, 8), (3, 4, 1.5), (1, 3, 2), (1, 4, 1.5), (0, 4, 1)]
    out = [
        path(f"M{x + points[a][0]} {y + points[a][1]}L{x + points[b][0]} {y + points[b][1]}", "#8fd0c8", width)
        for a, b, width in bonds
    ]
    for px, py in points:
        out.append(box(x + px - 15, y + py - 15, 30, 30, "#18212c", CARD, 7))
        out.append(dot(x + px, y + py, 7, "#8b97a5"))
    return "".join(out)


def heads(x: float, y: float) -> str:
    """One embedding, a head into each teacher's own space."""
    out = [dot(x + 50, y + 142, 17, ACCENT)]
    for k, hue in enumerate(HUES[::2]):
        top = y + 92 + 25 * k
        out.append(path(f"M{x + 68} {y + 142}C{x + 118} {y + 142} {x + 110} {top} {x + 150} {top}", hue, 2.5))
        for j in range(5):
            out.append(f'<g opacity="{1 - 0.15 * j:.2f}">{box(x + 154 + 16 * j, top - 7, 13, 14, hue, "none", 3)}</g>')
    return "".join(out)


def student(x: float, y: float) -> str:
    """Two towers, one space, the captions' own loss, and the folder that comes out."""
    out = [
        box(x, y, 330, 652, CARD, ACCENT),
        heading(x + 24, y + 44, "4", "Distil one student", "weights of the losses: one YAML"),
    ]
    for k, (label, fill) in enumerate((("image tower", ACCENT), ("text tower", "#334155"))):
        left = x + 34 + 142 * k
        out.append(f'<path d="M{left} {y + 100}h120l-26 84h-68z" fill="{fill}"/>')
        out.append(text(left + 60, y + 147, label, 14, "#fff", "middle", 'font-weight="600"'))
        out.append(arrow(f"M{left + 60} {y + 190}v28"))
    out.append(box(x + 34, y + 226, 262, 44, ACCENT_SOFT, ACCENT, 22))
    out.append(text(x + 165, y + 253, "one space, unit norm", 15, INK, "middle", 'font-weight="600"'))
    out.append(text(x + 24, y + 312, "Captions", 17, more='font-weight="700"'))
    mono = 'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"'
    out.append(text(x + 24, y + 334, "losses.task", 13, ACCENT, more=mono))
    out += [
        text(x + 24, y + 364, "each image finds its", 13.5, SOFT),
        text(x + 24, y + 384, "caption, and back", 13.5, SOFT),
    ]
    for i in range(5):
        for j in range(5):
            out.append(box(x + 184 + 23 * j, y + 296 + 23 * i, 20, 20, ACCENT if i == j else "#e6eaee", "none", 4))
    out.append(arrow(f"M{x + 165} {y + 424}v40", ACCENT))
    shape = "v-8q0 -10 10 -10h70l14 16h158q10 0 10 10v110q0 10 -10 10h-242q-10 0 -10 -10z"
    out.append(f'<path d="M{x + 34} {y + 490}{shape}" fill="{ACCENT}"/>')
    out.append(text(x + 165, y + 528, "mmkd-clip/", 17, "#fff", "middle", mono + ' font-weight="700"'))
    out.append(text(x + 165, y + 556, "AutoModel.from_pretrained", 14, "#d5efeb", "middle", mono))
    out.append(text(x + 165, y + 588, "light, no teacher inside", 14, "#fff", "middle"))
    out.append(text(x + 165, y + 637, "evaluated beside every teacher, with intervals", 13, SOFT, "middle"))
    return "".join(out)


def drawing() -> str:
    """The figure."""
    style = 'font-family="Inter, Segoe UI, Helvetica Neue, Helvetica, Arial, sans-serif"'
    heads_of_arrows = "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="5" markerHeight="5" orient="auto">'
        f'<path d="M0 0L10 5L0 10z" fill="{color}"/></marker>'
        for name, color in (("head", SOFT), ("accent", ACCENT))
    )
    described = "Pairs go through nine teachers once; their screened features teach one student through four losses"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1500 736" role="img" aria-label="{described}" {style}>',
        f"<defs>{heads_of_arrows}</defs>",
        box(0, 0, 1500, 736, PAPER, "none", 20),
        heading(40, 62, "1", "Curate pairs", "images with their captions"),
        pairs(40, 118),
        arrow("M262 220h42"),
        heading(326, 62, "2", "Run each teacher once", "offline, each its own space and width"),
        teachers(326, 118),
        arrow("M678 220h42"),
        heading(742, 62, "3", "Screen its features", "a teacher counts where it fits the pair"),
        features(742, 118),
        path("M900 346V384M166 384H964", ACCENT, 2.5),
        *(arrow(f"M{166 + 266 * k} 384v26", ACCENT) for k in range(4)),
        text(886, 372, "16-bit shards, mapped into memory", 13, SOFT, "end"),
        panel(
            40,
            420,
            "Affinity",
            "losses.affinity",
            ("softmax per teacher, then", "the mean; no common space"),
            affinity(40, 420),
        ),
        panel(
            306,
            420,
            "Aligned mean",
            "losses.feature",
            ("Procrustes with missing views;", "the target is a direction"),
            aligned(306, 420),
        ),
        panel(
            572,
            420,
            "Relations",
            "losses.relational",
            ("who is like whom among images,", "and among captions"),
            relational(572, 420),
        ),
        panel(
            838,
            420,
            "Heads",
            "losses.heads",
            ("one per teacher, on PHI-S", "targets; kept beside the model"),
            heads(838, 420),
        ),
        arrow("M1096 446h34", ACCENT),
        student(1138, 44),
        path("M166 38V24H480M660 24H1303V38", LINE, 2, 'stroke-dasharray="2 7"'),
        text(570, 28, "the pairs themselves", 13, SOFT, "middle"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(drawing(), encoding="utf-8")
