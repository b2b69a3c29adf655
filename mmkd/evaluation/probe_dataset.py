"""Linear probing of a dataset that has a manifest: classes, grades or findings, from its own training images.

Features are those before the projection, where an encoder has such. C is found as in `linear_probe`, or set to
``dim * classes / 100`` in the fast mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmkd.evaluation.dataset_classes import DatasetClasses, class_names, label_sets
from mmkd.evaluation.embedding import Embedded
from mmkd.evaluation.linear_probe import LinearProbe
from mmkd.evaluation.manifest import Manifest
from mmkd.evaluation.multilabel import MultiLabel
from mmkd.evaluation.probe_curve import ProbeCurve
from mmkd.evaluation.probe_fits import probe, probed_features
from mmkd.evaluation.task import Outputs, Samples


class DatasetProbe(DatasetClasses, LinearProbe):
    """The manifest's classes that have training images; the others are left out and named."""

    def __init__(self, samples: Samples, manifest: Manifest, classes: list[str]):
        """Fix the images of the three splits.

        Args:
            samples: the pairs.
            manifest: of their dataset.
            classes: those with training images.
        """
        title = f"Can a linear probe tell the class, in {manifest.title or manifest.id}?"
        how = (samples.probe_on, samples.probe_search)
        LinearProbe.__init__(self, "", title, samples, lambda pair: pair.label, classes, *how)
        self.follow(manifest, samples.auroc_on)


class MultiLabelProbe(MultiLabel):
    """A probe of its own for each finding, all with one C."""

    kind = "probe"

    def __init__(self, samples: Samples, manifest: Manifest, labels: list[str]):
        """Fix the images of the three splits.

        Args:
            samples: the pairs.
            manifest: of their dataset.
            labels: those that some training images show and some do not.
        """
        title = f"Can linear probes tell the findings, in {manifest.title or manifest.id}?"
        super().__init__(manifest, title, samples.held_out, labels)
        self.train, self.validation = samples.train, samples.validation
        columns = [list(manifest.classes).index(label) for label in labels]
        self.train_targets = label_sets(manifest, self.train)[:, columns]
        self.validation_targets = label_sets(manifest, self.validation)[:, columns]
        self.probe_on, self.search = samples.probe_on, samples.probe_search if self.validation else "fast"
        self.description |= {
            "train": len(self.train),
            "validation": len(self.validation),
            "left_out": [label for label in manifest.classes if label not in labels],
            "probe_on": self.probe_on,
            "search": self.search,
        }

    def outputs(self, embedded: Embedded) -> Outputs:
        """See `probe`."""
        parts = probed_features(embedded, self.probe_on, [self.train, self.validation, self.pairs])
        return probe(parts, self.train_targets, self.validation_targets, self.search)

    def ensemble(self, members: Sequence[Embedded], outputs: Sequence[Outputs]) -> Outputs:
        """Mean of the members' logits."""
        return {"image.scores": np.mean([own["image.scores"] for own in outputs], axis=0)}


def tasks(samples: Samples, manifest: Manifest) -> tuple[list[Any], dict[str, str]]:
    """The probe of a dataset whose manifest asks for classes, grades or findings, and its learning curve.

    Returns:
        ``probe-ID`` and, for classes and grades, ``probe-ID-shots``; and why they are not there.

    Raises:
        ValueError: a label or the headline is unknown to the manifest.
    """
    name = f"probe-{manifest.id}"
    if manifest.task not in ("classification", "ordinal", "multilabel"):
        return [], {}
    if not samples.train or not samples.held_out:
        what = "to learn from" if samples.held_out else "held out"
        return [], {name: f"no readable image {what}"}
    if manifest.task == "multilabel":
        return _multilabel(samples, manifest, name)
    for pairs in (samples.train, samples.validation, samples.held_out):
        class_names(manifest, pairs)
    seen = {pair.label for pair in samples.train}
    classes = [known for known in manifest.classes if known in seen]
    if len(classes) < 2:
        return [], {name: f"{len(classes)} class among the training images; 2 are needed"}
    if not any(pair.label in classes for pair in samples.held_out):
        return [], {name: "no held-out image is of a class with training images"}
    found: list[Any] = [DatasetProbe(samples, manifest, classes)]
    if samples.probe_curve:
        found.append(ProbeCurve(samples, manifest, classes))
    return found, {}


def _multilabel(samples: Samples, manifest: Manifest, name: str) -> tuple[list[Any], dict[str, str]]:
    shown, _, _ = (label_sets(manifest, pairs) for pairs in (samples.train, samples.validation, samples.held_out))
    counts = shown.sum(axis=0).tolist()
    labels = [label for label, count in zip(manifest.classes, counts, strict=True) if 0 < count < len(shown)]
    if not labels:
        return [], {name: "no finding that some training images show and others do not"}
    return [MultiLabelProbe(samples, manifest, labels)], {}
