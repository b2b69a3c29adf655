"""PMC-CLIP against its formula written out: no library loads the published form."""

import math

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from teacher_forms import TEXTS, check_odd_texts, randomized, rewrite, write_bert
from torch.nn import functional
from transformers import BertModel, BertTokenizer
from transformers.models.bert import BertConfig

from mmkd.encoders.tower_pair import IMAGE_FILE, PROJECTION_FILE, TEXT_FILE
from mmkd.encoders.zoo import load_encoder

BERT = "BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext"
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@pytest.fixture
def pmcclip(tmp_path):
    """The three files, PubMedBERT's sizes and tokenizer in a sub-folder; width 4, images of 64 pixels."""
    config = write_bert(tmp_path / BERT)
    vision = ModifiedResNet([1, 2, 1, 1], 768, 32, image_size=64, width=4)
    torch.save(randomized(vision).state_dict(), tmp_path / IMAGE_FILE)
    text = randomized(BertModel(BertConfig(**config)))
    stray = {"embeddings.position_ids": torch.arange(512)[None]}
    torch.save(text.state_dict() | stray, tmp_path / TEXT_FILE)
    torch.save(torch.nn.Parameter(torch.randn(16, 768)), tmp_path / PROJECTION_FILE)
    return tmp_path


def convolve(state, x, conv, norm, padding=0, stride=1):
    x = functional.conv2d(x, state[f"{conv}.weight"], padding=padding, stride=stride)
    mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
    scale = state[f"{norm}.weight"] / (variance + 1e-5).sqrt()
    return (x - mean[:, None, None]) * scale[:, None, None] + state[f"{norm}.bias"][:, None, None]


def block(state, name, x, stride):
    out = convolve(state, x, f"{name}.conv1", f"{name}.bn1").relu()
    out = convolve(state, out, f"{name}.conv2", f"{name}.bn2", padding=1).relu()
    out = functional.avg_pool2d(out, stride) if stride > 1 else out
    out = convolve(state, out, f"{name}.conv3", f"{name}.bn3")
    if f"{name}.downsample.0.weight" in state:
        x = functional.avg_pool2d(x, stride) if stride > 1 else x
        x = convolve(state, x, f"{name}.downsample.0", f"{name}.downsample.1")
    return (out + x).relu()


def image_tower(state, x, heads):
    """CLIP's modified ResNet: three-convolution stem, pooled strides, attention of the mean over all positions."""
    for k, stride in ((1, 2), (2, 1), (3, 1)):
        x = convolve(state, x, f"conv{k}", f"bn{k}", padding=1, stride=stride).relu()
    x = functional.avg_pool2d(x, 2)
    for stage, blocks in ((1, 1), (2, 2), (3, 1), (4, 1)):
        for number in range(blocks):
            x = block(state, f"layer{stage}.{number}", x, 2 if stage > 1 and number == 0 else 1)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + state["attnpool.positional_embedding"]
    q, k, v = (
        functional.linear(x, state[f"attnpool.{n}_proj.weight"], state[f"attnpool.{n}_proj.bias"])
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for n in "qkv"
    )
    weights = (q[:, :, :1] @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    pooled = (weights @ v).transpose(1, 2).flatten(2)[:, 0]
    return functional.linear(pooled, state["attnpool.c_proj.weight"], state["attnpool.c_proj.bias"])


@pytest.mark.parametrize("heads", [32, 8])
def test_images_equal_the_formula(pmcclip, images, heads):
    row = pmcclip / "row.yaml"
    row.write_text(f"name: pmc\nform: pmcclip\nweights: .\ntext_model: x/{BERT}\ncontext: 77\nheads: {heads}\n")
    encoder = load_encoder(str(row))
    state = torch.load(pmcclip / IMAGE_FILE, weights_only=True)
    pixels = (torch.rand(2, 3, 64, 64) - MEAN) / STD
    with torch.no_grad():
        torch.testing.assert_close(
            encoder.towers.image(pixels), image_tower(state, pixels, heads), atol=1e-5, rtol=1e-5
        )
        from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

        cropped = [center_crop(resize(image, 64, interpolation=3), 64) for image in images]
        pixels = torch.stack([(pil_to_tensor(image) / 255 - MEAN) / STD for image in cropped])
        expected = functional.normalize(image_tower(state, pixels, heads), dim=-1)
    torch.testing.assert_close(encoder.encode_images(images), expected, atol=1e-5, rtol=0)


def test_texts_are_the_first_token_of_the_last_state_times_the_projection(pmcclip):
    encoder = load_encoder("PMCCLIP", weights=pmcclip)
    bert = BertModel.from_pretrained(
        None,
        config=BertConfig.from_pretrained(pmcclip / BERT),
        state_dict=torch.load(pmcclip / TEXT_FILE, weights_only=True),
    ).eval()
    tokenizer = BertTokenizer.from_pretrained(pmcclip / BERT)
    projection = torch.load(pmcclip / PROJECTION_FILE, weights_only=True)
    with torch.no_grad():
        inputs = tokenizer(TEXTS, padding="max_length", max_length=77, return_tensors="pt")
        expected = functional.normalize(bert(**inputs).last_hidden_state[:, 0] @ projection, dim=-1)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (IMAGE_FILE, lambda s: s.pop("layer2.1.bn3.weight"), "1 missing: layer2.1.bn3.weight"),
        (IMAGE_FILE, lambda s: s.pop("conv1.weight"), "missing conv1.weight"),
        (TEXT_FILE, lambda s: s.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (TEXT_FILE, lambda s: s.pop("pooler.dense.bias"), "1 missing: pooler.dense.bias"),
    ],
)
def test_keys_that_do_not_fit_are_listed(pmcclip, file, change, said):
    rewrite(pmcclip / file, change)
    with pytest.raises(ValueError, match=said):
        load_encoder("PMCCLIP", weights=pmcclip)


def test_a_missing_file_is_named(pmcclip):
    (pmcclip / PROJECTION_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=PROJECTION_FILE):
        load_encoder("PMCCLIP", weights=pmcclip)


def test_texts_of_any_length_and_script(pmcclip):
    check_odd_texts(load_encoder("PMCCLIP", weights=pmcclip))
