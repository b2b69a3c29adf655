import dataclasses
import json

import open_clip
import pytest
import torch
from teacher_forms import TEXTS, check_odd_texts, randomized, rewrite, write_bert

from mmkd.encoders import zoo
from mmkd.encoders.zoo import load_encoder

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
VIT = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
CLIP_TEXT = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
WEIGHTS = "open_clip_pytorch_model.bin"
BERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"


def write(folder, config, state):
    """An open_clip repository as on the Hub."""
    folder.mkdir(exist_ok=True)
    stated = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(stated))
    torch.save(state, folder / WEIGHTS)
    return folder


@pytest.fixture
def quiltnet(tmp_path):
    """QuiltNet's form: both towers open_clip's own."""
    config = {"embed_dim": 512, "vision_cfg": VIT, "text_cfg": CLIP_TEXT}
    return write(tmp_path / "quilt", config, randomized(open_clip.CLIP(**config)).state_dict())


@pytest.fixture
def biomedclip(tmp_path):
    """BiomedCLIP's form: timm ViT, BERT with an MLP projection, tokenizer in the folder, BERT's sizes beside it."""
    folder = tmp_path / "biomed"
    bert = folder / BERT.split("/")[-1]
    write_bert(bert)
    for name in ("vocab.txt", "tokenizer_config.json"):
        (bert / name).rename(folder / name)
    vision = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
    text = {"hf_model_name": BERT, "hf_tokenizer_name": BERT, "hf_proj_type": "mlp", "context_length": 256}
    text["hf_pooler_type"] = "cls_last_hidden_state_pooler"
    config = {"embed_dim": 512, "vision_cfg": {**vision, "image_size": 160}, "text_cfg": text}
    local = {**config, "text_cfg": {**text, "hf_model_name": str(bert), "hf_model_pretrained": False}}
    state = randomized(open_clip.CustomTextCLIP(**local)).state_dict()
    state["text.transformer.embeddings.position_ids"] = torch.arange(512)[None]
    return write(folder, config, state)


def reference(folder, images, texts):
    """Features by open_clip's own loader of the same folder."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        pixels = torch.stack([transform(image) for image in images])
        return model.encode_image(pixels, normalize=True), model.encode_text(tokenizer(texts), normalize=True)


@pytest.mark.parametrize("name", ["quiltnet", "dermlip"])
def test_equals_open_clip(quiltnet, images, name):
    encoder = load_encoder(name, weights=quiltnet)
    image, text = reference(quiltnet, images, TEXTS)
    torch.testing.assert_close(encoder.encode_images(images), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), text, atol=1e-5, rtol=0)
    assert encoder.provenance["context"] == 20
    scale = torch.load(quiltnet / WEIGHTS, weights_only=True)["logit_scale"].exp().item()
    assert encoder.provenance["logit_scale"] == pytest.approx(scale, abs=1e-4)
    assert str(MEAN) in encoder.provenance["preprocessing"]


@pytest.mark.parametrize("name", ["BiomedCLIP", "OpenPMC18M"])
def test_biomedclip_offline_equals_open_clip_and_is_not_padded_to_its_context(biomedclip, images, name):
    encoder = load_encoder(name, weights=biomedclip)
    lengths = []
    encoder.model.text.transformer.register_forward_pre_hook(
        lambda _, __, options: lengths.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    mine = encoder.encode_images(images), encoder.encode_texts(TEXTS)
    config = json.loads((biomedclip / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = str(biomedclip / BERT.split("/")[-1])
    (biomedclip / "open_clip_config.json").write_text(json.dumps(config))
    for found, expected in zip(mine, reference(biomedclip, images, TEXTS), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert lengths == [15]
    assert encoder.provenance["context"] == 256


def test_bmca_is_an_architecture_and_a_wrapped_checkpoint(tmp_path, images, monkeypatch):
    config = {"embed_dim": 768, "vision_cfg": VIT, "text_cfg": CLIP_TEXT}
    (tmp_path / "tiny-bmca.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-bmca.json")
    model = randomized(open_clip.CLIP(**config))
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "BMC_CLIP_CF.pt")
    row = dataclasses.replace(zoo.TEACHERS["BMCA"], architecture="tiny-bmca")
    monkeypatch.setitem(zoo.KNOWN, "BMCA", row)
    encoder = load_encoder("BMCA", weights=tmp_path)
    with torch.no_grad():
        expected = model.encode_text(open_clip.SimpleTokenizer(context_length=20)(TEXTS), normalize=True)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), expected, atol=1e-5, rtol=0)
    assert "0.48145466" in encoder.provenance["preprocessing"]
    named = load_encoder(f"open_clip:tiny-bmca/{tmp_path / 'BMC_CLIP_CF.pt'}")
    assert named.name == "tiny-bmca-BMC_CLIP_CF"
    torch.testing.assert_close(named.encode_images(images), encoder.encode_images(images))
    colon = zoo.find_spec(f"open_clip:tiny-bmca:{tmp_path / 'BMC_CLIP_CF.pt'}")
    assert colon == zoo.find_spec(f"open_clip:tiny-bmca/{tmp_path / 'BMC_CLIP_CF.pt'}")
    assert zoo.find_spec("open_clip:ViT-B-32").weights == "openai"


def test_what_is_projected_comes_along(quiltnet, biomedclip, images):
    for folder in (quiltnet, biomedclip):
        encoder = load_encoder(str(folder))
        joint, pooled = encoder.encode_images_and_pooled(images)
        torch.testing.assert_close(joint, encoder.encode_images(images), atol=1e-6, rtol=0)
        visual = encoder.model.visual
        with torch.inference_mode():
            projected = visual.head(pooled) if hasattr(visual, "head") else pooled @ visual.proj
        torch.testing.assert_close(torch.nn.functional.normalize(projected, dim=1), joint, atol=1e-5, rtol=0)
        assert pooled.shape[0] == len(images) and not torch.allclose(pooled.norm(dim=1), torch.ones(len(images)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("visual.conv1.weight"), "1 missing: visual.conv1.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (lambda s: s.update({"visual.ln_pre.bias": torch.zeros(7)}), r"visual.ln_pre.bias \(7,\) instead of \(64,\)"),
    ],
)
def test_keys_that_do_not_fit_are_listed(quiltnet, change, said):
    rewrite(quiltnet / WEIGHTS, change)
    with pytest.raises(ValueError, match=said):
        load_encoder("QuiltNet", weights=quiltnet)


def test_preprocessing_must_be_stated(quiltnet):
    config = json.loads((quiltnet / "open_clip_config.json").read_text())
    (quiltnet / "open_clip_config.json").write_text(json.dumps({"model_cfg": config["model_cfg"]}))
    with pytest.raises(ValueError, match="preprocess_cfg, mean and std"):
        load_encoder("QuiltNet", weights=quiltnet)


def test_unknown_architecture_and_tag():
    with pytest.raises(ValueError, match="did you mean 'ViT-B-32'"):
        load_encoder("open_clip:ViT-B32/openai")
    with pytest.raises(ValueError, match="tags: openai"):
        load_encoder("open_clip:ViT-B-32/openay")


def test_texts_of_any_length_and_script(quiltnet, biomedclip):
    check_odd_texts(load_encoder("QuiltNet", weights=quiltnet))
    check_odd_texts(load_encoder("BiomedCLIP", weights=biomedclip))


def test_tokens_end_in_the_features(quiltnet, biomedclip, images):
    for folder, form in ((quiltnet, "last"), (biomedclip, "first")):
        encoder = load_encoder(str(folder), device="cpu")
        with torch.inference_mode():
            patches = encoder.image_token_features([encoder.prepare(image) for image in images])
            words, mask = encoder.text_token_features(TEXTS)
        assert patches.ndim == words.ndim == 3 and len(patches) == len(words) == 3 and patches.shape[1] > 3
        assert mask.shape == words.shape[:2] and mask.any(dim=1).all() and not mask.all()
        pooled = words[torch.arange(3), mask.sum(dim=1) - 1] if form == "last" else words[:, 0]
        model = encoder.model
        with torch.inference_mode():
            features = pooled @ model.text_projection if form == "last" else model.text.proj(pooled)
        torch.testing.assert_close(features, encoder.text_features(TEXTS), atol=1e-5, rtol=1e-4)
