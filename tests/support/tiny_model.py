"""A tiny model folder, as `from_pretrained` reads it."""

import torch
from authors_form import tokenizer

from modeling_mmkd import MMKDClipConfig, MMKDClipImageProcessor, MMKDClipModel, MMKDClipProcessor

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VISION = {**SMALL, "image_size": 32, "patch_size": 16}
TEXT = {**SMALL, "vocab_size": 70, "max_position_embeddings": 40}
CONTEXT = 24


def save_tiny(path, **options):
    torch.manual_seed(0)
    config = MMKDClipConfig(
        vision_config=VISION, text_config=TEXT, projection_dim=16, context_length=CONTEXT, **options
    )
    MMKDClipModel(config).save_pretrained(path)
    pixels = MMKDClipImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    MMKDClipProcessor(pixels, tokenizer(70, model_max_length=CONTEXT)).save_pretrained(path)
    return path
