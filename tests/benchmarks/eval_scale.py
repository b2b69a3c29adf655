"""Minutes and gigabytes of an evaluation of all image datasets of the registry by ten encoders, from a warm cache.

``python tests/benchmarks/eval_scale.py [--encoders 10] [--share 1.0] [--tasks zeroshot,retrieval] [--replicates 1000]``

Embeddings are simulated in the sizes of the real datasets (all splits, 512 joint and 768 pooled numbers an image, half
precision, shards of 4096 rows, as the cache has them); `--share` shrinks every dataset. Slides and cohorts have no
image embeddings and are left out. The cache of one dataset is written, judged (every cell: outputs, 1,000 replicates
twice, intervals, Parquet) and removed before the next; only judging and the summary are timed. Images are not opened.

The baseline reads the matrix of the largest dataset as a mapping from image to vector gives it, image by image; ours
maps shards and slices. Both read the same files; the ratio is that of the medians of five alternated rounds.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
from simulated_suite import SIZES, Simulated, write_cache

from mmkd.evaluation.encoders import Known
from mmkd.evaluation.eval_settings import EvalSettings
from mmkd.evaluation.registry import load_suite
from mmkd.evaluation.shards import Shard
from mmkd.evaluation.suite_run import SuiteRun, inputs_of


def reading(known: Known, inputs, collection: Simulated) -> tuple[float, float]:
    """Seconds for the joint matrix of all images: a vector for each key stacked, and ours."""
    times: dict[str, list[float]] = {"each": [], "ours": []}
    for _ in range(5):
        for side in times:
            began = time.perf_counter()
            embedded = known.embedded(inputs, collection.pairs, collection)
            if side == "ours":
                embedded.image_matrix(collection.pairs)
            else:
                files = inputs.content.files(known.cache / inputs.name, known.fingerprint)
                shards = [
                    Shard.read(file).vectors[:].astype(np.float32) for file in files[: len(inputs.content.images)]
                ]
                rows = (row for shard in shards for row in shard)
                vectors = dict(zip((pair.id for pair in collection.pairs), rows, strict=True))
                np.stack([vectors[pair.id] for pair in collection.pairs])
            times[side].append(time.perf_counter() - began)
    return statistics.median(times["each"]), statistics.median(times["ours"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--encoders", type=int, default=10)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--tasks", default="zeroshot,retrieval")
    parser.add_argument("--replicates", type=int, default=1000)
    options = parser.parse_args()
    manifests = [manifest for manifest in load_suite("paper58") if manifest.id in SIZES]
    with tempfile.TemporaryDirectory(prefix="eval-scale-") as temporary:
        output = Path(temporary)
        names = ["student", *(f"teacher{k}" for k in range(1, options.encoders))]
        settings = EvalSettings(
            names,
            suite="paper58",
            output=output,
            tasks=options.tasks.split(","),
            replicates=options.replicates,
            quiet=True,
        )
        known = [Known(name, name, f"simulated {name}", {}, settings.embeddings / name) for name in names]
        run = SuiteRun(settings, known)
        images, written, seconds, cpu, sides = 0, 0, 0.0, 0.0, (0.0, 0.0)
        largest = max(manifests, key=lambda manifest: sum(SIZES[manifest.id])).id
        for manifest in manifests:
            sizes = [int(size * options.share) if size else 0 for size in SIZES[manifest.id]]
            collection = Simulated(manifest, sizes[0], max(sizes[1], 4 * len(manifest.classes)))
            inputs = inputs_of(collection, lambda own=collection: own, "test")
            written += sum(write_cache(own, k, inputs, collection) for k, own in enumerate(known))
            began, busy = time.perf_counter(), time.process_time()
            run.judge(inputs)
            took, cpu = time.perf_counter() - began, cpu + time.process_time() - busy
            seconds, images = seconds + took, images + len(collection.pairs)
            if manifest.id == largest:
                sides = reading(known[0], inputs, collection)
            for own in known:
                shutil.rmtree(own.cache)
            print(f"{manifest.id:<28}{len(collection.pairs):>8} images  {took:6.1f} s", flush=True)
        began, busy = time.perf_counter(), time.process_time()
        summary = run.summary()
        seconds, cpu = seconds + time.perf_counter() - began, cpu + time.process_time() - busy
        cells = sum(len(task["rows"]) for task in summary["tasks"].values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(
        f"{len(manifests)} datasets x {options.encoders} encoders, {images * options.encoders / 1e6:.2f} M image "
        f"embeddings ({written / 1e9:.1f} GB): {len(summary['tasks'])} tasks, {cells} cells in {seconds / 60:.1f} min "
        f"({cpu / 60:.1f} CPU min), peak {peak:.1f} GiB"
    )
    each, ours = sides
    print(json.dumps({"name": "eval_scale", "ours": ours, "baseline": each, "unit": "s", "ratio": each / ours}))


if __name__ == "__main__":
    main()
