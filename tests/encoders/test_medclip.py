"""MedCLIP against its formula written out: averaged layers and tokens, grey square images."""

import json
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from teacher_forms import TEXTS, check_odd_texts, randomized, rewrite, write_bert
from torch.nn import functional
from transformers import BertConfig, BertModel, BertTokenizer, SwinConfig, SwinModel

from mmkd.encoders.zoo import load_encoder

FILE, SWIN, BERT = "pytorch_model.bin", "swin-tiny-patch4-window7-224", "Bio_ClinicalBERT"
SIZES = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 32, "patch_size": 4, "window_size": 4}
RENAMED = {
    "attention.q_proj": "attention.self.query",
    "attention.k_proj": "attention.self.key",
    "attention.v_proj": "attention.self.value",
    "attention.o_proj": "attention.output.dense",
    "attention.relative_position_bias.relative_position_bias_table": "attention.self.relative_position_bias_table",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def published_name(key: str) -> str:
    """A Swin key as it was called when the weights were saved; today's release has other names."""
    for new, old in RENAMED.items():
        key = key.replace(new, old)
    return key


@pytest.fixture
def medclip(tmp_path):
    """The unpacked archive, both towers' configurations in sub-folders."""
    bert = randomized(BertModel(BertConfig(**write_bert(tmp_path / BERT, layers=4))))
    (tmp_path / SWIN).mkdir()
    (tmp_path / SWIN / "config.json").write_text(json.dumps({"model_type": "swin", **SIZES}))
    swin = randomized(SwinModel(SwinConfig(**SIZES)))
    state = {f"vision_model.model.{published_name(k)}": v for k, v in swin.state_dict().items()}
    for key in [key for key in state if key.endswith("relative_position_bias_table")]:
        state[key.replace("bias_table", "index")] = torch.zeros(16, 16, dtype=torch.long)
    state |= {f"text_model.model.{k}": v for k, v in bert.state_dict().items()}
    state["text_model.model.embeddings.position_ids"] = torch.arange(512)[None]
    state["vision_model.projection_head.weight"] = torch.randn(512, 16)
    state["text_model.projection_head.weight"] = torch.randn(512, 16)
    state["logit_scale"] = torch.tensor(2.6)
    torch.save(state, tmp_path / FILE)
    return tmp_path, swin, bert, state


def test_images_equal_the_formula(medclip, images):
    folder, swin, _, state = medclip
    pixels = []
    for image in images:
        side = max(32, image.width, image.height)
        square = np.zeros((side, side), dtype=np.uint8)
        top, left = (side - image.height) // 2, (side - image.width) // 2
        square[top : top + image.height, left : left + image.width] = np.asarray(image.convert("L"))
        small = np.asarray(Image.fromarray(square).resize((32, 32), Image.Resampling.BICUBIC)) / 255
        pixels.append(torch.tensor((small - 0.5862785803043838) / 0.27950088968644304).float().repeat(3, 1, 1))
    with torch.no_grad():
        pooled = swin(torch.stack(pixels)).last_hidden_state.mean(dim=1)
    expected = functional.normalize(pooled @ state["vision_model.projection_head.weight"].T, dim=-1)
    encoder = load_encoder("MedCLIP", weights=folder)
    torch.testing.assert_close(encoder.encode_images(images), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode_images_and_pooled(images)[1], pooled, atol=1e-5, rtol=1e-5)
    assert encoder.provenance["logit_scale"] == pytest.approx(np.exp(2.6), abs=1e-4)


def test_texts_average_layers_and_their_own_tokens(medclip):
    folder, _, bert, state = medclip
    tokenizer = BertTokenizer.from_pretrained(folder / BERT)
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = bert(**tokenizer([text], return_tensors="pt"), output_hidden_states=True).hidden_states
        assert len(hidden) == 5
        expected.append(((hidden[1] + hidden[2] + hidden[4]) / 3).mean(dim=1)[0])
    projected = torch.stack(expected) @ state["text_model.projection_head.weight"].T
    encoder = load_encoder("MedCLIP", weights=folder)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), functional.normalize(projected, dim=-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("vision_model.projection_head.weight"), "vision_model.projection_head.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected: .*extra"),
        (lambda s: s.pop("vision_model.model.layernorm.weight"), "1 missing: layernorm.weight"),
        (lambda s: s.update({"text_model.model.extra": torch.zeros(1)}), "1 unexpected: extra"),
    ],
)
def test_keys_that_do_not_fit_are_listed(medclip, change, said):
    rewrite(medclip[0] / FILE, change)
    with pytest.raises(ValueError, match=said):
        load_encoder("MedCLIP", weights=medclip[0])


def test_the_archive_as_it_is_published(medclip, images):
    folder = medclip[0]
    with zipfile.ZipFile(folder / "medclip-vit-pretrained.zip", "w") as archive:
        for path in (folder / FILE, *(folder / SWIN).iterdir(), *(folder / BERT).iterdir()):
            archive.write(path, path.relative_to(folder))
    packed = load_encoder("MedCLIP", weights=folder / "medclip-vit-pretrained.zip")
    unpacked = load_encoder("MedCLIP", weights=folder)
    assert torch.equal(packed.encode_images(images), unpacked.encode_images(images))


def test_without_weights_it_says_where_they_are():
    with pytest.raises(FileNotFoundError, match=re.escape("medclip-vit-pretrained.zip")):
        load_encoder("medclip")


def test_texts_of_any_length_and_script(medclip):
    check_odd_texts(load_encoder("MedCLIP", weights=medclip[0]))
