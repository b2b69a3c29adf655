"""Teacher agreement on a pair: a teacher's own image-text similarity against its similarities of mismatched pairs.

The paper's rule is unpublished, except that kept pairs match their own caption best among their batch, and that a
sample stays when at least five of nine teachers agree. Comparing within one teacher only, by rank, makes teachers
comparable whose similarities lie on different scales (0.08 for one, 0.5 for another). Mismatches come from one pool of
random pairs per split, drawn once, so that any number of pairs can be screened in a stream. An image and the same
caption of another pair are not a mismatch and are left out of the comparison. The report's counts add up, and it shows
each teacher's similarities.
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
from mmkd.data.folder import PairFolder, in_chunks
from mmkd.data.table import SPLITS, Pair
from mmkd.pages.charts import histograms
from mmkd.pages.page import Grid, Page, Section, Table

Rule = Literal["percentile", "rank", "all"]


@dataclass(frozen=True)
class Pool:
    """One teacher's features of random pairs.

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
        """The percentile of the mismatched similarities; minus infinity where there are none."""
        mismatched = self.mismatched()
        rank = math.ceil(percentile / 100 * len(mismatched))
        return -math.inf if rank == 0 else float(mismatched.kthvalue(rank).values)


def above(image: Tensor, text: Tensor, threshold: float) -> Tensor:
    """Whether the similarity of each of n pairs is above a threshold.

    With the ``p``-th percentile of mismatches, a random teacher passes ``100 - p`` percent of pairs.

    Args:
        image: (n, dim) image features, unit length.
        text: (n, dim) text features of the same pairs, unit length.
        threshold: see `Pool.threshold`.

    Returns:
        (n,) bool.
    """
    return (image * text).sum(dim=1) > threshold


def within_top(image: Tensor, text: Tensor, captions: Sequence[str], pool: Pool, top: int) -> Tensor:
    """Whether each image's own caption ranks among its best ``top`` against the pool's other captions.

    Args:
        image: (n, dim) image features, unit length.
        text: (n, dim) text features of the same pairs, unit length.
        captions: n captions.
        pool: the other captions.
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
    """Which captions differ, (n, m) bool."""
    codes = np.unique(np.array([*ones, *others], dtype=object), return_inverse=True)[1]
    return torch.from_numpy(codes[: len(ones), None] != codes[None, len(ones) :])


KEPT, TOO_FEW, UNSEEN, OTHER_MODALITY = (
    "kept",
    "too few teachers agree",
    "no teacher has its features",
    "other modality",
)

BINS = np.linspace(-1, 1, 201)

BIN = 0.01


class ScreeningReport:
    """Counts of pairs in a stream; its size does not grow with them."""

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


def screening_page(summary: dict[str, Any]) -> Page:
    """The report as a page: what was kept, and each teacher's similarities of own and of mismatched captions."""
    train, teachers = summary["train"], list(summary["available"])
    charts = [
        histograms(
            f"{name}: {summary['available'][name]} of {train['pairs']} training pairs",
            {side: {float(edge): count for edge, count in about[side].items()} for side in ("mismatched", "own")},
            BIN,
            about["threshold"],
        )
        for name, about in summary["similarities"].items()
    ]
    agreeing = [[count, pairs] for count, pairs in summary["agreeing_teachers"].items()]
    modalities = [
        [name, own["pairs"], own["kept"], *(own["available"][teacher] for teacher in teachers)]
        for name, own in summary["modalities"].items()
    ]
    sections = [
        Section("similarities", "Image-text similarity of each teacher",
                "Own captions and mismatched ones, each as tall as its panel; the dashed line is the threshold.",
                [Grid(charts)]),
        Section("counts", "Counts of training pairs", "", [
            Table.of("Dropped", ["Reason", "pairs"], [[reason, count] for reason, count in train["dropped"].items()]),
            Table.of("Pairs by number of available teachers", ["Teachers", "pairs"], agreeing),
            Table.of("Available teachers by modality", ["Modality", "pairs", "kept", *teachers], modalities),
        ]),
    ]  # fmt: skip
    title = f"Screening kept {train['kept']} of {train['pairs']} training pairs"
    claims = [
        f"A pair stays when at least {summary['minimum_teachers']} teachers agree with it.",
        f"{summary['held_out_kept_unscreened']} held-out pairs stay unscreened.",
    ]
    return Page(title, sections, claims, footer="Made by mmkd screen.")


Pools = dict[str, dict[str, Pool]]  # split -> teacher -> its pool


def draw_pools(folder: PairFolder, features: TeacherFeatures, size: int, seed: int) -> tuple[Pools, set[str]]:
    """For each split and teacher random pairs that the teacher has features of; and the modalities of all pairs.

    Every pair gets a random number, and those with the smallest ones are drawn: one pass, and the same pairs for all.
    """
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[tuple[float, str, str]]] = {split: [] for split in SPLITS}
    modalities: set[str] = set()
    for _, pairs in in_chunks(folder.pairs):
        present, numbers = features.seen([pair.id for pair in pairs]), generator.random(len(pairs))
        for pair, has_features, number in zip(pairs, present.tolist(), numbers.tolist(), strict=True):
            modalities.add(pair.modality.lower())
            if has_features:
                drawn[pair.split].append((number, pair.id, pair.caption))
        drawn = {split: sorted(members)[:size] for split, members in drawn.items()}
    return {split: _pools_of(members, features) for split, members in drawn.items()}, modalities


class Screen:
    """A rule applied to pairs, within their own split."""

    def __init__(self, features: TeacherFeatures, pools: Pools, rule: Rule, percentile: float, top: int) -> None:
        """Screen by `rule`: ``percentile`` reads `percentile`, ``rank`` reads `top`, ``all`` passes every pair."""
        self.features, self.pools, self.rule, self.top = features, pools, rule, top
        self.thresholds = {
            split: {name: pool.threshold(percentile) for name, pool in members.items()}
            for split, members in pools.items()
        }

    def availability(self, pairs: Sequence[Pair], report: ScreeningReport) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Which pairs each teacher is available for, (n,) bool: it has their features and they pass the rule.

        Args:
            pairs: n pairs.
            report: takes the similarities of training pairs.

        Returns:
            That by teacher, and the pairs that any teacher has features of, (n,) bool.
        """
        splits = np.array([pair.split for pair in pairs])
        passed, present = {}, np.zeros(len(pairs), dtype=bool)
        for name, found in self.features.lookup([pair.id for pair in pairs]).items():
            image, text, passes = found["image"], found["text"], found["mask"].clone()
            for split in set(splits.tolist()):
                rows = torch.from_numpy(splits == split) & found["mask"]
                if split == "train":
                    report.add_similarities(name, (image[rows] * text[rows]).sum(dim=1).numpy())
                if self.rule == "percentile":
                    passes[rows] = above(image[rows], text[rows], self.thresholds[split][name])
                elif self.rule == "rank":
                    captions = [pairs[k].caption for k in rows.nonzero().flatten().tolist()]
                    passes[rows] = within_top(image[rows], text[rows], captions, self.pools[split][name], self.top)
            passed[name] = passes.numpy()
            present |= found["mask"].numpy()
        return passed, present

    def about_pools(self) -> dict[str, dict[str, Any]]:
        """Size, mismatches and threshold of each teacher's pool of training pairs, for `ScreeningReport.summary`."""
        thresholds = self.thresholds["train"] if self.rule == "percentile" else {}
        return {
            name: {
                "pool": len(pool.captions),
                "threshold": threshold if np.isfinite(threshold := thresholds.get(name, np.inf)) else None,
                "mismatched": np.histogram(pool.mismatched().clamp(-1, 1).numpy(), BINS)[0],
            }
            for name, pool in self.pools["train"].items()
        }


def _pools_of(members: Sequence[tuple[float, str, str]], features: TeacherFeatures) -> dict[str, Pool]:
    """Each teacher's pool among the drawn pairs of a split."""
    captions = [caption for _, _, caption in members]
    pools = {}
    for name, found in features.lookup([id for _, id, _ in members]).items():
        mask = found["mask"]
        own = [caption for caption, has_features in zip(captions, mask.tolist(), strict=True) if has_features]
        pools[name] = Pool(own, found["image"][mask], found["text"][mask])
    return pools
