"""Pixels as the authors computed them, captions cleaned, padded to the longest and cut with a word of warning."""

import json
import logging

import numpy as np
import pytest
import torch
from authors_form import tokenizer
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, CLIPImageProcessor

from mmkd.data.images import to_rgb
from modeling_mmkd import MMKDClipConfig, MMKDClipImageProcessor, MMKDClipModel, MMKDClipProcessor, clean_text
from modeling_mmkd.processing_mmkd import logger

GREY_LEVEL = 1 / 255 / 0.26130258  # the smallest standard deviation gives the largest step
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole model folder with the authors' image size."""
    path = tmp_path_factory.mktemp("model")
    text = {**SMALL, "vocab_size": 60, "max_position_embeddings": 32}
    MMKDClipModel(MMKDClipConfig(vision_config=SMALL, text_config=text, projection_dim=8)).save_pretrained(path)
    MMKDClipProcessor(MMKDClipImageProcessor(), tokenizer(60, model_max_length=32)).save_pretrained(path)
    return path


@pytest.fixture
def processor(folder):
    return MMKDClipProcessor.from_pretrained(folder)


@pytest.fixture
def warnings():
    """Messages of the processor's logger, which says each only once."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    type(logger).warning_once.cache_clear()
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("reader", "tolerance"),
    [(AutoProcessor, 1e-5), (AutoImageProcessor, 1e-5), (CLIPImageProcessor, GREY_LEVEL + 1e-5)],
)
def test_pixels_are_the_authors(folder, golden, shared_data, reader, tolerance):
    examples = shared_data / "mmkd_clip_official" / "modality_examples"
    expected = np.load(golden / "preprocess.npz")
    processor = reader.from_pretrained(folder)
    assert len(expected.files) == 9
    for name in expected.files:
        with Image.open(examples / name) as image:
            pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 224, 224)
        np.testing.assert_allclose(pixels[0, :, ::8, ::8], expected[name], atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.parametrize("size", [(224, 224), (31, 77), (500, 301), (1, 300)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pixels_by_hand(processor, size, mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
    scale = 224 / min(size)
    wide = tuple(int(side * scale) if side != min(size) else 224 for side in size)
    resized = image.convert("RGB").resize(wide, Image.Resampling.BICUBIC)
    left, top = (wide[0] - 224) // 2, (wide[1] - 224) // 2
    square = np.asarray(resized.crop((left, top, left + 224, top + 224)), dtype=np.float64) / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(pixels, ((square - mean) / std).transpose(2, 0, 1), atol=1e-5)


def test_auto_classes_read_the_folder(folder):
    assert isinstance(AutoProcessor.from_pretrained(folder), MMKDClipProcessor)
    for pixels in (AutoProcessor.from_pretrained(folder).image_processor, AutoImageProcessor.from_pretrained(folder)):
        assert type(pixels) is MMKDClipImageProcessor and pixels.size["shortest_edge"] == 224
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 32


def test_saved_and_loaded_it_does_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = MMKDClipProcessor.from_pretrained(tmp_path)
    image = Image.fromarray(np.arange(90 * 70 * 3, dtype=np.uint8).reshape(90, 70, 3))
    ours = processor(images=[image], text=["ct of the lung", "mri"], return_tensors="pt")
    theirs = again(images=[image], text=["ct of the lung", "mri"], return_tensors="pt")
    assert ours.keys() == theirs.keys() == {"pixel_values", "input_ids", "attention_mask", "token_type_ids"}
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_captions_are_padded_to_the_longest(processor):
    batch = processor(text=["ct", "ct of the lung"], return_tensors="pt")
    assert batch["input_ids"].shape == (2, 6)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 6]
    assert batch["input_ids"][0, 3:].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("ct  of\n\tthe lung ", "ct of the lung"),
        ("a &lt; b", "a < b"),
        ("a &amp;lt; b", "a < b"),
        ("x&nbsp;y", "x y"),
        ("", ""),
    ],
)
def test_texts_are_cleaned(processor, raw, clean):
    assert clean_text(raw) == clean
    assert processor(text=raw)["input_ids"] == processor.tokenizer(clean)["input_ids"]


@pytest.mark.parametrize("tensors", [None, "pt"])
def test_five_thousand_words_are_cut_with_a_warning(processor, warnings, tensors):
    batch = processor(text=["ct", "lung " * 5000], return_tensors=tensors)
    assert [len(row) for row in batch["input_ids"]] == [32, 32]
    assert int(batch["input_ids"][1][-1]) == processor.tokenizer.sep_token_id
    processor(text="mri " * 4000)
    assert warnings == ["texts longer than 32 tokens are cut to their beginning"]


def test_a_caption_that_just_fits_is_not_said_to_be_cut(processor, warnings):
    assert len(processor(text="lung " * 30)["input_ids"]) == 32
    assert len(processor(text="lung " * 30, max_length=32)["input_ids"]) == 32
    assert warnings == []


def test_a_single_text_and_an_empty_list(processor):
    assert processor(text="ct")["input_ids"] == processor.tokenizer("ct")["input_ids"]
    assert processor(text="ct", return_tensors="pt")["input_ids"].shape == (1, 3)


def test_without_a_vocabulary_texts_are_refused(processor, folder, tmp_path):
    processor.image_processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    lonely = AutoProcessor.from_pretrained(tmp_path)
    assert lonely(images=Image.new("RGB", (9, 9)))["pixel_values"][0].shape == (3, 224, 224)
    with pytest.raises(ValueError, match="no tokenizer"):
        lonely(text="ct", images=Image.new("RGB", (9, 9)))


def test_no_texts_and_texts_of_nothing(processor):
    with pytest.raises(ValueError, match="text is an empty list"):
        processor(text=[])
    for nothing in ("", " \n", [""]):
        assert processor(text=nothing, return_tensors="pt")["input_ids"].shape == (1, 2)  # beginning and end


GREY = np.full((40, 50, 3), 90, dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images is an empty list"),
        ([Image.new("L", (9, 9)), None], "image 1 is None"),
        (np.zeros((40, 50), np.uint8), r"the image has the shape \(40, 50\); allowed: \(3, height, width\)"),
        ([np.zeros((4, 40, 50), np.uint8)], r"image 0 has the shape \(4, 40, 50\)"),
        (torch.zeros(2, 1, 40, 50), r"image 0 has the shape \(1, 40, 50\)"),
        ([GREY, GREY.astype(np.uint16) * 400], "image 1 is uint16; allowed"),
        (torch.zeros(3, 40, 50, dtype=torch.int64), "the image is int64; allowed"),
        ([np.where(GREY > 0, np.nan, GREY)], "image 0 has NaN or infinity; allowed"),
        (torch.full((3, 40, 50), torch.inf, dtype=torch.float16), "the image has NaN or infinity"),
    ],
)
def test_images_that_are_none_are_refused(processor, images, message):
    with pytest.raises(ValueError, match=message):
        processor(images=images, return_tensors="pt")


@pytest.mark.parametrize("kind", ["<u2", ">u2", "i4", "f4"])
def test_deep_grey_is_windowed_as_in_training(processor, kind):
    values = np.random.default_rng(0).normal(1000, 300, (41, 53)).astype(kind)
    if kind == "f4":
        values[0, :3] = np.nan, np.inf, -np.inf
    deep = Image.fromarray(values) if kind != ">u2" else Image.frombytes("I;16B", (53, 41), values.tobytes())
    expected = processor(images=to_rgb(deep), return_tensors="pt")["pixel_values"]
    assert expected.std() > 0.3
    for images in (deep, [deep], (deep,)):
        assert torch.equal(processor(images=images, return_tensors="pt")["pixel_values"], expected)
    for value in (7, np.nan if kind == "f4" else 0):
        flat = Image.fromarray(np.full((40, 30), value, "f4" if kind == "f4" else "i4"))
        assert torch.equal(
            processor(images=flat, return_tensors="pt")["pixel_values"],
            processor(images=Image.new("RGB", (30, 40)), return_tensors="pt")["pixel_values"],
        )


def test_arrays_and_tensors_that_are_images_give_the_pixels_of_pil(processor):
    expected = processor(images=Image.fromarray(GREY), return_tensors="pt")["pixel_values"]
    channels_first = torch.from_numpy(GREY).permute(2, 0, 1)
    for image in (GREY, channels_first, channels_first.float(), channels_first[None], [GREY]):
        torch.testing.assert_close(processor(images=image, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (7, "text is a int; allowed: a string or a list of strings"),
        (["ct", None], "text 1 is None of type NoneType; allowed: strings"),
        (["ct", float("nan")], "text 1 is nan of type float"),
    ],
)
def test_texts_that_are_none_are_refused(processor, text, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text)


def test_nothing_at_all_is_refused(processor):
    with pytest.raises(ValueError, match="give images, text or both: neither came"):
        processor()


def test_strict_refuses_what_would_be_cut_or_says_nothing(processor):
    with pytest.raises(ValueError, match="text 1 has 42 tokens; strict allows at most 32"):
        processor(text=["ct", "lung " * 40], strict=True)
    with pytest.raises(ValueError, match="text 0 is empty; strict"):
        processor(text=[" "], strict=True)
    assert processor(text="ct of the lung", strict=True)["input_ids"]


def test_a_saved_folder_says_nothing_of_its_machine_and_has_the_file_of_other_clients(folder, tmp_path):
    local = MMKDClipProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    local.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert not {"local_files_only", "is_local", "backend", "name_or_path"} & told.keys()
    pixels = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert pixels["image_processor_type"] == "CLIPImageProcessor" and pixels["crop_size"] == {
        "height": 224,
        "width": 224,
    }
    assert not any(str(folder) in path.read_text() for path in tmp_path.glob("*.json"))


def test_pipelines_window_deep_images_as_the_processor_does(folder, processor):
    deep = Image.fromarray((np.arange(4096, dtype=np.uint16) * 16).reshape(64, 64))
    expected = processor(images=deep, return_tensors="np")["pixel_values"]
    assert (AutoImageProcessor.from_pretrained(folder)(deep, return_tensors="np")["pixel_values"] == expected).all()
    assert len(np.unique(expected)) > 200, "16 bits are windowed and not clipped to white"
