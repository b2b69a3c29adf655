"""Zero-shot classification: an image goes to the class whose sentences lie nearest.

A class is the unit mean of its unit prompt vectors. Similarities are divided by their own standard deviation over all
images and classes, which leaves answers as they are, makes the margins of the AUROC free of any temperature and lets
encoders with different scales be averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmkd.data.captions import UNKNOWN
from mmkd.data.records import Pair
from mmkd.evaluation.embedding import Embedded, Vectors
from mmkd.evaluation.manifest import Manifest
from mmkd.evaluation.metrics import Floats
from mmkd.evaluation.prompts import label_prompts, modality_prompts
from mmkd.evaluation.task import Classification, Outputs, Samples


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
        from mmkd.evaluation import zeroshot_dataset  # it builds on this module

        return zeroshot_dataset.tasks(samples, samples.manifest)
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
    from mmkd.evaluation.multilabel import negative_prompts  # it builds on this module

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
