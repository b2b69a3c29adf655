"""Names of tensors in both directions, and sizes read off them."""

import pytest
import torch
from authors_form import HEADS_OF_64, TINY, is_scale, reference, state_of

from mmkd.encoders.authors_checkpoint import from_authors, infer_config, to_authors
from mmkd.encoders.weights import listed, require_same_keys, unwrap
from modeling_mmkd import MMKDClipModel


@pytest.fixture(scope="module")
def state():
    return state_of(reference(TINY, seed=0))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
def test_unwrap_takes_off_every_wrapper(state, prefix):
    wrapped = {prefix + key: value for key, value in state.items()}
    for checkpoint in (wrapped, {"epoch": 3, "name": "x", "state_dict": wrapped}):
        assert unwrap(checkpoint).keys() == state.keys()


@pytest.mark.parametrize(
    "checkpoint", [None, 3, [], {}, {"state_dict": {}}, {"state_dict": [1]}, {"a": 1}, {"a": torch.ones(1), "b": "c"}]
)
def test_unwrap_refuses_what_holds_no_tensors(checkpoint):
    with pytest.raises(ValueError, match="state dictionary"):
        unwrap(checkpoint)


def test_unwrap_refuses_names_that_are_not_text_and_names_that_collide():
    with pytest.raises(ValueError, match="state dictionary"):
        unwrap({0: torch.ones(1)})
    with pytest.raises(ValueError, match=r"'a'.*twice"):
        unwrap({"module.a": torch.ones(1), "a": torch.ones(1)})


@pytest.mark.parametrize("sizes", [TINY, HEADS_OF_64])
def test_there_and_back_is_the_same_to_the_bit(sizes):
    state = state_of(reference(sizes, seed=4))
    back = to_authors(from_authors(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) and back[key].shape == value.shape for key, value in state.items())


def test_every_tensor_has_its_place(state):
    ours = from_authors(state)
    require_same_keys(ours, MMKDClipModel(infer_config(state, TINY)).state_dict(), "it")
    query, key, value = state["visual.transformer.resblocks.1.attn.in_proj_weight"].chunk(3)
    for name, part in (("q", query), ("k", key), ("v", value)):
        assert torch.equal(ours[f"vision_model.encoder.layers.1.self_attn.{name}_proj.weight"], part)
    assert torch.equal(ours["visual_projection.weight"], state["visual.proj"].T)
    assert ours["logit_scale"].shape == (1,)


def test_position_ids_of_older_releases_are_no_weights(state):
    ids = {"text_encoder.transformer.embeddings.position_ids": torch.arange(48)[None]}
    assert from_authors({**state, **ids}).keys() == from_authors(state).keys()


def test_unknown_keys_are_listed(state):
    with pytest.raises(ValueError, match=r"2 keys.*visual\.head, other"):
        from_authors({**state, "visual.head": torch.ones(1), "other": torch.ones(1)})
    with pytest.raises(ValueError, match=r"no place for vision_model\.timm"):
        to_authors({**from_authors(state), "vision_model.timm": torch.ones(1)})


def test_part_of_a_fused_triple_is_no_crash(state):
    ours = from_authors(state)
    del ours["vision_model.encoder.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj\.weight"):
        to_authors(ours)


@pytest.mark.parametrize("key", ["visual.transformer.resblocks.0.attn.in_proj_weight", "logit_scale", "visual.proj"])
def test_odd_shapes_are_told(state, key):
    odd = {**state, key: torch.ones(2, 4, 5)}
    with pytest.raises(ValueError, match=r"of another shape|shape \(2, 4, 5\)"):
        require_same_keys(from_authors(odd), MMKDClipModel(infer_config(odd, TINY)).state_dict(), "it")


def test_missing_unexpected_and_misshapen_keys_are_listed():
    expected = {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}
    given = {"a": torch.ones(2), "b": torch.ones(4), "d": torch.ones(1)}
    with pytest.raises(ValueError, match=r"it.*1 missing: c.*1 unexpected: d.*b \(4,\) instead of \(3,\)"):
        require_same_keys(given, expected, "it")
    require_same_keys(expected, expected, "it")


def test_sizes_are_read_off_the_tensors():
    config = infer_config(state_of(reference(HEADS_OF_64, seed=0)))
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.image_size, vision.patch_size, vision.num_hidden_layers) == (128, 64, 16, 1)
    assert (vision.num_attention_heads, vision.intermediate_size, vision.hidden_act) == (2, 512, "quick_gelu")
    assert (text.hidden_size, text.num_attention_heads, text.intermediate_size) == (192, 3, 100)
    assert (text.vocab_size, text.max_position_embeddings, text.num_hidden_layers) == (70, 48, 2)
    assert (config.projection_dim, config.text_projection_hidden) == (24, 108)


def test_given_sizes_win_over_the_tensors(state):
    config = infer_config(state, {"vision": {"num_attention_heads": 6, "image_size": 64}, "text": TINY["text"]})
    assert config.vision_config.num_attention_heads == 6
    assert config.vision_config.image_size == 64
    assert config.vision_config.intermediate_size == 4 * 48


def test_heads_that_do_not_divide_ask_for_the_config(state):
    with pytest.raises(ValueError, match=r"48 wide.*--config"):
        infer_config(state)
    with pytest.raises(ValueError, match=r"40 wide.*--config"):
        infer_config(state, {"vision": {"num_attention_heads": 3}})


def test_a_tensor_that_tells_a_size_is_missed_by_name(state):
    del (lacking := dict(state))["visual.positional_embedding"]
    with pytest.raises(ValueError, match=r"visual\.positional_embedding"):
        infer_config(lacking)


def test_long_lists_are_cut():
    assert listed([str(number) for number in range(30)]).endswith("11 and 18 more")


def test_the_reference_has_no_tensor_at_its_start(state):
    assert all(value.std() > 0.01 for key, value in state.items() if key != "logit_scale" and not is_scale(key))
