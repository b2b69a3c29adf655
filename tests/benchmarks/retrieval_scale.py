"""Memory and time of a whole retrieval task on a million images and captions, with the search of most queries copied.

``python tests/benchmarks/retrieval_scale.py [--pool 1000000] [--queries 2048] [--replicates 1000] [--work FOLDER]``

Images and captions are random unit vectors of 512 numbers in half precision, written by another process as the shards
of a warm cache (the caption of an image is the image plus noise). Then the dataset is judged as `mmkd eval` does:
pairs, hashes, right answers, search both ways, metrics with intervals under two sets of replicates, scores as Parquet,
the cell, the summary. A search of all queries would take hours, so the first ``--queries`` of each direction are
searched in the whole pool, and the others copy their ranks and answers; all else has its full size. The first ranks are
checked against a plain product in double precision.

The peak of resident memory counts the mapped pages of the cache, which the system may drop; that of memory that it may
not drop is sampled every 20 ms and given beside it. A figure for all queries is seconds a query times their number:
extrapolated. The baseline keeps the similarities of all pairs in single precision, as a plain product would: its memory
is computed, not run.
"""

import argparse
import hashlib
import json
import multiprocessing
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from private_memory import PrivateMemory
from simulated_suite import Simulated, simulated_inputs

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.manifest import find_manifests
from mmkd.evaluation.embeddings.embed import SHARD_SIZE, DatasetInputs, write_vectors
from mmkd.evaluation.embeddings.encoders import EncoderRecord
from mmkd.evaluation.run import SuiteRun
from mmkd.evaluation.settings import EvalSettings
from mmkd.evaluation.tasks import retrieval as ranks
from mmkd.evaluation.tasks.retrieval import search

DIM, CHECKED, PART = 512, 16, 1 << 16


class Hashed(Simulated):
    """Pairs whose images have hashes as long as real ones."""

    def digest(self, pair: Pair) -> str:
        return hashlib.sha256(pair.id.encode()).hexdigest()


def opened(pool: int) -> tuple[Hashed, DatasetInputs]:
    """The dataset: one caption for each image, all distinct."""
    collection = Hashed(replace(find_manifests(["rocov2"])[0], id="simulated"), 0, pool)
    return collection, simulated_inputs(collection)


def simulate(known: EncoderRecord, pool: int) -> None:
    """Write the shards of images and captions ``(pool, 512)``, seed 42."""
    collection, inputs = opened(pool)
    place = {pair.caption: k for k, pair in enumerate(collection.pairs)}
    images, captions = (np.empty((pool, DIM), dtype=np.float16) for _ in range(2))
    generator = np.random.default_rng(42)
    for start in range(0, pool, PART):
        rows = min(PART, pool - start)
        image = generator.standard_normal((rows, DIM), dtype=np.float32)
        caption = image + 3.2 * generator.standard_normal((rows, DIM), dtype=np.float32)
        for whole, part in ((images, image), (captions, caption)):
            whole[start : start + rows] = part / np.linalg.norm(part, axis=1, keepdims=True)
    files = iter(known.files(inputs))
    order = np.array([place[text] for part in inputs.texts for text in part])
    for whole, rows in ((images, np.arange(pool)), (captions, order)):
        for start in range(0, pool, SHARD_SIZE):
            vectors = torch.from_numpy(whole[rows[start : start + SHARD_SIZE]])
            write_vectors(
                next(files), [str(k) for k in range(start, start + len(vectors))], {"vectors": vectors}, {}, []
            )


class Searched:
    """The search of the first queries, timed and checked; the others copy their answers."""

    def __init__(self, queries: int) -> None:
        self.queries, self.seconds, self.cpu = queries, 0.0, 0.0

    def __call__(self, asked: Any, pool: Any, right: Any) -> tuple[np.ndarray, ...]:
        own, first = right[: self.queries], right[:CHECKED].values
        began, busy = time.perf_counter(), time.process_time()
        found = search(asked[: self.queries], pool, own)
        self.seconds, self.cpu = self.seconds + time.perf_counter() - began, self.cpu + time.process_time() - busy
        check(asked[:CHECKED], pool, first, found[0])
        return tuple(np.resize(part, (len(asked), *part.shape[1:])) for part in found)


def check(asked: np.ndarray, pool: Any, right: np.ndarray, found: np.ndarray) -> None:
    """Compare the first ranks with those of a product in double precision, but for ties of rounding."""
    queries = asked.astype(np.float64)
    own = np.array([query @ pool[k : k + 1][0].astype(np.float64) for query, k in zip(queries, right, strict=True)])
    surely, perhaps = np.zeros(len(own)), np.zeros(len(own))
    for start in range(0, len(pool), PART):
        similarities = queries @ pool[start : start + PART].astype(np.float64).T
        surely += (similarities > own[:, None] + 1e-6).sum(axis=1)
        perhaps += (similarities > own[:, None] - 1e-6).sum(axis=1)
    assert ((found[: len(own)] >= 1 + surely) & (found[: len(own)] <= perhaps)).all(), "a rank is wrong"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=2048, help="of each direction, that are searched")
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument(
        "--work", type=Path, default=None, help="where the vectors are written, by default a new folder"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        settings = EvalSettings(
            ["student"],
            suite="paper58",
            output=Path(folder),
            kinds=["retrieval"],
            replicates=arguments.replicates,
            quiet=True,
        )
        known = EncoderRecord("student", "student", "simulated", {}, settings.embeddings / "student")
        writer = multiprocessing.get_context("fork").Process(target=simulate, args=(known, arguments.pool))
        writer.start()
        writer.join()
        assert writer.exitcode == 0, "the vectors could not be written"
        ranks.search = searched = Searched(arguments.queries)
        began = time.perf_counter()
        with PrivateMemory() as memory:
            _, inputs = opened(arguments.pool)
            run = SuiteRun(settings, [known])
            run.evaluate(inputs)
            found = run.summary()["tasks"]["retrieval-simulated"]["rows"]["student"]["metrics"]["mean_recall"]
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    threads, each = torch.get_num_threads(), searched.seconds / 2 / arguments.queries
    print(
        f"{arguments.queries} queries each way in a pool of {arguments.pool} x {DIM}: {searched.seconds:.1f} s, "
        f"{searched.cpu:.1f} CPU s, {threads} threads; all of them one way, extrapolated: "
        f"{each * arguments.pool / 3600:.2f} h"
    )
    print(
        f"all else of the task, {arguments.replicates} replicates: {seconds - searched.seconds:.1f} s; mean recall "
        f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
    )
    print(f"peak resident memory {peak:.2f} GiB, mapped pages counted; {memory.peak / 2**30:.2f} GiB without them")
    plain = arguments.pool**2 * 4 / 2**30
    print(
        json.dumps({"name": "retrieval_scale", "ours": peak, "baseline": plain, "unit": "GiB", "ratio": plain / peak})
    )


if __name__ == "__main__":
    main()
