"""Adapters of fine-tuning on the Hub: their model named by its id, and nothing told of the machine."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import hub_environment, mmkd_at

from mmkd.command.settings import parse
from mmkd.hub.push import PushSettings, make_publication
from mmkd.student.folder import load_student

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own

LOAD = """
import sys
sys.modules["mmkd"] = sys.modules["modeling_mmkd"] = None  # as if not installed
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModel, AutoProcessor
base = PeftConfig.from_pretrained("user/lungs").base_model_name_or_path
assert base == "user/student", base
model = PeftModel.from_pretrained(AutoModel.from_pretrained(base, trust_remote_code=True), "user/lungs").eval()
processor = AutoProcessor.from_pretrained(base, trust_remote_code=True)
with torch.inference_mode():
    print("EMBEDDING", model(**processor(text=["a ct"], return_tensors="pt")).text_embeds[0].tolist())
"""


@pytest.fixture
def publication(tmp_path_factory):
    """Stages a folder with the options of a command line."""

    def stage(folder, *arguments):
        settings = parse(PushSettings, [str(folder), "--repo", "user/lungs", *map(str, arguments)])
        return make_publication(settings, tmp_path_factory.mktemp("staged"))

    return stage


def test_an_adapter_goes_up_and_is_loaded_onto_its_model(hub, published_student, published_adapter, tmp_path):
    peft = pytest.importorskip("peft")
    assert mmkd_at(hub, tmp_path, "push", published_student, "--repo", "user/student").returncode == 0
    command = ("push", published_adapter, "--repo", "user/lungs", "--base_model", "user/student")
    done = mmkd_at(hub, tmp_path, *command)
    assert done.returncode == 0, done.stderr
    files = {name: data for name, (data, _) in hub.repository("user/lungs").files.items()}
    assert {"adapter_config.json", "adapter_model.safetensors", "provenance.json", "README.md"} <= set(files)
    assert "patients.txt" not in files
    config = json.loads(files["adapter_config.json"])
    assert config == json.loads((published_adapter / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": "user/student"
    }
    assert not any(str(published_student.parent).encode() in data for data in files.values())
    again = mmkd_at(hub, tmp_path, *command)
    assert "0 files changed" in again.stdout

    loaded = subprocess.run(
        [sys.executable, "-c", LOAD], env=hub_environment(hub, tmp_path), capture_output=True, text=True, timeout=120
    )
    assert "EMBEDDING" in loaded.stdout, loaded.stderr[-2000:]
    model, processor = load_student(str(published_student))
    inputs = processor(text=["a ct"], return_tensors="pt")
    with torch.inference_mode():
        plain = model.eval()(**inputs).text_embeds[0].clone()
        expected = peft.PeftModel.from_pretrained(model, published_adapter).eval()(**inputs).text_embeds[0]
    found = torch.tensor(json.loads(loaded.stdout.partition("EMBEDDING")[2]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_the_card_of_an_adapter(published_adapter, publication):
    made = publication(published_adapter, "--base_model", "user/student", "--license", "mit")
    card = ModelCard(made.card)
    assert (card.data.library_name, card.data.base_model) == ("peft", "user/student")
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert "base_model:adapter:user/student" in card.data.tags
    for said in ("| adapter | LORA, rank 4, alpha 8 |", 'PeftModel.from_pretrained(model, "user/lungs")', "rank: 4"):
        assert said in card.text, said
    assert "| PLIP | vinid/plip | not declared |" in card.text, "its model's teachers are its own"
    assert "| CC BY-NC 4.0 | 3 | no commercial use |" in card.text
    assert "secret" not in card.content and "published with this adapter" in card.text
    assert "--license mit offers more" in made.notes[0]
    assert re.search(r"reduced to \d+ pixels", made.card)
    assert set(made.sizes()) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "provenance.json"}
    assert {"patients.txt", "processor_config.json"} <= set(made.left_out(published_adapter))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "it was read from student.*--base_model user/name"),
        ({"base_model_name_or_path": "runs/base"}, "it was read from base"),
        ({"auto_mapping": {"base_model_class": "LlamaModel"}}, "an adapter of a LlamaModel; only those of an MMKDClip"),
        ({"peft_type": None}, "has no peft_type"),
    ],
)
def test_an_adapter_of_an_unknown_or_another_model_is_refused(
    published_adapter, tmp_path, change, message, publication
):
    folder = shutil.copytree(published_adapter, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        publication(folder)


def test_what_belongs_to_others_and_what_is_broken_is_refused(
    published_adapter, published_student, tmp_path, publication
):
    with pytest.raises(ValueError, match="--base_model belongs to an adapter"):
        publication(published_student, "--base_model", "user/student")
    with pytest.raises(ValueError, match="--base_model 'student' has no owner"):
        publication(published_adapter, "--base_model", "student")
    with pytest.raises(ValueError, match="--results belongs to a model"):
        publication(published_adapter, "--results", tmp_path)
    folder = shutil.copytree(published_adapter, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors; pickled adapters are not pushed"):
        publication(folder, "--base_model", "user/student")


def test_an_adapter_of_pefts_own_knows_its_model(published_adapter, tmp_path, publication):
    folder = tmp_path / "plain"
    folder.mkdir()
    shutil.copy(published_adapter / "adapter_model.safetensors", folder)
    config = json.loads((published_adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "user/student"}))
    made = publication(folder)
    assert set(made.sizes()) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert ModelCard(made.card).data.base_model == "user/student"
    assert "reduced to the model's size" in made.card and any("cannot name teachers" in note for note in made.notes)
