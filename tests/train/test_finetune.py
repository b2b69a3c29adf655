"""Fine-tuning through the function that the command calls: adapters, full weights, captions and labels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mmkd.train.finetune
from mmkd.command.settings import parse
from mmkd.data.folder import open_pairs, write_manifest
from mmkd.data.table import Pair
from mmkd.student.folder import load_student, save_student
from mmkd.student.towers import build_model
from mmkd.student.trainable import adapter_targets
from mmkd.training.contrastive import PromptClassification
from modeling_mmkd import PRESETS, MMKDClipConfig, MMKDClipModel, MMKDClipProcessor

peft = pytest.importorskip("peft", reason="adapters need peft, of the extra train")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
LABELS = ("bright lesion", "dark lesion")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Bright and dark pictures, and a model that knows nothing of them."""
    root = tmp_path_factory.mktemp("finetune")
    rng = np.random.default_rng(0)
    (root / "pairs" / "images").mkdir(parents=True)
    pairs = []
    for k in range(24):
        pixels = rng.integers(0, 120, (40, 40, 3), dtype=np.uint8) + (130 if k % 2 == 0 else 0)
        Image.fromarray(pixels.astype(np.uint8)).save(root / "pairs" / "images" / f"{k}.png")
        label = LABELS[k % 2]
        pairs.append(Pair(f"p{k}", f"{k}.png", f"ct, {label}", "ct", label=label, group=f"g{k}", split="train"))
    write_manifest(root / "pairs", pairs)
    torch.manual_seed(0)
    save_student(root / "model", *build_model("random:tiny", "random:tiny", 16))
    return root


def finetune(world, output, *more):
    arguments = [
        "--pairs", world / "pairs", "--model", world / "model", "--output", output, "--epochs", 6, "--batch_size", 8,
        "--workers", 0, "--learning_rate", 1e-2, "--weight_decay", 0, "--quiet", *more,
    ]  # fmt: skip
    mmkd.train.finetune.main(parse(mmkd.train.finetune.FinetuneSettings, [str(argument) for argument in arguments]))
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_learns_and_gives_the_merged_model(world, tmp_path, method):
    losses = finetune(world, tmp_path / "out", "--objective", "classification", "--method", method)
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    before, after = tensors(world / "model"), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    model, processor = load_student(str(world / "model"))
    assert changed == {f"{name}.weight" for name in adapter_targets(model, "attention")}
    for part in ("vision_model.", "text_model.", "visual_projection", "text_projection"):
        assert any(name.startswith(part) for name in changed), part
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "out" / "adapter").eval()
    batch = processor(images=Image.new("RGB", (40, 40), "gray"), text=["a ct"], return_tensors="pt")
    with torch.no_grad():
        merged = MMKDClipModel.from_pretrained(tmp_path / "out").eval()(**batch)
        torch.testing.assert_close(adapted(**batch).logits_per_image, merged.logits_per_image, atol=1e-4, rtol=0)
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["stage"] == "finetune"


def test_an_adapter_alone_is_small_and_leaves_the_scale(world, tmp_path):
    finetune(world, tmp_path / "out", "--merge", "false", "--targets", "all", "--epochs", 1)
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved)
    assert MMKDClipProcessor.from_pretrained(tmp_path / "out").tokenizer.model_max_length


def test_full_and_scale(world, tmp_path):
    losses = finetune(world, tmp_path / "full", "--method", "full", "--objective", "classification", "--epochs", 3)
    assert losses[-1] < losses[0]
    before, after = tensors(world / "model"), tensors(tmp_path / "full")
    assert not torch.equal(before["logit_scale"], after["logit_scale"])
    assert not (tmp_path / "full" / "adapter").exists()
    finetune(world, tmp_path / "scale", "--train_logit_scale", "true", "--epochs", 1)
    assert not torch.equal(before["logit_scale"], tensors(tmp_path / "scale")["logit_scale"])


def test_the_classification_loss_is_zero_shot_by_hand(world):
    model, processor = load_student(str(world / "model"))
    pairs = list(open_pairs(world / "pairs", "train").pairs)
    objective = PromptClassification(model, processor, pairs)
    pixels, index = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 4])
    side = model.config.vision_config.image_size
    pixels = torch.nn.functional.interpolate(pixels, (side, side))
    with torch.no_grad():
        found = objective({"pixel_values": pixels, "index": index})["loss"]
        classes = []
        for label in LABELS:
            sentences = [f"a CT scan showing {label}", f"computed tomography image of {label}", f"CT slice, {label}"]
            words = model(**processor(text=sentences, return_tensors="pt")).text_embeds
            classes.append(torch.nn.functional.normalize(words.mean(dim=0), dim=0))
        images = model(pixel_values=pixels).image_embeds
        expected = torch.nn.functional.cross_entropy(
            model.logit_scale.exp() * images @ torch.stack(classes).T, torch.tensor([0, 1, 0])
        )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_default_adapters_are_a_few_megabytes(preset):
    if preset == "mmkd-clip-mobile":
        pytest.importorskip("timm")
    with torch.device("meta"):
        model = MMKDClipModel(MMKDClipConfig.from_preset(preset))
    numbers = 0
    for name in adapter_targets(model, "attention"):
        weight = model.get_submodule(name).weight
        numbers += 8 * (weight.shape[0] + weight[0].numel())
    assert 0 < 4 * numbers < 4e6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--method", "full", "--merge", "false"], "--merge false writes an adapter alone"),
        (["--merge", "false", "--train_logit_scale", "true"], "an adapter cannot hold logit_scale"),
        (["--objective", "classification", "--positives", "caption"], "--positives belongs to --objective contrastive"),
        (["--objective", "classification", "--prefix_widths", "4"], "--prefix_widths belongs to"),
        (["--prefix_widths", "4,900"], "--prefix_widths has 900; embeddings have"),
        (["--rank", "0"], "--rank is 0"),
    ],
)
def test_contradictions_are_refused_before_training(world, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        finetune(world, tmp_path / "out", *wrong)
    assert not list(tmp_path.iterdir())


def test_the_config_opens_with_its_commands_and_runs(world, tmp_path):
    path = Path(__file__).resolve().parents[2] / "train" / "configs" / "finetune.yaml"
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(line.startswith("# Before: mmkd curate") for line in comment)
    assert "# Run:    accelerate launch train/finetune.py --config train/configs/finetune.yaml" in comment
    losses = finetune(world, tmp_path / "out", "--config", path, "--max_steps", 2)
    assert len(losses) == 2 and (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()


def test_pairs_without_labels_cannot_be_classified(world):
    model, processor = load_student(str(world / "model"))
    pairs = list(open_pairs(world / "pairs", "train").pairs)
    with pytest.raises(ValueError, match="at least two labels"):
        PromptClassification(model, processor, pairs[::2])
