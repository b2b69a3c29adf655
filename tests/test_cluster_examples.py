"""The cluster examples run: two torchrun agents over the loopback, and the Slurm script against stand-ins."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import mmkd
from safetensors.torch import load_file

from mmkd.data.folder import write_manifest
from mmkd.data.table import Pair

ROOT = Path(__file__).resolve().parents[1]
COMMON = ["--vision", "random:tiny", "--text", "random:tiny", "--projection_dim", "16", "--epochs", "2"]
COMMON += ["--batch_size", "8", "--workers", "0", "--quiet", "true", "--trackers", "none", "--learning_rate", "1e-3"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    rows = []
    for number in range(16):
        pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.jpg")
        rows.append(Pair(f"p{number}", f"{number}.jpg", f"image {'very ' * (number % 5)}number {number}"))
    write_manifest(folder, rows)
    return folder


def environment(**more):
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    own = {"PATH": paths, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return {**kept, **own, **more}


def run(command, **more):
    return subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=240, cwd=ROOT)


@pytest.fixture(scope="module")
def alone(pairs, tmp_path_factory):
    """The weights that one process comes to."""
    output = tmp_path_factory.mktemp("alone") / "model"
    done = mmkd("pretrain", "--pairs", pairs, "--output", output, *COMMON, env=environment())
    assert done.returncode == 0, done.stderr
    return load_file(output / "model.safetensors")


def assert_same(output, weights):
    found = load_file(output / "model.safetensors")
    assert found.keys() == weights.keys()
    assert max((found[name] - weights[name]).abs().max().item() for name in weights) < 1e-5


def test_two_nodes_train_what_one_process_trains(pairs, alone, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    output = tmp_path / "model"
    script = ROOT / "examples" / "two_nodes.sh"
    done = run([script, "pretrain", "--pairs", pairs, "--output", output, *COMMON], PORT=port)
    assert done.returncode == 0, done.stderr
    assert_same(output, alone)


@pytest.fixture
def slurm(tmp_path):
    """Two commands of Slurm: ``srun`` starts the tasks it is told of, ``scontrol`` notes what it was asked."""
    programs = {
        "srun": "shift\nfor task in $(seq 0 $((SLURM_NTASKS - 1))); do\n"
        '  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks="${tasks:-} $!"\ndone\n'
        "for task in $tasks; do wait $task || exit 1; done\n",
        "scontrol": f'echo "$@" >> {tmp_path}/asked\n[ "$1" != show ] || echo 127.0.0.1\n',
        "mmkd": f'exec {sys.executable} -m mmkd.command.cli "$@"\n',
    }
    for name, text in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def submit(folder, *arguments, job="4711"):
    paths = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    more = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "PATH": paths}
    done = run([ROOT / "examples" / "slurm.sbatch", *map(str, arguments)], **more)
    asked = (folder / "asked").read_text() if (folder / "asked").is_file() else ""
    return done, asked


def test_slurm_starts_a_process_for_each_task(slurm, pairs, alone):
    output = slurm / "model"
    done, asked = submit(slurm, output, "pretrain", "--pairs", pairs, *COMMON)
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout and "requeue" not in asked
    assert_same(output, alone)


def test_slurm_puts_an_unfinished_run_back_and_stops_at_an_error(slurm):
    (slurm / "bin" / "mmkd").write_text("#!/bin/sh\nexit 0\n")  # saved as asked, and exited with 0
    done, asked = submit(slurm, slurm / "model", "pretrain")
    assert done.returncode == 0 and "requeue 4711" in asked
    (slurm / "bin" / "mmkd").write_text("#!/bin/sh\nexit 1\n")
    (slurm / "asked").unlink()
    done, asked = submit(slurm, slurm / "model", "pretrain")
    assert done.returncode != 0 and "requeue" not in asked
    done, _ = submit(slurm)
    assert done.returncode == 2 and "usage" in done.stderr
