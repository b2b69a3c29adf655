"""The interface of student and teachers: images and texts to unit vectors in a shared embedding space.

Everything that differs between models (preprocessing, tokenizer, context, pooling) stays behind `encode_images` and
`encode_texts`, so that extraction and evaluation treat a teacher, a student and a user's own model alike. Encoding is
inference only: whole batches, no gradients, results in main memory.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mmkd.data.images import to_rgb
from mmkd.data.pixels import to_image, to_tensor
from mmkd.encoders.hooks import with_input_of
from modeling_mmkd import MMKDClipModel

BATCH_SIZE = 64
FOLDED_TOLERANCE = 1e-4  # largest difference of unit vectors by which folding is known to be right

Item = TypeVar("Item")


class NoTokens(Exception):
    """An encoder gives one vector for each image and text, but no token sequences; the message names the encoder."""


class DualEncoder(ABC):
    """Encodes images and texts into one space.

    Attributes:
        name: of the encoder in feature stores and results.
        dim: width of its space.
        provenance: JSON values that describe it: weights and their fingerprint, preprocessing, tokenizer, context,
            pooling, license, versions.
        batch_size: most images or texts that go through the model together.
        fast_prepare: a faster form of `prepare`, from (3, height, width) uint8 and within one grey level; None where
            there is none.
        fast: whether it is used.
        autocast: kind of device and type in which the model computes where it safely can; None for its weights' type.
    """

    def __init__(self, name: str, dim: int, provenance: dict[str, Any], batch_size: int = BATCH_SIZE) -> None:
        """Name and describe the encoder."""
        self.name = name
        self.dim = dim
        self.provenance = provenance
        self.batch_size = batch_size
        self.fast_prepare: Callable[[Tensor], Any] | None = None
        self.fast = False
        self.autocast: tuple[str, torch.dtype] | None = None

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Encode n images of any size and mode.

        Returns:
            (n, dim) float32 on the CPU, unit length.

        Raises:
            ValueError: the model gives features of another shape, of no direction, or some that are not finite.
        """
        return self._encode(images, lambda own: self.image_features([self.prepare(to_rgb(i)) for i in own]), "image")

    def encode_images_and_pooled(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor | None]:
        """Encode n images of any size and mode; returns and raises as `encode_prepared_and_pooled`."""
        return self.encode_prepared_and_pooled([self.prepare(to_rgb(image)) for image in images])

    def encode_prepared(self, prepared: Sequence[Any]) -> Tensor:
        """Encode n images that `prepare_any` has prepared; returns and raises as `encode_images`."""
        return self._encode(prepared, lambda batch: self.image_features(list(batch)), "image")

    def encode_prepared_and_pooled(self, prepared: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
        """Encode n prepared images in one pass, with and without the projection into the shared space.

        Returns:
            (n, dim) as `encode_images`; and (n, width) float32 on the CPU, of any length, None where the model has no
            projection.

        Raises:
            ValueError: see `encode_images`.
        """
        before: list[Tensor] = []

        def features(batch: Sequence[Any]) -> Tensor:
            joint, pooled = self.image_and_pooled(list(batch))
            if pooled is not None:
                before.append(pooled.float().cpu())
            return joint

        joint = self._encode(prepared, features, "image")
        return joint, torch.cat(before) if before else None

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encode n texts, truncated to the context.

        Equal texts are encoded once, and texts of similar length together, so that little of a batch is padding.

        Returns:
            (n, dim) float32 on the CPU, unit length.

        Raises:
            ValueError: the model gives features of another shape, of no direction, or some that are not finite.
        """
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        rows = {text: row for row, text in enumerate(distinct)}
        encoded = self._encode(distinct, lambda batch: self.text_features(list(batch)), "text")
        return encoded[[rows[text] for text in texts]]

    def prepare(self, image: Image.Image) -> Any:
        """Preprocess one RGB image for `image_features`, by default not at all; may be called by several threads."""
        return image

    def prepare_any(self, image: Tensor | Image.Image) -> Any:
        """`prepare`, or its fast form if that is chosen, for a Pillow image or (3, height, width) uint8."""
        if self.fast and self.fast_prepare is not None:
            return self.fast_prepare(to_tensor(to_rgb(image)) if isinstance(image, Image.Image) else image)
        return self.prepare(to_rgb(image) if isinstance(image, Image.Image) else to_image(image))

    @abstractmethod
    def image_features(self, prepared: list[Any]) -> Tensor:
        """Features of one batch of prepared images, (n, dim), of any length, on any device."""

    def image_and_pooled(self, prepared: list[Any]) -> tuple[Tensor, Tensor | None]:
        """`image_features`, and the features before the projection, (n, width), if the model has one."""
        return self.image_features(prepared), None

    @abstractmethod
    def text_features(self, texts: list[str]) -> Tensor:
        """Features of one batch of texts, (n, dim), of any length, on any device."""

    def image_token_features(self, prepared: list[Any]) -> Tensor:
        """Features of every patch of a batch of prepared images, (n, tokens, width).

        Raises:
            NoTokens: the encoder gives no token sequences.
        """
        raise NoTokens(f"{self.name} ({type(self).__name__}) gives no sequences of image and text tokens")

    def text_token_features(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Features of every token of a batch of texts.

        Returns:
            (n, tokens, width), and the mask of tokens that are not padding, (n, tokens).

        Raises:
            NoTokens: the encoder gives no token sequences.
        """
        raise NoTokens(f"{self.name} ({type(self).__name__}) gives no sequences of image and text tokens")

    @torch.inference_mode()
    def _encode(self, items: Sequence[Item], features: Callable[[Sequence[Item]], Tensor], kind: str) -> Tensor:
        encoded = [torch.zeros(0, self.dim)]
        for start in range(0, len(items), self.batch_size):
            batch = items[start : start + self.batch_size]
            with torch.autocast(*self.autocast) if self.autocast else nullcontext():
                found = features(batch)
            found = found.float().cpu()
            if found.shape != (len(batch), self.dim):
                expected = (len(batch), self.dim)
                raise ValueError(f"{self.name} gave {kind} features {tuple(found.shape)}, expected {expected}")
            if not torch.isfinite(found).all():
                raise ValueError(f"{self.name} gave {kind} features that are not finite; its weights may be broken")
            unit = functional.normalize(found, dim=-1)
            if not (unit.norm(dim=-1) > 0.5).all():  # neither a zero nor what overflows has a direction
                raise ValueError(f"{self.name} gave {kind} features of length 0, or beyond what float32 can hold")
            encoded.append(unit)
        return torch.cat(encoded)


class HFClipEncoder(DualEncoder):
    """A transformers model with ``get_image_features`` and ``get_text_features``, and its processor."""

    def __init__(
        self, name: str, dim: int, provenance: dict[str, Any], model: Any, processor: Any, context: int
    ) -> None:
        """Take a model in evaluation mode."""
        super().__init__(name, dim, provenance)
        self.model = model
        self.processor = processor
        self.context = context

    def fold_batch_norms(self) -> None:
        """Compute the batch norms of the vision tower by the weights of the convolutions before them.

        Convolutional towers take 40 % less time on a CPU, and their vectors differ by rounding. A tower whose layers
        run in another order than they are listed, which shows on an image of noise, stays as it is.
        """
        before = getattr(self.model, "vision_model", None)
        if before is None:
            return
        noise = [self.prepare(Image.effect_noise((256, 256), 90).convert("RGB"))]
        expected = self.encode_prepared(noise)
        folded = copy.deepcopy(before)
        for parent in list(folded.modules()):
            for (name, layer), (following, norm) in pairwise(list(parent.named_children())):
                if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(parent, name, fuse_conv_bn_eval(layer, norm))
                    setattr(parent, following, nn.Sequential(*norm.children()))  # timm's norms hold an activation
        self.model.vision_model = folded
        if not (self.encode_prepared(noise) - expected).abs().max() < FOLDED_TOLERANCE:
            self.model.vision_model = before

    def prepare(self, image: Image.Image) -> Tensor:
        """See `DualEncoder`; (3, height, width)."""
        return self.processor(images=[image], return_tensors="pt")["pixel_values"][0]

    def image_features(self, prepared: list[Tensor]) -> Tensor:
        """See `DualEncoder`."""
        own = {"pooled_only": True} if isinstance(self.model, MMKDClipModel) else {}
        pixels = torch.stack(prepared).to(self.model.device)
        return _pooled(self.model.get_image_features(pixel_values=pixels, **own))

    def image_and_pooled(self, prepared: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """See `DualEncoder`; models such as SigLIP have no projection."""
        projection = getattr(self.model, "visual_projection", None)
        if projection is None:
            return self.image_features(prepared), None
        return with_input_of(projection, lambda: self.image_features(prepared))

    def text_features(self, texts: list[str]) -> Tensor:
        """See `DualEncoder`."""
        return _pooled(self.model.get_text_features(**self._tokens(texts)))

    def image_token_features(self, prepared: list[Tensor]) -> Tensor:
        """See `DualEncoder`; the rows of a convolutional tower's map follow one another."""
        states = self._tower("vision_model")(pixel_values=torch.stack(prepared).to(self.model.device)).last_hidden_state
        return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states

    def text_token_features(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """See `DualEncoder`."""
        inputs = self._tokens(texts)
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        return self._tower("text_model")(input_ids=ids, attention_mask=mask).last_hidden_state, mask.bool()

    def _tokens(self, texts: list[str]) -> Any:
        """Tokens of a batch; SigLIP pools the last position of the whole context, other towers a text's own tokens."""
        padding = "max_length" if "siglip" in self.model.config.model_type else True
        options = {"padding": padding, "truncation": True, "max_length": self.context, "return_tensors": "pt"}
        return self.processor(text=texts, **options).to(self.model.device)

    def _tower(self, name: str) -> Any:
        tower = getattr(self.model, name, None)
        if tower is None:
            raise NoTokens(f"{self.name}: {type(self.model).__name__} has no {name} that gives token sequences")
        return tower


class FastSquare:
    """The usual preprocessing in a fifth of the time: resize the shortest side, crop the central square, normalize.

    Pillow's bicubic resize of a photograph takes longer than decoding it. torch's antialiased kernel on uint8 computes
    the same filter: 0.3 % of the values are one grey level apart, all others equal. Several threads may use it at once.
    """

    def __init__(
        self, size: int, mean: Sequence[float], std: Sequence[float], centre: Literal["round", "floor"]
    ) -> None:
        """Describe the square.

        Args:
            size: its side in pixels.
            mean: of the three channels, 0 to 1.
            std: likewise.
            centre: where an odd rest is cut: torchvision rounds the offset, transformers takes the lower one.
        """
        self.size, self.centre = size, centre
        self.scale = 1 / (255 * torch.tensor(std).view(3, 1, 1))
        self.offset = torch.tensor(mean).view(3, 1, 1) / torch.tensor(std).view(3, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """The normalized square, (3, size, size) float32, of an image (3, height, width) uint8."""
        height, width = pixels.shape[1:]
        long = int(self.size * max(width, height) / min(width, height))
        shape = (self.size, long) if height <= width else (long, self.size)
        resized = functional.interpolate(pixels[None], shape, mode="bicubic", antialias=True)[0]
        top, left = (self._offset(side) for side in shape)
        square = resized[:, top : top + self.size, left : left + self.size]
        return torch.addcmul(-self.offset, square.float(), self.scale).contiguous()

    def _offset(self, side: int) -> int:
        rest = side - self.size
        return round(rest / 2) if self.centre == "round" else rest // 2


def _pooled(output: Any) -> Tensor:
    """The projected features; since version 5, transformers wraps them."""
    return output if isinstance(output, Tensor) else output.pooler_output


def token_counter(encoder: DualEncoder) -> Callable[[Sequence[str]], int]:
    """Counts the tokens of texts, up to the context, for models of transformers; others count none.

    It has a tokenizer of its own: a tokenizer keeps its padding from call to call, so that counting with the encoder's
    while another thread encodes would count padding, or take that of a batch away.
    """
    if not isinstance(encoder, HFClipEncoder):
        return lambda texts: 0
    tokenizer, context = copy.deepcopy(encoder.processor.tokenizer), encoder.context

    def count(texts: Sequence[str]) -> int:
        return sum(map(len, tokenizer(list(texts), truncation=True, max_length=context)["input_ids"]))

    count(["a"])
    return count
