"""Minutes and gigabytes of an evaluation of the catalog's datasets by ten encoders, from a warm cache.

``python tests/benchmarks/eval_scale.py [--encoders 10] [--share 1.0] [--kinds zeroshot,retrieval] [--replicates 1000]``

``--kinds`` takes any of zeroshot, retrieval, probe, vqa, diagnosis and survival. Embeddings are simulated in the sizes
of the real datasets (all splits, 512 joint and 768 pooled numbers an image, half precision, shards of 4096 rows, as the
cache has them); slides have bags of ``--tiles`` simulated tiles, far fewer than real ones; ``--share`` shrinks every
dataset. The cache of one dataset is written, judged (every cell: outputs, 1,000 replicates twice, intervals, Parquet)
and removed before the next; only judging and the summary are timed. Images are not opened. Heads over tokens are not
in it, since tokens come from loaded models. Probes choose C by a rule (``--sweep``: by 13 fits), without learning
curves.

The baseline reads the matrix of the largest dataset as a mapping from image to vector gives it, image by image; ours
maps shards and slices. Both read the same files; the ratio is that of the medians of five alternated rounds, or null
where no dataset of images was judged.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
from simulated_slides import KINDS, QUESTIONS, SLIDES, Slides, asked, write_bags
from simulated_suite import SIZES, Simulated, simulated_inputs, write_cache

from mmkd.data.features.shards import TensorMap
from mmkd.evaluation.datasets.dataset import Dataset
from mmkd.evaluation.datasets.manifest import Manifest, load_suite
from mmkd.evaluation.embeddings.embed import DatasetInputs
from mmkd.evaluation.embeddings.encoders import EncoderRecord
from mmkd.evaluation.run import SuiteRun
from mmkd.evaluation.settings import EvalSettings


def reading(known: EncoderRecord, inputs: DatasetInputs, collection: Dataset) -> tuple[float, float]:
    """Seconds for the joint matrix of all images: a vector for each key stacked, and ours."""
    times: dict[str, list[float]] = {"each": [], "ours": []}
    for _ in range(5):
        for side in times:
            began = time.perf_counter()
            embedded = known.embedded(inputs, collection)
            if side == "ours":
                embedded.image_matrix(collection.pairs)
            else:
                files = known.files(inputs)
                shards = [TensorMap(file).arrays["vectors"].astype(np.float32) for file in files[: len(inputs.images)]]
                rows = (row for shard in shards for row in shard)
                vectors = dict(zip((id for part in inputs.images for id in part), rows, strict=True))
                np.stack([vectors[pair.id] for pair in collection.pairs])
            times[side].append(time.perf_counter() - began)
    return statistics.median(times["each"]), statistics.median(times["ours"])


def collection_of(manifest: Manifest, share: float, folder: Path) -> Dataset:
    """A dataset with simulated pairs, smaller by ``share``; slides have their bags in ``folder``."""
    if manifest.id in QUESTIONS:
        return asked(manifest, share)
    if manifest.id in SLIDES:
        return Slides(manifest, share, folder / "bags" / manifest.id)
    learnt, tested = (int(size * share) for size in SIZES[manifest.id])
    return Simulated(manifest, learnt, max(tested, 4 * len(manifest.classes)))


def write(known: Sequence[EncoderRecord], inputs: DatasetInputs, collection: Dataset, tiles: int) -> int:
    """What all encoders have of a dataset; returns the bytes."""
    written = sum(write_cache(own, k, inputs, collection) for k, own in enumerate(known))
    if isinstance(collection, Slides):
        written += sum(write_bags(collection, own.name, k, tiles) for k, own in enumerate(known))
    return written


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", type=int, default=10)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--kinds", default="zeroshot,retrieval")
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--tiles", type=int, default=64)
    parser.add_argument("--sweep", action="store_true")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    kinds = chosen.kinds.split(",")
    wanted = {name for kind in kinds for name in KINDS.get(kind, SIZES)}
    manifests = [
        manifest
        for manifest in load_suite("paper58")
        if manifest.id in wanted and (manifest.task in kinds or manifest.task not in KINDS)
    ]
    with tempfile.TemporaryDirectory(prefix="eval-scale-") as temporary:
        output = Path(temporary)
        names = ["student", *(f"teacher{k}" for k in range(1, chosen.encoders))]
        settings = EvalSettings(
            names,
            suite="paper58",
            output=output,
            kinds=kinds,
            replicates=chosen.replicates,
            probe_search="sweep" if chosen.sweep else "fast",
            probe_curve=False,
            quiet=True,
        )
        known = [EncoderRecord(name, name, f"simulated {name}", {}, settings.embeddings / name) for name in names]
        run = SuiteRun(settings, known)
        images, written, clock, sides = 0, 0, Clock(), (0.0, 0.0)
        largest = max(manifests, key=lambda manifest: sum(SIZES.get(manifest.id, (0,)))).id
        for manifest in manifests:
            collection = collection_of(manifest, chosen.share, output)
            inputs = simulated_inputs(collection)
            written += write(known, inputs, collection, chosen.tiles)
            took = clock.time(lambda own=inputs: run.evaluate(own))
            images += len(collection.image_pairs)
            if manifest.id == largest and manifest.id in SIZES:
                sides = reading(known[0], inputs, collection)
            for folder in [*(own.cache for own in known), output / "bags"]:
                shutil.rmtree(folder, ignore_errors=True)
            print(f"{manifest.id:<28}{len(collection.pairs):>8} images or slides  {took:6.1f} s", flush=True)
        clock.time(lambda: tell(run.summary()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(
        f"{len(manifests)} datasets x {chosen.encoders} encoders, {images * chosen.encoders / 1e6:.2f} M image "
        f"embeddings ({written / 1e9:.1f} GB): {clock.seconds / 60:.1f} min ({clock.cpu / 60:.1f} CPU min), "
        f"peak {peak:.1f} GiB"
    )
    each, ours = sides
    ratio = each / ours if ours else None
    print(json.dumps({"name": "eval_scale", "ours": ours, "baseline": each, "unit": "s", "ratio": ratio}))


def tell(summary: dict[str, Any]) -> None:
    """Count the cells, and those without numbers by their reason."""
    cells = [row for task in summary["tasks"].values() for row in task["rows"].values()]
    reasons = Counter(cell["undefined"] for cell in cells if cell["undefined"])
    print(f"{len(summary['tasks'])} tasks, {len(cells)} cells, without numbers: {dict(reasons)}")


class Clock:
    """Seconds on the wall and of the processor, added up."""

    def __init__(self) -> None:
        self.seconds = self.cpu = 0.0

    def time(self, work: Callable[[], None]) -> float:
        """Do some work; returns its seconds on the wall."""
        began, busy = time.perf_counter(), time.process_time()
        work()
        took = time.perf_counter() - began
        self.seconds, self.cpu = self.seconds + took, self.cpu + time.process_time() - busy
        return took


if __name__ == "__main__":
    main()
