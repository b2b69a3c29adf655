"""Which teachers understand which pair: a teacher's own image-text similarity against its similarities of mismatches.

The paper's rule is unpublished; known is that kept pairs match their own caption best among their batch, and that a
sample stays when at least five of nine teachers are kept. Comparing within one teacher only, by rank, makes teachers
comparable whose similarities lie on different scales (0.08 for one, 0.5 for another). Mismatches come from one pool of
random pairs, drawn once, so that any number of pairs can pass by one after the other. An image and another pair's
caption in the very same words are no mismatch and are left out of the comparison.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmkd.data.features.lookup import TeacherFeatures
from mmkd.data.table import Pair
from mmkd.evaluation.report.markup import text

Rule = Literal["percentile", "rank", "all"]


@dataclass(frozen=True)
class Pool:
    """What one teacher makes of random pairs.

    Attributes:
        captions: of the m pairs.
        image: (m, dim) features, unit length.
        text: (m, dim) features, unit length.
    """

    captions: Sequence[str]
    image: Tensor
    text: Tensor

    def mismatched(self) -> Tensor:
        """Similarities of images and captions that do not belong together, flat."""
        similarity = self.image @ self.text.T
        return similarity[_differ(self.captions, self.captions)]

    def threshold(self, percentile: float) -> float:
        """What this percentage of the mismatched similarities does not exceed; minus infinity where there are none."""
        mismatched = self.mismatched()
        rank = math.ceil(percentile / 100 * len(mismatched))
        return -math.inf if rank == 0 else float(mismatched.kthvalue(rank).values)


def above(image: Tensor, text: Tensor, threshold: float) -> Tensor:
    """Whether the similarity of each of n pairs is above a threshold.

    With the ``p``-th percentile of mismatches, a teacher that knows nothing passes ``100 - p`` percent of pairs.

    Args:
        image: (n, dim) image features, unit length.
        text: (n, dim) text features of the same pairs, unit length.
        threshold: see `Pool.threshold`.

    Returns:
        (n,) bool.
    """
    return (image * text).sum(dim=1) > threshold


def within_top(image: Tensor, text: Tensor, captions: Sequence[str], pool: Pool, top: int) -> Tensor:
    """Whether each image's own caption ranks among its best ``top`` when the pool's other captions compete.

    Args:
        image: (n, dim) image features, unit length.
        text: (n, dim) text features of the same pairs, unit length.
        captions: n captions.
        pool: who competes.
        top: 1 for the first place alone; a tie counts against the own caption.

    Returns:
        (n,) bool.
    """
    own = (image * text).sum(dim=1, keepdim=True)
    better = (image @ pool.text.T >= own) & _differ(captions, pool.captions)
    return better.sum(dim=1) < top


def default_minimum(teachers: int) -> int:
    """How many teachers must agree: the paper's five of nine, and the same share of fewer."""
    return min(5, max(1, round(5 / 9 * teachers)))


def _differ(ones: Sequence[str], others: Sequence[str]) -> Tensor:
    """Which captions are not the same words, (n, m) bool."""
    codes = np.unique(np.array([*ones, *others], dtype=object), return_inverse=True)[1]
    return torch.from_numpy(codes[: len(ones), None] != codes[None, len(ones) :])


# Section: What screening found: counts that add up, and each teacher's similarities as a picture.


KEPT, TOO_FEW, UNSEEN, OTHER_MODALITY = (
    "kept",
    "too few teachers agree",
    "no teacher has its features",
    "modality not asked for",
)

BINS = np.linspace(-1, 1, 201)

PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 320, 170, 3


class ScreeningReport:
    """Counts of pairs that pass by one after the other; its size does not grow with them."""

    def __init__(self, teachers: Sequence[str]) -> None:
        """Start at zero."""
        self.teachers = list(teachers)
        self.reasons: Counter[str] = Counter()
        self.agreeing: Counter[int] = Counter()
        self.available: Counter[str] = Counter()
        self.modalities: Counter[str] = Counter()
        self.kept_of: Counter[str] = Counter()
        self.available_of: Counter[tuple[str, str]] = Counter()
        self.held_out = 0
        self.own = {name: np.zeros(len(BINS) - 1, dtype=np.int64) for name in teachers}

    def add(self, pair: Pair, available: Sequence[str], reason: str) -> None:
        """Count a pair: the teachers available for it, and whether it stays or why not."""
        if pair.split != "train":
            self.held_out += 1
            return
        modality = pair.modality or "unnamed"
        self.reasons[reason] += 1
        self.agreeing[len(available)] += 1
        self.available.update(available)
        self.modalities[modality] += 1
        self.kept_of[modality] += reason == KEPT
        self.available_of.update((modality, name) for name in available)

    def add_similarities(self, teacher: str, similarities: np.ndarray) -> None:
        """Count similarities (n,) of a teacher's own image-caption pairs."""
        self.own[teacher] += np.histogram(np.clip(similarities, -1, 1), BINS)[0]

    def summary(self, minimum: int, pools: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Everything as JSON; training pairs = kept + dropped = sum of ``agreeing``, by modality and by teacher, too.

        Args:
            minimum: teachers that had to agree.
            pools: teacher -> ``pool`` (its size), ``threshold`` and ``mismatched`` (counts by bin) of its pool.
        """
        total = sum(self.reasons.values())
        dropped = {reason: self.reasons[reason] for reason in (TOO_FEW, UNSEEN, OTHER_MODALITY)}
        modalities = {
            modality: {
                "pairs": count,
                "kept": self.kept_of[modality],
                "available": {name: self.available_of[modality, name] for name in self.teachers},
            }
            for modality, count in sorted(self.modalities.items())
        }
        similarities = {
            name: {**pools[name], "own": histogram(self.own[name]), "mismatched": histogram(pools[name]["mismatched"])}
            for name in self.teachers
        }
        return {
            "minimum_teachers": minimum,
            "train": {"pairs": total, "kept": self.reasons[KEPT], "dropped": dropped},
            "held_out_kept_unscreened": self.held_out,
            "agreeing_teachers": {str(count): self.agreeing[count] for count in range(len(self.teachers) + 1)},
            "available": {name: self.available[name] for name in self.teachers},
            "modalities": modalities,
            "similarities": similarities,
        }


def histogram(counts: np.ndarray) -> dict[str, int]:
    """The bins that are not empty, by their lower edge."""
    return {f"{BINS[k]:.2f}": int(counts[k]) for k in np.flatnonzero(counts)}


def draw(summary: dict[str, Any]) -> str:
    """An SVG with one panel for each teacher: similarities of mismatches (grey), own ones (blue), the threshold."""
    names = list(summary["similarities"])
    rows = -(-len(names) // COLUMNS)
    width, height = COLUMNS * PANEL_WIDTH, rows * PANEL_HEIGHT + 30
    panels = "".join(
        f'<g transform="translate({k % COLUMNS * PANEL_WIDTH} {30 + k // COLUMNS * PANEL_HEIGHT})">'
        f"{_panel(name, summary)}</g>\n"
        for k, name in enumerate(names)
    )
    title = "Image-text similarity: own captions (blue) and mismatched ones (grey); dashed: threshold"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="10" y="18" font-size="13">{text(title)}</text>\n{panels}</svg>\n'
    )


def _panel(name: str, summary: dict[str, Any]) -> str:
    about = summary["similarities"][name]
    edges = sorted(float(edge) for side in ("own", "mismatched") for edge in about[side])
    low, high = (edges[0], edges[-1] + 0.01) if edges else (-1.0, 1.0)

    def x(value: float) -> float:
        return 10 + (PANEL_WIDTH - 20) * (min(high, max(low, value)) - low) / (high - low)

    shapes = "".join(
        _steps(about[side], x, color) for side, color in (("mismatched", "#9aa0a6"), ("own", "#1a73e8")) if about[side]
    )
    threshold = about["threshold"]
    if threshold is not None:
        line = f'x1="{x(threshold):.1f}" x2="{x(threshold):.1f}" y1="24" y2="{PANEL_HEIGHT - 25}"'
        shapes += f'<line {line} stroke="#202124" stroke-dasharray="3 3"/>'
    pairs = summary["train"]["pairs"]
    label = f"{name}: {summary['available'][name]} of {pairs} training pairs"
    ends = (
        f'<text x="10" y="{PANEL_HEIGHT - 10}">{low:.2f}</text>'
        f'<text x="{PANEL_WIDTH - 10}" y="{PANEL_HEIGHT - 10}" text-anchor="end">{high:.2f}</text>'
    )
    return f'<text x="10" y="16" font-weight="bold">{text(label)}</text>{shapes}{ends}'


def _steps(counts: dict[str, int], x: Any, color: str) -> str:
    """Bars of one histogram, its highest filling the panel."""
    top, floor = max(counts.values()), PANEL_HEIGHT - 25
    bars = []
    for edge, count in counts.items():
        left, right = x(float(edge)), x(float(edge) + 0.01)
        tall = (floor - 28) * count / top
        bars.append(f"M{left:.1f} {floor:.1f}V{floor - tall:.1f}H{right:.1f}V{floor:.1f}Z")
    return f'<path d="{"".join(bars)}" fill="{color}" fill-opacity="0.55"/>'


Pools = dict[str, dict[str, Pool]]  # split -> teacher -> its pool


def pools_of(members: Sequence[tuple[float, str, str]], features: TeacherFeatures) -> dict[str, Pool]:
    """Each teacher's pool among the drawn pairs of a split."""
    captions = [caption for _, _, caption in members]
    pools = {}
    for name, found in features.lookup([id for _, id, _ in members]).items():
        mask = found["mask"]
        known = [caption for caption, seen in zip(captions, mask.tolist(), strict=True) if seen]
        pools[name] = Pool(known, found["image"][mask], found["text"][mask])
    return pools
