"""Every bad form of image gives 8-bit RGB or one of the named reasons."""

import io
import os

import numpy as np
import pytest
from damage import png_of_size
from PIL import Image

from mmkd.data.images import is_plain, open_image
from mmkd.data.pixel_rules import REASONS, UnreadableImageError

GRADIENT = np.linspace(0, 255, 40 * 30).reshape(30, 40)
COLOR = np.stack([GRADIENT, 255 - GRADIENT, np.full_like(GRADIENT, 40)], axis=2).astype(np.uint8)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def reason_of(source, **options):
    with pytest.raises(UnreadableImageError) as caught:
        open_image(source, **options)
    assert caught.value.reason in REASONS
    return caught.value.reason


def test_missing_and_folder(tmp_path):
    assert reason_of(tmp_path / "no.png") == "missing"
    assert reason_of(tmp_path) == "missing"
    os.mkfifo(tmp_path / "pipe.png")
    assert reason_of(tmp_path / "pipe.png") == "missing"
    with pytest.raises(UnreadableImageError, match=r"no\.png"):
        open_image(tmp_path / "no.png")


@pytest.mark.parametrize(
    "data", [b"", b"not an image, but long enough", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_unsupported(data):
    assert reason_of(data) == "unsupported"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP", "GIF"])
def test_truncated(format):
    rng = np.random.default_rng(0)
    data = encoded(Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)), format)
    assert reason_of(data[: len(data) // 2]) in ("corrupt", "unsupported")


def test_damaged_in_the_middle():
    data = bytearray(encoded(Image.fromarray(COLOR), "PNG"))
    data[60:70] = b"\0" * 10
    assert reason_of(bytes(data)) == "corrupt"


def test_sizes():
    assert reason_of(encoded(Image.new("RGB", (1, 1)))) == "too_small"
    assert reason_of(encoded(Image.new("RGB", (40, 31))), minimum_side=32) == "too_small"
    assert reason_of(png_of_size(20_000, 20_000)) == "too_large"
    assert reason_of(png_of_size(10_000, 10_000)) == "too_large"
    assert reason_of(png_of_size(5_000, 20)) == "too_narrow"


def test_a_real_image_bomb_is_refused_undecoded(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert reason_of(tmp_path / "bomb.png") == "too_large"


def test_cmyk_palette_and_bilevel_become_rgb():
    rgb = Image.fromarray(COLOR)
    for image, format in ((rgb.convert("CMYK"), "JPEG"), (rgb.convert("P", palette=Image.Palette.ADAPTIVE), "PNG")):
        opened = open_image(encoded(image, format))
        assert opened.mode == "RGB"
        assert np.abs(np.asarray(opened, dtype=int) - COLOR).mean() < 12
    bilevel = open_image(encoded(Image.fromarray(GRADIENT > 127)))
    assert set(np.unique(np.asarray(bilevel))) == {0, 255}


def test_transparency_lies_on_white():
    pixels = np.dstack([COLOR, np.zeros((30, 40), dtype=np.uint8)])
    pixels[:, 20:, 3] = 255
    opened = np.asarray(open_image(encoded(Image.fromarray(pixels))))
    assert (opened[:, :20] == 255).all()
    assert (opened[:, 20:] == COLOR[:, 20:]).all()
    palette = Image.fromarray(COLOR).quantize(8)
    palette.info["transparency"] = 0
    opened = np.asarray(open_image(encoded(palette, transparency=0)))
    assert (opened[np.asarray(palette) == 0] == 255).all()
    grey = Image.merge("LA", [Image.new("L", (30, 30), 50), Image.new("L", (30, 30), 0)])
    assert (np.asarray(open_image(encoded(grey))) == 255).all()


def test_deep_grey_is_windowed():
    for values, format in (
        ((GRADIENT * 16).astype(np.uint16), "PNG"),
        ((GRADIENT * 100000).astype(np.int32), "TIFF"),
        ((GRADIENT / 255 - 0.5).astype(np.float32), "TIFF"),
    ):
        opened = np.asarray(open_image(encoded(Image.fromarray(values), format)))
        assert opened.min() == 0
        assert opened.max() == 255
        assert np.abs(opened[..., 0].astype(int) - GRADIENT).max() < 4
    broken = (GRADIENT / 255).astype(np.float32)
    broken[0, :3] = np.nan, np.inf, -np.inf
    opened = np.asarray(open_image(encoded(Image.fromarray(broken), "TIFF")))
    assert opened[0, :3, 0].tolist() == [0, 255, 0]
    for value in (0.0, np.nan):
        flat = open_image(encoded(Image.fromarray(np.full((30, 40), value, dtype=np.float32)), "TIFF"))
        assert not np.asarray(flat).any()
    sparse = np.zeros((100, 100), dtype=np.uint16)
    sparse[0, 0] = 900
    assert np.asarray(open_image(encoded(Image.fromarray(sparse)))).max() == 255


def test_first_frame_of_animations_and_stacks():
    frames = [Image.new("RGB", (30, 30), color) for color in ("red", "blue")]
    for format in ("GIF", "TIFF", "WEBP", "PNG"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert open_image(data).getpixel((3, 3)) == (255, 0, 0)


def test_orientation_is_applied_and_broken_exif_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(COLOR), "PNG", exif=exif)
    opened = open_image(data)
    assert opened.size == (30, 40)
    assert (np.asarray(opened) == np.rot90(COLOR, -1)).all()
    assert not is_plain(data)
    assert open_image(encoded(Image.fromarray(COLOR), "JPEG", exif=b"Exif\0\0garbage")).size == (40, 30)


def test_draft_reduces_large_jpeg_only():
    large = Image.fromarray(COLOR).resize((1600, 1200))
    assert open_image(encoded(large, "JPEG"), draft_side=300).size == (400, 300)
    assert open_image(encoded(large, "JPEG"), draft_side=301).size == (800, 600)
    assert open_image(encoded(large, "PNG"), draft_side=300).size == (1600, 1200)


def test_plain_files():
    assert is_plain(encoded(Image.fromarray(COLOR), "JPEG"))
    assert is_plain(encoded(Image.fromarray(COLOR).convert("L"), "PNG"))
    for image in (
        Image.fromarray(COLOR).convert("P"),
        Image.fromarray(COLOR).convert("RGBA"),
        Image.new("1", (20, 20)),
    ):
        assert not is_plain(encoded(image))
    assert not is_plain(encoded(Image.fromarray(GRADIENT.astype(np.uint16))))
    assert not is_plain(encoded(Image.fromarray(COLOR).convert("CMYK"), "JPEG"))
    assert not is_plain(encoded(Image.fromarray(COLOR), "TIFF"))


def test_paths_with_blanks_and_any_script(tmp_path):
    path = tmp_path / "Bilder von heute" / "изображение 図 é.png"
    path.parent.mkdir()
    Image.fromarray(COLOR).save(path)
    assert (np.asarray(open_image(path)) == COLOR).all()
