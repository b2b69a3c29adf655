"""Teacher features of a folder of pairs: the part of an extraction that one process does with teachers loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkd.command.tasks import Progress, resident
from mmkd.data.features.writer import FeatureExtraction
from mmkd.data.folder import PairFolder, open_pairs
from mmkd.data.pixels import read_pixels
from mmkd.data.table import Pair, take_rows
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.extraction import EncodingTask, Readable, encode_shards, read_or_reason
from mmkd.encoders.frozen import FrozenEncoder, with_frozen_towers
from mmkd.encoders.settings import ExtractSettings
from mmkd.encoders.zoo import load_with_precision, named_sources


class FeatureTask(EncodingTask[Pair]):
    """Image and caption features of a teacher, for one feature store."""

    def __init__(self, encoder: DualEncoder, extraction: FeatureExtraction) -> None:
        """Write into this store."""
        super().__init__(encoder)
        self.extraction = extraction

    def has(self, shard: int) -> bool:
        """See `EncodingTask`."""
        return self.extraction.has(shard)

    def refuses(self, item: Pair) -> str:
        """See `EncodingTask`; JSON can hold halves of characters, tokenizers cannot."""
        try:
            item.caption.encode()
            return ""
        except UnicodeEncodeError:
            return "caption"

    def encode(self, prepared: list[Any]) -> dict[str, Tensor]:
        """See `EncodingTask`."""
        return {"image": self.encoder.encode_prepared(prepared)}

    def write(self, shard: int, items: list[Pair], arrays: dict[str, Tensor], skipped: list[tuple[Pair, str]]) -> None:
        """See `EncodingTask`; captions are encoded here."""
        image = arrays.get("image", torch.zeros(0, self.encoder.dim))
        text = self.encoder.encode_texts([pair.caption for pair in items])
        self.extraction.write(shard, image, text, {pair.id: reason for pair, reason in skipped})


def group_tasks(tasks: Sequence[FeatureTask]) -> list[list[FeatureTask]]:
    """Tasks grouped by the pairs that are missing in their stores, so that each group decodes them once."""
    groups: list[list[FeatureTask]] = []
    for task in tasks:
        own = task.extraction
        for group in groups:
            other = group[0].extraction
            if own.size == other.size and own.lacks_same_pairs(other):
                group.append(task)
                break
        else:
            groups.append([task])
    return groups


class OpenExtraction:
    """The pairs, the teachers and the stores of an extraction in this process.

    Attributes:
        folder: the pairs.
        tasks: one for each teacher, by its name.
    """

    def __init__(self, settings: ExtractSettings, device: str) -> None:
        """Load the teachers onto a device.

        Raises:
            FileNotFoundError: pairs or weights are not there.
            ValueError: a store of other weights, or an id that occurs twice.
        """
        self.settings, self.folder = settings, open_pairs(settings.pairs)
        self.tasks: dict[str, FeatureTask] = {}
        for name, source in named_sources(settings.teacher).items():
            encoder = load_teacher(name, source, settings, device)
            stored = (settings.output / name, name, self.folder.pairs, encoder.provenance)
            self.tasks[name] = FeatureTask(encoder, FeatureExtraction(*stored, settings.dtype, settings.shard_size))

    def extract(self, names: Sequence[str], shards: Sequence[int], progress: Progress) -> None:
        """Write shards of teachers that share the decoding."""
        tasks, pairs = [self.tasks[name] for name in names], self.folder.pairs
        own = ((shard, list(take_rows(pairs, tasks[0].extraction.positions(shard)))) for shard in shards)
        encoder = tasks[0].encoder
        if isinstance(encoder, FrozenEncoder):
            encoder.encode_shards(tasks[0], self.folder, own, lambda joint, _: {"image": joint}, progress)
        else:
            read = partial(read_image, self.folder)
            encode_shards(tasks, own, read, self.settings.batch_size, self.settings.threads, progress)


def extract_shards(
    run: str, settings: ExtractSettings, names: Sequence[str], shards: Sequence[int], progress: Progress
) -> None:
    """A task of `mmkd.command.tasks`; a process loads the teachers for its first task of a run."""
    resident(run, lambda: OpenExtraction(settings, settings.device)).extract(names, shards, progress)


def load_teacher(name: str, source: str, settings: ExtractSettings, device: str) -> DualEncoder:
    """The teacher on a device, under the name of its feature store."""
    weights = settings.weights.get(name)
    encoder = load_with_precision(source, device, settings.precision, Path(weights) if weights else None)
    encoder.batch_size = settings.batch_size
    if settings.resize == "fast" and encoder.fast_prepare is not None:
        encoder.fast = True
        encoder.provenance["preprocessing"] += ", resized as uint8 by torch"
    return with_frozen_towers(encoder, settings.cache_frozen_towers, settings.quiet or not settings.is_here)


def read_image(folder: PairFolder, pair: Pair) -> Readable | str:
    """The pixels of a pair's image, or why it cannot be read."""
    return read_or_reason(lambda: read_pixels(folder.image_path(pair)))
