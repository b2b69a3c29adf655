"""What is frozen is encoded once, and nothing else changes: weights, features, names of unreadable files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mmkd.train.extract
import mmkd.train.pretrain
from mmkd.command.settings import parse
from mmkd.data.features.lookup import TeacherFeatures
from mmkd.data.folder import open_pairs, write_manifest
from mmkd.data.table import Pair
from mmkd.encoders.frozen import FrozenTowers
from mmkd.student.folder import load_student

FROZEN = ["--freeze", "vision_model,text_model", "--crop", "center"]
TINY = ["--vision", "random:tiny", "--text", "random:tiny", "--projection_dim", "16"]
TINY += ["--vision_projection_hidden", "24"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("frozen")
    generator = np.random.default_rng(0)
    (root / "pairs" / "images").mkdir(parents=True)
    pairs = []
    for k in range(20):
        pixels = generator.integers(0, 255, (40, 36 + k, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "pairs" / "images" / f"{k}.png")
        pairs.append(Pair(f"p{k}", f"{k}.png", f"finding {'abc'[k % 3]} of case {k}", source="xy"[k % 2]))
    write_manifest(root / "pairs", pairs)
    return root


def pretrain(root, name, *arguments):
    command = ["--pairs", root / "pairs", "--output", root / name, *TINY, "--epochs", "3", "--batch_size", "8"]
    command += ["--learning_rate", "0.01", "--workers", "0", "--quiet", *arguments]
    mmkd.train.pretrain.main(parse(mmkd.train.pretrain.PretrainSettings, [str(argument) for argument in command]))
    return load_file(root / name / "model.safetensors")


def test_training_is_the_same(root):
    plain = pretrain(root, "plain", *FROZEN)
    cached = pretrain(root, "cached", *FROZEN, "--cache_frozen_towers", root / "towers")
    assert plain.keys() == cached.keys()
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, atol=5e-5, rtol=1e-3)  # AdamW divides rounding by itself
    parts = {path: path.stat().st_mtime_ns for path in (root / "towers").rglob("*.safetensors")}
    assert len(parts) == 2
    again = pretrain(root, "again", *FROZEN, "--cache_frozen_towers", root / "towers", "--sources", "x")
    assert {path: path.stat().st_mtime_ns for path in (root / "towers").rglob("*.safetensors")} == parts
    assert not torch.equal(again["visual_projection.fc1.weight"], cached["visual_projection.fc1.weight"])


def test_features_are_the_same(root):
    if not (root / "plain").is_dir():
        pretrain(root, "plain", *FROZEN)
    for name, more in (("f0", []), ("f1", ["--cache_frozen_towers", str(root / "other")])):
        command = ["--teacher", str(root / "plain"), "--pairs", str(root / "pairs"), "--output", str(root / name)]
        settings = parse(mmkd.train.extract.ExtractSettings, [*command, "--dtype", "float32", "--quiet", *more])
        mmkd.train.extract.main(settings)
    ids = [f"p{k}" for k in range(20)]
    one, two = (TeacherFeatures.open(root / name).lookup(ids)["plain"] for name in ("f0", "f1"))
    for side in ("image", "text"):
        torch.testing.assert_close(two[side], one[side], atol=2e-6, rtol=0)


def test_what_cannot_be_read_is_named(root, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes((root / "pairs" / "images" / "0.png").read_bytes()[:200])
    (tmp_path / "images" / "sound.png").write_bytes((root / "pairs" / "images" / "0.png").read_bytes())
    images = {"b": "broken.png", "s": "sound.png", "m": "missing.png", "t": "sound.png"}
    write_manifest(tmp_path, [Pair(id, image, "a") for id, image in images.items()])
    if not (root / "plain").is_dir():
        pretrain(root, "plain", *FROZEN)
    folder = open_pairs(tmp_path)
    outputs, unreadable = FrozenTowers(tmp_path / "towers", *load_student(str(root / "plain"))).image_outputs(
        folder, folder.pairs
    )
    assert unreadable == {"b": "corrupt", "m": "missing"}
    assert outputs.shape == (2, 32) and torch.equal(outputs[0], outputs[1])


def test_two_models_of_equal_towers_share_what_they_gave(root):
    pretrain(root, "first", *FROZEN, "--cache_frozen_towers", root / "shared")
    before = sorted((root / "shared").rglob("*.safetensors"))
    model = ["--model", root / "first", "--learning_rate", "0.1"]
    pretrain(root, "longer", *FROZEN, "--cache_frozen_towers", root / "shared", *model)
    assert sorted((root / "shared").rglob("*.safetensors")) == before
    pretrain(root, "reseeded", *FROZEN, "--cache_frozen_towers", root / "shared", "--seed", "7")
    assert len(list(Path(root / "shared").iterdir())) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--freeze", "vision_model", "--crop", "center"], "text_model is trainable: add it to --freeze"),
        (["--crop", "center"], "vision_model is trainable: add it to --freeze"),
        (["--freeze", "vision_model,text_model"], "needs --crop center"),
    ],
)
def test_refuses_what_could_not_be_kept(root, arguments, words):
    with pytest.raises(ValueError, match=words):
        pretrain(root, "never", *arguments, "--cache_frozen_towers", root / "towers")
