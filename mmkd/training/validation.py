"""Evaluation while a model trains: losses and retrieval on held-out pairs, and the best weights by one of them.

Every process encodes its share of the pairs. Retrieval is exact among all of them, and a caption that several pairs
share is right for each of their images, so that a small or repetitive split is not judged by luck.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkd.command.settings import nearest, setting
from mmkd.data.features.lookup import TeacherFeatures, seen_pairs
from mmkd.data.folder import PairFolder, open_pairs
from mmkd.data.table import Pair
from mmkd.distributed import gather, mean_over_processes, rank, wait_for_everyone
from mmkd.training.batches import Batches, pair_batches
from mmkd.training.checkpoints import snapshot
from mmkd.training.run_folder import RunFolder

RECALLS = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")
METRICS = ("loss", "mean_recall", *(f"{way}_recall@{k}" for way in DIRECTIONS for k in RECALLS))
ROWS_AT_ONCE = 1024


@dataclass(kw_only=True)
class ValidationSettings:
    """Evaluation during training."""

    validate_every: int | None = setting(None, "steps between evaluations on the validation split; none = at no time")
    best_metric: str | None = setting(
        None, f"the output is the weights that were best by it, none = the last; one of {', '.join(METRICS)}"
    )
    validation_pairs: int = setting(5000, "at most so many pairs of the validation split are used")
    hold_out: float = setting(
        0.0, "share of the training groups that is held out for evaluation, where a folder has no validation split"
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is read.

        Raises:
            ValueError: the message names the setting and what is allowed.
        """
        check(self.validate_every, self.best_metric)
        if self.validation_pairs < 2:
            raise ValueError(f"--validation_pairs is {self.validation_pairs}; it must be at least 2")
        if not 0 <= self.hold_out < 1:
            raise ValueError(f"--hold_out is {self.hold_out}; it must be at least 0 (nothing) and below 1")
        if self.hold_out and self.validate_every is None:
            raise ValueError(
                f"--hold_out {self.hold_out} needs --validate_every STEPS, or nothing looks at those pairs"
            )


class Validation:
    """Measures an objective on held-out pairs every so many steps."""

    def __init__(self, pairs: Sequence[Pair], batches: Batches, every: int, best_metric: str | None = None) -> None:
        """Measure on `pairs`, which `batches` reads, every `every` steps.

        Raises:
            ValueError: `every` is below 1, or `best_metric` is none of `METRICS`.
        """
        check(every, best_metric)
        self.batches, self.every, self.best_metric = batches, every, best_metric
        numbers: dict[str, int] = {}
        self._captions = torch.tensor([numbers.setdefault(pair.caption, len(numbers)) for pair in pairs])

    def measure(self, trained: Callable[..., Any], to_device: Callable[[Any], Any]) -> dict[str, float]:
        """Mean of the losses over batches, and recalls; the same on every process.

        Args:
            trained: a `mmkd.training.gradient_cache.OneForward`, wrapped or not, in evaluation mode.
            to_device: brings a batch to where it is.
        """
        parts: list[dict[str, Tensor]] = []
        images, texts, index = [], [], []
        with torch.no_grad():
            for batch in self.batches.epoch(0):
                batch = to_device({**batch, "epoch": 0})
                embeddings = trained("encode", batch)
                parts.append(trained("loss", embeddings, batch))
                images.append(gather(embeddings["image"]))
                texts.append(gather(embeddings["text"]))
                index.append(gather(batch["index"]))
            means = {name: torch.stack([part[name].float() for part in parts]).mean() for name in parts[0]}
            values = mean_over_processes(torch.stack(list(means.values()))).tolist()
            captions = self._captions.to(images[0].device)[torch.cat(index)]
            recalls = retrieval(torch.cat(images), torch.cat(texts), captions)
        return dict(zip(means, values, strict=True)) | recalls

    def keep_best(self, measured: Mapping[str, float], step: int, folder: RunFolder, objective: nn.Module) -> None:
        """Keep the weights in `folder` when they are the best so far by the metric, if there is one.

        Called by every process; the first one writes.
        """
        if self.best_metric is None:
            return
        value, best = measured[self.best_metric], folder.best()
        wait_for_everyone()  # no process may write while another reads
        if self.is_better(value, best["value"] if best else None):
            tensors = snapshot(objective)
            if rank() == 0:
                folder.keep_best({"step": step, "metric": self.best_metric, "value": value}, tensors)
        wait_for_everyone()

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether a value of the metric is better than the best before; a loss falls, a recall rises."""
        if best is None:
            return True
        return value < best if self.best_metric == "loss" else value > best


def validation_of(
    settings: ValidationSettings,
    pairs: Path,
    processor: Any,
    *,
    held_out: PairFolder | None = None,
    batch_size: int,
    workers: int,
    seed: int,
    features: TeacherFeatures | None = None,
    aligned: TeacherFeatures | None = None,
) -> Validation | None:
    """Evaluation on the validation split of a folder of pairs, None when none is asked for.

    Args:
        settings: how often, how many and what for.
        pairs: the folder.
        processor: the model's.
        held_out: from `mmkd.data.folder.hold_out_split`; None for the folder's own validation split.
        batch_size: pairs in a global batch, as in training, so that losses can be compared.
        workers: processes that read images.
        seed: of the order.
        features: raw teacher features, for the losses that read them.
        aligned: aligned teacher features, likewise.

    Raises:
        ValueError: the folder has no validation split.
    """
    if settings.validate_every is None:
        return None
    folder = held_out or _validation_split(pairs)
    folder.pairs = sorted(folder.pairs, key=_draw)[: settings.validation_pairs]
    for found in (features, aligned):
        if found is not None:
            seen_pairs(found, folder.pairs, f"--validate_every {settings.validate_every}: the folder of features")
    batches = pair_batches(
        folder,
        processor,
        batch_size=batch_size,
        crop="center",
        workers=workers,
        seed=seed,
        features=features,
        aligned=aligned,
    )
    return Validation(folder.pairs, batches, settings.validate_every, settings.best_metric)


def check(every: int | None, best_metric: str | None) -> None:
    """Refuse settings that cannot work, before anything is read.

    Raises:
        ValueError: the message names the setting and what is allowed.
    """
    if best_metric is not None and best_metric not in METRICS:
        hint = nearest(best_metric, METRICS)
        raise ValueError(f"--best_metric {best_metric} is not measured{hint}; allowed: {', '.join(METRICS)}")
    if every is not None and every < 1:
        raise ValueError(f"--validate_every is {every}; it must be at least 1, or none")
    if best_metric is not None and every is None:
        raise ValueError(f"--best_metric {best_metric} needs --validate_every STEPS")


def retrieval(images: Tensor, texts: Tensor, captions: Tensor) -> dict[str, float]:
    """Share of queries with a right answer among the first 1, 5 and 10, both ways, and the mean of the six.

    The rank of a query counts the wrong answers before its best right one, those that tie with it by one half.

    Args:
        images: `(pairs, dim)` unit-norm image features.
        texts: `(pairs, dim)` unit-norm text features.
        captions: `(pairs,)` numbers of the captions; pairs of equal number are right for each other.
    """
    found: dict[str, float] = {}
    for way, queries, answers in ((DIRECTIONS[0], images, texts), (DIRECTIONS[1], texts, images)):
        ranks = torch.cat([_ranks(queries[rows], answers, captions[rows], captions) for rows in _chunks(len(queries))])
        found |= {f"{way}_recall@{k}": (ranks <= k).double().mean().item() for k in RECALLS}
    return found | {"mean_recall": sum(found.values()) / len(found)}


def _validation_split(pairs: Path) -> PairFolder:
    try:
        return open_pairs(pairs, "validation")
    except ValueError as error:
        raise ValueError(
            f"{error}; --hold_out 0.01 holds out a hundredth of the training pairs, --validate_every none "
            "--best_metric none trains without evaluation"
        ) from None


def _draw(pair: Pair) -> bytes:
    """A number that depends on the pair alone, so that the same pairs are taken whatever their order."""
    return hashlib.sha256(pair.id.encode()).digest()


def _ranks(queries: Tensor, answers: Tensor, wanted: Tensor, captions: Tensor) -> Tensor:
    scores = queries.float() @ answers.float().T
    right = wanted[:, None] == captions[None, :]
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    before = ((scores > best) & ~right).sum(dim=1)
    ties = ((scores == best) & ~right).sum(dim=1)
    return 1 + before + ties / 2


def _chunks(rows: int) -> list[slice]:
    return [slice(begin, begin + ROWS_AT_ONCE) for begin in range(0, rows, ROWS_AT_ONCE)]
