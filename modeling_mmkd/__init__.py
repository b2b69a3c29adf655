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
"""MMKD-CLIP for Hugging Face Transformers; importing it registers the model with the Auto classes.

import modeling_mmkd
from transformers import AutoModel
model = AutoModel.from_pretrained("mmkd-clip")
"""

from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
)

from .modeling_mmkd import (
    PRESETS,
    MMKDClipConfig,
    MMKDClipModel,
    MMKDClipOutput,
    MMKDClipPreTrainedModel,
    MMKDClipTextModelWithProjection,
    MMKDClipVisionModelWithProjection,
)
from .processing_mmkd import MMKDClipImageProcessor, MMKDClipProcessor, clean_text

# AutoModel takes the class that the folder names under ``architectures``: the whole model or one half.
MODELS: Any = (MMKDClipModel, MMKDClipTextModelWithProjection, MMKDClipVisionModelWithProjection)

AutoConfig.register(MMKDClipConfig.model_type, MMKDClipConfig)
AutoModel.register(MMKDClipConfig, MODELS)
AutoModelForZeroShotImageClassification.register(MMKDClipConfig, MMKDClipModel)
AutoProcessor.register(MMKDClipConfig, MMKDClipProcessor)
AutoTokenizer.register(MMKDClipConfig, tokenizer_class=BertTokenizer)
# One class for both backends, so that AutoImageProcessor, AutoProcessor and pipelines give the same pixels.
AutoImageProcessor.register(
    MMKDClipConfig, image_processor_classes={"pil": MMKDClipImageProcessor, "torchvision": MMKDClipImageProcessor}
)

# Saved folders carry the code, so that they also work where this package is not installed.
MMKDClipConfig.register_for_auto_class()
for model in MODELS:
    model.register_for_auto_class("AutoModel")
MMKDClipProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "PRESETS",
    "MMKDClipConfig",
    "MMKDClipImageProcessor",
    "MMKDClipModel",
    "MMKDClipOutput",
    "MMKDClipPreTrainedModel",
    "MMKDClipProcessor",
    "MMKDClipTextModelWithProjection",
    "MMKDClipVisionModelWithProjection",
    "clean_text",
]
