"""Cancer diagnosis on whole slides: the slide is a bag of tiles, the answer a class of the slide.

- ``diagnosis-ID``: zero-shot. Every tile gets its similarity to every class' sentences; a class' score on the slide is
  the mean over the ``j`` tiles that are most like it (top-j pooling, MI-Zero). The answer is that of j = 50, fixed
  beforehand; 1, 5, 10 and 100 are reported, too.
- ``diagnosis-ID-ratio``: zero-shot. The share of tiles whose nearest class it is: for two classes, the tumour ratio.
- ``diagnosis-ID-mil``: gated attention over the tiles, trained on the training slides; probabilities averaged over 5
  seeds.
- ``diagnosis-ID-mean``: logistic regression on the mean tile, C as in linear probing.

Slides of one case are resampled together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.dataset import Samples
from mmkd.evaluation.embeddings.embed import Embedded, Vectors
from mmkd.evaluation.slides.attention import train_attention
from mmkd.evaluation.slides.bags import BagFolder, BagTask, EncoderBags, bags_of, listed, slide_of
from mmkd.evaluation.statistics import metrics
from mmkd.evaluation.statistics.bootstrap import Metrics
from mmkd.evaluation.statistics.metrics import Floats
from mmkd.evaluation.tasks.classification import Classification
from mmkd.evaluation.tasks.logistic_regression import log_mean, probe
from mmkd.evaluation.tasks.task import Outputs, TaskOptions
from mmkd.evaluation.tasks.zeroshot import class_vector, standardise

TOP, ANSWER = (1, 5, 10, 50, 100), 50
SEEDS = 5


class SlideTask(Classification, BagTask):
    """Name the class of each held-out slide; the unit ``image`` is a slide."""

    kind = "diagnosis"

    def __init__(self, samples: Samples, bags: BagFolder, variant: str, title: str) -> None:
        """Fix the slides of the three splits.

        Args:
            samples: the slides of one dataset.
            bags: their features.
            variant: which of the ways to answer.
            title: for people.
        """
        classes, chance = list(samples.manifest.classes), {"kappa": 0.0, "quadratic_kappa": 0.0}
        super().__init__(samples.manifest, title, samples.held_out, classes, variant, chance=chance)
        self.train, self.validation, self.bags = samples.train, samples.validation, bags
        self.slides = [slide_of(pair) for pair in [*self.train, *self.validation, *self.pairs]]
        self.description |= {"slides": {"train": len(self.train), "validation": len(self.validation)}}

    def metrics(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """Those of `Classification`, and Cohen's kappa without and with quadratic weights."""
        answers = outputs["image.scores"].argmax(axis=1)
        return {
            **super().metrics(outputs, weights),
            "kappa": metrics.kappa(self.targets, answers, weights["image"]),
            "quadratic_kappa": metrics.quadratic_kappa(self.targets, answers, weights["image"]),
        }


class TopTiles(SlideTask):
    """Zero-shot: mean score of the tiles most similar to a class, or share of the tiles nearest to it."""

    def __init__(self, samples: Samples, bags: BagFolder, variant: str = "") -> None:
        """Fix slides and sentences; variant ``ratio`` counts tiles."""
        way = "share of tiles" if variant else "top tiles"
        held_out = replace(samples, train=[], validation=[])
        super().__init__(held_out, bags, variant, f"Zero-shot slide classification, {way}")
        self.prompts = samples.manifest.prompts()
        self.description |= {"prompts": self.prompts, "slides": {}, "top": list(TOP), "answered_by": ANSWER}

    def outputs(self, embedded: Embedded) -> Outputs:
        """``image.scores`` ``(n, classes)``, and ``image.top_J`` for every j or nothing else for the ratio."""
        bags = self.bags.open(embedded.name)
        classes = np.stack([class_vector(embedded.text_matrix(texts)) for texts in self.prompts.values()])
        bags.require(self.slides)
        cosines = (bags.joint(slide, classes.shape[1]) @ classes.T for slide in self.slides)
        if self.variant:
            return {"image.scores": np.stack([shares(own) for own in cosines])}
        pooled = np.stack([top_means(own, TOP) for own in cosines])
        by_top = {f"image.top_{j}": standardise(pooled[:, k]) for k, j in enumerate(TOP)}
        return {"image.scores": by_top[f"image.top_{ANSWER}"], **by_top}

    def metrics(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """Those of the answer, and balanced accuracy and AUROC for every j."""
        found = super().metrics(outputs, weights)
        for j in TOP if not self.variant else ():
            scores = outputs[f"image.top_{j}"].astype(np.float64)
            answers = scores.argmax(axis=1)
            found[f"balanced_accuracy_top_{j}"] = metrics.balanced_accuracy(self.targets, answers, weights["image"])
            found[f"macro_auroc_top_{j}"] = metrics.macro_auroc(self.targets, metrics.margins(scores), weights["image"])
        return found


class TrainedTask(SlideTask):
    """Learn from the training slides."""

    def ensemble(self, members: Sequence[Embedded], outputs: Sequence[Outputs]) -> Outputs:
        """Logarithm of the mean of the members' probabilities."""
        return {"image.scores": log_mean([own["image.scores"] for own in outputs])}


class AttentionDiagnosis(TrainedTask):
    """Gated attention over tiles, for a fixed number of epochs on training and validation slides together."""

    def __init__(self, samples: Samples, bags: BagFolder) -> None:
        """Fix the slides."""
        super().__init__(samples, bags, "mil", "Slide classification, gated attention")
        self.description["seeds"] = SEEDS

    def outputs(self, embedded: Embedded) -> Outputs:
        """``image.scores``: logarithms of probabilities averaged over seeds, ``(n, classes)``."""
        bags = self.opened(embedded)
        learned = [*self.train, *self.validation]
        count, targets = len(learned), torch.from_numpy(self.targets_of(learned))
        scores = []
        for seed in range(SEEDS):
            answer = train_attention(
                lambda number: bags.features(self.slides[number]),
                range(count),
                targets,
                len(self.classes),
                functional.cross_entropy,
                seed,
            )
            logits = answer(range(count, len(self.slides))).astype(np.float64)
            scores.append(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
        return {"image.scores": log_mean(scores)}


class MeanTile(TrainedTask):
    """Logistic regression on the mean of a slide's tiles."""

    def __init__(self, samples: Samples, bags: BagFolder) -> None:
        """Fix the slides."""
        super().__init__(samples, bags, "mean", "Slide classification, mean tile")
        complete = {pair.label for pair in self.validation} == set(self.classes)
        self.search = "sweep" if complete else "fast"
        self.description["search"] = self.search

    def outputs(self, embedded: Embedded) -> Outputs:
        """See `probe`."""
        bags = self.opened(embedded)
        width = bags.width([slide_of(pair) for pair in self.train])
        parts = [mean_tiles(bags, pairs, width) for pairs in (self.train, self.validation, self.pairs)]
        return probe(parts, self.targets_of(self.train), self.targets_of(self.validation), self.search)


def tasks(samples: Samples, options: TaskOptions) -> tuple[list[SlideTask], dict[str, str]]:
    """The methods that the dataset allows, and why others are left out."""
    manifest, bags = samples.manifest, bags_of(samples.dataset)
    name = f"diagnosis-{manifest.id}"
    if bags is None:
        return [], {name: "its source holds no bags of slides"}
    tested = Counter(pair.label for pair in samples.held_out)
    if len(tested) < 2:
        return [], {name: f"held-out slides are of {len(tested)} class ({listed(sorted(tested))}); 2 are needed"}
    found: list[SlideTask] = [TopTiles(samples, bags), TopTiles(samples, bags, "ratio")]
    missing = sorted(set(manifest.classes) - {pair.label for pair in samples.train})
    if missing:
        reason = f"no training slide of {listed(missing)}"
        return found, dict.fromkeys((f"{name}-mil", f"{name}-mean"), reason)
    return [*found, AttentionDiagnosis(samples, bags), MeanTile(samples, bags)], {}


def mean_tiles(bags: EncoderBags, pairs: Sequence[Pair], width: int) -> Vectors:
    """Mean tile of each slide, ``(n, width)``."""
    means = [bags.features(slide_of(pair)).mean(axis=0) for pair in pairs]
    return np.array(means, dtype=np.float32).reshape(len(pairs), width)


def top_means(scores: Vectors, counts: Sequence[int]) -> Vectors:
    """Mean of the ``j`` highest of each column of ``(tiles, classes)``: ``(counts, classes)``; of all if fewer."""
    most = min(max(counts), len(scores))
    highest = -np.sort(-np.partition(scores, len(scores) - most, axis=0)[len(scores) - most :], axis=0)
    running = np.cumsum(highest, axis=0, dtype=np.float64)
    return np.stack([running[min(j, most) - 1] / min(j, most) for j in counts]).astype(np.float32)


def shares(scores: Vectors) -> Vectors:
    """Share of the tiles whose highest score each class has: ``(tiles, classes)`` to ``(classes,)``."""
    return (np.bincount(scores.argmax(axis=1), minlength=scores.shape[1]) / len(scores)).astype(np.float32)
