import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard
from loopback_hub import TOKEN, hub_environment, mmkd_at
from PIL import Image
from safetensors.torch import load_file

from mmkd.data.features.lookup import TeacherFeatures
from mmkd.data.folder import open_pairs, write_manifest
from mmkd.publishing.model import stage_weights
from mmkd.student.folder import weight_files
from modeling_mmkd import MMKDClipModel

EXPORT = Path(__file__).resolve().parents[2] / "examples" / "results_to_mteb.py"
WITHOUT_PACKAGE = """
import sys
sys.modules["mmkd"] = sys.modules["modeling_mmkd"] = None  # as if not installed
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline
model = AutoModel.from_pretrained("user/student", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("user/student", trust_remote_code=True)
classify = pipeline("zero-shot-image-classification", "user/student", trust_remote_code=True)
scores = classify(Image.new("RGB", (50, 40)), candidate_labels=["ct", "mri"])
assert {row["label"] for row in scores} == {"ct", "mri"} and abs(sum(row["score"] for row in scores) - 1) < 1e-5
"""
WITH_PACKAGE = """
import modeling_mmkd
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained("user/student").eval()
assert type(model) is modeling_mmkd.MMKDClipModel
processor = AutoProcessor.from_pretrained("user/student")
"""
WITH_MTEB = """
import modeling_mmkd, mteb
from mteb.mocks import MockAny2AnyRetrievalI2TTask, MockImageClassificationTask, MockZeroShotClassificationTask
model = mteb.get_model("user/student")
print("MODALITIES", *sorted(model.mteb_model_meta.modalities))
tasks = [MockAny2AnyRetrievalI2TTask(), MockImageClassificationTask(), MockZeroShotClassificationTask()]
for result in mteb.evaluate(model, tasks, cache=None, show_progress_bar=False):
    print("SCORE", result.task_name, result.get_score())
"""
RESULTS_IN_MTEB = """
import json, runpy, mteb
from pathlib import Path
export, results, cache = {!r}, {!r}, mteb.ResultCache({!r})
runpy.run_path(export)["main"](Path(results), cache)
(found,) = cache.load_results().model_results
assert found.model_name == "local/ours"
print(json.dumps({{task.task_name: task.get_score() for task in found.task_results}}))
"""
SHOW = """
import torch
with torch.inference_mode():
    found = model(**processor(text=["an mri"], return_tensors="pt")).text_embeds
print("EMBEDDING", found[0].tolist())
"""


def python(hub, home, code, token=TOKEN):
    """In an interpreter of its own, for libraries that keep where the Hub is when they are imported."""
    environment = hub_environment(hub, home, token)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)


def test_a_dry_run_shows_card_and_files_and_touches_no_network(hub, published_student, tmp_path):
    done = mmkd_at(hub, tmp_path, "push", published_student, "--repo", "user/student", "--dry-run", token=None)
    assert done.returncode == 0, done.stderr
    assert hub.requests == []
    text, _, files = done.stdout.partition("\n--- ")
    card = ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "zero-shot-image-classification")
    assert "knowledge-distillation" in card.data.tags
    for said in ("| PLIP | vinid/plip | not declared |", "CC BY 4.0 | 8 ", "learning_rate: 5.0e-05", "medical device"):
        assert said in text
    assert "No licence is declared for teacher PLIP (not declared), openai/clip-start (not stated)" in text
    assert "secret" not in done.stdout
    for name in ("model.safetensors", "modeling_mmkd.py", "processor_config.json", "tokenizer.json", "provenance.json"):
        assert f"  {name}\n" in files
    assert "not uploaded: log.jsonl, patients.txt, settings.yaml" in files


def test_pushing_again_uploads_only_what_changed(hub, published_student, tmp_path):
    student = shutil.copytree(published_student, tmp_path / "student")
    command = ("push", student, "--repo", "user/student", "--license", "cc-by-nc-4.0")
    first = mmkd_at(hub, tmp_path, *command)
    assert first.returncode == 0, first.stderr
    files = hub.repository("user/student").files
    assert files["model.safetensors"] == ((student / "model.safetensors").read_bytes(), True)
    assert "patients.txt" not in files and "settings.yaml" not in files
    assert ModelCard(files["README.md"][0].decode()).data.license == "cc-by-nc-4.0"

    count = len(files) - (".gitattributes" in files)
    uploads, commits = hub.count("PUT", "/lfs/"), hub.count("POST", "/commit/")
    assert uploads and commits == 1
    again = mmkd_at(hub, tmp_path, *command)
    assert f"0 files changed, {count} unchanged" in again.stdout
    assert (hub.count("PUT", "/lfs/"), hub.count("POST", "/commit/")) == (uploads, 1)

    settings = (student / "settings.yaml").read_text()
    (student / "settings.yaml").write_text(settings.replace("epochs: 1", "epochs: 7"))
    third = mmkd_at(hub, tmp_path, *command)
    assert f"1 files changed (README.md), {count - 1} unchanged" in third.stdout
    assert hub.count("PUT", "/lfs/") == uploads
    assert b"epochs: 7" in hub.repository("user/student").files["README.md"][0]
    assert not any(TOKEN in run.stdout + run.stderr for run in (first, again, third))


def test_what_was_pushed_loads_by_its_id_with_and_without_the_package(hub, published_student, tmp_path):
    done = mmkd_at(hub, tmp_path, "push", published_student, "--repo", "user/student", "--max_shard_size", "100KB")
    assert done.returncode == 0, done.stderr
    files = hub.repository("user/student").files
    shards = [name for name in files if name.startswith("model-0")]
    assert len(shards) >= 2 and "model.safetensors.index.json" in files and "model.safetensors" not in files
    assert set(json.loads(files["model.safetensors.index.json"][0])["weight_map"].values()) == set(shards)
    model = MMKDClipModel.from_pretrained(published_student).eval()
    expected = None
    snippets = re.findall(r"^```python\n(.*?)^```", files["README.md"][0].decode(), flags=re.DOTALL | re.MULTILINE)
    assert len(snippets) == 3
    Image.new("RGB", (50, 40)).save(tmp_path / "image.png")
    in_folder = f"import os\nos.chdir({str(tmp_path)!r})\n"
    for name, code in (("without", "".join([WITHOUT_PACKAGE, in_folder, *snippets])), ("with", WITH_PACKAGE)):
        hub.fail("GET", "/cdn/", "cut")  # once in the middle of a download
        loaded = python(hub, tmp_path / name, code + SHOW)
        assert "EMBEDDING" in loaded.stdout, loaded.stderr[-2000:]
        found = torch.tensor(json.loads(loaded.stdout.partition("EMBEDDING")[2]))
        expected = found if expected is None else expected
        torch.testing.assert_close(found, expected)
    assert len(expected) == model.config.projection_dim
    assert not any(fault.times for fault in hub.faults)

    whole = mmkd_at(hub, tmp_path, "push", published_student, "--repo", "user/student")
    assert f"removed {', '.join(sorted([*shards, 'model.safetensors.index.json']))}" in whole.stdout


def test_mteb_evaluates_image_tasks_by_id(hub, published_student, tmp_path):
    pytest.importorskip("mteb")
    done = mmkd_at(hub, tmp_path, "push", published_student, "--repo", "user/student")
    assert done.returncode == 0, done.stderr
    loaded = python(hub, tmp_path / "mteb", WITH_MTEB)
    assert "MODALITIES image text" in loaded.stdout, loaded.stderr[-2000:]
    scores = [line.split() for line in loaded.stdout.splitlines() if line.startswith("SCORE")]
    assert len(scores) == 3 and all(0 <= float(score) <= 1 for _, _, score in scores)


def test_mteb_reads_exported_results(hub, results, tmp_path):
    pytest.importorskip("mteb")
    loaded = python(hub, tmp_path, RESULTS_IN_MTEB.format(str(EXPORT), str(results), str(tmp_path / "cache")))
    scores = json.loads(loaded.stdout or loaded.stderr[-2000:])
    tasks = json.loads((results / "summary.json").read_text())["tasks"]
    expected = {name: task["rows"]["ours"]["metrics"][task["primary_metric"]]["value"] for name, task in tasks.items()}
    assert scores == pytest.approx(expected, abs=1e-6)


def test_shards_hold_the_same_numbers(published_student, tmp_path):
    files = weight_files(published_student)
    stage_weights(published_student, files, tmp_path, 100_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1 and max(path.stat().st_size for path in shards[1:]) < 110_000
    found = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    expected = MMKDClipModel.from_pretrained(published_student).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_private_repository_is_seen_with_a_token_alone(hub, published_student, tmp_path):
    done = mmkd_at(hub, tmp_path, "push", published_student, "--repo", "user/closed", "--private")
    assert done.returncode == 0, done.stderr
    assert hub.repository("user/closed").private
    code = "from huggingface_hub import hf_hub_download; print(hf_hub_download('user/closed', 'config.json'))"
    assert python(hub, tmp_path / "a", code).returncode == 0
    refused = python(hub, tmp_path / "b", code, token=None)
    assert refused.returncode and "401" in refused.stderr


def test_pairs_go_up_with_images_that_may_be_passed_on_and_come_down_as_they_were(hub, published_pairs, tmp_path):
    done = mmkd_at(hub, tmp_path, "push", published_pairs, "--repo", "user/pairs")
    assert done.returncode == 0, done.stderr
    assert "check that none names a patient" in done.stderr
    files = hub.repository("user/pairs", "dataset").files
    assert "images/000000.tar" in files and not [name for name in files if name.endswith((".png", "dropped.jsonl"))]
    card = DatasetCard(files["README.md"][0].decode())
    assert card.data.license == "cc-by-4.0"
    assert card.data.configs[0]["data_files"] == [{"split": "all", "path": "images/*.tar"}]
    assert "4 rows were read." in card.text and "| CC BY 4.0 | 4 |" in card.text

    code = "from huggingface_hub import snapshot_download as s; s('user/pairs', repo_type='dataset', local_dir={!r})"
    assert python(hub, tmp_path, code.format(str(tmp_path / "down"))).returncode == 0
    down, up = open_pairs(tmp_path / "down"), open_pairs(published_pairs)
    assert [replace(pair, image="") for pair in down.pairs] == [replace(pair, image="") for pair in up.pairs]
    for one, other in zip(down.pairs, up.pairs, strict=True):
        assert down.image_path(one).read_bytes() == up.image_path(other).read_bytes()


def test_images_without_a_licence_stay_where_they_are(hub, published_pairs, tmp_path):
    folder = shutil.copytree(published_pairs, tmp_path / "pairs")
    pairs = open_pairs(published_pairs).pairs
    write_manifest(folder, [replace(pairs[0], license=""), *pairs[1:]])
    shown = mmkd_at(hub, tmp_path, "push", folder, "--repo", "user/pairs", "--dry-run")
    assert (
        "images are not published, since licences restrict them or are not stated: not stated (1 pairs)" in shown.stderr
    )
    assert "images/deep" not in shown.stdout and "not uploaded: dropped.jsonl, images" in shown.stdout
    assert "The images themselves are not here" in shown.stdout
    forced = mmkd_at(hub, tmp_path, "push", folder, "--repo", "user/pairs", "--dry-run", "--images", "true")
    assert "images are published although" in forced.stderr and "images/000000.tar" in forced.stdout


def test_features_go_up_with_their_teachers_licences(hub, published_features, tmp_path):
    done = mmkd_at(hub, tmp_path, "push", published_features, "--repo", "user/features", "--license", "mit")
    assert done.returncode == 0, done.stderr
    assert "--license mit offers more than the strictest licence involved" in done.stderr
    files = hub.repository("user/features", "dataset").files
    card = files["README.md"][0].decode()
    assert "| UniMedCLIP | owner/UniMedCLIP | 4 | 4 | float16 | CC BY-NC 4.0 | no commercial use |" in card
    assert "The strictest declared licence is that of teacher UniMedCLIP (CC BY-NC 4.0): no commercial use." in card
    for name, (data, _) in files.items():
        (tmp_path / "down" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "down" / name).write_bytes(data)
    assert TeacherFeatures.open(tmp_path / "down").dims == {"PLIP": 4, "UniMedCLIP": 4}
    one = mmkd_at(hub, tmp_path, "push", published_features / "PLIP", "--repo", "user/plip", "--dry-run")
    assert "shard-00001.safetensors" in one.stdout and "--local-dir features/PLIP" in one.stdout


@pytest.mark.parametrize(
    ("token", "message"),
    [(None, "no token for the Hub"), ("hf_forgotten", "HTTP 401"), ("hf_reader_token", "HTTP 403")],
)
def test_without_the_right_to_write_one_line_says_so(hub, published_student, tmp_path, token, message):
    done = mmkd_at(hub, tmp_path, "push", published_student, "--repo", "user/student", token=token)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert ": error: " in error and message in error
    assert not token or token not in done.stdout + done.stderr
    assert hub.repositories == {}
