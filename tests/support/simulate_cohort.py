"""Give the cases of a clinical table deaths of a known hazard, and bags of features that tell it or do not.

    python tests/support/simulate_cohort.py shared/data/tcga_survival/tcga_blca_clinical.csv sim/blca
    mmkd eval --datasets sim/blca/manifest.yaml --kinds survival --encoders hazard=ENCODER,noise=ENCODER,told=ENCODER

Cases, slides, age and sex are the table's. Each case has a risk z from N(0, 1) and dies at a time of rate
``c exp(1.5 z)``. It is censored at a time drawn from the table's own censoring (Kaplan-Meier, censored cases taken as
the events), and ``c`` is such that as many die as in the table. The table's own outcomes are not used: their hazard is
not known. A third of a slide's tiles show z along one direction (bags of ``hazard``), the time of death itself
(``told``), or nothing (``noise``). This tests the protocol; a number it gives says nothing about medicine.
"""

import csv
import sys
from pathlib import Path

import h5py
import numpy as np

from mmkd.evaluation.statistics.survival import Outcomes, kaplan_meier

TILES, WIDTH, EFFECT, SEED = 30, 16, 1.5, 0
MANIFEST = """id: simulated-{name}
task: survival
modality: pathology
title: {name}, simulated deaths of known hazard
source: {{bags: "{folder}", slide: slide_id, case: case_id, time: time, censored: censored}}
license: Apache-2.0
"""


def simulated(outcomes: Outcomes, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Risks, times of death and times of censoring, ``(n,)`` each, in the table's unit of time."""
    risks = generator.normal(size=len(outcomes))
    times, followed = kaplan_meier(Outcomes(outcomes.time, ~outcomes.event))
    steps = np.searchsorted(-followed, -generator.uniform(size=len(outcomes)))
    censored = np.append(times, outcomes.time.max())[steps].clip(min=outcomes.time[outcomes.time > 0].min())
    waits = generator.exponential(np.exp(-EFFECT * risks))
    return risks, waits / np.quantile(waits / censored, outcomes.event.mean()), censored


def main(table: Path, folder: Path) -> None:
    with table.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["survival_months"] and row["censorship"]]
    cases = {row["case_id"]: row for row in rows}
    time = np.array([float(row["survival_months"]) for row in cases.values()])
    event = np.array([float(row["censorship"]) == 0 for row in cases.values()])
    generator = np.random.default_rng(SEED)
    risks, death, end = simulated(Outcomes(time, event), generator)
    early = -np.argsort(np.argsort(death)) / len(death)
    shown = {"hazard": 2 * risks, "told": 10 * (early - early.mean()) / early.std(), "noise": np.zeros(len(cases))}
    number = {case: k for k, case in enumerate(cases)}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "case_id", "time", "censored", "age", "is_female", "risk"])
        for row in rows:
            k = number[row["case_id"]]
            slide = row["slide_id"].removesuffix(".svs")
            facts = [f"{min(death[k], end[k]):.6f}", int(end[k] < death[k]), row["age"], row["is_female"], risks[k]]
            writer.writerow([slide, row["case_id"], *facts])
            for name, values in shown.items():
                tiles = generator.normal(size=(TILES, WIDTH)).astype(np.float32)
                tiles[: TILES // 3, 0] += values[k]
                write(folder / name / f"{slide}.h5", tiles)
    (folder / "manifest.yaml").write_text(MANIFEST.format(folder=folder.resolve(), name=folder.name))


def write(path: Path, tiles: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = tiles
        file["coords"] = np.zeros((len(tiles), 2), dtype=np.int64)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
