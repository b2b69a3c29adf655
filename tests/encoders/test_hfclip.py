import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from teacher_forms import TEXTS, check_odd_texts, randomized, rewrite, write_bert
from torch import nn
from torch.nn import functional
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)

from mmkd.encoders import zoo
from mmkd.encoders.encoder import HFClipEncoder
from mmkd.encoders.zoo import load_encoder
from modeling_mmkd import MMKDClipConfig, MMKDClipModel, MMKDClipProcessor

LETTERS = [chr(code) for code in range(33, 127)]
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


def write_clip_tokenizer(folder):
    """CLIP's tokenizer files with single characters as vocabulary."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "lu", *SPECIAL]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nl u\n")
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "unk_token": SPECIAL[1], "pad_token": SPECIAL[1]}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(tokens)


@pytest.fixture
def plip(tmp_path):
    """PLIP's form: an old CLIPModel repository with pytorch_model.bin and a feature extractor's configuration."""
    folder = tmp_path / "plip"
    folder.mkdir()
    vocabulary = write_clip_tokenizer(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": vocabulary, "max_position_embeddings": 77, "eos_token_id": 2, "bos_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 16})
    model = randomized(CLIPModel(config))
    config.save_pretrained(folder)
    state = {**model.state_dict(), "text_model.embeddings.position_ids": torch.arange(77)[None]}
    torch.save(state, folder / "pytorch_model.bin")
    extractor = {"feature_extractor_type": "CLIPFeatureExtractor", "do_resize": True, "size": 32, "resample": 3}
    extractor |= {"do_center_crop": True, "crop_size": 32, "do_normalize": True}
    extractor |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor))
    return folder, model


def test_equals_transformers(plip, images):
    folder, model = plip
    encoder = load_encoder("plip", weights=folder)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(folder)(TEXTS, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        image = functional.normalize(model.get_image_features(**pixels).pooler_output, dim=-1)
        text = functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    torch.testing.assert_close(encoder.encode_images(images), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), text, atol=1e-5, rtol=0)
    joint, pooled = encoder.encode_images_and_pooled(images)
    with torch.no_grad():
        expected = model.vision_model(**pixels).pooler_output
    torch.testing.assert_close(joint, image, atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)
    assert encoder.provenance["files"] == ["pytorch_model.bin"]
    assert encoder.provenance["license"] == "not declared"
    assert encoder.provenance["logit_scale"] == pytest.approx(model.logit_scale.exp().item(), abs=1e-4)
    assert "mean (0.5, 0.4, 0.3)" in encoder.provenance["preprocessing"]


def test_long_texts_are_cut_to_the_context(plip):
    encoder = load_encoder("PLIP", weights=plip[0])
    assert encoder.encode_texts(["lu " * 5000, "肺 🫁\0 pulmón", ""]).shape == (3, 512)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("visual_projection.weight"), "1 missing: visual_projection.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (lambda s: s.update({"text_projection.weight": torch.zeros(2, 2)}), "1 of another shape: text_projection"),
    ],
)
def test_keys_that_do_not_fit_are_listed(plip, change, said):
    rewrite(plip[0] / "pytorch_model.bin", change)
    with pytest.raises(ValueError, match=said):
        load_encoder("PUBMEDCLIP", weights=plip[0])


@pytest.mark.parametrize("content", [b"<html>404</html>", b"", b"\x80\x04\x95\x00"])
def test_a_damaged_file_is_named_without_torchs_advice(plip, content):
    (plip[0] / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: cannot be read as weights") as caught:
        load_encoder("PLIP", weights=plip[0])
    assert "weights_only" not in str(caught.value)


@pytest.fixture
def ours(tmp_path):
    """A student's folder."""
    folder = tmp_path / "student"
    text = write_bert(folder)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16}
    config = MMKDClipConfig(vision_config=vision, text_config=text, projection_dim=24)
    model = randomized(MMKDClipModel(config))
    processor = MMKDClipProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32), BertTokenizer.from_pretrained(folder)
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


def test_a_folder_of_ours_by_path(ours, images):
    folder, model, processor = ours
    encoder = load_encoder(str(folder))
    inputs = processor(images=images, text=TEXTS, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    joint, pooled = encoder.encode_images_and_pooled(images)
    torch.testing.assert_close(joint, output.image_embeds, atol=1e-5, rtol=0)
    with torch.no_grad():
        projected = functional.normalize(model.visual_projection(pooled), dim=-1)
    torch.testing.assert_close(projected, joint, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), output.text_embeds, atol=1e-5, rtol=0)
    assert (encoder.name, encoder.dim) == ("student", 24)
    assert encoder.provenance["logit_scale"] == pytest.approx(model.logit_scale.exp().item(), abs=1e-4)


def test_the_towers_of_a_student_keep_their_cosines(ours, plip, images):
    folder, model, processor = ours
    encoder = load_encoder(f"towers:{folder}")
    model.visual_projection = model.text_projection = torch.nn.Identity()
    tokens = processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        expected = {
            "image": model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output,
            "text": model.get_text_features(**tokens).pooler_output,
        }
    found = {"image": encoder.encode_images(images), "text": encoder.encode_texts(TEXTS)}
    for name, pooled in expected.items():
        unit = functional.normalize(pooled.float(), dim=1)
        assert found[name].shape[1] == encoder.dim
        torch.testing.assert_close(found[name] @ found[name].T, unit @ unit.T, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no MMKDClipModel; give a student's folder"):
        load_encoder(f"towers:{plip[0]}")


def test_a_damaged_folder_of_ours(ours):
    weights = ours[0] / "model.safetensors"
    state = load_file(weights)
    state.pop("logit_scale")
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="1 missing: logit_scale"):
        load_encoder(str(ours[0]))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated"):
        load_encoder(str(ours[0]))


def test_texts_of_any_length_and_script(plip):
    check_odd_texts(load_encoder("PLIP", weights=plip[0]))


def test_medsiglip_is_padded_to_its_context(tmp_path, images):
    text = write_bert(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {**sizes, "vocab_size": text["vocab_size"], "max_position_embeddings": 64, "projection_size": 16}
    config = SiglipConfig(text_config=words, vision_config={**sizes, "image_size": 32, "patch_size": 16})
    model = randomized(SiglipModel(config))
    tokenizer = BertTokenizer.from_pretrained(tmp_path, model_max_length=64, model_input_names=["input_ids"])
    processor = SiglipProcessor(SiglipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    spec = dataclasses.replace(zoo.NEWER_TEACHERS["MedSigLIP"], weights=str(tmp_path), dim=16)
    encoder = zoo.LOADERS[spec.form](spec, "cpu")
    with torch.no_grad():
        inputs = processor(images=images, text=TEXTS, padding="max_length", max_length=64, return_tensors="pt")
        image = functional.normalize(model.get_image_features(inputs["pixel_values"]).pooler_output, dim=-1)
        words = functional.normalize(model.get_text_features(inputs["input_ids"]).pooler_output, dim=-1)
    torch.testing.assert_close(encoder.encode_images(images), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), words, atol=1e-5, rtol=0)
    assert encoder.provenance["logit_scale"] == pytest.approx(model.logit_scale.exp().item(), rel=1e-3)
    states, mask = encoder.text_token_features(TEXTS)
    assert states.shape == (3, 64, 16) and mask.all()


class Convolutional(nn.Module):
    """A model whose tower lists a convolution, a batch norm and an activation, and runs them in a given order."""

    device = torch.device("cpu")

    def __init__(self, order):
        super().__init__()
        parts = {"conv": nn.Conv2d(3, 3, 3, bias=False), "norm": nn.BatchNorm2d(3), "act": nn.Tanh()}
        self.vision_model, self.order = nn.ModuleDict(parts), order

    def get_image_features(self, pixel_values):
        for name in self.order:
            pixel_values = self.vision_model[name](pixel_values)
        return pixel_values.mean(dim=(2, 3))


@pytest.mark.parametrize(("order", "folded"), [(("conv", "norm", "act"), True), (("norm", "conv", "act"), False)])
def test_batch_norms_are_folded_only_where_the_vectors_stay(order, folded, images):
    torch.manual_seed(0)
    model = randomized(Convolutional(order))

    def processor(images, return_tensors):
        return {"pixel_values": torch.stack([torch.tensor(np.array(i)) for i in images]).permute(0, 3, 1, 2) / 255}

    encoder = HFClipEncoder("folded", 3, {}, model, processor, 8)
    expected = encoder.encode_images(images[:1])
    encoder.fold_batch_norms()
    torch.testing.assert_close(encoder.encode_images(images[:1]), expected, atol=1e-6, rtol=0)
    assert isinstance(encoder.model.vision_model["norm"], nn.BatchNorm2d) is not folded
