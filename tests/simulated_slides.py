"""Slides whose tiles hold a number we chose, so that what a protocol ought to find is known: its test, and no result.

    python tests/simulated_slides.py TABLE.csv OUTPUT

takes the cases, times and events of a table with the columns of the TCGA ones in ``shared/data/tcga_survival`` and
writes ``OUTPUT/ENCODER/SLIDE.h5`` for two encoders: ``informed``, some of whose tiles are shifted by a risk that goes
with the table's own outcome, and ``random``, whose tiles hold nothing. ``OUTPUT/labels.csv`` has what a manifest reads.
"""

import csv
import sys
from pathlib import Path

import h5py
import numpy as np

from mmkd.data.records import Pair
from mmkd.evaluation.collection import Collection
from mmkd.evaluation.manifest import Manifest

WIDTH, INFORMED_SHARE = 16, 0.3


class SlideCollection(Collection):
    """Slides with bags under a root."""

    def __init__(self, manifest, pairs, root, facts=None):
        super().__init__(manifest, pairs)
        self.root, self.facts = root, facts or {}

    def image(self, pair):
        raise AssertionError("slides are read through their bags")

    def digest(self, pair):
        return pair.id


def slide_manifest(task, classes=None, headline=""):
    """A manifest of slides."""
    return Manifest("slides", task, "pathology", {"bags": "."}, "CC0-1.0", classes=classes or {}, headline=headline)


def write_bag(path, tiles, proj=None, **names):
    """A bag; ``names`` are further datasets."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = tiles.astype(np.float32)
        file["coords"] = np.stack([np.arange(len(tiles)), np.arange(len(tiles))], axis=1)
        if proj is not None:
            file["proj"] = proj.astype(np.float32)
        for name, array in names.items():
            file[name] = array


def risk_tiles(generator, risk, tiles=24, strength=2.0, width=WIDTH):
    """Tiles of noise, some of which are shifted by ``strength * risk`` along the first axis."""
    made = generator.normal(size=(tiles, width))
    informed = max(1, round(INFORMED_SHARE * tiles))
    made[:informed, 0] += strength * risk
    made[:informed, 1] += 2.0  # what attention can know them by
    return made


def exponential_cohort(count, beta=1.5, seed=0):
    """Risks ``(n,)`` with hazard ``exp(beta risk)``, times and events; about a third is censored."""
    generator = np.random.default_rng(seed)
    risk = generator.normal(size=count)
    event = generator.exponential(np.exp(-beta * risk))
    censored = generator.exponential(2.0 * np.median(event) + 0.2, size=count)
    return risk, np.round(np.minimum(event, censored), 2) + 0.01, event <= censored


def outcome_risk(time, event, noise, seed=0):
    """A risk that goes with outcomes: standardised event minus cumulative hazard (martingale residual), plus noise."""
    order = np.argsort(time, kind="stable")
    hazard = np.empty(len(time))
    hazard[order] = np.cumsum(event[order] / np.arange(len(time), 0, -1))
    residual = event - hazard
    residual = (residual - residual.mean()) / residual.std()
    return residual + noise * np.random.default_rng(seed).normal(size=len(time))


def main(table, output, noise=1.0, seed=0):
    with table.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["survival_months"] and row["censorship"]]
    cases = {row["case_id"]: row for row in rows}
    time = np.array([float(row["survival_months"]) for row in cases.values()])
    event = np.array([float(row["censorship"]) == 0 for row in cases.values()])
    risks = dict(zip(cases, outcome_risk(time, event, noise, seed), strict=True))
    generator = np.random.default_rng(seed + 1)
    for row in rows:
        slide = row["slide_id"].removesuffix(".svs")
        write_bag(output / "informed" / f"{slide}.h5", risk_tiles(generator, risks[row["case_id"]]))
        write_bag(output / "random" / f"{slide}.h5", generator.normal(size=(24, WIDTH)))
    kept = ("age", "is_female", "oncotree_code")
    with (output / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["slide", "case", "time", "event", *kept])
        for row in rows:
            event = int(float(row["censorship"]) == 0)
            known = [row[name] for name in kept]
            writer.writerow([row["slide_id"], row["case_id"], row["survival_months"], event, *known])
    print(f"{len(rows)} slides of {len(cases)} cases, simulated: they test the protocol and are no result")


def slide_pairs(names, cases=None, labels=None, splits=None):
    """A pair for each slide."""
    count = len(names)
    columns = (names, cases or names, labels or [""] * count, splits or ["test"] * count)
    rows = zip(*columns, strict=True)
    return [Pair(name, name, "", "pathology", label, case, split) for name, case, label, split in rows]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
