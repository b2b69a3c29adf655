"""Exports against the model they are of, used as somebody without this package would use them."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from mmkd.command.cli import main as cli
from mmkd.command.settings import parse
from mmkd.exporting.folder import examples, require_exportable, towers, write_usage
from mmkd.exporting.usage import Encoder, load_tower
from mmkd.hub import export, push
from mmkd.student.folder import save_student
from mmkd.student.towers import build_model
from modeling_mmkd import MMKDClipConfig, MMKDClipModel, MMKDClipProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fake_encoder import make_pairs, write_pairs

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # commands run in this process
PAGE = Path(__file__).resolve().parents[2] / "docs" / "deployment.md"
FORMS = {"": 1e-4, "_fp16": 1e-2, "_quantized": 0.45}  # suffix -> largest difference of a unit vector's numbers
TEXTS = ["an MRI of the brain", "ct", "a &amp;amp; b  with\n white space", "word " * 400]


def run_export(model, output, *arguments):
    settings = parse(export.ExportSettings, [str(model), "--output", str(output), *map(str, arguments)])
    export.main(settings)
    return output


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A ViT and a BERT, the published form in small."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit") / "model"
    save_student(folder, *build_model("random:tiny", "random:tiny", 16))
    return folder


@pytest.fixture(scope="module")
def mobile(vit, tmp_path_factory):
    """A convolutional timm backbone and a BERT pooled by its mean."""
    torch.manual_seed(1)
    processor = MMKDClipProcessor.from_pretrained(vit)
    model = MMKDClipModel.from_pretrained(vit)
    config = MMKDClipConfig(
        vision_config={"model_type": "timm_wrapper", "architecture": "test_efficientnet"},
        text_config=model.config.text_config,
        projection_dim=16,
        text_pooling="mean",
    )
    folder, model = tmp_path_factory.mktemp("mobile") / "model", MMKDClipModel(config)
    with torch.no_grad():
        for _ in range(30):  # until batch normalization has seen what random layers give
            model.get_image_features(torch.randn(8, 3, 32, 32))
    save_student(folder, model.eval(), processor)
    return folder


@pytest.fixture(scope="module")
def exported(vit, mobile, tmp_path_factory):
    """Every form of both models that the tests look at, made once."""
    root = tmp_path_factory.mktemp("exported")
    pairs = write_pairs(root / "pairs", make_pairs(24))
    return {
        "pairs": pairs,
        ("vit", "onnx"): run_export(vit, root / "vit-onnx", "--format", "onnx", "--repeats", 0, "--quiet"),
        ("vit", "exported-program"): run_export(
            vit, root / "vit-pt2", "--format", "exported-program", "--repeats", 0, "--quiet"
        ),
        ("mobile", "onnx"): run_export(mobile, root / "mobile-onnx", "--format", "onnx", "--repeats", 0, "--quiet"),
        ("vit", "int8"): run_export(
            vit, root / "vit-int8", "--format", "int8", "--repeats", 2, "--pairs", pairs, "--replicates", 100
        ),
    }


@pytest.mark.parametrize("kind", [("vit", "onnx"), ("vit", "exported-program"), ("mobile", "onnx")])
def test_towers_equal_the_model_for_any_batch_and_text_length(kind, exported, request):
    source, folder = request.getfixturevalue(kind[0]), exported[kind]
    model, facts = MMKDClipModel.from_pretrained(source).eval(), json.loads((folder / "export.json").read_text())
    assert facts["largest_difference"] < 1e-4
    side, context = facts["image"]["side"], facts["text"]["context"]
    for name, tower in towers(model).items():
        exported_tower = load_tower(folder / facts[name]["file"])
        for batch, tokens in ((1, 2), (2, 9), (7, 40), (1, context)):
            inputs = examples(model, side, batch, tokens, seed=batch)[name]
            with torch.inference_mode():
                expected = tower(**inputs).numpy()
            found = exported_tower({key: value.numpy() for key, value in inputs.items()})
            np.testing.assert_allclose(found, expected, atol=1e-4)
            np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("kind", [("vit", "onnx"), ("vit", "exported-program"), ("mobile", "onnx")])
def test_usage_prepares_images_and_texts_as_the_processor_does(kind, exported, request):
    source = request.getfixturevalue(kind[0])
    model, processor = MMKDClipModel.from_pretrained(source).eval(), MMKDClipProcessor.from_pretrained(source)
    encoder, rng = Encoder(exported[kind]), np.random.default_rng(0)
    sizes = [(32, 32), (33, 57), (224, 31), (100, 101), (31, 31), (640, 480)]
    images = [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    images.append(Image.fromarray(rng.integers(0, 255, (40, 50), dtype=np.uint8)))
    with torch.inference_mode():
        found = model(**processor(images=images, text=TEXTS, return_tensors="pt"))
    np.testing.assert_allclose(encoder.encode_images(images), found.image_embeds.numpy(), atol=1e-4)
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), found.text_embeds.numpy(), atol=1e-4)
    assert encoder.scale == pytest.approx(float(model.logit_scale.detach().exp()))


def test_the_folder_works_alone_without_torch_and_without_this_package(exported, tmp_path):
    Image.new("RGB", (50, 40), (9, 99, 199)).save(tmp_path / "picture.png")
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'mmkd', 'modeling_mmkd']))\n"
    code = f"{blocked}import runpy; runpy.run_path('usage.py', run_name='__main__')"
    command = [sys.executable, "-c", code, str(tmp_path / "picture.png"), "an mri", "a ct"]
    for form in ("onnx", "int8"):
        done = subprocess.run(command, cwd=exported["vit", form], capture_output=True, text=True, timeout=60)
        shares = [float(line.split()[0]) for line in done.stdout.splitlines()]
        assert len(shares) == 2 and sum(shares) == pytest.approx(1, abs=2e-3), done.stderr


def test_the_page_on_deployment_runs_as_it_is_written(exported, tmp_path, monkeypatch):
    exports, usage = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    for line in exports.splitlines():
        words = shlex.split(line)
        assert words[:2] == ["mmkd", "export"]
        settings = parse(export.ExportSettings, words[2:])
        (tmp_path / settings.output).symlink_to(exported["vit", settings.format])  # made with these options above
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40), (9, 99, 199)).save("picture.png")
    install, command = usage.splitlines()
    assert install.startswith("pip install numpy pillow tokenizers onnxruntime")
    python, *words = shlex.split(command)
    assert python == "python"
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2, done.stderr
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = {}
    exec(compile(snippet, PAGE.name, "exec"), names)
    monkeypatch.delitem(sys.modules, "usage")
    assert names["similarity"].shape == (1, 1) and abs(names["similarity"]).max() <= 1 + 1e-5


def test_the_layout_of_transformers_js_and_optimum(exported, vit):
    """Every graph and precision; equality with torch of `model.onnx` too; no path of this machine in any file."""
    folder = exported["vit", "onnx"]
    names = {f"{half}{form}.onnx" for half in ("model", "vision_model", "text_model") for form in FORMS}
    assert {path.name for path in (folder / "onnx").iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["projection_dim"]) == ("clip", 16)
    assert json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"] == "CLIPImageProcessor"
    model = MMKDClipModel.from_pretrained(vit).eval()
    inputs = examples(model, 32, 2, 9)
    inputs = inputs["text"] | inputs["image"] | {"pixel_values": torch.randn(3, 3, 32, 32)}
    with torch.inference_mode():
        expected = model(**inputs)
    for form, tolerance in FORMS.items():
        session = onnxruntime.InferenceSession(str(folder / "onnx" / f"model{form}.onnx"))
        outputs = [output.name for output in session.get_outputs()]
        assert outputs == ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        for name, value in zip(outputs, found, strict=True):
            scale = float(model.logit_scale.detach().exp()) if "logits" in name else 1
            np.testing.assert_allclose(value, getattr(expected, name), atol=tolerance * scale, err_msg=f"{form} {name}")
    for path in folder.rglob("*"):
        if path.is_file():
            held = path.read_bytes()
            assert str(PAGE.parents[1]).encode() not in held and b"site-packages" not in held, path.name


def test_onnx_of_other_weights_is_not_published(exported, vit, mobile, tmp_path):
    settings = parse(push.PushSettings, [str(vit), "--repo", "a/b", "--onnx", str(exported["vit", "onnx"])])
    made = push.make_publication(settings, tmp_path)
    assert "onnx/model_quantized.onnx" in made.sizes() and "@huggingface/transformers" in made.card
    settings = parse(push.PushSettings, [str(mobile), "--repo", "a/b", "--onnx", str(exported["vit", "onnx"])])
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="of other weights"):
        push.make_publication(settings, tmp_path / "other")


def test_int8_says_what_it_costs_and_gains(exported, vit):
    folder = exported["vit", "int8"]
    facts = json.loads((folder / "export.json").read_text())
    assert facts["format"] == "int8" and min(facts["integer_products"].values()) > 4
    assert {path.name for path in (folder / "onnx").iterdir()} == {
        "vision_model_quantized.onnx", "text_model_quantized.onnx", "model_quantized.onnx",
    }  # fmt: skip
    comparison = json.loads((folder / "comparison.json").read_text())
    rows = comparison["rows"]
    assert set(rows) == {"model", "onnx", "int8"}
    assert rows["int8"]["megabytes"] < rows["onnx"]["megabytes"]
    assert all(
        rows[row][f"{tower}_ms"][batch] > 0 for row in rows for tower in ("image", "text") for batch in ("1", "16")
    )
    assert min(comparison["lowest_cosine"].values()) > 0.9
    task = comparison["zero_shot"]["zeroshot-modality"]
    assert set(task["rows"]) == {"model", "onnx", "int8"}
    assert task["differences"]["onnx"]["accuracy"].keys() == {"difference", "low", "high", "p", "p_holm"}
    assert task["rows"]["model"]["metrics"]["accuracy"] == task["rows"]["onnx"]["metrics"]["accuracy"]


def test_the_comparison_is_printed(exported, capsys):
    folder = exported["vit", "int8"]
    settings = parse(export.ExportSettings, ["m", "--format", "int8", "--output", str(folder)])
    export.show(settings, json.loads((folder / "comparison.json").read_text()))
    printed = capsys.readouterr().out
    for said in ("MB", "image, batch 16", "lowest cosine", "zeroshot-modality: 24 images", "int8 - model: accuracy"):
        assert said in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnnx"], "did you mean 'onnx'"),
        (["--format", "onnx", "--pairs", "nowhere"], "nowhere holds neither"),
        (["--format", "onnx", "--repeats", "-1"], "must be at least 0"),
        (["--format", "onnx"], "no such folder"),
    ],
)
def test_wrong_settings_are_one_line_before_any_work(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        cli(["export", str(tmp_path / "model"), "--output", str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_there_is_not_touched(vit, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="choose another --output"):
        run_export(vit, tmp_path, "--format", "onnx")


def test_a_missing_package_names_the_extra(vit, tmp_path, capsys, monkeypatch):
    real = importlib.import_module
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SystemExit, match="1"):
        cli(["export", str(vit), "--format", "onnx", "--output", str(tmp_path / "out")])
    assert 'pip install -e ".[export]"' in capsys.readouterr().err
    assert real is importlib.import_module


def test_a_processor_that_cannot_be_written_down_is_refused(vit, tmp_path):
    processor = MMKDClipProcessor.from_pretrained(vit)
    processor.image_processor.crop_size = {"height": 32, "width": 48}
    with pytest.raises(ValueError, match="only CLIP's square crop"):
        require_exportable(processor, Path("model"))


def test_usage_imports_nothing_of_ours(tmp_path):
    write_usage(tmp_path)
    files = sorted(tmp_path.rglob("*.py"))
    assert [file.name for file in files] == ["archives.py", "images.py", "medical.py", "pixel_rules.py", "usage.py"]
    for file in files:
        assert "import mmkd" not in file.read_text() and "from mmkd" not in file.read_text()
