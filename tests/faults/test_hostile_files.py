"""Files from others run no code, name no variable of the environment, and give no orders to a terminal."""

import ast
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tiny_model import save_tiny

from mmkd.command.settings import fail, run
from mmkd.curation.contamination import _catalog_contents
from mmkd.data.folder import open_pairs, write_manifest
from mmkd.data.table import Pair
from mmkd.encoders.weights import load_config
from modeling_mmkd import MMKDClipConfig

ROOT = Path(__file__).resolve().parents[2]
LOADERS = ("AutoConfig", "AutoTokenizer", "AutoProcessor", "AutoModel", "MMKDClipProcessor", "MMKDClipConfig")


@dataclass
class NoSettings:
    """Settings of a command without any.

    Example:
        mmkd test
    """


def test_whatever_is_loaded_says_whether_its_code_may_run():
    """Without the argument, transformers prompts on the terminal, where `yes` may be piped in."""
    silent = []
    for path in sorted(file for room in ("mmkd", "train", "hub") for file in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in [f"{loader}.from_pretrained" for loader in LOADERS]:
                given = {keyword.arg for keyword in node.keywords}
                if "trust_remote_code" not in given:
                    silent.append(f"{path}:{node.lineno} {called}")
    assert not silent


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
