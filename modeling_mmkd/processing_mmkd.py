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

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare images, texts or both.

        Args:
            images: an image or a list of them (PIL, numpy or torch).
            text: a text or a list of them; longer ones than the context are cut, with one warning.
            **kwargs: options of the image processor and the tokenizer.

        Raises:
            ValueError: a text is given, and the folder the processor was loaded from has no tokenizer; or the list of
                texts is empty.
        """
        if text is not None:
            self._require_vocabulary()
        if isinstance(text, str):
            text = clean_text(text)
        elif text is not None:
            text = [clean_text(item) if isinstance(item, str) else item for item in text]
            if not text:
                raise ValueError("text is an empty list; give at least one text, or none with images alone")
        output = super().__call__(images=images, text=text, **kwargs)
        if text is not None:
            ids = output["input_ids"]
            rows = ids if len(ids) and hasattr(ids[0], "__len__") else [ids]
            context = kwargs.get("max_length") or self.tokenizer.model_max_length
            if max(len(row) for row in rows) >= context:
                self._warn_if_cut([text] if isinstance(text, str) else text, context)
        return output

    def _require_vocabulary(self) -> None:
        """Refuse the tokenizer that transformers makes up where a folder has none: it knows special tokens only."""
        if len(self.tokenizer) <= len(set(self.tokenizer.all_special_ids)):
            raise ValueError(
                f"{self.tokenizer.name_or_path or 'the processor'} has no tokenizer, so texts cannot be read; save the "
                "text tower's there: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            )

    def _warn_if_cut(self, texts: list[Any], context: int) -> None:
        """Say once that a text was longer than the context."""
        lengths = (len(self.tokenizer(text, truncation=False, verbose=False)["input_ids"]) for text in texts)
        if any(length > context for length in lengths):
            logger.warning_once(f"texts longer than {context} tokens are cut to their beginning")


def clean_text(text: str) -> str:
    """Unescape HTML twice and make every run of white space one space."""
    return " ".join(html.unescape(html.unescape(text)).split())


__all__ = ["MMKDClipProcessor", "clean_text"]
