import pytest
import torch
from PIL import Image

from mmkd.encoders.encoder import DualEncoder


class Counting(DualEncoder):
    """Mean colour and number of characters; remembers the sizes of its batches."""

    def __init__(self, dim=3, batch_size=2):
        super().__init__("counting", dim, {}, batch_size)
        self.batches = []

    def image_features(self, images):
        self.batches.append(len(images))
        return torch.tensor([[float(band) + 1 for band in image.getpixel((0, 0))] for image in images])

    def text_features(self, texts):
        assert torch.is_inference_mode_enabled()
        return torch.tensor([[len(text), 1.0, 0.0] for text in texts], dtype=torch.float64)


def test_unit_length_in_batches():
    encoder = Counting()
    images = [Image.new("RGB", (2, 2), (level, 0, 0)) for level in range(5)]
    found = encoder.encode_images(images)
    assert encoder.batches == [2, 2, 1]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(found[3], torch.tensor([4.0, 1.0, 1.0]) / 18**0.5)
    torch.testing.assert_close(encoder.encode_texts(["abcd"])[0], torch.tensor([4.0, 1.0, 0.0]) / 17**0.5)


def test_any_image_mode_becomes_rgb():
    images = [Image.new("L", (2, 2), 9), Image.new("RGBA", (2, 2), (0, 0, 0, 0)), Image.new("P", (2, 2))]
    found = Counting().encode_images(images)
    torch.testing.assert_close(found[1], torch.full((3,), 3**-0.5))  # transparent is white


def test_nothing_gives_nothing():
    assert Counting().encode_images([]).shape == (0, 3)
    assert Counting().encode_texts([]).shape == (0, 3)


def test_wrong_shapes_and_broken_numbers_are_refused():
    with pytest.raises(ValueError, match=r"text features \(1, 3\), expected \(1, 7\)"):
        Counting(dim=7).encode_texts(["a"])
    broken = Counting()
    broken.text_features = lambda texts: torch.full((len(texts), 3), torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        broken.encode_texts(["a"])
    for number in (0.0, 1e30):  # the norm of the latter is infinite, and what is divided by it zero
        broken.text_features = lambda texts, number=number: torch.full((len(texts), 3), number)
        with pytest.raises(ValueError, match="features of length 0, or beyond"):
            broken.encode_texts(["a"])


def test_equal_texts_are_encoded_once_and_order_is_kept():
    encoder = Counting(batch_size=8)
    seen = []
    real = encoder.text_features
    encoder.text_features = lambda texts: seen.extend(texts) or real(texts)
    found = encoder.encode_texts(["ccc", "a", "ccc", "bb"])
    assert seen == ["a", "bb", "ccc"]
    torch.testing.assert_close(found[:, 0], torch.tensor([3.0, 1.0, 3.0, 2.0]) / torch.tensor([10, 2, 10, 5]).sqrt())
