"""Files from others run no code, name no variable of the environment, and give no orders to a terminal."""

import ast
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import pytest
from tiny_model import save_tiny

from mmkd.command.settings import fail, run
from mmkd.curation.contamination import _catalog_contents
from mmkd.data.folder import open_pairs, write_manifest
from mmkd.data.readers import open_hub_dataset
from mmkd.data.table import Pair
from mmkd.encoders import hfclip, openclip
from mmkd.encoders.spec import TeacherSpec
from mmkd.encoders.weights import load_config, read_state_dict
from mmkd.exporting.served import OnnxEncoder
from mmkd.files import read_json, read_object
from mmkd.student.folder import load_student, save_student, weight_files
from modeling_mmkd import MMKDClipConfig

ROOT = Path(__file__).resolve().parents[2]
FORGED = {  # of a teacher in transformers' form; the sizes are of no model, timm would open the file
    "layers": {"vision_config": {"num_hidden_layers": 1_000_000}},
    "words": {"text_config": {"vocab_size": 10**12}},
    "positions": {"text_config": {"max_position_embeddings": 10**12}},
    "width": {"projection_dim": 10**12},
    "kernel": {"text_config": {"attn_implementation": "else/where"}},
    "file": {
        "model_type": "vision-text-dual-encoder",
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "resnet18",
            "model_args": {"checkpoint_path": "weights.pth"},
        },
        "text_config": {"model_type": "bert"},
    },
}


@dataclass
class NoSettings:
    """Settings of a command without any.

    Example:
        mmkd test
    """


def test_whatever_is_loaded_says_whether_its_code_may_run():
    """Without the argument, transformers prompts on the terminal, where `yes` may be piped in: one module gives it."""
    others = []
    for path in sorted(file for room in ("mmkd", "train", "hub") for file in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called.endswith(".from_pretrained") and path.name != "weights.py":
                others.append(f"{path}:{node.lineno} {called}")
    assert not others


def test_code_in_a_model_s_folder_is_not_run(tmp_path, monkeypatch):
    save_tiny(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="describes no model"):
        load_config(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "vision",
    [
        {"architecture": "resnet18", "model_args": {"checkpoint_path": "weights.pth"}},
        {"architecture": "resnet18", "model_args": {"pretrained_cfg": {"file": "weights.pth"}}},
        {"architecture": "resnet18", "model_args": {"img_size": {"file": "weights.pth"}}},
        {"architecture": "local-dir:/tmp/weights"},
        {"architecture": "hf-hub:owner/model"},
    ],
)
def test_a_configuration_names_no_file_that_timm_would_load(vision):
    with pytest.raises(ValueError, match="allowed: "):
        MMKDClipConfig(vision_config={"model_type": "timm_wrapper", **vision})


@pytest.mark.parametrize("kind", FORGED)
def test_no_teacher_is_built_of_a_size_that_no_model_has_nor_opens_files(tmp_path, kind):
    save_tiny(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "clip"} | FORGED[kind]))
    with pytest.raises(ValueError, match=r"config\.json describes no model: .* allowed: "):
        hfclip.load(TeacherSpec("T", "hfclip", str(tmp_path / "model")), "cpu")


@pytest.mark.parametrize("load", [weight_files, lambda folder: load_student(str(folder)), load_config])
def test_an_index_of_weights_names_no_file_elsewhere(tmp_path, load):
    save_tiny(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "private.safetensors")
    index = {"weight_map": dict.fromkeys(read_state_dict(tmp_path / "private.safetensors"), "../private.safetensors")}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json must map tensors to files beside it"):
        load(tmp_path / "model")


def test_an_adapter_beside_a_model_does_not_replace_it(tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "else/where", "peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"adapter_config\.json: transformers would load the model that it names"):
        load_student(str(tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        {"vision_cfg": {"layers": 1_000_000}, "text_cfg": {}},
        {"vision_cfg": {"timm_model_name": "local-dir:/tmp/weights"}, "text_cfg": {}},
        {"vision_cfg": {}, "text_cfg": {"hf_model_name": "../../private"}},
    ],
)
def test_no_teacher_of_open_clip_either(tmp_path, config):
    stated = {"model_cfg": config | {"embed_dim": 8}, "preprocess_cfg": {"mean": [0] * 3, "std": [1] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(stated))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"open_clip_config\.json: .*(allowed: |refused)"):
        openclip.load(TeacherSpec("T", "openclip", str(tmp_path)), "cpu")


def test_code_that_a_file_names_is_not_passed_on_to_those_who_load_what_came_of_it(tmp_path):
    save_tiny(tmp_path / "model")
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        values = json.loads((tmp_path / "model" / name).read_text())
        for part in (values, values.get("vision_config", {}), values.get("image_processor", {})):
            part["auto_map"] = {"AutoConfig": "else/where--evil.C", "AutoImageProcessor": "else/where--evil.I"}
        (tmp_path / "model" / name).write_text(json.dumps(values))
    (tmp_path / "saved").mkdir()
    save_student(tmp_path / "saved", *load_student(str(tmp_path / "model")))
    saved = "".join(path.read_text() for path in (tmp_path / "saved").rglob("*.json"))
    assert "modeling_mmkd.MMKDClipModel" in saved and "else/where" not in saved


@pytest.mark.parametrize("file", ["onnx/evil.pt2", "../private.onnx", "/private.onnx"])
def test_a_folder_of_onnx_names_no_program_and_no_tower_elsewhere(tmp_path, file):
    (tmp_path / "folder").mkdir()
    stated = {"format": "onnx", "dim": 8, "logit_scale": 1, "provenance": {}, "text": {"file": "onnx/text.onnx"}}
    stated["image"] = {"file": file, "side": 32, "size": 32}
    (tmp_path / "folder" / "export.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=r"export\.json names the tower .*; allowed: \.onnx files in it"):
        OnnxEncoder(tmp_path / "folder")


def test_a_saved_data_set_names_no_tables_elsewhere(tmp_path):
    table = datasets.DatasetDict({"test": datasets.Dataset.from_dict({"label": ["private"]})})
    table.save_to_disk(tmp_path / "private")
    (tmp_path / "private" / "test").rename(tmp_path / "elsewhere")
    table.save_to_disk(tmp_path / "forged")
    state = tmp_path / "forged" / "test" / "state.json"
    whole, split = state.read_text(), tmp_path / "forged" / "dataset_dict.json"
    (name,) = [entry["filename"] for entry in json.loads(whole)["_data_files"]]
    state.write_text(whole.replace(name, f"../../elsewhere/{name}"))
    with pytest.raises(ValueError, match=r"state\.json names a table outside"):
        open_hub_dataset(str(tmp_path / "forged"))
    state.write_text(whole)
    split.write_text('{"splits": ["../elsewhere"]}')
    with pytest.raises(ValueError, match=r"dataset_dict\.json names no folders"):
        open_hub_dataset(str(tmp_path / "forged"))


def test_two_files_that_describe_different_pixels_are_refused(tmp_path):
    save_tiny(tmp_path)
    values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values | {"size": 32}))  # as older releases write it
    load_student(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values | {"image_mean": [0.9, 0.9, 0.9]}))
    with pytest.raises(ValueError, match=r"processor_config\.json has image_mean .* beside it"):
        load_student(str(tmp_path))


@pytest.mark.parametrize("forged", [{"tokenizer_class": "CLIPTokenizer"}, {"do_lower_case": False}], ids=str)
def test_a_tokenizer_that_makes_other_tokens_than_its_file_states_is_refused(tmp_path, forged):
    save_tiny(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | forged))
    with pytest.raises(ValueError, match=r"as tokenizer_config\.json has it, makes other tokens of .* states"):
        load_student(str(tmp_path))


def test_the_context_is_that_of_the_model_where_no_file_of_the_tokenizer_states_it(tmp_path):
    save_tiny(tmp_path)
    stated = load_student(str(tmp_path))[1].tokenizer.model_max_length
    (tmp_path / "tokenizer_config.json").unlink()
    model, processor = load_student(str(tmp_path))
    assert processor.tokenizer.model_max_length == model.config.text_limit == stated


def test_sizes_beyond_any_model_are_refused_before_it_is_built():
    with pytest.raises(ValueError, match="allowed: 1 to 1024"):
        MMKDClipConfig(text_config={"num_hidden_layers": 1_000_000})


def test_a_manifest_names_no_variable_but_that_of_the_data(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hf_secret")
    (tmp_path / "own.yaml").write_text("source: {imagefolder: '/x/${SECRET_TOKEN}/$SECRET_TOKEN'}")
    _, _, reason = _catalog_contents(tmp_path / "own.yaml")
    assert "hf_secret" not in reason and "${SECRET_TOKEN}" in reason
    monkeypatch.setenv("MMKD_DATA", str(tmp_path))
    (tmp_path / "images").mkdir()
    (tmp_path / "own.yaml").write_text("source: {imagefolder: '${DATA}/images'}")
    assert _catalog_contents(tmp_path / "own.yaml") == ([], [], "")


def test_control_characters_of_a_caption_do_not_reach_the_terminal(monkeypatch, capsysbinary):
    caption = "a \x1b]0;title\x07 b \x9b31m c\td \x7f"
    monkeypatch.setattr(sys, "argv", ["mmkd test"])
    run(NoSettings, lambda _: print(caption))
    assert capsysbinary.readouterr().out.decode() == "a \ufffd]0;title\ufffd b \ufffd31m c\td \ufffd\n"
    with pytest.raises(SystemExit):
        fail(1, "\x1b[2J")
    assert capsysbinary.readouterr().err.endswith(b"error: \xef\xbf\xbd[2J\n")


def test_what_was_not_expected_is_one_line_and_a_traceback_on_request(monkeypatch, capsys):
    def fails(_settings):
        raise KeyError("teachers\nand more")

    monkeypatch.setattr(sys, "argv", ["mmkd test"])
    with pytest.raises(SystemExit, match="1"):
        run(NoSettings, fails)
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "KeyError" in errors and "--debug" in errors
    monkeypatch.setattr(sys, "argv", ["mmkd test", "--debug"])
    monkeypatch.setenv("MMKD_DEBUG", "")
    with pytest.raises(KeyError):
        run(NoSettings, fails)


def test_what_was_not_expected_names_the_file_that_was_read_last(tmp_path, monkeypatch, capsys):
    (tmp_path / "forged.json").write_text("[]")
    monkeypatch.setattr(sys, "argv", ["mmkd test"])
    with pytest.raises(SystemExit, match="1"):
        run(NoSettings, lambda _: read_json(tmp_path / "forged.json")["teachers"])
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and f"(perhaps of {tmp_path / 'forged.json'}" in errors
    with pytest.raises(ValueError, match=r"forged\.json must hold a JSON object, not a list"):
        read_object(tmp_path / "forged.json")


def test_a_manifest_opens_no_images_outside_folders_of_pairs(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "notes.txt").write_text("secret")
    pair = Pair("p0", "notes.txt", "a caption")
    write_manifest(tmp_path / "forged", [pair], images=tmp_path / "private")
    with pytest.raises(ValueError, match="is no folder of pairs; refused"):
        open_pairs(tmp_path / "forged")
    write_manifest(tmp_path / "forged", [replace(pair, image="private/notes.txt")], images=Path("/"))
    with pytest.raises(ValueError, match="is no folder of pairs; refused"):
        open_pairs(tmp_path / "forged")
    write_manifest(tmp_path / "private", [pair], images=tmp_path / "private")
    write_manifest(tmp_path / "screened", [pair], images=tmp_path / "private")
    assert open_pairs(tmp_path / "screened").image_path(pair) == (tmp_path / "private" / "notes.txt").resolve()
