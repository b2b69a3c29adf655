"""Zero-shot classification of a dataset that has a manifest."""

from __future__ import annotations

from mmkd.evaluation.dataset_classes import Areas, DatasetClasses, class_names
from mmkd.evaluation.manifest import Manifest
from mmkd.evaluation.multilabel import MultiLabelZeroShot
from mmkd.evaluation.task import Samples
from mmkd.evaluation.zeroshot import ZeroShot


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


def tasks(samples: Samples, manifest: Manifest) -> tuple[list[DatasetZeroShot | MultiLabelZeroShot], dict[str, str]]:
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
