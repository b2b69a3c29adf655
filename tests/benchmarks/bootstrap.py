"""Seconds of a bootstrap of five metrics: replicates as weights, all at once, against a loop over scikit-learn.

``python tests/benchmarks/bootstrap.py [--samples 7180] [--classes 9] [--replicates 1000] [--loop 20] [--rounds 3]``

The baseline draws indices and calls scikit-learn's accuracy, balanced accuracy, macro-F1, macro one-versus-rest AUROC
and quadratic kappa on the resampled arrays, replicate by replicate. It runs ``--loop`` replicates a round and its time
is scaled to ``--replicates``; ours runs all of them. Sides alternate, one thread; the figure is the ratio of medians of
CPU time. Before the timing both sides are checked to agree to 1e-9 on the same draws.
"""

import argparse
import json
import os
import statistics
import time

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import numpy as np
from scipy.special import softmax
from sklearn.metrics import accuracy_score, balanced_accuracy_score, cohen_kappa_score, f1_score, roc_auc_score

from mmkd.evaluation.statistics import metrics
from mmkd.evaluation.statistics.bootstrap import ResamplingUnits, replicate, replicate_weights, resampling_units

AGREEMENT = 1e-9


def made_up(samples: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Targets ``(n,)`` of unequal classes and probabilities ``(n, classes)`` that know something of them."""
    generator = np.random.default_rng(42)
    targets = generator.choice(classes, samples, p=np.arange(1, classes + 1) / (classes * (classes + 1) / 2))
    return targets, softmax(generator.normal(size=(samples, classes)) + 2 * np.eye(classes)[targets], axis=1)


def ours(targets: np.ndarray, scores: np.ndarray, sampling: ResamplingUnits, replicates: int) -> dict[str, np.ndarray]:
    answers = scores.argmax(axis=1)

    def five(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        image = weights["image"]
        return {
            "accuracy": metrics.accuracy(targets, answers, image),
            "balanced_accuracy": metrics.balanced_accuracy(targets, answers, image),
            "macro_f1": metrics.macro_f1(targets, answers, image),
            "macro_auroc": metrics.macro_auroc(targets, scores, image),
            "quadratic_kappa": metrics.quadratic_kappa(targets, answers, image),
        }

    return replicate(five, {"image": sampling}, replicates, 42)[1]


def scikit_learn(targets: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """The five metrics of one resample, ``rows`` ``(n,)``."""
    true, drawn = targets[rows], scores[rows]
    answers = drawn.argmax(axis=1)
    labels = np.arange(scores.shape[1])
    return {
        "accuracy": accuracy_score(true, answers),
        "balanced_accuracy": balanced_accuracy_score(true, answers),
        "macro_f1": f1_score(true, answers, average="macro"),
        "macro_auroc": roc_auc_score(true, drawn, multi_class="ovr", labels=labels),
        "quadratic_kappa": cohen_kappa_score(true, answers, weights="quadratic", labels=labels),
    }


def disagreement(targets: np.ndarray, scores: np.ndarray, sampling: ResamplingUnits, replicates: int) -> float:
    """Largest difference of both sides over the same draws."""
    found = ours(targets, scores, sampling, replicates)
    drawn = np.concatenate(list(replicate_weights(sampling, replicates, 42)))
    worst = 0.0
    for row, weights in enumerate(drawn):
        expected = scikit_learn(targets, scores, np.repeat(np.arange(len(targets)), weights.astype(int)))
        worst = max(worst, *(abs(found[name][row] - value) for name, value in expected.items()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=7180)
    parser.add_argument("--classes", type=int, default=9)
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--loop", type=int, default=20, help="replicates of the baseline in a round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    targets, scores = made_up(arguments.samples, arguments.classes)
    sampling = resampling_units(list(map(str, targets)), [""] * len(targets))
    worst = disagreement(targets, scores, sampling, min(10, arguments.replicates))
    print(f"largest difference over the same draws {worst:.1e}")
    assert worst < AGREEMENT, "the sides differ"
    generator = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {"scikit-learn": [], "ours": []}
    for _ in range(arguments.rounds):
        began = time.process_time()
        for _ in range(arguments.loop):
            scikit_learn(targets, scores, generator.integers(0, len(targets), len(targets)))
        seconds["scikit-learn"].append((time.process_time() - began) * arguments.replicates / arguments.loop)
        began = time.process_time()
        ours(targets, scores, sampling, arguments.replicates)
        seconds["ours"].append(time.process_time() - began)
        print(
            f"scikit-learn {seconds['scikit-learn'][-1]:.1f} s (scaled), ours {seconds['ours'][-1]:.2f} s", flush=True
        )
    medians = {name: statistics.median(spent) for name, spent in seconds.items()}
    result = {"name": "bootstrap", "ours": medians["ours"], "baseline": medians["scikit-learn"], "unit": "s"}
    print(json.dumps({**result, "ratio": medians["scikit-learn"] / medians["ours"]}))


if __name__ == "__main__":
    main()
