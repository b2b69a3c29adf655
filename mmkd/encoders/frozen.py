"""What is frozen is encoded once: pooled tower outputs of images and texts, kept and shared by every run.

Where a tower does not learn, its output for an image that is not cropped at random never changes. Training then needs
the projections alone, which are thousands of times cheaper, and so does encoding with any model that has the same
tower: many students and teachers on one pair of towers cost one pass over the images. Outputs are kept under the hash
of the tower's weights and of all that prepares its input.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from mmkd.data.archives import ArchivedFile
from mmkd.data.folder import PairFolder
from mmkd.data.images import UnreadableImage, open_image, read_image_bytes
from mmkd.data.table import Pair
from mmkd.distributed import chosen_device, rank, wait_for_everyone, world_size
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.hfclip import HFClipEncoder
from mmkd.files import atomic_write_bytes
from modeling_mmkd import MMKDClipModel, clean_text

UNTOLD = ("dtype", "transformers_version", "architectures", "_name_or_path")  # differ where towers do not

PIXELS = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")

PART_SIZE, BATCH_SIZE = 1024, 64

ImageFile = Path | ArchivedFile

Encode = Callable[[list[int]], tuple[list[int], Tensor]]


class FrozenTowers:
    """Both towers of a model, in evaluation mode, with what they gave before."""

    def __init__(self, cache: Path, model: MMKDClipModel, processor: Any, quiet: bool = True) -> None:
        """Open the outputs of these very towers under `cache`; nothing is encoded yet."""
        self.model, self.processor, self.quiet = model, processor, quiet
        self._images = TowerOutputs(cache / f"vision-{_vision_fingerprint(model, processor)[:24]}")
        self._texts = TowerOutputs(cache / f"text-{_text_fingerprint(model, processor)[:24]}")

    def image_outputs(
        self, folder: PairFolder, pairs: Sequence[Pair], share: bool = False
    ) -> tuple[Tensor, dict[str, str]]:
        """Pooled outputs of the pairs' images; what is not there yet is encoded and kept.

        Args:
            folder: where the images lie.
            pairs: the pairs.
            share: the processes of one training do a part each, and wait for each other.

        Returns:
            (readable pairs, width) float32 on the CPU, and id -> reason of the pairs whose image cannot be read.
        """
        unreadable: dict[str, str] = {}
        found = [(pair, *_path_and_key(folder, pair, unreadable)) for pair in pairs]
        known = [(pair, path, key) for pair, path, key in found if path is not None]
        paths, keys = [path for _, path, _ in known], [key for _, _, key in known]
        self._complete(self._images, keys, lambda rows: self._encode_images([paths[k] for k in rows]), share)
        gone = {keys[k]: _reason(paths[k]) for k in self._images.missing(keys)}
        unreadable |= {pair.id: gone[key] for pair, _, key in known if key in gone}
        return self._images.read([key for key in keys if key not in gone]), unreadable

    def text_outputs(self, texts: Sequence[str], share: bool = False) -> Tensor:
        """Pooled outputs of n texts, (n, width); see `image_outputs`."""
        cleaned = [clean_text(text) for text in texts]
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in cleaned]
        self._complete(self._texts, keys, lambda rows: self._encode_texts([cleaned[k] for k in rows]), share)
        return self._texts.read(keys)

    def _complete(self, store: TowerOutputs, keys: list[bytes], encode: Encode, share: bool) -> None:
        """Encode and keep what is missing, in parts; `encode` says which of the rows it was given it could do."""
        missing = store.missing(keys)
        parts = [missing[start : start + PART_SIZE] for start in range(0, len(missing), PART_SIZE)]
        for part in parts[rank() :: world_size()] if share else parts:
            done, vectors = encode(part)
            if done:
                store.add([keys[part[k]] for k in done], vectors)
        if share:
            wait_for_everyone()
            store.refresh()

    def _encode_images(self, paths: list[ImageFile]) -> tuple[list[int], Tensor]:
        done: list[int] = []

        def run(batch: list[int]) -> None:
            images = []
            for position in batch:
                try:
                    images.append(open_image(paths[position]))
                    done.append(position)
                except UnreadableImage:  # named by the caller
                    continue
            if images:
                pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
                self.model.get_image_features(pixel_values=pixels.to(self.model.device))

        return done, self._encode(list(range(len(paths))), self.model.visual_projection, run, "image")

    def _encode_texts(self, texts: list[str]) -> tuple[list[int], Tensor]:
        context = self.processor.tokenizer.model_max_length
        order = sorted(range(len(texts)), key=lambda k: len(texts[k]))  # little of a batch is padding

        def run(batch: list[int]) -> None:
            words = [texts[position] for position in batch]
            inputs = self.processor(text=words, truncation=True, max_length=context, return_tensors="pt")
            self.model.get_text_features(**inputs.to(self.model.device))

        return order, self._encode(order, self.model.text_projection, run, "text")

    @torch.no_grad()
    def _encode(self, items: list[int], projection: nn.Module, run: Callable[[list[int]], None], unit: str) -> Tensor:
        """What the projection is given, (n, width), float32: the tower's pooled output, whichever tower it is."""
        self.model.to(torch.device(chosen_device("auto")))  # type: ignore[arg-type]
        self.model.eval()
        given: list[Tensor] = []
        handle = projection.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].float().cpu()))
        try:
            for batch in self._batches(items, unit):
                run(batch)
        finally:
            handle.remove()
        return torch.cat(given) if given else torch.empty(0, 0)

    def _batches(self, items: list[int], unit: str) -> Iterator[list[int]]:
        with tqdm(total=len(items), desc="frozen tower", unit=unit, disable=self.quiet or rank() > 0) as bar:
            for start in range(0, len(items), BATCH_SIZE):
                batch = items[start : start + BATCH_SIZE]
                yield batch
                bar.update(len(batch))


class FrozenEncoder(DualEncoder):
    """An encoder of a model of ours that asks `FrozenTowers` first, and computes projections only."""

    def __init__(self, encoder: HFClipEncoder, towers: FrozenTowers) -> None:
        """Take the name, width and provenance of `encoder`."""
        super().__init__(encoder.name, encoder.dim, encoder.provenance, encoder.batch_size)
        self.encoder, self.towers = encoder, towers

    def encode_pairs(self, folder: PairFolder, pairs: Sequence[Pair]) -> tuple[Tensor, dict[str, str]]:
        """Encode the images of pairs.

        Returns:
            (readable pairs, dim) float32 on the CPU, unit length; and id -> reason of those that cannot be read.
        """
        joint, _, unreadable = self.encode_pairs_and_pooled(folder, pairs)
        return joint, unreadable

    def encode_pairs_and_pooled(
        self, folder: PairFolder, pairs: Sequence[Pair]
    ) -> tuple[Tensor, Tensor, dict[str, str]]:
        """As `encode_pairs`, with the towers' outputs (readable pairs, width) float32 as second."""
        outputs, unreadable = self.towers.image_outputs(folder, pairs)
        return self._projected(self.encoder.model.visual_projection, outputs), outputs, unreadable

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """See `DualEncoder`; equal texts are encoded once."""
        distinct = sorted(set(texts))
        rows = {text: row for row, text in enumerate(distinct)}
        encoded = self._projected(self.encoder.model.text_projection, self.towers.text_outputs(distinct))
        return encoded[[rows[text] for text in texts]]

    def prepare(self, image: Image.Image) -> Any:
        """See `DualEncoder`."""
        return self.encoder.prepare(image)

    def image_features(self, prepared: list[Any]) -> Tensor:
        """See `DualEncoder`; images without a file are not kept."""
        return self.encoder.image_features(prepared)

    def text_features(self, texts: list[str]) -> Tensor:
        """See `DualEncoder`."""
        return self.encode_texts(texts)

    def image_token_features(self, prepared: list[Any]) -> Tensor:
        """See `DualEncoder`; tokens are not kept."""
        return self.encoder.image_token_features(prepared)

    def text_token_features(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """See `DualEncoder`; tokens are not kept."""
        return self.encoder.text_token_features(texts)

    @torch.inference_mode()
    def _projected(self, projection: nn.Module, outputs: Tensor) -> Tensor:
        weights = next(projection.parameters())
        return functional.normalize(projection(outputs.to(weights)).float().cpu(), dim=-1)


def with_frozen_towers(encoder: DualEncoder, cache: Path | None, quiet: bool = True) -> DualEncoder:
    """The encoder, asking `cache` for tower outputs where it is a model of ours; any other is given back as it is."""
    if cache is None or not isinstance(encoder, HFClipEncoder) or not isinstance(encoder.model, MMKDClipModel):
        return encoder
    return FrozenEncoder(encoder, FrozenTowers(cache, encoder.model, encoder.processor, quiet))


def _path_and_key(
    folder: PairFolder, pair: Pair, unreadable: dict[str, str]
) -> tuple[Path | ArchivedFile | None, bytes]:
    """Where the pair's image lies and the file's hash; None, and a reason in `unreadable`, if it cannot be read."""
    try:
        path = folder.image_path(pair)
        return path, hashlib.sha256(read_image_bytes(path)).digest()
    except UnreadableImage as error:
        unreadable[pair.id] = error.reason
    except ValueError:
        unreadable[pair.id] = "outside"
    return None, b""


def _reason(path: ImageFile) -> str:
    try:
        open_image(path)
    except UnreadableImage as error:
        return error.reason
    return "unreadable"


def _vision_fingerprint(model: MMKDClipModel, processor: Any) -> str:
    """Of the tower's weights and of the pixels it is given."""
    settings = processor.image_processor.to_dict()
    described = {key: value for key, value in settings.items() if key.startswith("do_") or key in PIXELS}
    return _fingerprint(model.vision_model, [type(processor.image_processor).__name__, described])


def _text_fingerprint(model: MMKDClipModel, processor: Any) -> str:
    """Of the tower's weights, its pooling and its tokens."""
    tokenizer = processor.tokenizer
    vocabulary = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    facts = [type(tokenizer).__name__, vocabulary, tokenizer.model_max_length, model.config.text_pooling]
    return _fingerprint(model.text_model, facts)


def _fingerprint(tower: Any, facts: Any) -> str:
    config = {key: value for key, value in tower.config.to_dict().items() if key not in UNTOLD}
    digest = hashlib.sha256(json.dumps([config, facts], sort_keys=True, default=str).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Section: Pooled outputs of one frozen tower on disk, found by what was encoded.
#
# A key is the hash of an image file or of a text, so that runs on other folders, other captions or other seeds share
# what they have in common. Parts are written whole under the hash of their keys: several processes may add to one
# folder
# at a time, and a killed run loses at most the part it worked on.


KEY_BYTES = 32


class TowerOutputs:
    """The outputs of one tower by key, float32, so that what is read back is what was computed."""

    def __init__(self, folder: Path) -> None:
        """Index the parts that are there; vectors are mapped, not read."""
        self.folder = folder
        self._parts: dict[str, Tensor] = {}
        self._place: dict[bytes, tuple[str, int]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Find parts that other processes have written since.

        Raises:
            ValueError: a part is damaged; the message names it.
        """
        for path in sorted(self.folder.glob("part-*.safetensors")):
            if path.name in self._parts:
                continue
            try:
                part = load_file(path)
                keys, vectors = part["keys"].numpy(), part["vectors"]
            except (SafetensorError, KeyError) as error:
                raise ValueError(f"{path} is damaged ({error}); remove it, and it is made again") from error
            self._parts[path.name] = vectors
            self._place |= {key.tobytes(): (path.name, row) for row, key in enumerate(keys)}

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Positions of the first occurrence of each key that is not there."""
        first: dict[bytes, int] = {}
        for position, key in enumerate(keys):
            if key not in self._place:
                first.setdefault(key, position)
        return list(first.values())

    def add(self, keys: Sequence[bytes], vectors: Tensor) -> None:
        """Write one part.

        Args:
            keys: n hashes of 32 bytes.
            vectors: (n, width).
        """
        name = f"part-{hashlib.sha256(b''.join(keys)).hexdigest()[:32]}.safetensors"
        stored = torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES).copy())
        data = save({"keys": stored, "vectors": vectors.detach().float().cpu().contiguous()})
        atomic_write_bytes(self.folder / name, data)
        self.refresh()

    def read(self, keys: Sequence[bytes]) -> Tensor:
        """Outputs (n, width) of n keys, all of which must be there."""
        places = [self._place[key] for key in keys]
        width = next(iter(self._parts.values())).shape[1] if self._parts else 0
        found = torch.empty(len(keys), width)
        for name in {part for part, _ in places}:
            chosen = [position for position, place in enumerate(places) if place[0] == name]
            found[chosen] = self._parts[name][[places[position][1] for position in chosen]]
        return found
