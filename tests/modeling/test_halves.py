"""Text and vision half alone: whole from the whole model's folder, and never half a model without a word."""

import json
import shutil

import pytest
import torch
from processes import in_another_process
from safetensors.torch import load_file, save_file
from tiny_model import save_tiny
from transformers import AutoModel, AutoModelForZeroShotImageClassification

from modeling_mmkd import (
    MMKDClipModel,
    MMKDClipProcessor,
    MMKDClipTextModelWithProjection,
    MMKDClipVisionModelWithProjection,
)

HALVES = {"text": MMKDClipTextModelWithProjection, "vision": MMKDClipVisionModelWithProjection}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def batch(folder):
    return MMKDClipProcessor.from_pretrained(folder)(
        images=torch.randint(0, 255, (2, 3, 40, 50), dtype=torch.uint8), text=["ct of the lung", "mri"],
        return_tensors="pt",
    )  # fmt: skip


@pytest.mark.parametrize("half", HALVES)
@torch.no_grad()
def test_a_half_loads_whole_from_the_whole_folder(folder, batch, half):
    model, info = HALVES[half].from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    whole = MMKDClipModel.from_pretrained(folder)
    own = model.state_dict()
    assert own and all(torch.equal(value, whole.state_dict()[key]) for key, value in own.items())
    if half == "text":
        output = model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
        expected = whole.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
        torch.testing.assert_close(output.text_embeds, expected)
        assert len(output.hidden_states) == 3
    else:
        output = model(pixel_values=batch["pixel_values"])
        torch.testing.assert_close(output.image_embeds, whole.get_image_features(batch["pixel_values"]).pooler_output)
        larger = torch.nn.functional.interpolate(batch["pixel_values"], (48, 64))
        assert model(larger, interpolate_pos_encoding=True).image_embeds.shape == (2, 16)
    assert output.last_hidden_state.ndim == 3


@pytest.mark.parametrize("half", HALVES)
def test_a_half_saved_is_read_as_a_half_and_not_as_a_whole(folder, tmp_path, half):
    model = HALVES[half].from_pretrained(folder)
    model.save_pretrained(tmp_path)
    again, info = HALVES[half].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    gone = "vision_model, visual_projection" if half == "text" else "text_model, text_projection"
    other = HALVES["vision" if half == "text" else "text"]
    assert type(AutoModel.from_pretrained(tmp_path)) is HALVES[half]
    for auto in (AutoModelForZeroShotImageClassification, MMKDClipModel, other):
        with pytest.raises(ValueError, match=f"has no weights for {gone}.*WithProjection"):
            auto.from_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.py")) == ["modeling_mmkd.py"]
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == f"modeling_mmkd.{HALVES[half].__name__}"


@pytest.mark.parametrize("part", ["vision_model", "visual_projection", "text_model", "text_projection"])
def test_a_missing_part_never_starts_at_random(folder, tmp_path, part):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    state = {key: value for key, value in load_file(folder / "model.safetensors").items() if not key.startswith(part)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"has no weights for {part} of MMKDClipModel"):
        AutoModel.from_pretrained(tmp_path)
    _, info = MMKDClipModel.from_pretrained(tmp_path, output_loading_info=True)  # who asks is told, and may go on
    assert {key.split(".")[0] for key in info["missing_keys"]} == {part}


def test_halves_saved_alone_work_where_this_package_is_not(folder, batch, tmp_path):
    for half, own in (("text", ("input_ids", "attention_mask")), ("vision", ("pixel_values",))):
        model = HALVES[half].from_pretrained(folder)
        model.save_pretrained(tmp_path / half)
        MMKDClipProcessor.from_pretrained(folder).save_pretrained(tmp_path / half)
        inputs = {name: batch[name] for name in own}
        with torch.no_grad():
            torch.save((inputs, model(**inputs)[0]), tmp_path / half / "expected")
    code = """
import torch
from transformers import AutoModel, AutoProcessor
for folder in sys.argv[2:]:
    model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    inputs, embeddings = torch.load(f"{folder}/expected", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], embeddings, atol=1e-5, rtol=0)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    texts = processor(text=["ct of the lung", "mri"], return_tensors="pt")
    assert "input_ids" not in inputs or torch.equal(texts["input_ids"], inputs["input_ids"])
    print(type(model).__name__, type(model).__module__.startswith("transformers_modules"))
"""
    hidden = "modeling_mmkd,mmkd,torchvision,timm,accelerate,peft,open_clip,sklearn"
    cache = str(tmp_path / "modules")
    printed = in_another_process(hidden, code, *(tmp_path / half for half in HALVES), HF_MODULES_CACHE=cache)
    assert printed.split() == ["MMKDClipTextModelWithProjection", "True", "MMKDClipVisionModelWithProjection", "True"]
