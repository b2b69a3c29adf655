"""The smallest student, and batches with captions of any lengths as `Collate` makes them."""

import random

import torch
from transformers import BertConfig, CLIPVisionConfig

from mmkd.student.embed import PixelStatistics
from modeling_mmkd import MMKDClipConfig, MMKDClipModel

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def model():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **SMALL)
    text = BertConfig(vocab_size=50, max_position_embeddings=64, **SMALL)
    config = MMKDClipConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=8)
    return MMKDClipModel(config).eval()


def batch(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows, longest = len(lengths), max(lengths)
    mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()
    return {
        "pixel_values": torch.randint(0, 256, (rows, 3, 16, 16), generator=g, dtype=torch.uint8),
        "pixel_statistics": PixelStatistics((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
        "input_ids": torch.randint(1, 50, (rows, longest), generator=g) * mask,
        "attention_mask": mask,
        "text_lengths": lengths,
    }


def descending(rows, seed=0):
    generator = random.Random(seed)
    return sorted((min(60, int(generator.lognormvariate(2.8, 0.8)) + 2) for _ in range(rows)), reverse=True)
