"""The whole way through the commands a user types, on a small folder of pictures and random towers."""

import csv
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import forked, mmkd, stop_while_training
from transformers import AutoModel, AutoProcessor

import modeling_mmkd  # noqa: F401  registers MMKDClipModel with the Auto classes
from mmkd.command.launch import blocked_signals
from mmkd.data.splits import partition
from mmkd.data.table import Pair
from mmkd.training.checkpoints import newest_checkpoint

MODALITIES = {"MRI": (40, 40, 40), "fundus": (160, 60, 30), "ultrasound": (20, 30, 90)}
TINY = {"vision": "random:tiny", "text": "random:tiny", "projection_dim": 16, "image_size": 32, "epochs": 1}
ROOT = Path(__file__).resolve().parents[2]


def write_pictures(folder: Path) -> None:
    """Sixty pictures of three modalities, each with noise of its own, in a folder whose name has a space."""
    (folder / "images").mkdir(parents=True)
    noise = np.random.default_rng(0)
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "modality", "label", "caption", "group", "split"])
        for number in range(60):
            modality = list(MODALITIES)[number % 3]
            pixels = np.clip(noise.normal(MODALITIES[modality], 12, (40, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
            label = f"{modality} of kind {number % 2}"
            table.writerow([f"images/{number}.png", modality, label, "", f"patient {number // 2}", ""])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    write_pictures(folder / "my pictures")
    settings = [f"--{stage}.{key}={value}" for stage in ("pretrain", "specialist") for key, value in TINY.items()]
    settings += ["--pretrain.text_layers=none", "--pretrain.freeze=", "--specialist.freeze=", "--align.dim=16"]
    settings += ["--distill.epochs=1", "--distill.freeze=", "--merge.replicates=100"]
    settings += ["--eval.replicates=100", "--quiet"]
    command = ["quickstart", "--data", "my pictures", *settings]
    done = mmkd(*command, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, command


def test_the_student_loads_and_answers(finished):
    folder, _ = finished
    model = AutoModel.from_pretrained(folder / "mmkd-clip")
    processor = AutoProcessor.from_pretrained(folder / "mmkd-clip")
    inputs = processor(text=["MRI", "fundus"], images=Image.new("RGB", (50, 40)), return_tensors="pt")
    with torch.inference_mode():
        assert model(**inputs).logits_per_image.shape == (1, 2)


def test_the_report_compares_student_and_three_teachers(finished):
    folder, _ = finished
    summary = json.loads((folder / "mmkd-clip-work" / "results" / "summary.json").read_text())
    assert summary["student"] == "student"
    assert sorted(summary["teachers"]) == ["fundus", "mri", "ultrasound"]
    page = (folder / "report.html").read_text()
    assert "ot a clinical result" in page
    assert summary["baselines"] == ["stage1", "distilled", "no-teacher"]
    assert "the same training without a teacher: " in page and "trained as long" not in page
    assert "http://" not in page
    assert "https://" not in page


def test_started_again_it_does_nothing(finished):
    folder, command = finished
    before = (folder / "mmkd-clip" / "model.safetensors").stat().st_mtime_ns
    done = mmkd(*command, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done before") == 15
    assert (folder / "mmkd-clip" / "model.safetensors").stat().st_mtime_ns == before


def test_a_stage_killed_after_its_last_rename_is_done(finished):
    folder, command = finished
    record = folder / "mmkd-clip-work" / "stages.json"
    stages = json.loads(record.read_text())
    for name in ("merge", "report"):
        stages[name]["seconds"] = None
    record.write_text(json.dumps(stages))
    done = mmkd(*command, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done before") == 15


@pytest.mark.parametrize("script", ["zero_shot", "search_images"])
def test_examples_run_on_the_student(finished, script):
    folder, _ = finished
    picture, pictures = "my pictures/images/0.png", "my pictures/images"
    arguments = {"zero_shot": [picture, "MRI", "fundus"], "search_images": [pictures, "MRI", "3"]}[script]
    done = forked(ROOT / "examples" / f"{script}.py", "mmkd-clip", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == {"zero_shot": 2, "search_images": 3}[script]


def test_what_it_did_not_make_it_does_not_touch(tmp_path):
    (tmp_path / "mmkd-clip").mkdir()
    (tmp_path / "mmkd-clip" / "mine.txt").write_text("keep")
    done = mmkd("quickstart", cwd=tmp_path)
    assert done.returncode == 1
    assert "mmkd-clip exists" in done.stderr
    assert (tmp_path / "mmkd-clip" / "mine.txt").read_text() == "keep"


def test_a_misspelt_setting_of_a_late_stage_is_refused_before_any_work(tmp_path):
    done = mmkd("quickstart", "--distill.epoch=4", cwd=tmp_path)
    assert done.returncode == 1
    assert "did you mean 'epochs'" in done.stderr
    assert "settings of distill are wrong" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named_before_any_work(tmp_path):
    done = mmkd("quickstart", "--data", "nowhere", cwd=tmp_path)
    assert done.returncode == 1
    assert "nowhere: no such folder" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_one_group_alone_is_refused_before_any_training(tmp_path):
    write_pictures(tmp_path / "data")
    table = tmp_path / "data" / "labels.csv"
    table.write_text(re.sub(r"patient \d+", "patient 0", table.read_text()))
    done = mmkd("quickstart", "--data", "data", cwd=tmp_path)
    assert done.returncode == 1
    assert "at least two groups are needed" in done.stderr
    assert "pretrain" not in done.stdout


def pairs(**fields: list[str]) -> list[Pair]:
    rows = [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
    return [Pair(id=str(k), image=f"{k}.png", caption="x", **row) for k, row in enumerate(rows)]


def test_pairs_are_divided_by_modality_or_by_group_and_never_by_label():
    many = pairs(modality=["MRI"] * 20 + ["CT"] * 10 + ["US"] * 9, label=["a"] * 39)
    assert partition(many, 3) == {
        "mri": {"modalities": ["MRI"]},
        "ct": {"modalities": ["CT"]},
        "us": {"modalities": ["US"]},
    }
    one = pairs(modality=["MRI"] * 30, label=["a"] * 10 + ["b"] * 10 + ["c"] * 10)
    assert list(partition(one, 3).values()) == [{}, {}, {}]
    plain = pairs(modality=["MRI"] * 60, label=["a"] * 30 + ["b"] * 30)
    assert [share["part"] for share in partition(plain, 3).values()] == ["1/3", "2/3", "3/3"]
    assert list(partition(pairs(modality=["OCT"] * 4), 3).values()) == [{}, {}, {}]
    with pytest.raises(ValueError, match="cannot divide"):
        partition([], 3)


def test_pairs_that_leave_nothing_to_ask_are_refused_before_training(tmp_path):
    write_pictures(tmp_path / "pictures")
    table = tmp_path / "pictures" / "labels.csv"
    table.write_text("file,caption\n" + "".join(f"images/{number}.png,the same words\n" for number in range(60)))
    done = mmkd("quickstart", "--data", "pictures", "--quiet", cwd=tmp_path)
    assert done.returncode == 1
    assert "too much alike to evaluate on: " in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "mmkd-clip-work" / "stage1").exists()


def test_a_signal_to_the_pipeline_has_its_stage_save_and_starts_no_other(tmp_path):
    write_pictures(tmp_path / "pictures")
    settings = [f"--pretrain.{key}={value}" for key, value in TINY.items() if key != "epochs"]
    settings += ["--pretrain.text_layers=none", "--pretrain.freeze=", "--pretrain.epochs=100000", "--quiet"]
    command = [sys.executable, "-m", "mmkd.command.cli", "quickstart", "--data", "pictures", *settings]
    log = tmp_path / "mmkd-clip-work" / "stage1.partial" / "log.jsonl"
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    printed, errors = stop_while_training(process, log, patience=200)
    assert process.returncode == 0, errors
    assert "stopped by a signal; saved at step" in errors
    assert errors.endswith("stopped by a signal at [2/15] pretrain; run the same command to resume\n")
    assert "[3/15]" not in printed
    assert newest_checkpoint(log.parent / "checkpoints") is not None
    stages = json.loads((tmp_path / "mmkd-clip-work" / "stages.json").read_text())
    assert {name: stage["seconds"] is not None for name, stage in stages.items()} == {"curate": True, "pretrain": False}


def test_a_process_started_while_signals_are_blocked_signals_does_not_end_by_them():
    with blocked_signals():
        process = subprocess.Popen(["sleep", "60"])
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.kill()
    assert process.wait() == -signal.SIGKILL
