"""Kernels of attention and compilation: the same numbers, and inputs in the form that flash attention takes them."""

import shutil

import pytest
import torch
from tiny_model import TEXT, VISION
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, BertModel, CLIPVisionModel
from transformers.masking_utils import flash_attention_mask

from modeling_mmkd import MMKDClipConfig, MMKDClipModel

STAND_IN = "unpadded_stand_in"
of_python_3_13_0 = pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MMKDClipModel(MMKDClipConfig(vision_config=VISION, text_config=TEXT, projection_dim=16)).eval()


@pytest.fixture
def batch():
    """Texts of 3, 9 and 20 tokens, padded to 20."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 70, (3, 20), generator=generator)
    for row, length in enumerate((3, 9, 20)):
        ids[row, length:] = 0
    return {"input_ids": ids, "pixel_values": torch.randn(3, 3, 32, 32, generator=generator)}


@pytest.fixture
def calls(model):
    """Run the model as with flash attention: sequences without their padding, no mask inside; masks that came.

    It gets `(batch, heads, tokens, width)` and a mask of `(batch, tokens)` or none; what stood on
    padding comes back as zeros.
    """
    masks = []

    def unpadded(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **_):
        assert query.shape == key.shape == value.shape and query.ndim == 4
        assert not (module.is_causal if is_causal is None else is_causal), "an encoder sees both sides"
        masks.append(attention_mask)
        keep = torch.ones(query.shape[0], query.shape[2]) if attention_mask is None else attention_mask
        assert keep.shape == (query.shape[0], query.shape[2]), "it counts tokens in a mask of two dimensions"
        output = torch.zeros_like(query)
        for row, length in enumerate(keep.sum(dim=1).int().tolist()):
            assert keep[row, :length].all()
            own = (part[row : row + 1, :, :length] for part in (query, key, value))
            output[row, :, :length] = scaled_dot_product_attention(*own, scale=scaling)[0]
        return output.transpose(1, 2), None

    AttentionInterface.register(STAND_IN, unpadded)
    AttentionMaskInterface.register(STAND_IN, flash_attention_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(STAND_IN)
    yield masks
    model.set_attn_implementation(before)


def test_both_towers_and_the_model_say_that_they_take_flash_attention(model):
    assert isinstance(model.vision_model, CLIPVisionModel) and isinstance(model.text_model, BertModel)
    for part in (model, model.vision_model, model.text_model):
        assert part._supports_flash_attn and part._supports_sdpa and part._supports_attention_backend


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.no_grad()
def test_flash_attention_gets_texts_as_it_takes_them_and_gives_the_same(model, batch, calls, monkeypatch, pooling):
    monkeypatch.setattr(model.config, "text_pooling", pooling)
    mask = batch["input_ids"].ne(0).long()
    found = model(**batch)
    layers = model.config.vision_config.num_hidden_layers
    assert len(calls) == 2 * layers and all(given is None for given in calls[:layers]), "images have no padding"
    assert all(given.sum(dim=1).tolist() == [3, 9, 20] for given in calls[layers:])
    model.set_attn_implementation("sdpa")
    for given in ({}, {"attention_mask": mask}):
        expected = model(**batch, **given)
        torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, atol=1e-5, rtol=0)
    alone = model(input_ids=batch["input_ids"][:1, :3])
    torch.testing.assert_close(found.text_embeds[:1], alone.text_embeds, atol=1e-5, rtol=0)


@torch.no_grad()
def test_texts_of_one_length_need_no_mask(model, batch, calls):
    model(input_ids=batch["input_ids"][2:])
    assert calls == [None] * model.config.text_config.num_hidden_layers


@torch.no_grad()
def test_the_class_token_alone_does_not_depend_on_the_kernel(model, batch, calls):
    whole = model.get_image_features(batch["pixel_values"]).pooler_output
    alone = model.get_image_features(batch["pixel_values"], pooled_only=True).pooler_output
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=0)


def compiled(called, backend):
    """No part of what is called is left to Python."""
    torch.compiler.reset()
    return torch.compile(called, fullgraph=True, dynamic=True, backend=backend)


def batches(batch):
    """The batch, and one of another size whose texts are shorter."""
    return batch, {"input_ids": batch["input_ids"].repeat(2, 1)[:, :12], "pixel_values": batch["pixel_values"][:2]}


def one_layer():
    torch.manual_seed(0)
    one = {"num_hidden_layers": 1}
    text = {**TEXT, **one, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return MMKDClipModel(MMKDClipConfig(vision_config={**VISION, **one}, text_config=text, projection_dim=16))


@of_python_3_13_0
@torch.no_grad()
def test_compiled_it_gives_the_same_for_every_batch_and_length(batch):
    model = one_layer().eval()
    graph = compiled(model, "aot_eager")
    for given in batches(batch):
        expected, found = model(**given), graph(**given)
        for name in ("logits_per_image", "text_embeds", "image_embeds"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@of_python_3_13_0
@torch.no_grad()
def test_kernels_of_inductor_give_the_same_for_texts_of_every_length(batch):
    """Of the text tower alone, both of whose sizes change: every kernel costs the compiler a second."""
    model = one_layer().eval()
    kernels = compiled(model.get_text_features, "inductor")
    for given in batches(batch):
        expected, found = (run(given["input_ids"]).pooler_output for run in (model.get_text_features, kernels))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@of_python_3_13_0
def test_compiled_it_trains_with_the_same_gradients(batch):
    model = one_layer().train()
    gradients = []
    for run in (model, compiled(model, "aot_eager")):
        model.zero_grad()
        run(**batch, return_loss=True).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-5, rtol=1e-4, msg=name)
