import pytest
import torch
from teacher_forms import check_odd_texts, randomized, rewrite, write_bert
from transformers import CLIPImageProcessorPil

from mmkd.encoders.authors_checkpoint import to_authors
from mmkd.encoders.zoo import load_encoder
from modeling_mmkd import MMKDClipConfig, MMKDClipModel

FILE, BERT = "unimed-clip-vit-b16.pt", "BiomedNLP-BiomedBERT-base-uncased-abstract"


@pytest.fixture
def unimed(tmp_path):
    """One checkpoint in the training envelope, towers 64 wide, BiomedBERT's tokenizer in a sub-folder."""
    text = write_bert(tmp_path / BERT, width=64, heads=1)
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 32, "patch_size": 16}
    model = randomized(MMKDClipModel(MMKDClipConfig(vision_config=vision, text_config=text)))
    state = {f"module.{key}": value for key, value in to_authors(model.state_dict()).items()}
    state["module.text_encoder.transformer.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save({"epoch": 10, "name": "unimed", "state_dict": state}, tmp_path / FILE)
    return tmp_path, model


def test_equals_the_model_it_was_written_from(unimed, images):
    folder, model = unimed
    encoder = load_encoder("UniMedCLIP", weights=folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    ids = [[2, 5, 3, 0], [2, 10, 3, 0], [2, 12, 9, 3]]  # [CLS] ... [SEP]; the third is "normal mri"
    with torch.no_grad():
        output = model(torch.tensor(ids), processor(images, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(encoder.encode_images(images), output.image_embeds, atol=1e-5, rtol=0)
    found = encoder.encode_texts(["lung", "CT", " normal \n mri"])
    torch.testing.assert_close(found, output.text_embeds, atol=1e-5, rtol=0)
    assert encoder.provenance["license"] == "CC BY-NC 4.0"
    assert encoder.provenance["context"] == 256
    assert encoder.provenance["logit_scale"] == pytest.approx(model.logit_scale.exp().item(), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["state_dict"].pop("module.visual.ln_post.bias"), "1 missing: vision_model.post_layernorm.bias"),
        (lambda s: s["state_dict"].update(extra=torch.zeros(1)), "extra"),
    ],
)
def test_keys_that_do_not_fit_are_listed(unimed, change, said):
    rewrite(unimed[0] / FILE, change)
    with pytest.raises(ValueError, match=said):
        load_encoder("UniMedCLIP", weights=unimed[0])


def test_texts_of_any_length_and_script(unimed):
    check_odd_texts(load_encoder("UniMedCLIP", weights=unimed[0]))
