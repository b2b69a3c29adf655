"""Main memory of ``mmkd align`` by number of pairs: the slope at a tenth of the paper's 19.2 million.

    python tests/benchmarks/scale_align.py [--pairs 1920000] [--teachers 9]

Pairs and features are simulated, and the features are narrow (16 numbers): what grows with the pairs does not depend on
their width. Two runs, of half and of all pairs, give the slope; a third with 512 numbers and few pairs gives what does
not grow. Memory is the private part (RssAnon), which mapped files do not add to. The last line is JSON.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from private_memory import PrivateMemory

from mmkd.data.features.writer import FeatureWriter
from mmkd.data.folder import write_manifest
from mmkd.data.table import Pair
from mmkd.train.align import AlignSettings
from mmkd.train.align import main as align

PAPER, WIDTH, REAL_WIDTH, FEW, WRITTEN_TOGETHER = 19_200_000, 16, 512, 20_000, 65_536


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=PAPER // 10)
    parser.add_argument("--teachers", type=int, default=9)
    given = parser.parse_args()
    half, whole = (in_its_own_process(n, given.teachers, WIDTH) for n in (given.pairs // 2, given.pairs))
    wide = in_its_own_process(min(FEW, given.pairs), given.teachers, REAL_WIDTH)
    slope = (whole["peak"] - half["peak"]) / (given.pairs - given.pairs // 2)
    report = {
        "pairs": given.pairs,
        "teachers": given.teachers,
        "peak_mb": round(whole["peak"] / 2**20),
        "peak_mb_at_512_few_pairs": round(wide["peak"] / 2**20),
        "bytes_a_pair": round(slope, 1),
        "gb_at_19.2_million": round((wide["peak"] + slope * PAPER) / 1e9, 2),
        "seconds": round(whole["seconds"], 1),
        "met": wide["peak"] + slope * PAPER <= 2e9,
    }
    print(json.dumps(report))


def in_its_own_process(pairs: int, teachers: int, width: int) -> dict[str, float]:
    """Peak of private memory in bytes and seconds of an alignment."""
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(make, (Path(folder), pairs, teachers, width))
        pool.close()
        with multiprocessing.get_context("spawn").Pool(1) as other:
            return other.apply(measure, (Path(folder), width))


def make(folder: Path, pairs: int, teachers: int, width: int) -> None:
    """A manifest and feature stores."""
    write_manifest(
        folder / "pairs",
        (Pair(f"pair-{k:08d}", f"{k}.png", f"caption of {k}", sha256=f"{k:064x}") for k in range(pairs)),
    )
    rng = np.random.default_rng(0)
    for number in range(teachers):
        writer = FeatureWriter(folder / "features" / f"t{number}", f"t{number}")
        for begin in range(0, pairs, WRITTEN_TOGETHER):
            ids = [f"pair-{k:08d}" for k in range(begin, min(begin + WRITTEN_TOGETHER, pairs))]
            image, text = torch.from_numpy(rng.normal(size=(2, len(ids), width)).astype(np.float32))
            writer.add(ids, image, text)
        writer.finish({})


def measure(folder: Path, width: int) -> dict[str, float]:
    """Align, while the private memory of this process is read."""
    began = time.perf_counter()
    settings: dict[str, Any] = {
        "pairs": folder / "pairs",
        "features": folder / "features",
        "output": folder / "aligned",
    }
    with PrivateMemory() as memory:
        align(AlignSettings(**settings, dim=width, quiet=True, trackers=["none"]))
    return {"peak": float(memory.peak), "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    main()
