# Copyright 2026 The mmkd-clip developers
# SPDX-License-Identifier: Apache-2.0
"""Named sizes of MMKD-CLIP, from the paper's student to one for a telephone.

Each is what `MMKDClipConfig` is given. The widths are those of towers with public weights, so that a student of one of
these sizes can also start from them (``mmkd pretrain --vision timm:... --text ...``): ViT-S and ViT-Ti of timm,
MobileNetV4, and BERTs of 384 and 312 wide.
"""

from typing import Any

_SMALL_TEXT = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
_TINY_TEXT = {"hidden_size": 312, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 1200}

PRESETS: dict[str, dict[str, Any]] = {
    "mmkd-clip-base": {},  # ViT-B/16 and BiomedBERT-base, as published
    "mmkd-clip-small": {
        "vision_config": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
        "text_config": _SMALL_TEXT,
        "projection_dim": 384,
    },
    "mmkd-clip-tiny": {
        "vision_config": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
        "text_config": _TINY_TEXT,
        "projection_dim": 256,
    },
    "mmkd-clip-mobile": {
        "vision_config": {"model_type": "timm_wrapper", "architecture": "mobilenetv4_conv_small"},
        "text_config": _TINY_TEXT,
        "projection_dim": 256,
    },
}


__all__ = ["PRESETS"]
