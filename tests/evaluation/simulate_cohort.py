"""Write a cohort whose hazard is known: a table of times and deaths, and bags of features that tell it or do not.

    python tests/evaluation/simulate_cohort.py sim
    mmkd eval --datasets sim/simulated.yaml --tasks survival --encoders hazard=ENCODER,noise=ENCODER

Each case has a risk z from N(0, 1), dies at an exponential time of rate exp(1.5 z), and is censored at an independent
one. A third of its tiles show z along one direction (bags of ``hazard``), or nothing does (``noise``). This tests the
protocol; a number it gives says nothing about medicine.
"""

import sys
from pathlib import Path

import h5py
import numpy as np

CASES, TILES, WIDTH, EFFECT = 240, 30, 16, 1.5
MANIFEST = """id: simulated
task: survival
modality: pathology
title: Simulated cohort of known hazard
source: {{bags: "{folder}", slide: slide_id, case: case_id, time: time, censored: censored}}
license: Apache-2.0
"""


def main(folder: Path) -> None:
    generator = np.random.default_rng(0)
    risks = generator.normal(size=CASES)
    death = generator.exponential(np.exp(-EFFECT * risks))
    end = generator.exponential(2.0, size=CASES)
    rows = ["slide_id,case_id,time,censored"]
    for k in range(CASES):
        rows.append(f"s{k},c{k},{min(death[k], end[k]) * 12:.6f},{int(end[k] < death[k])}")
        for name, shown in (("hazard", risks[k]), ("noise", 0.0)):
            tiles = generator.normal(size=(TILES, WIDTH)).astype(np.float32)
            tiles[: TILES // 3, 0] += 2 * shown
            path = folder / name / f"s{k}.h5"
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(path, "w") as file:
                file["features"] = tiles
                file["coords"] = np.zeros((TILES, 2), dtype=np.int64)
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    (folder / "simulated.yaml").write_text(MANIFEST.format(folder=folder.resolve()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
