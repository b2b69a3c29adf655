"""All tasks of visual question answering: of given pairs, or of a dataset that a manifest describes.

A dataset is answered by three heads: over frozen vectors, over tokens with co-attention, and without training on
closed questions. The two that train do so on the official split and on one by image.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.datasets.questions import Question, question_texts
from mmkd.evaluation.tasks.classes import name_after
from mmkd.evaluation.tasks.task import Samples, Task
from mmkd.evaluation.vqa import answer_head as vqa
from mmkd.evaluation.vqa.answer_head import QuestionSplit, VisualQuestions, question_splits
from mmkd.evaluation.vqa.co_attention import MeterQuestions
from mmkd.evaluation.vqa.statements import StatementQuestions, choices, turn


def tasks(samples: Samples) -> tuple[list[Task], dict[str, str]]:
    """The tasks that the samples allow, and the reasons why others are not there."""
    if samples.manifest is None:
        found, skipped = vqa.tasks(samples)
        return list(found), skipped
    if samples.manifest.task != "vqa":
        return [], {}
    splits, reason = question_splits(samples)
    if not splits:
        return [], {f"vqa-{samples.manifest.id}": reason}
    return _of_dataset(samples.manifest, splits)


def texts(questions: Sequence[Question]) -> list[str]:
    """Everything an encoder is asked to embed for these questions: themselves, and the statements that answer them."""
    found = [choices(question.text) for question in questions if question.closed]
    return sorted({*question_texts(questions), *(text for own in found if own for text in own.statements)})


def _of_dataset(manifest: Manifest, splits: list[QuestionSplit]) -> tuple[list[Task], dict[str, str]]:
    """Frozen and co-attention heads on every split; closed questions without training on the first."""
    found: list[Task] = []
    skipped: dict[str, str] = {}
    for split in splits:
        for head, made in (("", VisualQuestions), ("meter", MeterQuestions)):
            variant = "-".join(part for part in (head, split.variant) if part)
            task = made(split.questions, facts=split.facts)
            name_after(task, manifest, variant)
            found.append(task)
    turned, left_out = turn(splits[0].questions["test"])
    if len(turned) > 1:
        found.append(StatementQuestions(turned, left_out, {"split": splits[0].facts["split"]}))
        name_after(found[-1], manifest, "zeroshot")
    else:
        skipped[f"vqa-{manifest.id}-zeroshot"] = f"{len(turned)} closed test questions can be turned into statements"
    return found, skipped
