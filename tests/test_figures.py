"""Figures are what their code draws."""

import runpy
from pathlib import Path
from xml.etree import ElementTree

FIGURE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "method.svg"


def test_the_figure_of_the_method_is_drawn_by_its_code():
    drawn = runpy.run_path(str(FIGURE.with_suffix(".py")))["drawing"]()
    assert drawn == FIGURE.read_text(encoding="utf-8"), "run python docs/figures/method.py"
    root = ElementTree.fromstring(drawn)
    words = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"losses.task", "losses.affinity", "losses.feature", "losses.relational", "losses.heads"} <= words
