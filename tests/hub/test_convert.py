"""Conversion through the command: parity with the authors, refusals that leave nothing behind, the way back."""

import json
import pickle
import socket
import sys
import urllib.error

import numpy as np
import pytest
import torch
from authors_form import HEADS_OF_64, TINY, inputs, reference, save_checkpoint, state_of, tokenizer
from PIL import Image
from processes import mmkd
from safetensors.torch import load_file, save_file
from tiny_model import save_tiny
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, BertConfig

import mmkd.hub.convert as convert
from mmkd.command.settings import parse
from mmkd.command.settings import run as run_recipe
from mmkd.encoders import weights as hub_access
from mmkd.exporting.open_clip_folder import load_open_clip
from modeling_mmkd import MMKDClipConfig, MMKDClipImageProcessor, MMKDClipModel, MMKDClipProcessor


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(convert.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint, its sizes and the model that made it."""
    folder = tmp_path_factory.mktemp("tiny")
    model = reference(TINY, seed=1)
    (folder / "sizes.json").write_text(json.dumps(TINY))
    return save_checkpoint(folder / "tiny.pt", model), folder / "sizes.json", model


def run(**options):
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    convert.main(parse(convert.ConvertSettings, [*arguments, "--quiet"]))


def assert_refused(capsys, tmp_path, *words, **options):
    """Run as the command does, expect one line on stderr, exit code 1 or 2, and no file that was not there before."""
    options.setdefault("output", tmp_path / "out")
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    listing = sorted(tmp_path.iterdir())
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["mmkd convert", *arguments, "--quiet"])
        run_recipe(convert.ConvertSettings, convert.main)
    message = capsys.readouterr().err.strip()
    assert stop.value.code in (1, 2)
    assert "Traceback" not in message and message.count("\n") == 0, message
    for word in words:
        assert word in message, message
    assert sorted(tmp_path.iterdir()) == listing
    return message


def embeddings(folder, pixels, ids):
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        image = model.get_image_features(pixels).pooler_output
        text = model.get_text_features(ids).pooler_output
        return image, text, model(input_ids=ids, pixel_values=pixels).logits_per_image


@pytest.mark.parametrize("name", ["tiny", "wide"])
def test_authors_outputs(golden, tmp_path, name):
    paths = {"checkpoint": golden / f"{name}.pt", "config": golden / f"{name}.json", "output": tmp_path / name}
    if name == "tiny":
        arguments = [str(part) for key, value in paths.items() for part in (f"--{key}", value)]
        done = mmkd("convert", *arguments)
        assert done.returncode == 0, done.stderr
    else:
        run(**paths)
    expected = np.load(golden / f"{name}.npz")
    pixels, ids = torch.from_numpy(expected["pixel_values"]), torch.from_numpy(expected["input_ids"])
    names = ("image_embeds", "text_embeds", "logits_per_image")
    for key, ours in zip(names, embeddings(tmp_path / name, pixels, ids), strict=True):
        np.testing.assert_allclose(ours, expected[key], atol=1e-5, rtol=0, err_msg=key)


@pytest.mark.parametrize(("sizes", "seed", "stated"), [(TINY, 1, True), (TINY, 7, True), (HEADS_OF_64, 3, False)])
def test_equals_open_clip(tmp_path, sizes, seed, stated):
    model = reference(sizes, seed)
    save_checkpoint(tmp_path / "x.pt", model)
    (tmp_path / "x.json").write_text(json.dumps(sizes))
    run(checkpoint=tmp_path / "x.pt", output=tmp_path / "x", **({"config": tmp_path / "x.json"} if stated else {}))
    pixels, ids = inputs(sizes, seed)
    image, text, logits = embeddings(tmp_path / "x", pixels, ids)
    with torch.no_grad():
        expected_image, expected_text = model.visual(pixels), model.text_encoder(ids)
        unit = torch.nn.functional.normalize
        expected_logits = model.logit_scale.exp() * unit(expected_image, dim=-1) @ unit(expected_text, dim=-1).T
    torch.testing.assert_close(image, expected_image, atol=1e-5, rtol=0)
    torch.testing.assert_close(text, expected_text, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("envelope", [True, False])
def test_every_wrapper_round_trips(tmp_path, tiny, prefix, envelope):
    _, sizes, model = tiny
    source = save_checkpoint(tmp_path / "x.pt", model, prefix, envelope)
    run(checkpoint=source, output=tmp_path / "x", config=sizes)
    run(checkpoint=tmp_path / "x", output=tmp_path / "back.pt", to="authors")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert set(back) == {"epoch", "name", "state_dict"}
    expected = state_of(model)
    assert back["state_dict"].keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in back["state_dict"].items())
    assert all(value.shape == expected[key].shape for key, value in back["state_dict"].items())


def test_safetensors_and_half_precision_keep_their_bits(tmp_path, tiny):
    state = {key: value.half().contiguous() for key, value in state_of(tiny[2]).items()}
    save_file(state, tmp_path / "x.safetensors")
    run(checkpoint=tmp_path / "x.safetensors", output=tmp_path / "x", config=tiny[1])
    assert AutoModel.from_pretrained(tmp_path / "x").dtype == torch.float16
    run(checkpoint=tmp_path / "x", output=tmp_path / "back.pt", to="authors")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["state_dict"]
    assert all(value.dtype == torch.float16 and torch.equal(value, state[key]) for key, value in back.items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("vision", ["vit", "timm"])
def test_open_clip_opens_what_is_written_for_it(tmp_path, vision):
    open_clip = pytest.importorskip("open_clip")
    student = save_tiny(tmp_path / "student", text_pooling="mean" if vision == "timm" else "cls")
    model, processor = MMKDClipModel.from_pretrained(student).eval(), MMKDClipProcessor.from_pretrained(student)
    if vision == "timm":
        tower = {"model_type": "timm_wrapper", "architecture": "test_efficientnet"}
        config = MMKDClipConfig(**model.config.to_dict() | {"vision_config": tower, "text_projection_hidden": None})
        model = MMKDClipModel(config).eval()
        model.save_pretrained(student)
    run(checkpoint=student, output=tmp_path / "for-open-clip", to="open_clip")
    name = f"local-dir:{tmp_path / 'for-open-clip'}"
    theirs, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenize = open_clip.get_tokenizer(name)
    adapter, own_preprocess, own_tokenize = load_open_clip(str(student))
    image, texts = Image.effect_noise((60, 44), 90).convert("RGB"), ["ct of the lung", "mri"]
    batch = processor(images=image, text=texts, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**batch)
        assert preprocess(image).shape == (3, 32, 32)
        torch.testing.assert_close(own_preprocess(image)[None], batch["pixel_values"])
        for encoder, words in ((theirs.eval(), tokenize(texts)), (adapter, own_tokenize(texts))):
            found = encoder.encode_image(batch["pixel_values"], normalize=True)
            torch.testing.assert_close(found, expected.image_embeds, atol=1e-5, rtol=0)
            torch.testing.assert_close(
                encoder.encode_text(words, normalize=True), expected.text_embeds, atol=1e-5, rtol=0
            )
            torch.testing.assert_close(encoder.logit_scale.exp().reshape(1), model.logit_scale.exp())


def test_a_student_that_open_clip_cannot_hold_names_the_adapter(tmp_path, capsys):
    pytest.importorskip("open_clip")
    student = save_tiny(tmp_path / "student", vision_projection_hidden=24)
    assert_refused(capsys, tmp_path, "hidden layer", "load_open_clip", checkpoint=student, to="open_clip")


def test_pixels_that_open_clip_would_not_make_are_refused(tmp_path, capsys):
    pytest.importorskip("open_clip")
    student = save_tiny(tmp_path / "student")
    processor = MMKDClipProcessor.from_pretrained(student)
    processor.image_processor.size = {"shortest_edge": 40}
    processor.save_pretrained(student)
    assert_refused(capsys, tmp_path, "resized to", "load_open_clip", checkpoint=student, to="open_clip")


def test_mixed_precision_takes_the_widest(tmp_path, tiny):
    state = {key: value.half() if "mlp" in key else value for key, value in state_of(tiny[2]).items()}
    torch.save(state, tmp_path / "x.pt")
    run(checkpoint=tmp_path / "x.pt", output=tmp_path / "x", config=tiny[1])
    assert {value.dtype for value in load_file(tmp_path / "x" / "model.safetensors").values()} == {torch.float32}


def test_same_command_same_bytes(tmp_path, tiny):
    for name in ("a", "b"):
        run(checkpoint=tiny[0], output=tmp_path / name, config=tiny[1])
        run(checkpoint=tmp_path / name, output=tmp_path / f"{name}.pt", to="authors")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_sizes_in_part_and_as_our_config(tmp_path, tiny):
    heads = {"vision": {"num_attention_heads": 3}, "text": {"num_attention_heads": 4}}
    (tmp_path / "heads.json").write_text(json.dumps(heads))
    run(checkpoint=tiny[0], output=tmp_path / "a", config=tmp_path / "heads.json")
    run(checkpoint=tiny[0], output=tmp_path / "b", config=tmp_path / "a" / "config.json")
    run(checkpoint=tiny[0], output=tmp_path / "c", config=tiny[1])
    ours = [json.loads((tmp_path / name / "config.json").read_text()) for name in "abc"]
    assert ours[0] == ours[1] == ours[2]
    assert ours[0]["vision_config"]["intermediate_size"] == 4 * TINY["vision"]["hidden_size"]


def test_with_a_tokenizer_the_folder_is_whole(tmp_path, tiny):
    tokenizer(70).save_pretrained(tmp_path / "words")
    run(checkpoint=tiny[0], output=tmp_path / "x", config=tiny[1], tokenizer=tmp_path / "words")
    processor = AutoProcessor.from_pretrained(tmp_path / "x")
    assert isinstance(processor, MMKDClipProcessor)
    assert processor.tokenizer.model_max_length == 48  # the position embeddings, fewer than 256
    batch = processor(images=Image.new("RGB", (50, 40)), text=["ct of the lung", "a b"], return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert AutoModel.from_pretrained(tmp_path / "x")(**batch).logits_per_image.shape == (1, 2)


def test_context_is_256_where_the_model_has_more(tmp_path):
    found, problem = convert.find_tokenizer(str(make_words(tmp_path)), BertConfig(vocab_size=70))
    assert not problem and found.model_max_length == 256


@pytest.mark.parametrize("words", ["none", "too many", "no vocabulary"])
def test_without_a_tokenizer_images_work_and_the_message_is_loud(tmp_path, tiny, capsys, words):
    name = tmp_path / "words"
    if words != "none":
        tokenizer(71).save_pretrained(name)
    if words == "no vocabulary":
        (name / "tokenizer.json").unlink()
    run(checkpoint=tiny[0], output=tmp_path / "x", config=tiny[1], tokenizer=name)
    message = capsys.readouterr().err
    assert "NO TOKENIZER" in message and str(tmp_path / "x") in message and "AutoTokenizer" in message
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path / "x"), MMKDClipImageProcessor)
    processor = AutoProcessor.from_pretrained(tmp_path / "x")
    assert processor(images=Image.new("L", (40, 50)), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="no tokenizer"):
        processor(text="ct of the lung")
    AutoTokenizer.from_pretrained(make_words(tmp_path), model_max_length=48).save_pretrained(tmp_path / "x")
    assert AutoProcessor.from_pretrained(tmp_path / "x")(text="ct")["input_ids"]


def make_words(tmp_path):
    tokenizer(70).save_pretrained(tmp_path / "right")
    return tmp_path / "right"


def test_a_dead_network_is_asked_once_and_briefly(monkeypatch, tmp_path):
    calls = []

    def dead(request, timeout):
        calls.append(timeout)
        raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(convert.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_access.urllib.request, "urlopen", dead)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    found, problem = convert.find_tokenizer(convert.TOKENIZER, MMKDClipConfig().text_config)
    assert found is None and "does not answer" in problem
    assert calls == [hub_access.HUB_TIMEOUT_SECONDS]


class Code:
    def __reduce__(self):
        return (print, ("this must not run",))


BAD_FILES = {
    "text": b"these are no weights\n",
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "empty": b"",
    "pickle": pickle.dumps({"state_dict": {"visual.proj": Code()}}),
    "list": pickle.dumps([1, 2, 3]),
}


@pytest.mark.parametrize("kind", [*BAD_FILES, "truncated", "code", "number", "folder", "absent"])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_not_a_checkpoint(tmp_path, tiny, capsys, kind, ending):
    path = tmp_path / f"x.{ending}"
    if kind == "folder":
        path.mkdir()
    elif kind == "truncated":
        path.write_bytes(tiny[0].read_bytes()[:-5000])
    elif kind in ("code", "number"):
        torch.save({"state_dict": {"a": Code()}} if kind == "code" else {"state_dict": {"a": 3}}, path)
    elif kind != "absent":
        path.write_bytes(BAD_FILES[kind])
    message = assert_refused(capsys, tmp_path, str(path), checkpoint=path, config=tiny[1])
    assert "weights_only" not in message and "torch.load" not in message
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("stated", [True, False])
def test_unknown_and_missing_keys_are_listed(tmp_path, capsys, stated):
    state = state_of(reference(HEADS_OF_64, 0), "module.")
    (tmp_path / "x.json").write_text(json.dumps(HEADS_OF_64))
    options = {"checkpoint": tmp_path / "x.pt"} | ({"config": tmp_path / "x.json"} if stated else {})
    torch.save({**state, "module.visual.extra": torch.ones(1), "module.head.weight": torch.ones(1)}, tmp_path / "x.pt")
    assert_refused(capsys, tmp_path, "visual.extra", "head.weight", **options)
    for lost in ("visual.ln_pre.bias", "logit_scale", "visual.proj"):
        torch.save({key: value for key, value in state.items() if not key.endswith(lost)}, tmp_path / "x.pt")
        told = {"visual.ln_pre.bias": "pre_layrnorm.bias", "visual.proj": "proj"}.get(lost, lost)
        assert_refused(capsys, tmp_path, told, **options)
    block = "text_encoder.transformer.encoder.layer.1."
    torch.save({key: value for key, value in state.items() if block + "attention" not in key}, tmp_path / "x.pt")
    assert_refused(capsys, tmp_path, "10 missing", "layer.1.attention.self.query.weight", **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"projection_dim": 21}, ["text_projection.fc2.weight (20, 30) instead of (21, 30)"]),
        ({"vision": {**TINY["vision"], "num_hidden_layers": 3}}, ["16 missing", "vision_model.encoder.layers.2"]),
        ({"vision": {**TINY["vision"], "num_hidden_layers": 1}}, ["16 unexpected", "vision_model.encoder.layers.1"]),
        ({"vision": {**TINY["vision"], "image_size": 64}}, ["position_embedding.weight (17, 48) instead of (65, 48)"]),
        ({"vision": {**TINY["vision"], "num_attention_heads": 7}}, ["7"]),
        ({"text": {**TINY["text"], "vocab_size": 71}}, ["word_embeddings.weight (70, 40) instead of (71, 40)"]),
        ({"text": {**TINY["text"], "hidden_sise": 40}}, ["hidden_sise", "'hidden_size'"]),
        ({"text": {**TINY["text"], "model_type": "nonesuch"}}, ["nonesuch"]),
        ({"text": {**TINY["text"], "hidden_size": "wide"}}, ["hidden_size"]),
        ({"text": {"hidden_size": "wide"}}, ["x.json", "number"]),
        ({"vision": {"patch_size": None}}, ["x.json", "number"]),
        ({"projection_dim": "x"}, ["x.json", "number"]),
        ({"projection_dim": -3}, ["projection_dim is -3"]),
        ({"vision": 3}, ["vision"]),
        ({"vison": {}}, ["vison", "'vision'"]),
        ({"projection_dims": 20}, ["projection_dims", "'projection_dim'"]),
    ],
)
def test_sizes_that_do_not_fit(tmp_path, tiny, capsys, change, words):
    (tmp_path / "x.json").write_text(json.dumps({**TINY, **change}))
    assert_refused(capsys, tmp_path, *words, checkpoint=tiny[0], config=tmp_path / "x.json")


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "vision: {}", '"vision"'])
def test_json_that_is_none(tmp_path, tiny, capsys, text):
    (tmp_path / "x.json").write_text(text)
    assert_refused(capsys, tmp_path, "x.json", checkpoint=tiny[0], config=tmp_path / "x.json")


def test_a_width_that_64_does_not_divide_asks_for_the_config(tmp_path, tiny, capsys):
    assert_refused(capsys, tmp_path, "48 wide", "--config", "num_attention_heads", checkpoint=tiny[0])


def test_outputs_that_cannot_be(tmp_path, tiny, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    assert_refused(capsys, tmp_path, "exists", checkpoint=tiny[0], config=tiny[1], output=tmp_path / "full")
    assert_refused(
        capsys, tmp_path, "letter", checkpoint=tiny[0], config=tiny[1], output=tmp_path / "full" / "letter.txt" / "x"
    )
    assert_refused(capsys, tmp_path, "nonsense", "open_clip", checkpoint=tiny[0], to="nonsense")
    assert (tmp_path / "full" / "letter.txt").read_text() == "dear"
    run(checkpoint=tiny[0], config=tiny[1], output=tmp_path / "full", overwrite="true")
    assert not (tmp_path / "full" / "letter.txt").exists() and (tmp_path / "full" / "config.json").exists()


def test_a_disk_that_fails_leaves_nothing(tmp_path, tiny, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MMKDClipModel, "save_pretrained", full)
    assert_refused(capsys, tmp_path, "No space left", checkpoint=tiny[0], config=tiny[1])


def test_written_tensors_are_compared(tmp_path, tiny, monkeypatch):
    save = MMKDClipModel.save_pretrained

    def flip_a_bit(model, folder):
        with torch.no_grad():
            model.visual_projection.weight = torch.nn.Parameter(model.visual_projection.weight.clone())
            model.visual_projection.weight[0, 0] += 1e-6
        save(model, folder)

    monkeypatch.setattr(MMKDClipModel, "save_pretrained", flip_a_bit)
    with pytest.raises(ValueError, match=r"visual_projection\.weight"):
        run(checkpoint=tiny[0], config=tiny[1], output=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_folders_that_cannot_go_back(tmp_path, tiny, capsys):
    back = {"to": "authors", "output": tmp_path / "back.pt"}
    (tmp_path / "nothing").mkdir()
    assert_refused(capsys, tmp_path, "config.json", checkpoint=tmp_path / "nothing", **back)
    assert_refused(capsys, tmp_path, "tiny.pt", checkpoint=tiny[0], **back)
    vision = {**TINY["vision"], "intermediate_size": 64, "model_type": "vit"}
    MMKDClipModel(MMKDClipConfig(vision_config=vision, text_config=TINY["text"], projection_dim=20)).save_pretrained(
        tmp_path / "vit"
    )
    assert_refused(capsys, tmp_path, "vit", checkpoint=tmp_path / "vit", **back)
    vision["model_type"] = "clip_vision_model"
    MMKDClipModel(
        MMKDClipConfig(vision_config=vision, text_config=TINY["text"], projection_dim=20, text_pooling="mean")
    ).save_pretrained(tmp_path / "mean")
    assert_refused(capsys, tmp_path, "mean", checkpoint=tmp_path / "mean", **back)
    assert_refused(capsys, tmp_path, "--config", checkpoint=tmp_path / "mean", config=tiny[1], **back)
    (tmp_path / "mean" / "model.safetensors").write_bytes(b"12345678")
    assert_refused(capsys, tmp_path, "model.safetensors", checkpoint=tmp_path / "mean", **back)
    (tmp_path / "mean" / "model.safetensors").unlink()
    assert_refused(capsys, tmp_path, "model.safetensors", checkpoint=tmp_path / "mean", **back)
