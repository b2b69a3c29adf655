"""Memory and time of affinity distillation: chunks of rows with closed-form gradients against the plain form.

    python tests/benchmarks/loss_memory.py [--rows 16384] [--rounds 3]

Both sides compute the same loss (six teachers, both directions, each teacher blind to 27 % of the samples as in the
published features: 6.6 of 9 know a pair) and its gradients with respect to features and scale, in one process. The
plain side is written as one would write it for speed: every similarity matrix is made once and serves both directions,
sums are in place where automatic differentiation allows it. Each measurement is a process of its own, sides alternate;
memory is the peak above what the process held with its inputs. The plain side needs about 10 N^2 x 4 bytes: 11 GB at
N = 16384.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.distillation.losses import TeacherSimilarity, affinity
from mmkd.training.chunked_loss import rows_at_once

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}  # as the `mmkd` command sets it: waiting threads leave the core to others
DIM, TEACHERS, KNOWN, TEACHER_SCALE = 512, 6, 0.73, 70.0


def main() -> None:
    """Measure both sides in turn and print a table and one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--known", type=float, default=KNOWN, help="share of samples that a teacher knows")
    parser.add_argument("--side", choices=SIDES)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measure(given.side, given.rows, given.known)))
        return
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(given.rounds):
        for side in list(SIDES) if number % 2 == 0 else list(SIDES)[::-1]:
            command = [sys.executable, __file__, "--rows", str(given.rows), "--known", str(given.known), "--side", side]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | PASSIVE)
            runs[side].append(json.loads(done.stdout))
            print(f"{side:<6} " + "  ".join(f"{key} {value:.6g}" for key, value in runs[side][-1].items()), flush=True)
    report(runs, given.rows, given.known)


def report(runs: dict[str, list[dict[str, float]]], rows: int, known: float) -> None:
    """Medians of both sides."""
    median = {
        side: {key: statistics.median(run[key] for run in found) for key in found[0]} for side, found in runs.items()
    }
    ours, plain = median["ours"], median["plain"]
    print(
        f"N = {rows}, {TEACHERS} teachers, {DIM} dimensions, {known:.0%} known; medians of {len(runs['ours'])} rounds"
    )
    result = {
        "name": "loss_memory",
        "ours": round(ours["peak_mib"], 1),
        "baseline": round(plain["peak_mib"], 1),
        "unit": "MiB",
        "ratio": round(plain["peak_mib"] / ours["peak_mib"], 2),
        "time_ratio": round(plain["seconds"] / ours["seconds"], 2),
        "cpu_time_ratio": round(plain["cpu_seconds"] / ours["cpu_seconds"], 2),
        "loss_difference": abs(plain["loss"] - ours["loss"]) / plain["loss"],
        "gradient_difference": abs(plain["gradient_norm"] - ours["gradient_norm"]) / plain["gradient_norm"],
    }
    print(json.dumps(result))


def measure(side: str, rows: int, known: float) -> dict[str, float]:
    """Seconds, peak memory above the inputs in MiB, loss and norm of the gradient."""
    image, text, scale, teachers = inputs(rows, known)
    before, wall, cpu = peak_mib(), time.perf_counter(), time.process_time()
    loss = SIDES[side](image, text, scale, teachers)
    loss.backward()
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    norm = torch.cat([leaf.grad.flatten() for leaf in (image, text, scale)]).norm()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mib": peak_mib() - before,
        "loss": loss.item(),
        "gradient_norm": norm.item(),
    }


def inputs(rows: int, known: float) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """A student that has learned something, and teachers that know a bit more."""
    g = torch.Generator().manual_seed(0)

    def features(noise: float, base: Tensor) -> Tensor:
        return F.normalize(base.add_(torch.randn(rows, DIM, generator=g), alpha=noise), dim=1)

    world = torch.randn(rows, DIM, generator=g)
    image, text = (features(1.5, world.clone()).requires_grad_() for _ in range(2))
    teachers = [
        (features(1.0, world.clone()), features(1.0, world.clone()), torch.rand(rows, generator=g) < known)
        for _ in range(TEACHERS)
    ]
    return image, text, torch.tensor([20.0], requires_grad=True), teachers


def ours(image: Tensor, text: Tensor, scale: Tensor, teachers: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The project's loss."""
    to_texts = [TeacherSimilarity(a, b, known.float(), known, TEACHER_SCALE) for a, b, known in teachers]
    to_images = [TeacherSimilarity(b, a, known.float(), known, TEACHER_SCALE) for a, b, known in teachers]
    chunk = rows_at_once(len(image), len(image), image.device)
    return affinity(image, text, image, text, to_texts, to_images, scale, chunk)


def plain(image: Tensor, text: Tensor, scale: Tensor, teachers: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Whole matrices and automatic differentiation."""
    rows = len(image)
    with torch.no_grad():
        to_texts, to_images, votes = torch.zeros(rows, rows), torch.zeros(rows, rows), torch.zeros(rows, 1)
        for a, b, known in teachers:
            similarity = (a @ b.T).mul_(TEACHER_SCALE)
            to_texts += similarity.masked_fill(~known, -torch.inf).softmax(dim=1).mul_(known[:, None])
            to_images += similarity.T.masked_fill(~known, -torch.inf).softmax(dim=1).mul_(known[:, None])
            votes += known[:, None]
        to_texts /= votes.clamp(min=1)
        to_images /= votes.clamp(min=1)
    logits = scale * (image @ text.T)
    return (F.cross_entropy(logits, to_texts) + F.cross_entropy(logits.T, to_images)) / 2


def peak_mib() -> float:
    """Peak resident memory of this process so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


SIDES = {"plain": plain, "ours": ours}

if __name__ == "__main__":
    main()
