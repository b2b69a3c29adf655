"""Heat maps point at what the similarity depends on, and depend on the weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import save_tiny
from torch import nn

from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.zoo import load_encoder
from mmkd.serving.explain import heat_map, overlay

COLOURS = {"red": (200, 20, 20), "blue": (20, 20, 200)}


class ColourEncoder(DualEncoder):
    """Image features: shares of red and of blue pixels; text features: the colour that the text names."""

    def __init__(self):
        super().__init__("colours", 3, {})

    def image_features(self, prepared):
        rows = []
        for image in prepared:
            pixels = np.asarray(image).astype(int)
            rows.append([np.mean(pixels[..., k] - pixels[..., 2 - k] > 100) for k in (0, 2)] + [0.02])
        return torch.tensor(rows, dtype=torch.float32)

    def text_features(self, texts):
        return torch.tensor([[float("red" in text), float("blue" in text), 0.1] for text in texts])


def picture(width=200, height=100):
    """A red square at the top left, a blue one at the bottom right."""
    image = Image.new("RGB", (width, height), (120, 120, 120))
    image.paste(COLOURS["red"], (10, 10, 30, 30))
    image.paste(COLOURS["blue"], (160, 70, 180, 90))
    return image


@pytest.mark.parametrize(("text", "other", "place"), [("red", "blue", (2, 2)), ("blue", "red", (8, 17))])
def test_the_hottest_place_is_what_the_text_names(text, other, place):
    heat = heat_map(ColourEncoder(), picture(), text)
    assert heat.shape == (10, 20) and heat.dtype == np.float32
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert abs(row - place[0]) <= 1 and abs(column - place[1]) <= 1
    assert heat.max() > 0.1 and abs(heat[9, 0]) < 0.01
    contrast = heat_map(ColourEncoder(), picture(), text, other)
    assert contrast.max() > 0.1 and contrast.min() < -0.1  # the other square speaks against
    assert np.allclose(contrast, -heat_map(ColourEncoder(), picture(), other, text), atol=1e-6)


def test_the_size_of_a_large_image_does_not_matter():
    small, large = picture(), picture().resize((2000, 1000), Image.Resampling.NEAREST)
    maps = [heat_map(ColourEncoder(), image, "red") for image in (small, large)]
    assert np.allclose(*maps, atol=0.05)


def test_other_weights_give_another_map(tmp_path):
    save_tiny(tmp_path / "model")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    encoder = load_encoder(str(tmp_path / "model"))
    first = heat_map(encoder, image, "CT scan", cells=6)
    assert np.array_equal(first, heat_map(encoder, image, "CT scan", cells=6))
    correlations = []
    for seed in range(4):
        torch.manual_seed(seed)
        for module in encoder.model.vision_model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                module.reset_parameters()
        other = heat_map(encoder, image, "CT scan", cells=6)
        correlations.append(np.corrcoef(first.ravel(), other.ravel())[0, 1])
    assert abs(np.mean(correlations)) < 0.4 and max(correlations) < 0.9


def test_the_overlay_colours_positive_heat_alone():
    heat = np.zeros((10, 10), dtype=np.float32)
    heat[2, 2], heat[7, 7] = 0.5, -0.5
    image = Image.new("RGB", (100, 100), (80, 80, 80))
    drawn = np.asarray(overlay(image, heat)).astype(int)
    assert drawn.shape == (100, 100, 3)
    assert np.ptp(drawn[25, 25]) > 50  # coloured
    assert tuple(drawn[75, 75]) == (80, 80, 80)
    flat = overlay(image, -np.abs(heat))
    assert np.array_equal(np.asarray(flat), np.asarray(image))


def test_what_cannot_be_explained_is_refused():
    with pytest.raises(ValueError, match="at least 3"):
        heat_map(ColourEncoder(), picture(), "red", cells=2)
    with pytest.raises(ValueError, match="text is empty"):
        heat_map(ColourEncoder(), picture(), "  ")
