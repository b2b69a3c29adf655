"""Zero-shot classification: an image is assigned to the class with the most similar sentences.

A class is the unit mean of its unit prompt vectors. Similarities are divided by their own standard deviation over all
images and classes, which leaves answers as they are, makes the margins of the AUROC free of any temperature and allows
encoders with different scales to be averaged. Several findings of an image are predicted one by one: the similarity
with sentences that state the finding minus that with sentences that negate it, positive above zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmkd.data.prompts import class_vector
from mmkd.data.table import Pair
from mmkd.evaluation.datasets.dataset import Samples
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.embeddings.embed import Embedded, Vectors
from mmkd.evaluation.statistics.metrics import Floats
from mmkd.evaluation.tasks.classification import Classification, MultiLabel
from mmkd.evaluation.tasks.task import Outputs, TaskOptions, task_name

TITLE = "Zero-shot classification"


class ZeroShot(Classification):
    """The manifest's classes, described by its prompts; classes without images may be answered, too."""

    kind = "zeroshot"

    def __init__(self, manifest: Manifest, pairs: Sequence[Pair]) -> None:
        """Fix images and prompts.

        Raises:
            ValueError: the manifest's primary metric is not one of this task.
        """
        self.prompts = manifest.prompts()
        super().__init__(manifest, TITLE, pairs, list(self.prompts))
        self.description["prompts"] = self.prompts

    def outputs(self, embedded: Embedded) -> Outputs:
        """``image.scores``: standardised similarities, ``(n, classes)``."""
        return {"image.scores": standardise(similarities(embedded, embedded.image_matrix(self.pairs), self.prompts))}


class MultiLabelZeroShot(MultiLabel):
    """Every finding, described by one set of prompts with and one without it."""

    kind = "zeroshot"

    def __init__(self, manifest: Manifest, pairs: Sequence[Pair]) -> None:
        """Fix images and prompts; see `MultiLabel`."""
        super().__init__(manifest, TITLE, pairs, list(manifest.classes))
        self.prompts, self.negatives = manifest.prompts(), manifest.negative_prompts()
        self.description |= {"prompts": self.prompts, "negative_prompts": self.negatives}

    def outputs(self, embedded: Embedded) -> Outputs:
        """``image.scores``: similarity with a finding minus that without it, over the standard deviation of all."""
        images = embedded.image_matrix(self.pairs)
        with_it, without = (similarities(embedded, images, prompts) for prompts in (self.prompts, self.negatives))
        margins = (with_it - without).astype(np.float64)
        spread = margins.std()
        return {"image.scores": margins / (spread if spread > 0 else 1.0)}


def tasks(samples: Samples, options: TaskOptions) -> tuple[list[Any], dict[str, str]]:
    """The zero-shot task of a dataset of classes, grades or findings, or why it has none.

    Raises:
        ValueError: the manifest's primary metric is not one of the task.
    """
    manifest = samples.manifest
    if not samples.held_out:
        return [], {task_name("zeroshot", manifest): "no readable image is held out"}
    if manifest.task == "multilabel":
        return [MultiLabelZeroShot(manifest, samples.held_out)], {}
    if len(manifest.classes) < 2:
        return [], {task_name("zeroshot", manifest): f"{len(manifest.classes)} class in the manifest; 2 are needed"}
    return [ZeroShot(manifest, samples.held_out)], {}


def similarities(embedded: Embedded, images: Vectors, prompts: dict[str, list[str]]) -> Vectors:
    """Cosines ``(n, classes)`` of images ``(n, dim)`` with the vector of each class."""
    return images @ np.stack([class_vector(embedded.text_matrix(texts)) for texts in prompts.values()]).T


def standardise(similarities: Vectors) -> Floats:
    """Subtract the mean of the whole ``(n, classes)`` matrix and divide by its standard deviation."""
    wide = similarities.astype(np.float64)
    spread = wide.std()
    return (wide - wide.mean()) / (spread if spread > 0 else 1.0)
