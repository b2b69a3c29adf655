# Copyright 2026 The mmkd-clip developers. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Processor of MMKD-CLIP: evaluation pixels as the authors computed them, captions padded to the longest of the batch.

Texts are unescaped and freed of superfluous white space as in the authors' training, then padded to the longest of the
batch, never to the whole context. Inputs that are no image or no text are refused before anything is computed, and
images are never clipped silently: PIL images of more than 8 bits are windowed from their 0.5th to their 99.5th
percentile, as in training.
"""

import html
import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, CLIPImageProcessorPil, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs
from transformers.utils import IMAGE_PROCESSOR_NAME, logging

logger = logging.get_logger(__name__)

AUTO_MAP = {  # as in the configuration, so that neither forgets it
    "AutoImageProcessor": "processing_mmkd.MMKDClipImageProcessor",
    "AutoProcessor": "processing_mmkd.MMKDClipProcessor",
}
LOCAL_SETTINGS = ("local_files_only", "is_local", "backend")  # how a tokenizer was read, which is nobody else's concern
WINDOW_PERCENTILES = (0.5, 99.5)  # of deep grey, as in `mmkd.data.pixel_rules`, whose pixels these are exactly
DEFAULTS: dict[str, dict[str, Any]] = {"text_kwargs": {"padding": True, "truncation": True}}


# trf-ignore: TRF019 (defaults in processor_config.json: transformers before 5.21 ignores them silently)
class MMKDClipProcessorKwargs(ProcessingKwargs, total=False):
    """Defaults: padding to the longest text of the batch, truncation to the tokenizer's context."""

    _defaults = DEFAULTS  # type: ignore[misc]


# trf-ignore: TRF057
class MMKDClipImageProcessor(CLIPImageProcessorPil):
    """The authors' pixels, by Pillow, wherever images come from: processor, pipelines and `AutoImageProcessor`.

    Shortest side to 224 pixels (bicubic, antialiased), central square, RGB, OpenAI's mean and standard deviation. The
    file has the format of ``CLIPImageProcessor``, whose torchvision backend is faster and differs by at most one grey
    level: ``CLIPImageProcessor.from_pretrained(folder)``.
    """

    # trf-ignore: TRF057
    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Prepare an image or a list of them (PIL, numpy or torch); PIL images of more than 8 bits are windowed."""
        return super().preprocess(window_deep_images(images), *args, **kwargs)


# trf-ignore: TRF057
class MMKDClipProcessor(ProcessorMixin):
    """Converts images to ``pixel_values``, texts to ``input_ids`` and ``attention_mask``.

    Args:
        image_processor: `MMKDClipImageProcessor`, or another one of transformers.
        tokenizer: the text tower's; its ``model_max_length`` is the context.
    """

    valid_processor_kwargs = MMKDClipProcessorKwargs

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer)
        self.auto_map = dict(AUTO_MAP)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Write a folder for every client, with nothing of the machine it was made on.

        transformers reads the image processor from ``processor_config.json``. ``preprocessor_config.json`` is a copy of
        these settings for clients in other languages, such as transformers.js: change both or neither.

        Returns:
            paths of the files.
        """
        for name in LOCAL_SETTINGS if self.tokenizer else ():
            self.tokenizer.init_kwargs.pop(name, None)
        if isinstance(self.image_processor, MMKDClipImageProcessor):
            self.image_processor.auto_map = dict(AUTO_MAP)  # type: ignore[attr-defined]
        files = super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / IMAGE_PROCESSOR_NAME
        values = {**self.image_processor.to_dict(), "image_processor_type": "CLIPImageProcessor"}
        values.pop("auto_map", None)  # from here pipelines would run the folder's code for a video processor
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return [*files, str(path)]

    # trf-ignore: TRF057
    def __call__(self, images: Any = None, text: Any = None, strict: bool | None = None, **kwargs: Any) -> BatchFeature:
        """Prepare images, texts or both.

        Args:
            images: an image or a list of them (PIL, numpy or torch); PIL images of more than 8 bits are windowed.
            text: a text or a list of them; those longer than the context are cut, with one warning.
            strict: refuse texts longer than the context, and empty ones.
            **kwargs: options of the image processor and the tokenizer.

        Raises:
            ValueError: no images and no texts; an input that is no image or no text, see `refuse_bad_images` and
                `refuse_bad_texts`; a text for a processor without a tokenizer; or what ``strict`` refuses.
        """
        if images is None and text is None:
            raise ValueError("give images, text or both: neither came")
        if images is not None:
            refuse_bad_images(images)
            images = window_deep_images(images)  # here too, for other image processors of transformers
        if text is not None:
            refuse_bad_texts(text, bool(strict))
            self._require_vocabulary()
            text = clean_text(text) if isinstance(text, str) else [_cleaned(item) for item in text]
        output = super().__call__(images=images, text=text, **kwargs)
        if text is not None:
            ids = output["input_ids"]
            rows = ids if len(ids) and hasattr(ids[0], "__len__") else [ids]
            context = kwargs.get("max_length") or self.tokenizer.model_max_length
            if max(len(row) for row in rows) >= context:
                self._warn_if_cut([text] if isinstance(text, str) else text, context, bool(strict))
        return output

    def _require_vocabulary(self) -> None:
        """Refuse the tokenizer of special tokens alone that transformers makes up where a folder has none."""
        if len(self.tokenizer) <= len(set(self.tokenizer.all_special_ids)):
            raise ValueError(
                f"{self.tokenizer.name_or_path or 'the processor'} has no tokenizer, so texts cannot be read; save the "
                "text tower's there: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            )

    def _warn_if_cut(self, texts: list[Any], context: int, strict: bool) -> None:
        """Warn once that a text was longer than the context, or refuse it."""
        for number, text in enumerate(texts):
            tokens = len(self.tokenizer(text, truncation=False, verbose=False)["input_ids"])
            if tokens > context:
                if strict:
                    raise ValueError(f"text {number} has {tokens} tokens; strict allows at most {context}")
                logger.warning_once(f"texts longer than {context} tokens are cut to their beginning")


def clean_text(text: str) -> str:
    """Unescape HTML twice and make every run of white space one space."""
    return " ".join(html.unescape(html.unescape(text)).split())


def _cleaned(text: Any) -> Any:
    return clean_text(text) if isinstance(text, str) else text


def window_deep_images(images: Any) -> Any:
    """An image or a list of them, those of PIL with more than 8 bits as 8-bit grey."""
    several = isinstance(images, (list, tuple))
    return [window_deep_image(image) for image in images] if several else window_deep_image(images)


def window_deep_image(image: Any) -> Any:
    """A PIL image of 16 or 32 bits or floating point as 8-bit grey; anything else as it is.

    Values from the 0.5th to the 99.5th percentile (from minimum to maximum where these coincide) become 0 to 255;
    values that are not finite are left out of the percentiles and count as the nearest end.
    """
    if not _is_deep(image):
        return image
    wide = image if image.mode in ("F", "I") else image.convert("I")
    kind = torch.float32 if wide.mode == "F" else torch.int32
    values = torch.frombuffer(bytearray(wide.tobytes()), dtype=kind).double()
    ordered = values[values.isfinite()].sort().values
    if not len(ordered):
        low, high = 0.0, 0.0
    else:
        low, high = (_percentile(ordered, percent) for percent in WINDOW_PERCENTILES)
        if high <= low:
            low, high = float(ordered[0]), float(ordered[-1])
    finite = torch.nan_to_num(values, nan=low, posinf=high, neginf=low)
    scaled = (finite - low) / max(high - low, torch.finfo(torch.float64).tiny)
    grey = image.convert("L")
    grey.frombytes((scaled.clamp(0, 1) * 255).round().byte().numpy().tobytes())
    return grey


def _percentile(ordered: torch.Tensor, percent: float) -> float:
    """A percentile of sorted values by linear interpolation, in the order of operations of `numpy.percentile`."""
    position = (len(ordered) - 1) * (percent / 100)
    below = int(position)
    low, high = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)])
    share = position - below
    return low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share)


def _is_deep(image: Any) -> bool:
    mode = getattr(image, "mode", None)
    return isinstance(mode, str) and hasattr(image, "tobytes") and (mode == "F" or mode.startswith("I"))


def refuse_bad_images(images: Any) -> None:
    """Raise on inputs that the image processor would take for pixels and are none, or would clip silently.

    Paths, URLs and nested lists are left to the image processor.

    Raises:
        ValueError: an empty list, a missing image, or one of the wrong depth, channels or values; the message says
            which, what came and what is allowed.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError("images is an empty list; give at least one image, or none with text alone")
        for number, image in enumerate(images):
            _refuse_bad_image(image, f"image {number}")
    elif getattr(images, "ndim", 0) == 4:
        for number, image in enumerate(images):
            _refuse_bad_image(image, f"image {number}")
    else:
        _refuse_bad_image(images, "the image")


def refuse_bad_texts(texts: Any, strict: bool) -> None:
    """Raise on inputs that are no texts, such as the NaN of an empty table cell.

    Raises:
        ValueError: no text, something else than text, or with ``strict`` an empty one.
    """
    if not isinstance(texts, (str, list, tuple)):
        raise ValueError(f"text is a {type(texts).__name__}; allowed: a string or a list of strings")
    rows = [texts] if isinstance(texts, str) else texts
    if not rows:
        raise ValueError("text is an empty list; give at least one text, or none with images alone")
    for number, text in enumerate(rows):
        if not isinstance(text, (str, list, tuple)):
            raise ValueError(f"text {number} is {text!r} of type {type(text).__name__}; allowed: strings")
        if strict and not "".join(text).strip():
            raise ValueError(f"text {number} is empty; strict allows texts with at least one character")


def _refuse_bad_image(image: Any, name: str) -> None:
    if image is None:
        raise ValueError(f"{name} is None; leave it out, or give a PIL image, an array or a tensor")
    if hasattr(image, "dtype") and hasattr(image, "shape"):
        _refuse_bad_array(image, name)


def _refuse_bad_array(image: Any, name: str) -> None:
    allowed = "allowed: (3, height, width) or (height, width, 3), uint8 or floating point from 0 to 255"
    shape = tuple(image.shape)
    if len(shape) != 3 or 3 not in (shape[0], shape[-1]):
        raise ValueError(f"{name} has the shape {shape}; {allowed}; repeat the channel of grey images three times")
    kind = str(image.dtype).removeprefix("torch.")
    if kind != "uint8" and not kind.startswith(("float", "bfloat")):
        raise ValueError(f"{name} is {kind}; {allowed}")
    total = image.sum(dtype=torch.float64 if isinstance(image, torch.Tensor) else "float64")
    if not math.isfinite(float(total)):
        raise ValueError(f"{name} has NaN or infinity; {allowed}, every one a finite number")


__all__ = ["MMKDClipImageProcessor", "MMKDClipProcessor", "clean_text"]
