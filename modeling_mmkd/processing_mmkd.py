# Copyright 2026 The mmkd-clip developers
# SPDX-License-Identifier: Apache-2.0
"""Processor of MMKD-CLIP: evaluation pixels as the authors computed them, captions as short as they are.

Texts are unescaped and freed of superfluous white space as in the authors' training, then padded to the longest of the
batch, never to the whole context.
"""

import html
from typing import Any

from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs
from transformers.utils import logging

from .inputs_mmkd import refuse_bad_images, refuse_bad_texts

logger = logging.get_logger(__name__)

AUTO_MAP = {"AutoProcessor": "processing_mmkd.MMKDClipProcessor"}  # as in the configuration, so that neither forgets it


class MMKDClipProcessorKwargs(ProcessingKwargs, total=False):
    """Defaults: padding to the longest text of the batch, truncation to the tokenizer's context."""

    _defaults = {"text_kwargs": {"padding": True, "truncation": True}}  # type: ignore[misc]  # noqa: RUF012


class MMKDClipProcessor(ProcessorMixin):
    """Images to ``pixel_values``, texts to ``input_ids`` and ``attention_mask``.

    Args:
        image_processor: shortest side to 224 pixels (bicubic, antialiased), central square, RGB, OpenAI's mean and
            standard deviation. ``CLIPImageProcessorPil`` gives the authors' pixels exactly; the torchvision backend is
            faster and differs by at most one grey level.
        tokenizer: the text tower's; its ``model_max_length`` is the context.
    """

    valid_processor_kwargs = MMKDClipProcessorKwargs

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer)
        self.auto_map = dict(AUTO_MAP)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> "MMKDClipProcessor":
        """Load from a folder or Hub id; ``backend="torchvision"`` is faster, the default ``"pil"`` exact."""
        return super().from_pretrained(pretrained_model_name_or_path, **{"backend": "pil", **kwargs})

    def __call__(self, images: Any = None, text: Any = None, strict: bool | None = None, **kwargs: Any) -> BatchFeature:
        """Prepare images, texts or both.

        Args:
            images: an image or a list of them (PIL, numpy or torch).
            text: a text or a list of them; longer ones than the context are cut, with one warning.
            strict: refuse texts longer than the context, and empty ones.
            **kwargs: options of the image processor and the tokenizer.

        Raises:
            ValueError: nothing came; an image or a text is none, see `refuse_bad_images` and `refuse_bad_texts`; a text
                is given, and the folder the processor was loaded from has no tokenizer; or what ``strict`` refuses.
        """
        if images is None and text is None:
            raise ValueError("give images, text or both: neither came")
        if images is not None:
            refuse_bad_images(images)
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
                self._tell_if_cut([text] if isinstance(text, str) else text, context, bool(strict))
        return output

    def _require_vocabulary(self) -> None:
        """Refuse the tokenizer that transformers makes up where a folder has none: it knows special tokens only."""
        if len(self.tokenizer) <= len(set(self.tokenizer.all_special_ids)):
            raise ValueError(
                f"{self.tokenizer.name_or_path or 'the processor'} has no tokenizer, so texts cannot be read; save the "
                "text tower's there: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            )

    def _tell_if_cut(self, texts: list[Any], context: int, strict: bool) -> None:
        """Say once that a text was longer than the context, or refuse it."""
        for number, text in enumerate(texts):
            tokens = len(self.tokenizer(text, truncation=False, verbose=False)["input_ids"])
            if tokens > context:
                if strict:
                    raise ValueError(f"text {number} has {tokens} tokens; strict allows at most {context}")
                logger.warning_once(f"texts longer than {context} tokens are cut to their beginning")


def _cleaned(text: Any) -> Any:
    return clean_text(text) if isinstance(text, str) else text


def clean_text(text: str) -> str:
    """Unescape HTML twice and make every run of white space one space."""
    return " ".join(html.unescape(html.unescape(text)).split())


__all__ = ["MMKDClipProcessor", "clean_text"]
