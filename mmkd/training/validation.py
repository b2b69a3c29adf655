"""Validation during training: losses and retrieval on held-out pairs, and the best weights by one of them.

Every process encodes its share of the pairs. Retrieval is exact among all of them, and a caption that several pairs
share is a correct answer for each of their images, so that duplicates in a small split do not count as errors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkd.data.features.lookup import seen_pairs
from mmkd.data.folder import PairFolder, open_pairs
from mmkd.data.table import Pair
from mmkd.distributed import gather, mean_over_processes, model_state, rank, wait_for_everyone
from mmkd.training.batches import Batches, pair_batches
from mmkd.training.checkpoints import RunFolder
from mmkd.training.dataset import TeacherStores, micro_batches, without_inputs
from mmkd.training.gradient_cache import encoded
from mmkd.training.objectives import ObjectiveWrapper
from mmkd.training.optimizer import WeightAverage
from mmkd.training.settings import DIRECTIONS, RECALLS, ValidationSettings

ROWS_AT_ONCE = 1024


class Validation:
    """Measures an objective on held-out pairs every so many steps."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        batches: Batches,
        every: int,
        best_metric: str | None = None,
        micro_batch_size: int | None = None,
    ) -> None:
        """Measure on `pairs`, read by `batches`, every `every` steps, encoding as many at once as training does."""
        self.batches, self.every, self.best_metric = batches, every, best_metric
        self.micro_batch_size = micro_batch_size
        numbers: dict[str, int] = {}
        self._captions = torch.tensor([numbers.setdefault(pair.caption, len(numbers)) for pair in pairs])

    def is_due(self, step: int, total: int) -> bool:
        """Whether to measure after this step: at the interval, and after the last step."""
        return step % self.every == 0 or step == total

    def run(
        self,
        step: int,
        trained: Callable[..., Any],
        objective: nn.Module,
        average: WeightAverage,
        folder: RunFolder,
        to_device: Callable[[Any], Any],
    ) -> dict[str, float]:
        """Measure the averaged weights in evaluation mode, and keep them in `folder` if they are the best so far.

        Args:
            step: number of the step before.
            trained: the `mmkd.training.objectives.ObjectiveWrapper` of `objective`, prepared for all processes.
            objective: what is trained.
            average: of its weights.
            folder: of the run.
            to_device: moves a batch to the device of `trained`.

        Returns:
            Measures as ``validation_NAME``.
        """
        modes = [(module, module.training) for module in objective.modules()]
        with average.applied(objective):
            objective.eval()
            measured = self.measure(trained, to_device)
            self.keep_best(measured, step, folder, objective)
        for module, training in modes:
            module.training = training
        return {f"validation_{name}": value for name, value in measured.items()}

    def measure(self, trained: Callable[..., Any], to_device: Callable[[Any], Any]) -> dict[str, float]:
        """Mean of the losses over batches, and recalls; the same on every process. See `run` for the arguments."""
        parts: list[dict[str, Tensor]] = []
        images, texts, index = [], [], []
        with torch.no_grad():
            for batch in self.batches.epoch(0):
                pieces = micro_batches(batch, self.micro_batch_size)
                embeddings = encoded(trained, pieces, to_device, seed=(0,))
                batch = to_device(without_inputs({**batch, "epoch": 0}))
                parts.append(trained(ObjectiveWrapper.loss, embeddings, batch))
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
        sign = -1 if self.best_metric == "loss" else 1  # a loss falls, a recall rises
        if best is None or sign * value > sign * best["value"]:
            tensors = model_state(objective)
            if rank() == 0:
                folder.keep_best({"step": step, "metric": self.best_metric, "value": value}, tensors)
        wait_for_everyone()


def validation_of(
    settings: ValidationSettings,
    pairs: Path,
    processor: Any,
    held_out: PairFolder | None = None,
    features: TeacherStores | None = None,
) -> Validation | None:
    """Validation on the validation split of a folder of pairs; None where the settings disable it.

    Args:
        settings: interval, number of pairs and metric; batches as in training, so that losses can be compared.
        pairs: the folder.
        processor: the model's.
        held_out: from `mmkd.data.folder.hold_out_split`; None for the folder's own validation split.
        features: teacher features, for the losses that read them.

    Raises:
        ValueError: the folder has no validation split.
    """
    if settings.validate_every is None:
        return None
    folder = held_out or _validation_split(pairs)
    folder.pairs = sorted(folder.pairs, key=_hash)[: settings.validation_pairs]
    for store in (features or {}).values():
        seen_pairs(store, folder.pairs, f"--validate_every {settings.validate_every}: the folder of features")
    batches = pair_batches(folder, processor, settings, features, crop="center")
    size = settings.micro_batch_size
    return Validation(folder.pairs, batches, settings.validate_every, settings.best_metric, size)


def retrieval(images: Tensor, texts: Tensor, captions: Tensor) -> dict[str, float]:
    """Share of queries with a correct answer among the first 1, 5 and 10, both ways, and the mean of the six.

    The rank of a query counts the wrong answers before its best correct one, those that tie with it by one half.

    Args:
        images: `(pairs, dim)` unit-norm image features.
        texts: `(pairs, dim)` unit-norm text features.
        captions: `(pairs,)` numbers of the captions; pairs of equal number are correct answers for each other.
    """
    found: dict[str, float] = {}
    for way, queries, answers in ((DIRECTIONS[0], images, texts), (DIRECTIONS[1], texts, images)):
        parts = zip(queries.split(ROWS_AT_ONCE), captions.split(ROWS_AT_ONCE), strict=True)
        ranks = torch.cat([_ranks(rows, answers, wanted, captions) for rows, wanted in parts])
        found |= {f"{way}_recall@{k}": (ranks <= k).double().mean().item() for k in RECALLS}
    return found | {"mean_recall": sum(found.values()) / len(found)}


def _validation_split(pairs: Path) -> PairFolder:
    try:
        return open_pairs(pairs, "validation")
    except ValueError as error:
        raise ValueError(
            f"{error}; --hold_out 0.01 holds out a hundredth of the training pairs, --validate_every null "
            "--best_metric null trains without validation"
        ) from None


def _hash(pair: Pair) -> bytes:
    """Depends on the pair alone, so that the same pairs are taken whatever their order."""
    return hashlib.sha256(pair.id.encode()).digest()


def _ranks(queries: Tensor, answers: Tensor, wanted: Tensor, captions: Tensor) -> Tensor:
    scores = queries.float() @ answers.float().T
    right = wanted[:, None] == captions[None, :]
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    before = ((scores > best) & ~right).sum(dim=1)
    ties = ((scores == best) & ~right).sum(dim=1)
    return 1 + before + ties / 2
