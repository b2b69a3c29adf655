"""The student's features of a training batch, with gradients; `mmkd.encoders` has the interface for inference.

Pixels are normalized on the model's device, and captions are encoded in chunks of similar length: padding every caption
to the longest of a large batch makes two thirds of the text tower's work padding. `Collate` sorts each batch by caption
length, longest first; the text tower takes it in a few runs of neighbouring rows, each padded to its own longest. The
features are the same to rounding, and so is the loss: no row depends on another, and nothing is moved between batches,
whose members are each other's negatives. The number of runs depends on the number of rows alone, so that processes that
share a sharded model call its layers equally often.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.encoders.hooks import with_input_of

MOST_CHUNKS = 16
LEAST_ROWS = 8  # of a chunk on average: a smaller chunk costs more to start than its padding


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and standard deviation of each channel, of values from 0 to 1; loaders would turn bare tuples into lists."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def embed(model: nn.Module, batch: Mapping[str, Any], trunk: bool = False) -> dict[str, Tensor]:
    """Run the student on a batch of pairs.

    Args:
        model: takes ``pixel_values``, ``input_ids`` with ``attention_mask``, or all three, and returns ``image_embeds``
            and ``text_embeds``.
        batch: ``pixel_values`` (rows, 3, size, size), normalized, or uint8 beside ``pixel_statistics``; ``input_ids``
            and ``attention_mask`` (rows, tokens); ``text_lengths``, a list with the tokens of each row, without which
            the captions are taken in one run. In place of either, ``pooled_images`` or ``pooled_texts`` (rows, width),
            stored outputs of a frozen tower: then only its projection is run.
        trunk: also return what the towers give to their projections.

    Returns:
        Unit-norm ``image`` and ``text`` features (rows, dim), in fp32, and with `trunk` ``image_trunk`` and
        ``text_trunk`` (rows, width).
    """
    found = {}
    for modality, projection, run in (
        ("image", "visual_projection", image_features),
        ("text", "text_projection", _text_features),
    ):
        if trunk:
            features, found[f"{modality}_trunk"] = with_input_of(
                model.get_submodule(projection), partial(run, model, batch)
            )
        else:
            features = run(model, batch)
        found[modality] = F.normalize(features.float(), dim=1)
    return found


def normalized_pixels(pixels: Tensor, statistics: PixelStatistics) -> Tensor:
    """``(pixels / 255 - mean) / std`` for each channel.

    Args:
        pixels: (rows, 3, height, width) uint8.
        statistics: mean and standard deviation of each channel.

    Returns:
        (rows, 3, height, width) float32, on the device of ``pixels``.
    """
    scale, shift = _scale_and_shift(statistics, pixels.device)
    return pixels.float().mul_(scale).add_(shift)


def text_chunks(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of neighbouring rows with the fewest padded tokens, as many as the number of rows allows.

    Args:
        lengths: tokens of each row. Rows in descending order make the most of it; in any other order the runs are
            correct, but only the first row's length is sure to be used well.

    Returns:
        ``(start, stop, longest)`` of each run, together all rows.
    """
    rows = len(lengths)
    count = max(1, min(MOST_CHUNKS, rows // LEAST_ROWS))
    if count == 1 or any(lengths[row] < lengths[row + 1] for row in range(rows - 1)):
        bounds = np.linspace(0, rows, count + 1).astype(int).tolist()
    else:
        bounds = _best_bounds(np.asarray(lengths), count)
    return [(start, stop, max(lengths[start:stop])) for start, stop in pairwise(bounds)]


def padding_free_share(lengths: Sequence[int], micro_batch_size: int | None = None) -> float:
    """The share of caption tokens in all tokens that the text tower processes for a batch.

    Args:
        lengths: tokens of each row, descending.
        micro_batch_size: rows that are encoded at once; None for all.
    """
    size = micro_batch_size or len(lengths)
    pieces = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    processed = sum((stop - start) * longest for piece in pieces for start, stop, longest in text_chunks(piece))
    return sum(lengths) / processed


def _best_bounds(lengths: np.ndarray, count: int) -> list[int]:
    """The bounds of `count` runs of rows of descending length with the smallest sum of rows x longest.

    Cuts lie between different lengths, of which there are at most as many as the context has tokens; the best cuts for
    k runs follow from those for k - 1. With fewer different lengths than runs, runs of equal rows are halved.
    """
    firsts = np.concatenate([[0], np.flatnonzero(np.diff(lengths)) + 1])
    edges = np.append(firsts, len(lengths))
    cost = (edges[None, :] - firsts[:, None]) * lengths[firsts][:, None].astype(float)
    cost[edges[None, :] <= firsts[:, None]] = np.inf  # (first, edge): a run from a first row to before an edge
    total, choices = cost[0], []
    for _ in range(min(count, len(firsts)) - 1):
        candidates = total[:-1][:, None] + cost  # the run before ends where this one begins
        choices.append(candidates.argmin(axis=0))
        total = candidates.min(axis=0)
    place, bounds = len(edges) - 1, [len(lengths)]
    for choice in reversed(choices):
        place = int(choice[place])
        bounds.append(int(edges[place]))
    bounds = [0, *reversed(bounds)]
    while len(bounds) <= count:
        widest = int(np.argmax(np.diff(bounds)))
        bounds.insert(widest + 1, (bounds[widest] + bounds[widest + 1]) // 2)
    return bounds


def image_features(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Image features of a batch, (rows, dim) of any length; see `embed`."""
    if "pooled_images" in batch:
        return model.get_submodule("visual_projection")(batch["pooled_images"])
    pixels = batch["pixel_values"]
    if "pixel_statistics" in batch:
        pixels = normalized_pixels(pixels, batch["pixel_statistics"])
    return model(pixel_values=pixels).image_embeds


def _text_features(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    if "pooled_texts" in batch:
        return model.get_submodule("text_projection")(batch["pooled_texts"])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    chunks = text_chunks(batch["text_lengths"]) if "text_lengths" in batch else [(0, len(ids), ids.shape[1])]
    runs = [(ids[start:stop, :longest], mask[start:stop, :longest]) for start, stop, longest in chunks]
    return torch.cat([model(input_ids=run, attention_mask=run_mask).text_embeds for run, run_mask in runs])


@lru_cache(maxsize=16)
def _scale_and_shift(statistics: PixelStatistics, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and summand (1, 3, 1, 1) that normalize values of 0-255; cached: creating them waits for the device."""
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (statistics.mean, statistics.std)
    )
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)
