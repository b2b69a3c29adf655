"""Folders to publish, and the commands that do it in a process of their own."""

import time
from pathlib import Path

import pytest
import torch
from fake_encoder import make_pairs, write_pairs
from huggingface_hub import constants
from loopback_hub import TOKEN, LoopbackHub
from PIL import Image

from mmkd.command.settings import parse, save_settings
from mmkd.data.features.writer import FeatureWriter
from mmkd.data.folder import PairFolder, write_manifest
from mmkd.data.table import Pair
from mmkd.student.folder import load_student, save_student, training_provenance
from mmkd.student.towers import build_model
from mmkd.student.trainable import add_adapter
from mmkd.train import eval as evaluation
from mmkd.train.distill import DistillSettings
from mmkd.train.finetune import save_adapter

TEACHERS = [
    {"teacher": "PLIP", "weights": "vinid/plip", "license": "not declared", "note": "which commit is unknown"},
    {"teacher": "BiomedCLIP", "weights": "microsoft/BiomedCLIP", "license": "MIT"},
]


@pytest.fixture
def hub():
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def at_hub(hub, monkeypatch, tmp_path):
    """Leads this process' client to the stand-in; what it would have waited is noted."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.waits = []
    monkeypatch.setattr(time, "sleep", hub.waits.append)
    return hub


@pytest.fixture(scope="session")
def published_student(tmp_path_factory) -> Path:
    """A tiny student with everything that distillation leaves beside it."""
    folder = tmp_path_factory.mktemp("models") / "student"
    torch.manual_seed(0)
    pairs = [Pair(f"p{k}", f"{k}.png", "c", "MRI" if k % 2 else "CT", group="g", license="CC BY 4.0") for k in range(8)]
    provenance = training_provenance("distill", PairFolder(folder, folder, pairs), ["openai/clip-start"], TEACHERS)
    save_student(folder, *build_model("random:tiny", "random:tiny", 16), provenance)
    settings = DistillSettings(
        output=folder,
        pairs=Path("/secret/hospital/screened"),
        model="openai/clip-start",
        features=Path("/secret/features"),
    )
    save_settings(settings, folder / "settings.yaml")
    (folder / "log.jsonl").write_text('{"loss": 1.0}\n')
    (folder / "patients.txt").write_text("not for the public")
    return folder


@pytest.fixture(scope="session")
def results(published_student, tmp_path_factory) -> Path:
    """A real evaluation of the tiny student, which knows nothing."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_pairs(folder / "held-out", make_pairs(48))
    arguments = ["--encoders", f"ours={published_student}", "--pairs", str(folder / "held-out"), "--quiet"]
    arguments += ["--output", str(folder / "results"), "--kinds", "zeroshot,retrieval", "--replicates", "100"]
    evaluation.main(parse(evaluation.EvalSettings, arguments))
    return folder / "results"


@pytest.fixture(scope="session")
def published_pairs(tmp_path_factory) -> Path:
    """Four pairs with images under an open licence."""
    folder = tmp_path_factory.mktemp("pairs") / "pairs"
    (folder / "images" / "deep").mkdir(parents=True)
    pairs = []
    for k in range(4):
        name = f"deep/{k}.png"
        Image.new("RGB", (8, 8), (k, 0, 0)).save(folder / "images" / name)
        pairs.append(Pair(f"p{k}", name, f"caption {k}", "MRI", group=f"g{k}", license="CC BY 4.0", source="atlas"))
    write_manifest(folder, pairs)
    (folder / "README.md").write_text("# pairs: 4\n\n4 rows were read.\n\n## Splits\n")
    (folder / "dropped.jsonl").write_text('{"file": "secret.png"}\n')
    return folder


@pytest.fixture(scope="session")
def published_features(tmp_path_factory) -> Path:
    """Two small stores, one of a teacher with a licence that restricts."""
    folder = tmp_path_factory.mktemp("stores") / "features"
    for name, license in {"PLIP": "not declared", "UniMedCLIP": "CC BY-NC 4.0"}.items():
        writer = FeatureWriter(folder / name, name, shard_size=2)
        writer.add([f"p{k}" for k in range(4)], torch.ones(4, 4), torch.ones(4, 4))
        writer.finish({"license": license, "weights": f"owner/{name}", "pooling": "cls"})
    return folder


@pytest.fixture(scope="session")
def published_adapter(published_student, tmp_path_factory) -> Path:
    """The adapter that fine-tuning leaves beside the merged model."""
    pytest.importorskip("peft", reason="adapters need peft, of the extra train")
    run = tmp_path_factory.mktemp("finetuned")
    model, processor = load_student(str(published_student))
    torch.manual_seed(3)
    adapted = add_adapter(model, "lora", 4, "attention")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    pairs = [Pair(f"q{k}", f"{k}.png", "c", "CT", group="g", license="CC BY-NC 4.0") for k in range(3)]
    provenance = training_provenance("finetune", PairFolder(run, run, pairs), [str(published_student)])
    save_adapter(run / "adapter", adapted, processor, provenance)
    (run / "settings.yaml").write_text("pairs: /secret/hospital/lungs\nrank: 4\n")
    (run / "adapter" / "patients.txt").write_text("not for the public")
    return run / "adapter"
