"""Main memory by number of pairs of `mmkd align`, of `mmkd extract` beside its weights, and of `mmkd screen`.

    python tests/benchmarks/scale_stages.py [--pairs 1920000] [--teachers 9] [--stages align,extract,screen]

A tenth of the paper's 19.2 million. Pairs and features are simulated, and the features are narrow (16 numbers): what
grows with the pairs does not depend on their width. Two runs, of a quarter and of all pairs, give the slope; a third
with 512 numbers and few pairs gives what does not grow, and the CPU time of a pair at that width. An extraction is all
but the teacher and the images: pairs opened, shards written, the store finished. Memory is the private part (RssAnon),
which mapped files do not add to, beyond that of a process with torch. The last line of each stage is JSON: megabytes
at 19.2 million pairs, and the bar.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from private_memory import PrivateMemory, private_bytes

from mmkd.data.features.index import fingerprinted
from mmkd.data.features.writer import FeatureExtraction, FeatureWriter
from mmkd.data.folder import open_pairs, write_manifest
from mmkd.data.table import Pair
from mmkd.train.align import AlignSettings
from mmkd.train.align import main as align
from mmkd.train.screen import ScreenSettings
from mmkd.train.screen import main as screen

PAPER, WIDTH, REAL_WIDTH, FEW = 19_200_000, 16, 512, 20_000
BARS = {"align": 2e9, "extract": 200e6, "screen": 2e9}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=PAPER // 10)
    parser.add_argument("--teachers", type=int, default=9)
    parser.add_argument("--stages", default=",".join(BARS))
    given = parser.parse_args()
    stages = given.stages.split(",")
    few, quarter = min(FEW, given.pairs), given.pairs // 4
    sizes = [(quarter, WIDTH), (given.pairs, WIDTH), (few, REAL_WIDTH)]
    small, whole, wide = (in_processes(stages, n, given.teachers, width) for n, width in sizes)
    for stage in stages:
        slope = (whole[stage]["peak"] - small[stage]["peak"]) / (given.pairs - quarter)
        grown = max(slope, 0)
        at_full = max(found[stage]["peak"] + grown * (PAPER - n) for found, n in ((wide, few), (whole, given.pairs)))
        print(json.dumps({
            "name": f"scale_{stage}",
            "ours": round(at_full / 1e6),
            "baseline": round(BARS[stage] / 1e6),
            "unit": "MB at 19.2 million pairs",
            "ratio": round(BARS[stage] / at_full, 2),
            "pairs": given.pairs,
            "teachers": given.teachers,
            "peak_mb": round(whole[stage]["peak"] / 1e6),
            "peak_mb_at_512_few_pairs": round(wide[stage]["peak"] / 1e6),
            "bytes_a_pair": round(slope, 1),
            "cpu_microseconds_a_pair": round(1e6 * whole[stage]["seconds"] / given.pairs, 1),
            "cpu_microseconds_a_pair_at_512": round(1e6 * wide[stage]["seconds"] / few, 1),
        }), flush=True)  # fmt: skip


def in_processes(stages: list[str], pairs: int, teachers: int, width: int) -> dict[str, dict[str, float]]:
    """Peak of private memory in bytes and CPU seconds of stages, each in a process of its own."""
    context, found = multiprocessing.get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as folder:
        for call in (make, *(partial(measure, stage) for stage in stages)):
            with context.Pool(1) as pool:
                done = pool.apply(call, (Path(folder), pairs, teachers, width))
            found |= done
    print(f"{pairs} pairs, {width} wide: {found}", flush=True)
    return found


def make(folder: Path, pairs: int, teachers: int, width: int) -> dict[str, dict[str, float]]:
    """A manifest and feature stores."""
    write_manifest(
        folder / "pairs",
        (Pair(f"pair-{k:08d}", f"{k}.png", f"caption of {k}", sha256=f"{k:064x}") for k in range(pairs)),
    )
    rng = np.random.default_rng(0)
    for number in range(teachers):
        writer = FeatureWriter(folder / "features" / f"t{number}", f"t{number}")
        for ids, fingerprints in fingerprinted(open_pairs(folder / "pairs").pairs):
            image, text = torch.from_numpy(rng.normal(size=(2, len(ids), width)).astype(np.float32))
            writer.add(ids, image, text, fingerprints)
        writer.finish({})
    return {}


def measure(stage: str, folder: Path, pairs: int, teachers: int, width: int) -> dict[str, dict[str, float]]:
    """Run a stage, while the private memory of this process is read."""
    inputs: dict[str, Any] = {"pairs": folder / "pairs", "features": folder / "features", "output": folder / stage}
    began, before = time.process_time(), private_bytes()
    with PrivateMemory() as memory:
        if stage == "align":
            align(AlignSettings(**inputs, dim=width, quiet=True, trackers=["none"]))
        elif stage == "screen":
            screen(ScreenSettings(**inputs, minimum_teachers=0, quiet=True))
        else:
            extract(folder / "pairs", folder / stage, width)
    return {stage: {"peak": float(memory.peak - before), "seconds": time.process_time() - began}}


def extract(folder: Path, output: Path, width: int) -> None:
    """All of an extraction but the teacher and the images."""
    extraction = FeatureExtraction(output, "teacher", open_pairs(folder).pairs, {}, "float16")
    for shard in range(len(extraction)):
        features = torch.ones(len(extraction.positions(shard)), width)
        extraction.write(shard, features, features, {})
    extraction.close()


if __name__ == "__main__":
    main()
