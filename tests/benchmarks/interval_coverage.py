"""How often the interval of mean recall holds the recall that is true of all images and captions there could be.

``python tests/benchmarks/interval_coverage.py [--pairs 500] [--rounds 200] [--replicates 400]``

How hard a pair is has a part that both directions share, so that their errors go together. Ranks follow from it alone;
no vectors are made. Seed 0.
"""

import argparse
from functools import partial
from statistics import NormalDist

import numpy as np
from simulated_suite import Simulated

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.dataset import Samples
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.statistics.bootstrap import interval, replicate
from mmkd.evaluation.tasks.retrieval import Retrieval

SHARED, OWN = 1.0, 0.5  # spread of what both directions share, and of what each has for itself
BARS = (0.5, 0.0, -0.5)  # a pair above them has its answer first, among five, among ten
RANKS = np.array([50.0, 10.0, 5.0, 1.0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--replicates", type=int, default=400)
    given = parser.parse_args()
    names = [f"p{k}" for k in range(given.pairs)]
    pairs = [Pair(name, name, f"{k * 7919 % given.pairs:09d}", "CT", split="test") for k, name in enumerate(names)]
    manifest = Manifest("pairs", "retrieval", "CT", {}, "CC0-1.0")
    task = Retrieval(Samples(manifest, pairs, [], [], dict(zip(names, names, strict=True)), Simulated(manifest, 0, 0)))
    captions = [names.index(pair.id) for pair in task.sample_pairs["caption"]]
    spread = float(np.hypot(SHARED, OWN))
    truth = float(np.mean([1 - NormalDist(0, spread).cdf(bar) for bar in BARS]))
    generator, widths, held = np.random.default_rng(0), [], 0
    for seed in range(given.rounds):
        shared = SHARED * generator.normal(size=given.pairs)
        image, caption = (shared + OWN * generator.normal(size=given.pairs) for _ in range(2))
        ranks = [RANKS[sum(ease > bar for bar in BARS)] for ease in (image, caption)]
        outputs = {"image.rank": ranks[0], "caption.rank": ranks[1][captions]}
        _, drawn = replicate(partial(task.metrics, outputs), task.units, given.replicates, seed)
        low, high = interval(drawn["mean_recall"])
        widths.append(high - low)
        held += low <= truth <= high
    print(f"{held} of {given.rounds} intervals hold {truth:.3f}; their mean width is {np.mean(widths):.4f}")


if __name__ == "__main__":
    main()
