"""The model against formulas written out here, other towers, and what saving, loading and importing must keep."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from authors_form import HEADS_OF_64, TINY, inputs, reference, state_of, tokenizer
from huggingface_hub.errors import StrictDataclassFieldValidationError
from PIL import Image
from processes import in_another_process
from tiny_model import TEXT, VISION
from torch.nn.functional import cross_entropy, gelu, normalize
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    BertConfig,
    CLIPModel,
    CLIPVisionConfig,
    DistilBertConfig,
    ElectraConfig,
    RobertaConfig,
    TimmWrapperConfig,
    ViTConfig,
    pipeline,
)

from mmkd.encoders.authors_checkpoint import from_authors, infer_config, to_authors
from modeling_mmkd import (
    PRESETS,
    MMKDClipConfig,
    MMKDClipImageProcessor,
    MMKDClipModel,
    MMKDClipProcessor,
    modeling_mmkd,
)

TENTH = {"initializer_factor": 0.1}


def small(vision=VISION, text=TEXT, seed=0, **options):
    torch.manual_seed(seed)
    options = {"vision_config": vision, "text_config": text, "projection_dim": 16, **options}
    return MMKDClipModel(MMKDClipConfig(**options)).eval()


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.fixture
def batch():
    pixels, ids = inputs({"vision": VISION, "text": TEXT}, count=4)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids.ne(0).long()}


@pytest.mark.parametrize("sizes", [TINY, HEADS_OF_64])
def test_outputs_are_open_clips(sizes):
    theirs = reference(sizes, seed=11)
    ours = MMKDClipModel(infer_config(state_of(theirs), sizes)).eval()
    ours.load_state_dict(from_authors(state_of(theirs)))
    pixels, ids = inputs(sizes, seed=2, count=6)
    with torch.no_grad():
        output = ours(input_ids=ids, pixel_values=pixels)
        image, text = normalize(theirs.visual(pixels), dim=-1), normalize(theirs.text_encoder(ids), dim=-1)
        logits = theirs.logit_scale.exp() * image @ text.T
    torch.testing.assert_close(output.image_embeds, image, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.text_embeds, text, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.logits_per_image, logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.logits_per_text, logits.T, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_joint_part_by_hand(model, batch):
    vision = model.vision_model(batch["pixel_values"]).pooler_output
    text = model.text_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, 0]
    weights = model.state_dict()
    image = vision @ weights["visual_projection.weight"].T
    words = gelu(text @ weights["text_projection.fc1.weight"].T) @ weights["text_projection.fc2.weight"].T
    output = model(**batch, return_loss=True)
    torch.testing.assert_close(model.get_image_features(batch["pixel_values"]).pooler_output, image)
    torch.testing.assert_close(output.vision_model_output.pooler_output, image)
    torch.testing.assert_close(output.text_model_output.pooler_output, words)
    torch.testing.assert_close(output.image_embeds.norm(dim=-1), torch.ones(4))
    logits = model.logit_scale.exp() * (normalize(words, dim=-1) @ normalize(image, dim=-1).T)
    torch.testing.assert_close(output.logits_per_text, logits)
    target = torch.arange(4)
    torch.testing.assert_close(output.loss, (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2)
    assert model(**batch).loss is None


def test_loss_needs_pairs(model, batch):
    with pytest.raises(ValueError, match=r"\(texts, images\) is \(4, 3\)"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:3]}, return_loss=True)
    with pytest.raises(ValueError, match="return_loss"):
        model(pixel_values=batch["pixel_values"], return_loss=True)
    with pytest.raises(ValueError, match="neither"):
        model()


@torch.no_grad()
def test_one_modality_alone(model, batch):
    both = model(**batch)
    image = model(pixel_values=batch["pixel_values"])
    assert image.text_embeds is None and image.logits_per_image is None and image.text_model_output is None
    torch.testing.assert_close(image.image_embeds, both.image_embeds)
    text = model(input_ids=batch["input_ids"])
    assert text.image_embeds is None and text.logits_per_text is None and text.vision_model_output is None
    torch.testing.assert_close(text.text_embeds, both.text_embeds)
    words = model.get_input_embeddings()(batch["input_ids"])
    embedded = model(inputs_embeds=words, attention_mask=batch["attention_mask"])
    torch.testing.assert_close(embedded.text_embeds, both.text_embeds)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.no_grad()
def test_padding_changes_nothing(batch, pooling):
    model = small(text_pooling=pooling)
    given = model(**batch).text_embeds
    derived = model(input_ids=batch["input_ids"]).text_embeds
    torch.testing.assert_close(derived, given)
    longer = torch.nn.functional.pad(batch["input_ids"], (0, 20))
    torch.testing.assert_close(model(input_ids=longer).text_embeds, given, atol=1e-6, rtol=0)
    alone = batch["input_ids"][:1, : int(batch["attention_mask"][0].sum())]
    torch.testing.assert_close(model(input_ids=alone).text_embeds, given[:1], atol=1e-6, rtol=0)


@torch.no_grad()
def test_mean_pooling_by_hand(batch):
    model, mask = small(text_pooling="mean"), batch["attention_mask"]
    states = model.text_model(batch["input_ids"], attention_mask=mask).last_hidden_state
    means = torch.stack([row[keep.bool()].mean(dim=0) for row, keep in zip(states, mask, strict=True)])
    given = model.get_text_features(batch["input_ids"], mask).pooler_output
    torch.testing.assert_close(given, model.text_projection(means))


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        (VISION, DistilBertConfig(vocab_size=70, dim=32, n_layers=1, n_heads=2, hidden_dim=48)),
        (VISION, RobertaConfig(**TEXT, pad_token_id=1)),
        (VISION, ElectraConfig(**TEXT, embedding_size=24)),
        (ViTConfig(**VISION), BertConfig(**TEXT)),
        (TimmWrapperConfig(architecture="test_vit", model_args={"img_size": 32}), TEXT),
        (TimmWrapperConfig(architecture="test_efficientnet"), TEXT),
    ],
    ids=["distilbert", "roberta", "electra", "vit", "timm-vit", "timm-convnet"],
)
def test_other_towers(tmp_path, vision, text, batch):
    model = small(vision, text)
    pad = model.config.text_config.pad_token_id
    ids = torch.where(batch["attention_mask"] == 1, batch["input_ids"].clamp(min=2), pad)
    inputs = {"input_ids": ids, "pixel_values": batch["pixel_values"]}
    with torch.no_grad():
        output = model(**inputs, attention_mask=batch["attention_mask"])
        torch.testing.assert_close(model(**inputs).text_embeds, output.text_embeds)
    assert output.logits_per_image.shape == (4, 4)
    assert not any("pooler.dense" in key for key in model.state_dict())
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found = again(**inputs).logits_per_image  # weights read from a file are aligned otherwise: kernels may differ
    torch.testing.assert_close(found, output.logits_per_image, atol=1e-5, rtol=0)
    model.train()(**inputs, return_loss=True).loss.backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == [], "parameters without gradient break distributed training"


@torch.no_grad()
def test_a_hidden_layer_of_the_image_projection(batch, tmp_path):
    model = small(vision_projection_hidden=24)
    vision = model.vision_model(batch["pixel_values"]).pooler_output
    weights = model.state_dict()
    assert weights["visual_projection.fc1.weight"].shape == (24, 32)
    assert weights["visual_projection.fc1.weight"].std().item() == pytest.approx(32**-0.5, rel=0.1)
    image = gelu(vision @ weights["visual_projection.fc1.weight"].T) @ weights["visual_projection.fc2.weight"].T
    torch.testing.assert_close(model(**batch).image_embeds, normalize(image, dim=-1))
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path).eval()(**batch).image_embeds, model(**batch).image_embeds)
    with pytest.raises(ValueError, match=r"hidden layer \(vision_projection_hidden\)"):
        to_authors(weights)


@torch.no_grad()
def test_initial_weights():
    model = small({**VISION, "hidden_size": 128}, {**TEXT, "hidden_size": 256}, projection_dim=192)
    assert model.config.text_projection_hidden == 224
    for layer, width in (
        (model.visual_projection, 128),
        (model.text_projection.fc1, 256),
        (model.text_projection.fc2, 224),
    ):
        assert layer.bias is None and layer.in_features == width
        assert layer.weight.std().item() == pytest.approx(width**-0.5, rel=0.05)
        assert abs(layer.weight.mean().item()) < 0.01
    assert model.logit_scale.shape == (1,) and model.logit_scale.item() == pytest.approx(2.659260, abs=1e-6)
    assert small(logit_scale_init_value=1.5).logit_scale.item() == 1.5
    tenth = small(
        {**VISION, "hidden_size": 128}, {**TEXT, "hidden_size": 256}, projection_dim=192, initializer_factor=0.1
    )
    torch.testing.assert_close(tenth.visual_projection.weight, 0.1 * model.visual_projection.weight)


def test_loaded_weights_are_never_initialized_again(tmp_path):
    model = small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=3.0)
    model.save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForZeroShotImageClassification, MMKDClipModel):
        loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert isinstance(loaded, MMKDClipModel)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_what_is_missing_is_initialized_and_the_rest_kept(tmp_path):
    model = small(seed=1)
    state = {key: value for key, value in model.state_dict().items() if key not in ("logit_scale",)}
    state = {key: value for key, value in state.items() if not key.startswith("text_projection.fc1")}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = MMKDClipModel.from_pretrained(tmp_path)
    assert loaded.logit_scale.item() == pytest.approx(2.659260, abs=1e-6)
    assert loaded.text_projection.fc1.weight.std().item() == pytest.approx(32**-0.5, rel=0.2)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in state.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("folder")
    model.save_pretrained(path)
    side = {"height": 32, "width": 32}
    pixels = MMKDClipImageProcessor(size={"shortest_edge": 32}, crop_size=side)
    MMKDClipProcessor(pixels, tokenizer(70, model_max_length=40)).save_pretrained(path)
    return path


@torch.no_grad()
def test_zero_shot_pipeline(folder, model):
    image, labels = Image.effect_noise((60, 44), 90).convert("RGB"), ["ct", "mri", "lung"]
    template = "the {} of"
    found = pipeline("zero-shot-image-classification", str(folder))(
        image, candidate_labels=labels, hypothesis_template=template
    )
    processor = MMKDClipProcessor.from_pretrained(folder)
    batch = processor(images=image, text=[template.format(label) for label in labels], return_tensors="pt")
    expected = model(**batch).logits_per_image.softmax(dim=-1)[0]
    assert {row["label"] for row in found} == set(labels)
    for row in found:
        assert row["score"] == pytest.approx(expected[labels.index(row["label"])].item(), abs=1e-4)


@pytest.mark.parametrize(
    ("text", "layer"),
    [
        (TEXT, "BertLayer"),
        (ElectraConfig(**TEXT, embedding_size=24), "ElectraLayer"),
        (DistilBertConfig(vocab_size=70, dim=32, n_layers=1, n_heads=2, hidden_dim=48), "TransformerBlock"),
    ],
)
def test_layers_not_to_split_are_there(text, layer):
    model = small(text=text)
    assert set(model._no_split_modules) == {"CLIPEncoderLayer", "CLIPVisionEmbeddings", layer}
    assert set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}
    assert set(MMKDClipModel._no_split_modules) == {"CLIPEncoderLayer", "CLIPVisionEmbeddings", "BertLayer"}


def test_word_embeddings_are_the_text_towers(model):
    assert model.get_input_embeddings() is model.text_model.embeddings.word_embeddings


@torch.no_grad()
def test_tower_outputs_and_tuples(model, batch):
    output = model(**batch, output_hidden_states=True)
    assert len(output.vision_model_output.hidden_states) == len(output.text_model_output.hidden_states) == 3
    values = model(**batch, return_dict=False)
    assert torch.equal(values[0], output.logits_per_image) and len(output.to_tuple()) == 6
    larger = torch.nn.functional.interpolate(batch["pixel_values"], (48, 64))
    assert model(pixel_values=larger, interpolate_pos_encoding=True).image_embeds.shape == (4, 16)
    with pytest.raises(ValueError, match="48"):
        model(pixel_values=larger)


@torch.no_grad()
def test_half_precision_stays_near(model, batch):
    half = small().to(torch.bfloat16)
    output = half(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()})
    torch.testing.assert_close(output.image_embeds.float(), model(**batch).image_embeds, atol=0.05, rtol=0)
    torch.testing.assert_close(output.text_embeds.float(), model(**batch).text_embeds, atol=0.05, rtol=0)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # its new name is not in 5.8
def test_gradient_checkpointing_gives_the_same_gradients(batch):
    gradients = []
    for checkpointing in (False, True):
        model = small({**VISION, "attention_dropout": 0.0}, {**TEXT, "hidden_dropout_prob": 0.0})
        model.text_model.config.attention_probs_dropout_prob = 0.0
        for layer in model.text_model.encoder.layer:
            layer.attention.self.dropout.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()(**batch, return_loss=True).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.allclose(value, gradients[1][name], atol=1e-6) for name, value in gradients[0].items())


def test_default_sizes_are_the_papers():
    config = MMKDClipConfig()
    vision, text = config.vision_config, config.text_config
    assert (vision.model_type, vision.hidden_size, vision.num_hidden_layers) == ("clip_vision_model", 768, 12)
    assert (vision.num_attention_heads, vision.intermediate_size) == (12, 3072)
    assert (vision.patch_size, vision.image_size, vision.hidden_act) == (16, 224, "quick_gelu")
    assert (text.model_type, text.hidden_size, text.num_hidden_layers, text.vocab_size) == ("bert", 768, 12, 30522)
    assert (text.num_attention_heads, text.intermediate_size, text.hidden_act) == (12, 3072, "gelu")
    assert (text.max_position_embeddings, text.type_vocab_size, text.pad_token_id) == (512, 2, 0)
    assert (config.projection_dim, config.text_projection_hidden, config.text_pooling) == (512, 640, "cls")
    with torch.device("meta"):
        model = MMKDClipModel(config)
    vision_parameters = 768 * (3 * 256 + 1 + 197 + 4) + 12 * (12 * 768**2 + 13 * 768)
    text_parameters = 768 * (30522 + 512 + 2 + 2) + 12 * (12 * 768**2 + 13 * 768)
    joint = 768 * 512 + 768 * 640 + 640 * 512 + 1
    assert sum(parameter.numel() for parameter in model.parameters()) == vision_parameters + text_parameters + joint


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text_pooling": "max"}, "'max'; allowed: cls, mean"),
        ({"projection_dim": 0}, "projection_dim is 0"),
        ({"text_projection_hidden": -4}, "text_projection_hidden is -4"),
        ({"vision_projection_hidden": 0}, "vision_projection_hidden is 0"),
        ({"text_config": {"model_type": "resnet"}}, "hidden_size"),
        ({"vision_config": 3}, "configuration is 3; allowed: a configuration, a dictionary or None"),
    ],
)
def test_config_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        MMKDClipConfig(**options)


def test_a_patch_size_of_16_holds_unless_said_otherwise():
    assert MMKDClipConfig(vision_config={"hidden_size": 96, "num_attention_heads": 3}).vision_config.patch_size == 16
    assert MMKDClipConfig(vision_config={"patch_size": 32}).vision_config.patch_size == 32
    assert MMKDClipConfig(vision_config=CLIPVisionConfig()).vision_config.patch_size == 32


@pytest.mark.parametrize("vision", [VISION, TimmWrapperConfig(architecture="test_vit"), ViTConfig(**VISION)])
def test_config_round_trip(tmp_path, vision):
    config = MMKDClipConfig(
        vision_config=vision,
        text_config=TEXT,
        projection_dim=24,
        text_projection_hidden=30,
        vision_projection_hidden=28,
        text_pooling="mean",
        logit_scale_init_value=3.25,
        context_length=20,
        initializer_factor=0.5,
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, MMKDClipConfig)
    assert type(again.vision_config) is type(config.vision_config)
    again = MMKDClipConfig.from_dict(json.loads(again.to_json_string(use_diff=False)))
    assert again.to_dict().keys() == config.to_dict().keys()
    own = ("projection_dim", "text_projection_hidden", "vision_projection_hidden", "text_pooling", "context_length")
    for name in (*own, "logit_scale_init_value", "initializer_factor"):
        assert getattr(again, name) == getattr(config, name)
    for name in ("vision_config", "text_config"):
        assert getattr(again, name).to_diff_dict() == getattr(config, name).to_diff_dict()
    shapes = [{key: value.shape for key, value in MMKDClipModel(c).state_dict().items()} for c in (config, again)]
    assert shapes[0] == shapes[1]


def test_hugging_faces_model_linter_reports_nothing():
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "mlinter", "--no-cache", "--no-progress", "--enable-all-trf-rules"]
    done = subprocess.run([*command, "modeling_mmkd"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_first_arguments_are_in_clips_order():
    names = [list(inspect.signature(model.forward).parameters) for model in (CLIPModel, MMKDClipModel)]
    clips = [name for name in names[0] if name not in ("self", "kwargs")]
    assert names[1][1 : 1 + len(clips)] == clips


def test_the_model_needs_torch_and_transformers_only(folder):
    code = """
import contextlib, io
import torch, transformers
with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
    import modeling_mmkd
assert not said.getvalue(), said.getvalue()
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[2])
processor = AutoProcessor.from_pretrained(sys.argv[2])
ids = processor(text=["ct of the lung"], return_tensors="pt")
pixels = processor(images=torch.zeros(3, 40, 50, dtype=torch.uint8), return_tensors="pt")
print(tuple(model(**ids, **pixels).logits_per_image.shape))
"""
    hidden = "torchvision,timm,accelerate,mmkd,open_clip,sklearn,matplotlib,skimage"
    assert "(1, 1)" in in_another_process(hidden, code, folder)


def test_a_saved_folder_brings_its_code(folder, tmp_path):
    code = """
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, pipeline
folder, again = sys.argv[2:]
model = AutoModelForZeroShotImageClassification.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(again)
processor.save_pretrained(again)
twice = AutoModel.from_pretrained(again, trust_remote_code=True)
batch = AutoProcessor.from_pretrained(again, trust_remote_code=True)(
    images=Image.new("RGB", (50, 40)), text=["ct", "lung"], return_tensors="pt"
)
assert torch.equal(model(**batch).logits_per_image, twice(**batch).logits_per_image)
scores = pipeline("zero-shot-image-classification", folder, trust_remote_code=True)(
    Image.new("RGB", (50, 40)), candidate_labels=["ct", "lung"], hypothesis_template="{}"
)
expected = model(**batch).logits_per_image.softmax(dim=-1)[0]
assert all(abs(row["score"] - expected[["ct", "lung"].index(row["label"])]) < 1e-3 for row in scores)
text = pipeline("feature-extraction", folder, trust_remote_code=True)("ct", return_tensors=True)
torch.testing.assert_close(text, model(**batch).text_embeds[:1], atol=1e-5, rtol=0)
image = pipeline("image-feature-extraction", folder, trust_remote_code=True)(Image.new("RGB", (50, 40)))
torch.testing.assert_close(torch.tensor(image), model(**batch).image_embeds, atol=1e-3, rtol=0)
print("the same", type(model).__module__.startswith("transformers_modules"))
"""
    hidden = "modeling_mmkd,mmkd,torchvision,timm,accelerate,peft,open_clip,sklearn"
    out = in_another_process(hidden, code, folder, tmp_path / "again", HF_MODULES_CACHE=str(tmp_path))
    assert "the same True" in out
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == MMKDClipConfig().auto_map


@pytest.mark.parametrize("context", [40, 24])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.no_grad()
def test_texts_beyond_the_context_are_cut_as_a_tokenizer_cuts_them(context, pooling):
    model = small(context_length=context, text_pooling=pooling)
    assert model.config.text_limit == context
    ids = torch.randint(5, 70, (3, 60), generator=torch.Generator().manual_seed(3))
    ids[:, 0], ids[0, 59], ids[1, 49], ids[2, 9] = 2, 3, 3, 3
    ids[1, 50:], ids[2, 10:] = 0, 0
    cut = ids[:, :context].clone()
    cut[:2, -1] = 3
    mask, types = ids.ne(0).long(), torch.zeros_like(ids)
    expected = model(input_ids=cut).text_embeds
    torch.testing.assert_close(model(input_ids=ids).text_embeds, expected)
    given = model(input_ids=ids, attention_mask=mask, token_type_ids=types, position_ids=torch.arange(60)[None])
    torch.testing.assert_close(given.text_embeds, expected)


def test_cutting_is_said_once_and_names_the_limit(model, caplog):
    type(modeling_mmkd.logger).warning_once.cache_clear()
    with caplog.at_level("WARNING", modeling_mmkd.logger.name):
        for _ in range(2):
            model(input_ids=torch.ones(1, 41, dtype=torch.long))
    assert caplog.messages == ["texts longer than the context of 40 tokens are cut to their beginning"]


@torch.no_grad()
def test_the_positions_limit_the_context(model):
    assert MMKDClipConfig().text_limit == 256 and model.config.text_limit == 40
    with pytest.raises(ValueError, match="inputs_embeds of 41 tokens came, but the context is at most 40"):
        model(inputs_embeds=torch.zeros(1, 41, 32))
    offset = small(text=RobertaConfig(**TEXT, pad_token_id=1))
    assert offset.config.text_limit == 38
    assert offset(input_ids=torch.full((1, 39), 5)).text_embeds.shape == (1, 16)


def test_the_limit_survives_export(model):
    tokens = torch.export.Dim("tokens", min=2, max=40)
    ids = torch.ones(2, 9, dtype=torch.long)
    exported = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes={"input_ids": {1: tokens}}).module()
    longer = torch.arange(60).reshape(2, 30) + 5
    torch.testing.assert_close(exported(input_ids=longer).text_embeds, model(input_ids=longer).text_embeds)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vision_config": {"num_attention_heads": 0}}, "num_attention_heads of a clip_vision_model tower is 0"),
        ({"text_config": {"num_attention_heads": -1}}, "text_config: num_attention_heads is -1"),
        ({"text_config": {"num_attention_heads": 7}}, "hidden_size 768 must be a multiple of num_attention_heads 7"),
        ({"vision_config": {"patch_size": 0}}, "patch_size is 0"),
        ({"vision_config": {"image_size": 33, "patch_size": 8}}, "image_size 33 must be a multiple of patch_size 8"),
        ({"vision_config": {"hidden_act": "zelu"}}, "hidden_act is 'zelu'; allowed: .*quick_gelu"),
        ({"logit_scale_init_value": float("nan")}, "must be a finite number"),
    ],
)
def test_sizes_that_no_tower_can_have_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        MMKDClipConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"pixel_values": torch.zeros(2, 1, 32, 32)},
            r"pixel_values has the shape \(2, 1, 32, 32\); allowed: \(images, 3,",
        ),
        ({"pixel_values": torch.zeros(3, 32, 32)}, r"shape \(3, 32, 32\)"),
        ({"pixel_values": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, "pixel_values is torch.uint8; allowed"),
        ({"pixel_values": torch.full((2, 3, 32, 32), torch.nan)}, r"NaN or infinity in images \[0, 1\]"),
        ({"pixel_values": [[0.0]]}, "pixel_values is a list"),
        ({"input_ids": torch.zeros(1, 4)}, r"input_ids is torch.float32 of the shape \(1, 4\); allowed: .*int64"),
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, r"of the shape \(4,\)"),
        ({"input_ids": [[1, 2]]}, "input_ids is a list"),
        ({"pixel_values": torch.zeros(0, 3, 32, 32)}, r"shape \(0, 3, 32, 32\), no image; allowed"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"shape \(2, 0\), no token; allowed"),
        (
            {"input_ids": torch.tensor([[2, 70]])},
            "input_ids has 70, but the text tower has embeddings for 0 to 69; use the token",
        ),
        ({"input_ids": torch.tensor([[2, -1]])}, "input_ids has -1, but the text tower has embeddings for 0 to 69"),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 4)},
            r"attention_mask has the shape \(1, 4\), but input_ids \(1, 3\)",
        ),
        ({}, "give pixel_values, input_ids or both: neither came"),
    ],
)
def test_tensors_that_are_no_input_are_refused(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        model(**wrong)


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 16),
    reason="before 5.16 transformers leaves containers of code that is not its own as they are",
)
def test_a_checkpoint_without_weights_starts_as_the_model_does():
    config = MMKDClipConfig(vision_config={**VISION, "hidden_size": 64}, text_config=TEXT, projection_dim=16)
    empty, fresh = MMKDClipModel.from_pretrained(None, config=config, state_dict={}), MMKDClipModel(config)
    for name, value in fresh.named_parameters():
        found = empty.get_parameter(name)
        assert found.device.type == "cpu" and torch.isfinite(found).all(), name
        if value.ndim > 1 and value.numel() > 1000:  # weights, of each kind of layer
            assert found.std().item() == pytest.approx(value.std().item(), rel=0.15), name
        elif value.numel() > 1:
            torch.testing.assert_close(found.mean(), value.mean(), atol=0.2, rtol=0)


@pytest.mark.parametrize("name", ["projection_dim", "text_projection_hidden", "context_length"])
@pytest.mark.parametrize("value", ["512", 2.5, True])
def test_a_width_that_is_no_whole_number_is_refused(name, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{name}'.*\n.*{value}"):
        MMKDClipConfig(**{name: value})
    config = MMKDClipConfig()
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{name}'.*\n.*{value}"):
        setattr(config, name, value)


def test_presets_are_named_configurations():
    for name in PRESETS:
        config = MMKDClipConfig.from_preset(name)
        assert config.projection_dim in (512, 384, 256)
    base = MMKDClipConfig.from_preset("mmkd-clip-base", projection_dim=128)
    assert base.to_diff_dict() == MMKDClipConfig(projection_dim=128).to_diff_dict()
    assert MMKDClipConfig.from_preset("mmkd-clip-small").vision_config.patch_size == 16
    assert MMKDClipConfig.from_preset("mmkd-clip-mobile").vision_config.model_type == "timm_wrapper"
    with pytest.raises(ValueError, match="'mmkd-clip-huge'; known: mmkd-clip-base"):
        MMKDClipConfig.from_preset("mmkd-clip-huge")


def test_an_old_transformers_is_refused_at_import(monkeypatch):
    source = inspect.getsource(sys.modules[MMKDClipConfig.__module__])
    guard = source[source.index("OLDEST_TRANSFORMERS") : source.index("DEFAULT_LOGIT_SCALE")]
    monkeypatch.setattr(transformers, "__version__", "5.0.1")
    with pytest.raises(ImportError, match=r"needs transformers 5\.8 or newer, this is 5\.0\.1"):
        exec(guard, {"transformers": transformers})


@torch.no_grad()
def test_the_class_token_alone_is_the_pooled_output(batch):
    for vision in (VISION, {**VISION, "num_hidden_layers": 1}, ViTConfig(**VISION)):
        model = small(vision)
        for pixels in (batch["pixel_values"], torch.nn.functional.interpolate(batch["pixel_values"], (48, 64))):
            options = {"interpolate_pos_encoding": pixels.shape[-1] == 64}
            expected = model.get_image_features(pixels, **options)
            found = model.get_image_features(pixels, pooled_only=True, **options)
            torch.testing.assert_close(found.pooler_output, expected.pooler_output)
            assert (found.last_hidden_state is None) == (model.config.vision_config.model_type == "clip_vision_model")
