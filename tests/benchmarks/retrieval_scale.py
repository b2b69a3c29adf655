"""Memory and time of exact retrieval from a million vectors, with the time of a million queries extrapolated.

``python tests/benchmarks/retrieval_scale.py [--pool 1000000] [--queries 2048] [--dim 512] [--work FOLDER]``

Images and captions are random unit vectors in half precision, written to FOLDER and memory-mapped, as a cache of
embeddings is; image i and caption i belong together (the caption is the image plus noise). The queries are searched in
the whole pool in blocks; the first are checked against a plain product in double precision. The peak of resident
memory counts the mapped pages, too. A figure for all queries is seconds a query times their number: extrapolated. The
baseline keeps the similarities of all pairs in single precision, as a plain product would: its memory is computed, not
run.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mmkd.data.records import Pair
from mmkd.evaluation import retrieval
from mmkd.evaluation.bootstrap import replicate
from mmkd.evaluation.embedding import Embedded
from mmkd.evaluation.ranks import search
from mmkd.evaluation.task import Samples
from mmkd.evaluation.vectors import Table

PART = 1 << 16
CHECKED = 16


def simulate(folder: Path, pool: int, dim: int) -> tuple[Path, Path]:
    """Write images and captions ``(pool, dim)`` in half precision, seed 42."""
    generator = np.random.default_rng(42)
    files = folder / "images.npy", folder / "captions.npy"
    images, captions = (
        np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=(pool, dim)) for file in files
    )
    for start in range(0, pool, PART):
        rows = min(PART, pool - start)
        image = generator.standard_normal((rows, dim), dtype=np.float32)
        caption = image + 3.2 * generator.standard_normal((rows, dim), dtype=np.float32)
        for whole, part in ((images, image), (captions, caption)):
            whole[start : start + rows] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return files


def check(images: np.ndarray, captions: np.ndarray, ranks: np.ndarray) -> None:
    """Compare the first ranks with those of a product in double precision, but for ties of rounding."""
    queries = images[:CHECKED].astype(np.float64)
    own = (queries * captions[:CHECKED].astype(np.float64)).sum(axis=1)
    surely, perhaps = np.zeros(CHECKED), np.zeros(CHECKED)
    for start in range(0, len(captions), PART):
        similarities = queries @ captions[start : start + PART].astype(np.float64).T
        surely += (similarities > own[:, None] + 1e-6).sum(axis=1)
        perhaps += (similarities > own[:, None] - 1e-6).sum(axis=1)
    assert ((ranks[:CHECKED] >= 1 + surely) & (ranks[:CHECKED] <= perhaps)).all(), "a rank is wrong"


def whole_task(images: np.ndarray, captions: np.ndarray, queries: int) -> None:
    """The task as `mmkd eval` runs it, with 100 replicates; only the first queries are searched, the rest copy them."""
    names = [f"caption {k}" for k in range(len(images))]
    pairs = [Pair(f"{k}", f"{k}.png", names[k], "CT", split="test") for k in range(len(images))]
    shards = [slice(start, start + 4096) for start in range(0, len(images), 4096)]
    vectors = [
        Table(keys, [whole[part] for part in shards])
        for keys, whole in (([pair.id for pair in pairs], images), (names, captions))
    ]
    embedded = Embedded("e", "f", {}, vectors[0], {}, vectors[1])
    task = retrieval.Retrieval(Samples(pairs, [], [], {pair.id: pair.image for pair in pairs}), (50, 200))

    def first(asked: np.ndarray, pool: np.ndarray, right: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        return tuple(
            np.resize(own, (len(asked), *own.shape[1:])) for own in search(asked[:queries], pool, right[:queries])
        )

    retrieval.search = first
    outputs = task.outputs(embedded)
    points, _ = replicate(lambda weights: task.metrics(outputs, weights), task.frames, 100, 42)
    print(f"the whole task: mean recall {points['mean_recall']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument(
        "--work", type=Path, default=None, help="where the vectors are written, by default a new folder"
    )
    parser.add_argument("--task", action="store_true", help="also make the whole task: pairs, right answers, intervals")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        files = simulate(Path(folder), arguments.pool, arguments.dim)
        images, captions = (np.load(file, mmap_mode="r") for file in files)
        right = [np.array([k]) for k in range(arguments.queries)]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        began, cpu = time.perf_counter(), time.process_time()
        ranks, _, _ = search(images[: arguments.queries], captions, right)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        check(images, captions, ranks)
        if arguments.task:
            whole_task(images, captions, arguments.queries)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    hours = seconds / arguments.queries * arguments.pool / 3600
    plain = arguments.pool**2 * 4 / 2**30
    print(
        f"{arguments.queries} queries in a pool of {arguments.pool} x {arguments.dim}: {seconds:.1f} s, {cpu:.1f} CPU s"
    )
    print(f"recall@1 {np.mean(ranks <= 1):.3f}, @200 {np.mean(ranks <= 200):.3f}, median rank {np.median(ranks):.0f}")
    print(
        f"peak resident memory {peak:.2f} GiB, of it {before:.2f} before the search; {torch.get_num_threads()} threads"
    )
    print(f"all {arguments.pool} queries one way, extrapolated: {hours:.2f} h")
    result = {"name": "retrieval_scale", "ours": peak, "baseline": plain, "unit": "GiB", "ratio": plain / peak}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
