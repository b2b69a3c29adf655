"""The fast square against Pillow's, in both libraries' ways of cutting the centre."""

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from transformers import CLIPImageProcessorPil

from mmkd.data.pixels import to_tensor
from mmkd.encoders.encoder import FastSquare

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(300, 225), (225, 301), (64, 64), (40, 97), (224, 224), (1201, 33)]


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_within_one_grey_level_of_the_library(library):
    worst = 0.0
    for k, (width, height) in enumerate(SIZES):
        noise = np.random.default_rng(k).integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        if library == "open_clip":
            expected = image_transform_v2(PreprocessCfg(size=64, mean=MEAN, std=STD), is_train=False)(image)
            found = FastSquare(64, MEAN, STD, "round")(to_tensor(image))
        else:
            processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=64)
            expected = processor([image], return_tensors="pt")["pixel_values"][0]
            found = FastSquare(64, MEAN, STD, "floor")(to_tensor(image))
        apart = (found - expected).abs() * 255 * torch.tensor(STD).view(3, 1, 1)
        assert apart.max() < 1.01, (width, height)
        assert (apart > 0.5).float().mean() < 0.02, (width, height)
        worst = max(worst, float(apart.max()))
    assert worst > 0.5  # else the promise could be a stronger one
