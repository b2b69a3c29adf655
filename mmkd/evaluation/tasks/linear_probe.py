"""Linear probing: how much of the class a straight cut through the frozen image vectors can tell.

Features are standardised on the training images; scikit-learn's L-BFGS logistic regression; C by the log-loss on the
validation images; then one more fit on training and validation together. Without validation images of every class C is
``dim * classes / 100``. Of a folder of pairs the vectors are the joint ones, of which student and teachers all have
some, and classes with fewer than five training images are left out and named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.embeddings.embed import Embedded
from mmkd.evaluation.tasks.classes import DatasetClasses, MultiLabel, class_names, label_sets
from mmkd.evaluation.tasks.learning_curve import ProbeCurve
from mmkd.evaluation.tasks.logistic_regression import log_mean, probe, probed_features
from mmkd.evaluation.tasks.task import Classification, Outputs, Samples
from mmkd.evaluation.tasks.zeroshot import known_modality, slug

FEWEST = 5


class LinearProbe(Classification):
    """Classes learnt from the training images' vectors."""

    kind = "probe"

    def __init__(
        self,
        name: str,
        title: str,
        samples: Samples,
        class_of: Callable[[Pair], str],
        classes: list[str],
        probe_on: str = "joint",
        search: str = "sweep",
    ):
        """Fix the images of the three splits.

        Args:
            name: of the task.
            title: for people.
            samples: the pairs.
            class_of: the class of a pair.
            classes: those with enough training images.
            probe_on: which vectors are learnt from, ``joint`` or ``pooled``.
            search: how C is found, see `probe`; ``fast`` where a class has no validation image.
        """
        held_out, self.train, self.validation = (
            [pair for pair in pairs if class_of(pair) in classes]
            for pairs in (samples.held_out, samples.train, samples.validation)
        )
        super().__init__(name, title, held_out, [class_of(pair) for pair in held_out], classes)
        self.train_targets = np.array([classes.index(class_of(pair)) for pair in self.train])
        self.validation_targets = np.array([classes.index(class_of(pair)) for pair in self.validation], dtype=np.int64)
        self.probe_on = probe_on
        self.search = search if len(set(self.validation_targets.tolist())) == len(classes) else "fast"
        known = {class_of(pair) for pair in samples.held_out} - {""}
        self.description |= {
            "train": len(self.train),
            "validation": len(self.validation),
            "left_out": sorted(known - set(classes)),
            "probe_on": self.probe_on,
            "search": self.search,
        }

    def outputs(self, embedded: Embedded) -> Outputs:
        """See `probe`."""
        parts = probed_features(embedded, self.probe_on, [self.train, self.validation, self.pairs])
        return probe(parts, self.train_targets, self.validation_targets, self.search)

    def ensemble(self, members: Sequence[Embedded], outputs: Sequence[Outputs]) -> Outputs:
        """Logarithm of the mean of the members' probabilities."""
        return {"image.scores": log_mean([own["image.scores"] for own in outputs])}


def tasks(samples: Samples) -> tuple[list[Any], dict[str, str]]:
    """Probes for the modality and for the label, or for the label in each collection, where images allow.

    Where tasks follow a manifest they are those of its dataset.

    Returns:
        The tasks, and why the others are not there.
    """
    if samples.manifest is not None:
        return dataset_tasks(samples, samples.manifest)
    found: list[LinearProbe] = []
    skipped: dict[str, str] = {}
    if samples.within == "source":
        return _by_source(samples), skipped
    fields: tuple[tuple[str, Callable[[Pair], str]], ...] = (
        ("modality", known_modality),
        ("label", lambda pair: pair.label),
    )
    for field, class_of in fields:
        counts = Counter(class_of(pair) for pair in samples.train)
        classes = sorted(name for name, count in counts.items() if name and count >= FEWEST)
        tested = {class_of(pair) for pair in samples.held_out} & set(classes)
        if len(tested) < 2:
            skipped[f"probe-{field}"] = (
                f"{len(tested)} {field} with at least {FEWEST} training images among the held-out ones; 2 are needed"
            )
        elif field == "label" and all(pair.label in ("", pair.modality) for pair in samples.held_out):
            skipped["probe-label"] = "labels are the modalities"
        else:
            title = f"Can a linear probe tell the {field}?"
            found.append(LinearProbe(f"probe-{field}", title, samples, class_of, classes))
            found[-1].asks_modality = field == "modality"
    return found, skipped


def _by_source(samples: Samples) -> list[LinearProbe]:
    """A probe for the labels of each collection that has several with enough training images."""
    found = []
    for source in sorted({pair.source for pair in samples.held_out}):
        splits = (samples.held_out, samples.train, samples.validation)
        held_out, train, validation = ([pair for pair in own if pair.source == source] for own in splits)
        own = replace(samples, held_out=held_out, train=train, validation=validation)
        counts = Counter(pair.label for pair in train)
        classes = sorted(label for label, count in counts.items() if label and count >= FEWEST)
        if len({pair.label for pair in held_out} & set(classes)) >= 2:
            title = f"Can a linear probe tell the label, within {source}?"
            found.append(LinearProbe(f"probe-{slug(source)}", title, own, lambda pair: pair.label, classes))
    return found


# Section: Linear probing of a dataset that has a manifest: classes, grades or findings, from its own training images.
#
# Features are those before the projection, where an encoder has such. C is found as in `linear_probe`, or set to
# ``dim * classes / 100`` in the fast mode.


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


def dataset_tasks(samples: Samples, manifest: Manifest) -> tuple[list[Any], dict[str, str]]:
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
