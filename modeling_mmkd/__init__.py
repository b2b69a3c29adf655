# Copyright 2026 The mmkd-clip developers
# SPDX-License-Identifier: Apache-2.0
"""MMKD-CLIP for Hugging Face Transformers; importing it teaches the Auto classes the model.

import modeling_mmkd
from transformers import AutoModel
model = AutoModel.from_pretrained("mmkd-clip")
"""

import contextlib

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
)

from .configuration_mmkd import MMKDClipConfig
from .modeling_mmkd import (
    MMKDClipModel,
    MMKDClipOutput,
    MMKDClipTextModelWithProjection,
    MMKDClipVisionModelWithProjection,
)
from .presets_mmkd import PRESETS
from .processing_mmkd import MMKDClipProcessor, clean_text
from .towers_mmkd import MMKDClipPreTrainedModel

AutoConfig.register(MMKDClipConfig.model_type, MMKDClipConfig)
AutoModel.register(MMKDClipConfig, MMKDClipModel)
AutoModelForZeroShotImageClassification.register(MMKDClipConfig, MMKDClipModel)
AutoProcessor.register(MMKDClipConfig, MMKDClipProcessor)
with contextlib.suppress(ImportError):  # transformers 5.8 has no AutoImageProcessor without torchvision
    AutoImageProcessor.register(
        MMKDClipConfig, image_processor_classes={"torchvision": CLIPImageProcessor, "pil": CLIPImageProcessorPil}
    )
AutoTokenizer.register(MMKDClipConfig, tokenizer_class=BertTokenizer)

# What is saved carries its code, so that the folder also works where this package is not installed.
MMKDClipConfig.register_for_auto_class()
MMKDClipModel.register_for_auto_class("AutoModel")
MMKDClipTextModelWithProjection.register_for_auto_class("AutoModel")
MMKDClipVisionModelWithProjection.register_for_auto_class("AutoModel")
MMKDClipProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "PRESETS",
    "MMKDClipConfig",
    "MMKDClipModel",
    "MMKDClipOutput",
    "MMKDClipPreTrainedModel",
    "MMKDClipProcessor",
    "MMKDClipTextModelWithProjection",
    "MMKDClipVisionModelWithProjection",
    "clean_text",
]
