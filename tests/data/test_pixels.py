"""Fast decoding gives Pillow's pixels, hands odd files to Pillow, and refuses what Pillow refuses."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mmkd.data import pixels
from mmkd.data.images import UnreadableImageError, open_image
from mmkd.data.pixels import crop_box, random_crop, read_pixels, to_tensor


def figure(mode="RGB", size=(90, 70)):
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    bands = np.stack([127 + 120 * np.sin(x / 9 + k) * np.cos(y / (7 + k)) for k in range(4)], 2).astype(np.uint8)
    image = Image.fromarray(bands[:, :, :3])
    if mode == "CMYK":
        return Image.frombytes("CMYK", size, bands.tobytes())
    return Image.fromarray(bands[:, :, 0].astype(np.uint16) * 200) if mode == "I;16" else image.convert(mode)


def encoded(image, form="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.fixture
def calls(monkeypatch):
    """The files that Pillow decoded."""
    seen, real = [], pixels.finish_image
    monkeypatch.setattr(pixels, "finish_image", lambda *given: seen.append(given) or real(*given))
    return seen


@pytest.mark.parametrize(
    "data",
    [
        encoded(figure(), quality=90),
        encoded(figure(), quality=100, subsampling=0),
        encoded(figure(), quality=75, subsampling=1, progressive=True),
        encoded(figure("L")),
        encoded(figure(size=(91, 71)), exif=turned(1)),
    ],
)
def test_plain_jpeg_is_decoded_fast_to_the_same_pixels(data, calls):
    assert torch.equal(read_pixels(data), to_tensor(open_image(data)))
    assert not calls


@pytest.mark.parametrize(
    "data",
    [
        encoded(figure("CMYK")),
        encoded(figure(), exif=turned(6)),
        encoded(figure(), exif=turned(3)),
        encoded(figure(), xmp=b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="8"/>'),
        encoded(figure(), "PNG"),
        encoded(figure("P"), "PNG"),
        encoded(figure("I;16"), "PNG"),
        encoded(figure("RGBA"), "PNG"),
        encoded(figure(), "TIFF"),
        encoded(figure("P"), "GIF"),
    ],
)
def test_odd_files_are_read_by_pillow(data, calls):
    assert torch.equal(read_pixels(data), to_tensor(open_image(data)))
    assert len(calls) == 1


def test_without_simplejpeg_pixels_are_the_same(monkeypatch):
    data = encoded(figure(size=(900, 700)))
    whole, quarter = read_pixels(data), read_pixels(data, draft_side=150)
    monkeypatch.setattr(pixels, "simplejpeg", None)
    assert torch.equal(read_pixels(data), whole)
    assert torch.equal(read_pixels(data, draft_side=150), quarter)
    assert quarter.shape == (3, 175, 225)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(figure())[:900], "corrupt"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "corrupt|unsupported"),
        (b"GIF89a nothing", "corrupt|unsupported"),
        (encoded(Image.new("L", (4000, 30))), "too_narrow"),
        (encoded(Image.new("L", (6, 40))), "too_small"),
        (encoded(Image.new("L", (12000, 9000))), "too_large"),
    ],
)
def test_the_same_files_are_refused_for_the_same_reason(data, reason):
    messages = []
    for read in (read_pixels, open_image):
        with pytest.raises(UnreadableImageError, match=reason) as caught:
            read(data)
        messages.append(caught.value.reason)
    assert messages[0] == messages[1]


def test_real_images_are_pillow_s_own_and_crops_within_a_rounding(shared_data):
    files = [path for folder in shared_data.iterdir() for path in sorted(folder.rglob("*.jp*g"))[:4]]
    assert len(files) > 20
    for number, path in enumerate(files):
        image = open_image(path)
        decoded = read_pixels(path)
        assert torch.equal(decoded, to_tensor(image)), path
        square = random_crop(decoded, 224, np.random.default_rng(number)).permute(1, 2, 0).numpy()
        left, top, width, height = crop_box(*image.size, np.random.default_rng(number))
        pillow = image.crop((left, top, left + width, top + height)).resize((224, 224), Image.Resampling.BICUBIC)
        error = np.square(square - np.asarray(pillow, dtype=float)).mean()
        assert 10 * np.log10(255**2 / max(error, 1e-9)) > 50, path


def test_crops_cover_position_area_and_aspect_evenly():
    generator = np.random.default_rng(0)
    boxes = np.array([crop_box(400, 300, generator) for _ in range(500)])
    left, top, width, height = boxes.T
    assert (left >= 0).all() and (left + width <= 400).all() and (top >= 0).all() and (top + height <= 300).all()
    area, aspect = width * height / (400 * 300), width / height
    assert area.min() > 0.895 and area.max() < 1.005 and np.ptp(area) > 0.09
    assert aspect.min() > 1.15 and aspect.max() <= 4 / 3 + 0.01  # what fits of 3:4 to 4:3 into this image
    slack = (400 - width) > 10
    assert abs((left / np.maximum(400 - width, 1))[slack].mean() - 0.5) < 0.07
