"""A signal to `mmkd` with several processes: they save, all exit with 0, and the same command goes on."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from processes import stop_while_training

from mmkd.data.folder import write_manifest
from mmkd.data.table import Pair
from mmkd.training.checkpoints import newest_checkpoint

SETTINGS = ["--vision", "random:tiny", "--text", "random:tiny", "--projection_dim", "16", "--batch_size", "8"]
SETTINGS += ["--workers", "1", "--quiet", "--trackers", "none", "--checkpoint_every", "100000", "--epochs", "100000"]


@pytest.fixture
def pairs(tmp_path):
    (tmp_path / "pairs" / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (8, 40, 48, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "pairs" / "images" / f"{number}.jpg")
    write_manifest(tmp_path / "pairs", [Pair(f"p{k}", f"{k}.jpg", f"image number {k}") for k in range(8)])
    return tmp_path / "pairs"


def test_a_signal_to_the_command_saves_the_run_of_all_processes(tmp_path, pairs):
    output = tmp_path / "out"
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [
        sys.executable,
        "-m",
        "mmkd.command.cli",
        "pretrain",
        "--num_processes",
        "2",
        "--pairs",
        pairs,
        *SETTINGS,
    ]
    process = subprocess.Popen(
        [*map(str, command), "--output", str(output)],
        env={**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "out.partial" / "log.jsonl"
    _, errors = stop_while_training(process, log, patience=120)
    assert process.returncode == 0, errors
    assert "stopped by a signal; saved at step" in errors
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    newest = newest_checkpoint(tmp_path / "out.partial" / "checkpoints")
    assert newest is not None and newest.name == f"step-{last:08d}"
    assert json.loads((newest / "checkpoint.json").read_text())["processes"] == 2
