"""A dataset of an evaluation as its manifest says: at most ten lines of YAML for what is asked and of what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mmkd.evaluation.prompts import label_prompts

Asked = Literal["classification", "multilabel", "ordinal", "retrieval", "vqa", "survival", "diagnosis"]
ASKED: tuple[str, ...] = get_args(Asked)


@dataclass(frozen=True)
class Manifest:
    """One dataset.

    Attributes:
        id: short name, letters, digits and hyphens.
        task: what is asked of it; the order of ``classes`` is the grade's where it is ordinal.
        modality: for macro means and for the sentences that describe classes.
        source: kind of source -> where it lies, and the columns of a table.
        license: as its publisher states it.
        title: for people.
        classes: class as the data name it -> phrases that stand for it in sentences.
        templates: family of sentences (`prompts.FAMILIES`); empty = that of the modality.
        headline: metric that stands for the dataset; empty = the task's own.
        expects: counts that are publicly stated, such as ``n_test``; another count is an error.
        group: column of patient, case or slide.
        split: column of the split.
        derived_from: data it was made from, for the marks of contamination.
        citation: where it was published.
        sha256: of the file it is read from.
        tier: A = open, B = after registration, C = after credentials and an agreement.
        register: where one registers or downloads.
    """

    id: str
    task: Asked
    modality: str
    source: dict[str, Any]
    license: str
    title: str = ""
    classes: dict[str, list[str]] = field(default_factory=dict)
    templates: str = ""
    headline: str = ""
    expects: dict[str, int] = field(default_factory=dict)
    group: str = ""
    split: str = ""
    derived_from: list[str] = field(default_factory=list)
    citation: str = ""
    sha256: str = ""
    tier: Literal["A", "B", "C"] = "A"
    register: str = ""

    def prompts(self) -> dict[str, list[str]]:
        """Sentences of every class, in the order of ``classes``: each phrase in each template."""
        family = self.templates or self.modality
        return {
            name: [text for phrase in phrases or [name] for text in label_prompts(phrase, family)]
            for name, phrases in self.classes.items()
        }
