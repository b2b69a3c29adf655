"""Figures are what their code draws, and tables of the experiment what its results say."""

import json
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mmkd.miniature.report import summary

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs" / "figures" / "method.svg"
RESULTS = ROOT / "docs" / "results"
ROWS = {
    "**control:** own starting towers, same images": "own starting towers + images",
    "**control:** random projections, same images": "random projections + images",
    "task loss alone": "task loss alone",
    "task loss, also on the teachers' captions": "task loss on the teachers' pairs too",
    "ensemble of the teachers": "ensemble of the teachers",
}


@pytest.fixture(scope="module")
def claim():
    return json.loads((RESULTS / "claim.json").read_text(encoding="utf-8"))


def test_the_page_of_the_experiment_has_the_tables_of_its_results(claim):
    page, primary = (RESULTS / "claim.md").read_text(encoding="utf-8"), claim["primary"]
    for found in (claim, json.loads((RESULTS / "claim_vision.json").read_text(encoding="utf-8"))):
        assert summary(found).strip() in page
    assert f"{primary['delta']:+.1f} points [{primary['low']:+.1f}, {primary['high']:+.1f}]" in page


@pytest.mark.parametrize("label", ROWS)
def test_readme_says_what_the_results_say(claim, label):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    shown = next(line for line in lines if line.startswith(f"| {label} |")).strip("| ").split(" | ")[1:]
    found = {
        (row["endpoint"], row["noise"]): row for row in claim["rows"] if row["contrast"].endswith(f" - {ROWS[label]}")
    }
    columns = [(endpoint, noise) for noise in (0.2, 0.4) for endpoint in ("seen", "unseen")]
    for text, column in zip(shown, columns, strict=True):
        row = found[column]
        expected = f"{row['delta']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"
        assert text == (f"**{expected}**" if row["holm_p"] < 0.05 else expected)


def test_the_figure_of_the_method_is_drawn_by_its_code():
    drawn = runpy.run_path(str(FIGURE.with_suffix(".py")))["drawing"]()
    assert drawn == FIGURE.read_text(encoding="utf-8"), "run python docs/figures/method.py"
    root = ElementTree.fromstring(drawn)
    words = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"losses.task", "losses.affinity", "losses.feature", "losses.relational", "losses.heads"} <= words
