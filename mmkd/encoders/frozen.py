"""Cache of the pooled outputs of frozen towers, which every run shares: each image and text is encoded once.

Where a tower is frozen, its output for an image that is not cropped at random never changes. Training then needs the
projections alone, which are thousands of times cheaper, and so does encoding with any model that has the same tower:
many students and teachers on one pair of towers cost one pass over the images. Outputs are cached under the hash of the
tower's weights and of all that prepares its input, by the hash of the image file or of the text, so that runs on other
folders, with other captions or other seeds share what they have in common. `FrozenEncoder` is an encoder that reads
them, and computes projections only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from mmkd.data.archives import ArchivedFile
from mmkd.data.features.shards import is_whole, shard_file, write_shard
from mmkd.data.features.store import VectorStore
from mmkd.data.folder import PairFolder
from mmkd.data.images import UnreadableImageError, read_image_bytes
from mmkd.data.pixels import read_pixels
from mmkd.data.table import Pair
from mmkd.distributed import chosen_device, rank, wait_for_everyone, world_size
from mmkd.encoders.encoder import DualEncoder, HFClipEncoder
from mmkd.encoders.extraction import EncodingTask, encode_shards, read_or_reason, share_of_cores
from mmkd.encoders.hooks import with_input_of
from modeling_mmkd import MMKDClipModel, clean_text

NOT_OF_THE_TOWER = ("dtype", "transformers_version", "architectures", "_name_or_path")  # differ where towers do not
PIXELS = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
SHARD_SIZE, BATCH_SIZE = 1024, 64
OUTPUTS = "outputs"
SHOWN = 5

ImageFile = Path | ArchivedFile


class FrozenTowers:
    """Both towers of a model, in evaluation mode, with their cached outputs."""

    def __init__(self, cache: Path, model: MMKDClipModel, processor: Any, quiet: bool = True) -> None:
        """Open the outputs of these towers under `cache`; nothing is encoded yet."""
        self.encoder = HFClipEncoder("frozen tower", 0, {}, model, processor, processor.tokenizer.model_max_length)
        self.model, self.quiet = model, quiet
        self._images = TowerOutputs(cache / f"vision-{_vision_fingerprint(model, processor)[:24]}")
        self._texts = TowerOutputs(cache / f"text-{_text_fingerprint(model, processor)[:24]}")

    def outputs_of(self, folder: PairFolder) -> dict[str, Tensor]:
        """``pooled_images`` and ``pooled_texts`` of a folder, `(n, width)` each, shared out among the processes.

        Raises:
            ValueError: an image cannot be read; the message names it.
        """
        images, unreadable = self.image_outputs(folder, folder.pairs, share=True)
        if unreadable:
            listed = ", ".join(f"{id} ({reason})" for id, reason in list(unreadable.items())[:SHOWN])
            raise ValueError(f"{len(unreadable)} images of {folder.path} cannot be read: {listed}; curate them again")
        texts = self.text_outputs([pair.caption for pair in folder.pairs], share=True)
        return {"pooled_images": images, "pooled_texts": texts}

    def image_outputs(
        self, folder: PairFolder, pairs: Sequence[Pair], share: bool = False
    ) -> tuple[Tensor, dict[str, str]]:
        """Pooled outputs of the pairs' images; those that are not cached are encoded and cached.

        Args:
            folder: where the images lie.
            pairs: the pairs.
            share: all processes of one training call this together; each encodes a part, and waits for the others.

        Returns:
            (readable pairs, width) float32 on the CPU, and id -> reason of the pairs whose image cannot be read.
        """
        with ThreadPoolExecutor(share_of_cores()) as readers:
            found = list(readers.map(partial(_path_and_key, folder), pairs))
        unreadable = {pair.id: path for pair, (path, _) in zip(pairs, found, strict=True) if isinstance(path, str)}
        files = {key: path for path, key in found if not isinstance(path, str)}
        shards = self._missing(self._images, list(files), share)
        task = _TowerTask(self.encoder, self._images)
        with self._bar(shards, "image") as bar:
            self._ready()
            encode_shards(
                [task],
                [(k, shard) for k, shard in enumerate(shards)],
                lambda key: read_pixels(files[key]),
                BATCH_SIZE,
                progress=bar.update,
            )
        self._encoded(self._images, share)
        rows = dict(zip(files, self._images.rows(list(files)).tolist(), strict=True))
        for pair, (path, key) in zip(pairs, found, strict=True):
            if not isinstance(path, str) and rows[key] < 0:
                reason = task.skipped.get(key) or read_or_reason(partial(read_pixels, path))
                unreadable[pair.id] = reason if isinstance(reason, str) else "unreadable"
        keys = [key for pair, (_, key) in zip(pairs, found, strict=True) if pair.id not in unreadable]
        return self._images.read(keys), unreadable

    def text_outputs(self, texts: Sequence[str], share: bool = False) -> Tensor:
        """Pooled outputs of n texts, (n, width); see `image_outputs`."""
        cleaned = [clean_text(text) for text in texts]
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in cleaned]
        by_key = dict(zip(keys, cleaned, strict=True))
        shards = self._missing(self._texts, list(by_key), share)
        with self._bar(shards, "text") as bar:
            self._ready()
            for shard in shards:
                ordered = sorted(shard, key=lambda key: len(by_key[key]))  # little of a batch is padding
                parts = []
                for start in range(0, len(ordered), BATCH_SIZE):
                    batch = [by_key[key] for key in ordered[start : start + BATCH_SIZE]]
                    with torch.inference_mode():
                        encode = partial(self.encoder.text_features, batch)
                        parts.append(with_input_of(self.model.text_projection, encode)[1].float().cpu())
                    bar.update(len(batch))
                self._texts.add(ordered, torch.cat(parts))
        self._encoded(self._texts, share)
        return self._texts.read(keys)

    def _missing(self, outputs: TowerOutputs, keys: list[str], share: bool) -> list[list[str]]:
        """The keys that are not cached, as the shards that this process encodes."""
        missing = outputs.missing(keys)
        shards = [missing[start : start + SHARD_SIZE] for start in range(0, len(missing), SHARD_SIZE)]
        if share:
            wait_for_everyone()  # until all have listed the same shards, before any is written
            shards = shards[rank() :: world_size()]
        return shards

    def _encoded(self, outputs: TowerOutputs, share: bool) -> None:
        if share:
            wait_for_everyone()
        outputs.refresh()

    def _ready(self) -> None:
        self.model.to(torch.device(chosen_device("auto")))  # type: ignore[arg-type]
        self.model.eval()

    def _bar(self, shards: Sequence[Sequence[str]], unit: str) -> tqdm:
        hidden = self.quiet or rank() > 0 or not shards
        return tqdm(total=sum(map(len, shards)), desc="frozen tower", unit=unit, disable=hidden)


class FrozenEncoder(HFClipEncoder):
    """Encoder of a model of this package that reads cached outputs of its towers; images without a file have none."""

    def __init__(self, encoder: HFClipEncoder, towers: FrozenTowers) -> None:
        """Take the model and all else of `encoder`."""
        super().__init__(
            encoder.name, encoder.dim, encoder.provenance, encoder.model, encoder.processor, encoder.context
        )
        self.batch_size, self.towers = encoder.batch_size, towers

    def encode_shards(
        self,
        task: EncodingTask[Pair],
        folder: PairFolder,
        shards: Iterable[tuple[int, Sequence[Pair]]],
        arrays: Callable[[Tensor, Tensor], dict[str, Tensor]],
        progress: Callable[[int], object] = lambda pairs: None,
    ) -> None:
        """Write the missing shards of a task from cached outputs; see `mmkd.encoders.extraction.encode_shards`.

        Args:
            task: what writes them.
            folder: where the images lie.
            shards: number and pairs of each.
            arrays: from joint vectors (n, dim) and the towers' outputs (n, width) to what the task writes.
            progress: called with the number of pairs of each shard.
        """
        for shard, pairs in shards:
            if not task.has(shard):
                skipped = {pair.id: reason for pair in pairs if (reason := task.refuses(pair))}
                usable = [pair for pair in pairs if pair.id not in skipped]
                outputs, unreadable = self.towers.image_outputs(folder, usable)
                skipped |= unreadable
                kept = [pair for pair in pairs if pair.id not in skipped]
                left_out = [(pair, skipped[pair.id]) for pair in pairs if pair.id in skipped]
                found = arrays(self._projected(self.model.visual_projection, outputs), outputs) if kept else {}
                task.write(shard, kept, found, left_out)
            progress(len(pairs))

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """See `DualEncoder`; equal texts are encoded once."""
        distinct = sorted(set(texts))
        rows = {text: row for row, text in enumerate(distinct)}
        encoded = self._projected(self.model.text_projection, self.towers.text_outputs(distinct))
        return encoded[[rows[text] for text in texts]]

    @torch.inference_mode()
    def _projected(self, projection: nn.Module, outputs: Tensor) -> Tensor:
        weights = next(projection.parameters())
        return functional.normalize(projection(outputs.to(weights)).float().cpu(), dim=-1)


def with_frozen_towers(encoder: DualEncoder, cache: Path | None, quiet: bool = True) -> DualEncoder:
    """The encoder with cached tower outputs if it is a model of this package; any other encoder unchanged."""
    if cache is None or not isinstance(encoder, HFClipEncoder) or not isinstance(encoder.model, MMKDClipModel):
        return encoder
    return FrozenEncoder(encoder, FrozenTowers(cache, encoder.model, encoder.processor, quiet))


class TowerOutputs:
    """The outputs of one tower by key, in float32 and thus exact.

    Several processes may add to one folder at a time, and a killed run loses at most the shard it worked on.
    """

    def __init__(self, folder: Path) -> None:
        """Open the existing shards; nothing is read yet."""
        self.folder = folder
        self.refresh()

    def refresh(self) -> None:
        """Find new shards; damaged ones are ignored, and their outputs computed again."""
        self._store = VectorStore([file for file in sorted(self.folder.glob("shard-*.safetensors")) if is_whole(file)])

    def rows(self, keys: Sequence[str]) -> Any:
        """Row of each key, (n,) int64; -1 if it is missing."""
        return self._store.rows(keys)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """The missing keys among distinct ones."""
        return [key for key, row in zip(keys, self.rows(keys).tolist(), strict=True) if row < 0]

    def add(self, keys: Sequence[str], outputs: Tensor) -> None:
        """Write one shard of outputs (n, width)."""
        write_shard(shard_file(self.folder, list(keys)), keys, {OUTPUTS: outputs.float()})

    def read(self, keys: Sequence[str]) -> Tensor:
        """Outputs (n, width) of n keys, all of which must be cached."""
        return torch.from_numpy(self._store.gather(OUTPUTS, self.rows(keys)))


class _TowerTask(EncodingTask[str]):
    """Outputs of the vision tower by the hash of the image file."""

    def __init__(self, encoder: HFClipEncoder, outputs: TowerOutputs) -> None:
        super().__init__(encoder)
        self.outputs = outputs
        self.skipped: dict[str, str] = {}

    def has(self, shard: int) -> bool:
        return False  # only missing ones are listed

    @torch.inference_mode()
    def encode(self, prepared: list[Any]) -> dict[str, Tensor]:
        pooled = self.encoder.image_and_pooled(prepared)[1]
        assert pooled is not None, "a model of this package has a projection"
        return {OUTPUTS: pooled.float().cpu()}

    def write(self, shard: int, items: list[str], arrays: dict[str, Tensor], skipped: list[tuple[str, str]]) -> None:
        self.skipped |= dict(skipped)
        if items:
            self.outputs.add(items, arrays[OUTPUTS])


def _path_and_key(folder: PairFolder, pair: Pair) -> tuple[ImageFile | str, str]:
    """Path and hash of the pair's image file, or the reason why it cannot be read."""
    try:
        path = folder.image_path(pair)
        return path, hashlib.sha256(read_image_bytes(path)).hexdigest()
    except UnreadableImageError as error:
        return error.reason, ""
    except ValueError:
        return "outside", ""


def _vision_fingerprint(model: MMKDClipModel, processor: Any) -> str:
    """Fingerprint of the tower's weights and of its preprocessing."""
    settings = processor.image_processor.to_dict()
    described = {key: value for key, value in settings.items() if key.startswith("do_") or key in PIXELS}
    return _fingerprint(model.vision_model, [type(processor.image_processor).__name__, described])


def _text_fingerprint(model: MMKDClipModel, processor: Any) -> str:
    """Fingerprint of the tower's weights, pooling and tokenizer."""
    tokenizer = processor.tokenizer
    vocabulary = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    details = [type(tokenizer).__name__, vocabulary, tokenizer.model_max_length, model.config.text_pooling]
    return _fingerprint(model.text_model, details)


def _fingerprint(tower: Any, details: Any) -> str:
    config = {key: value for key, value in tower.config.to_dict().items() if key not in NOT_OF_THE_TOWER}
    digest = hashlib.sha256(json.dumps([config, details], sort_keys=True, default=str).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
