"""Zero-shot classification: an image goes to the class whose sentences lie nearest.

A class is the unit mean of its unit prompt vectors. Similarities are divided by their own standard deviation over all
images and classes, which leaves answers as they are, makes the margins of the AUROC free of any temperature and lets
encoders with different scales be averaged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmkd.data.prompts import label_prompts, modality_prompts
from mmkd.data.table import UNKNOWN, Pair
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.embeddings.cache import Vectors
from mmkd.evaluation.embeddings.embed import Embedded
from mmkd.evaluation.statistics.metrics import Floats
from mmkd.evaluation.tasks.classes import Areas, DatasetClasses, MultiLabel, class_names
from mmkd.evaluation.tasks.task import Classification, Outputs, Samples


class ZeroShot(Classification):
    """Classes described by sentences."""

    kind = "zeroshot"

    def __init__(
        self, name: str, title: str, pairs: Sequence[Pair], names: Sequence[str], prompts: dict[str, list[str]]
    ):
        """Fix images and prompts.

        Args:
            name: of the task.
            title: for people.
            pairs: the images.
            names: true class of each.
            prompts: class -> sentences; its keys are the possible answers.
        """
        super().__init__(name, title, pairs, names, list(prompts))
        self.prompts = prompts
        self.description["prompts"] = prompts

    def outputs(self, embedded: Embedded) -> Outputs:
        """``image.scores``: standardised similarities, ``(n, classes)``."""
        classes = np.stack([class_vector(embedded.text_matrix(texts)) for texts in self.prompts.values()])
        return {"image.scores": standardise(embedded.image_matrix(self.pairs) @ classes.T)}

    def ensemble(self, members: Sequence[Embedded], outputs: Sequence[Outputs]) -> Outputs:
        """Mean of the members' standardised similarities."""
        return {"image.scores": np.mean([own["image.scores"] for own in outputs], axis=0)}


def tasks(samples: Samples) -> tuple[list[Any], dict[str, str]]:
    """Modality recognition, label classification, and that within each known modality; or within each collection.

    Where tasks follow a manifest there is one for its dataset.

    Returns:
        The tasks the held-out pairs allow, and why the others are not there.
    """
    if samples.manifest is not None:
        return dataset_tasks(samples, samples.manifest)
    found: list[ZeroShot] = []
    skipped: dict[str, str] = {}
    pairs = [pair for pair in samples.held_out if known_modality(pair)]
    modalities = sorted({pair.modality for pair in pairs})
    if len(modalities) >= 2:
        prompts = {modality: modality_prompts(modality) for modality in modalities}
        names = [pair.modality for pair in pairs]
        found.append(ZeroShot("zeroshot-modality", "Which modality is it?", pairs, names, prompts))
        found[0].asks_modality = True
    else:
        skipped["zeroshot-modality"] = f"{len(modalities)} modality among the held-out images; 2 are needed"
    labelled = [pair for pair in samples.held_out if pair.label]
    if samples.within == "source":
        return found + _by_source(labelled), skipped
    overall = _label_task("zeroshot-label", "Which label is it?", labelled)
    if overall is None:
        skipped["zeroshot-label"] = f"{len({p.label for p in labelled})} label among the held-out images; 2 are needed"
    elif all(pair.label == pair.modality for pair in labelled):
        skipped["zeroshot-label"] = "labels are the modalities"
    else:
        found.append(overall)
    if len({pair.modality for pair in labelled}) >= 2:
        for modality in modalities:
            inside = [pair for pair in labelled if pair.modality == modality]
            name = f"zeroshot-label-{slug(modality)}"
            name += f"-{len(found)}" if name in [task.name for task in found] else ""  # "MRI" beside "mri"
            task = _label_task(name, f"Which label, within {modality}?", inside)
            found += [task] if task else []
    return found, skipped


def _by_source(labelled: list[Pair]) -> list[ZeroShot]:
    """Label classification within each collection that has several labels."""
    found = []
    for source in sorted({pair.source for pair in labelled}):
        inside = [pair for pair in labelled if pair.source == source]
        task = _label_task(f"zeroshot-{slug(source)}", f"Which label, within {source}?", inside)
        found += [task] if task else []
    return found


def known_modality(pair: Pair) -> str:
    """The modality of a pair, empty where its collection does not say: "unknown" is no answer to choose."""
    return "" if pair.modality == UNKNOWN else pair.modality


def prompt_texts(pairs: Sequence[Pair]) -> list[str]:
    """Every sentence that `tasks` may ask about these pairs."""
    kinds = {(pair.label, pair.modality) for pair in pairs}
    modalities = {known_modality(pair) for pair in pairs} - {""}
    sentences = [text for modality in modalities for text in modality_prompts(modality)]
    sentences += [text for label, modality in kinds if label for text in label_prompts(label, modality)]
    return sorted(set(sentences))


def manifest_texts(manifest: Manifest) -> list[str]:
    """Sentences that `tasks` asks of a dataset beyond the manifest's own prompts: those that say what is not there."""
    if manifest.task != "multilabel":
        return []
    return sorted({text for own in negative_prompts(manifest).values() for text in own})


def class_vector(vectors: Vectors) -> Vectors:
    """Unit mean ``(dim,)`` of unit prompt vectors ``(prompts, dim)``."""
    mean = vectors.mean(axis=0)
    return mean / max(float(np.linalg.norm(mean)), np.finfo(np.float32).tiny)


def standardise(similarities: Vectors) -> Floats:
    """Subtract the mean of the whole ``(n, classes)`` matrix and divide by its standard deviation."""
    wide = similarities.astype(np.float64)
    spread = wide.std()
    return (wide - wide.mean()) / (spread if spread > 0 else 1.0)


def slug(name: str) -> str:
    """A name as part of a file name: letters and digits, the rest hyphens, cut at 40 characters."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())[:40]


def _label_task(name: str, title: str, pairs: list[Pair]) -> ZeroShot | None:
    labels = sorted({pair.label for pair in pairs})
    if len(labels) < 2:
        return None
    seen = sorted({(pair.label, pair.modality) for pair in pairs})
    prompts: dict[str, list[str]] = {
        label: [text for known, modality in seen if known == label for text in label_prompts(label, modality)]
        for label in labels
    }
    return ZeroShot(name, title, pairs, [pair.label for pair in pairs], prompts)


# Section: Zero-shot classification of a dataset that has a manifest.


class DatasetZeroShot(DatasetClasses, ZeroShot):
    """The manifest's classes, described by its prompts; classes that no image has may be answered, too."""

    def __init__(self, samples: Samples, manifest: Manifest, areas: Areas = "margin"):
        """Fix images and prompts.

        Raises:
            ValueError: a label or the headline is unknown.
        """
        names = class_names(manifest, samples.held_out)
        title = f"Which class, in {manifest.title or manifest.id}?"
        ZeroShot.__init__(self, "", title, samples.held_out, names, manifest.prompts())
        self.follow(manifest, areas)


def dataset_tasks(
    samples: Samples, manifest: Manifest
) -> tuple[list[DatasetZeroShot | MultiLabelZeroShot], dict[str, str]]:
    """The zero-shot task of a dataset whose manifest asks for classes, grades or findings; none for others."""
    if manifest.task not in ("classification", "ordinal", "multilabel"):
        return [], {}
    name = f"zeroshot-{manifest.id}"
    if not samples.held_out:
        return [], {name: "no readable image is held out"}
    if manifest.task == "multilabel":
        return [MultiLabelZeroShot(manifest, samples.held_out)], {}
    if len(manifest.classes) < 2:
        return [], {name: f"{len(manifest.classes)} class in the manifest; 2 are needed"}
    return [DatasetZeroShot(samples, manifest, samples.auroc_on)], {}


# Section: Several findings that an image may show at once: each is a question of its own, answered by a score above
# zero.


ARTICLE = re.compile(r"^(an?|the) ")


class MultiLabelZeroShot(MultiLabel):
    """Every finding asked by a pair of prompt sets, with and without it."""

    kind = "zeroshot"

    def __init__(self, manifest: Manifest, pairs: Sequence[Pair]):
        """Fix images and prompts; see `MultiLabel`."""
        title = f"Which findings, in {manifest.title or manifest.id}?"
        super().__init__(manifest, title, pairs, list(manifest.classes))
        self.prompts, self.negatives = manifest.prompts(), negative_prompts(manifest)
        self.description |= {"prompts": self.prompts, "negative_prompts": self.negatives}

    def outputs(self, embedded: Embedded) -> Outputs:
        """``image.scores``: similarity with a finding minus that without it, over the standard deviation of all."""
        images = embedded.image_matrix(self.pairs)
        there, absent = (_similarities(embedded, images, asked) for asked in (self.prompts, self.negatives))
        margins = (there - absent).astype(np.float64)
        spread = margins.std()
        return {"image.scores": margins / (spread if spread > 0 else 1.0)}

    def ensemble(self, members: Sequence[Embedded], outputs: Sequence[Outputs]) -> Outputs:
        """Mean of the members' scores, which are of one scale."""
        return {"image.scores": np.mean([own["image.scores"] for own in outputs], axis=0)}


def negative_prompts(manifest: Manifest) -> dict[str, list[str]]:
    """Sentences that say of each class that it is not there, in the templates of `Manifest.prompts`.

    "radiograph of a lung nodule" becomes "radiograph without lung nodule", elsewhere "a lung nodule" "no lung nodule".
    """
    family = manifest.templates or manifest.modality
    return {
        name: [
            text.replace(" of no ", " without ")
            for phrase in phrases or [name]
            for text in label_prompts(f"no {ARTICLE.sub('', phrase)}", family)
        ]
        for name, phrases in manifest.classes.items()
    }


def _similarities(embedded: Embedded, images: Vectors, prompts: dict[str, list[str]]) -> Vectors:
    return images @ np.stack([class_vector(embedded.text_matrix(texts)) for texts in prompts.values()]).T
