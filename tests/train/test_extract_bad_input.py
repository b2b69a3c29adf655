"""What is wrong with pairs, texts, disks and processes: flagged, counted, listed, and nothing lost."""

import errno
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmkd import files
from mmkd.command.settings import parse
from mmkd.data.features.store import FeatureStore
from mmkd.data.features.writer import shard_size
from mmkd.data.folder import open_pairs, write_manifest
from mmkd.data.table import Pair
from mmkd.train.extract import ExtractSettings, main

TEACHER = """
import hashlib
import numpy as np
import torch

class Mean:
    def encode_images(self, images):
        return np.array([np.asarray(i.resize((4, 4)), dtype=np.float64).ravel() + 1 for i in images])

    def encode_texts(self, texts):
        return np.array([list(hashlib.shake_256(t.encode()).digest(48)) for t in texts], dtype=np.float32) + 1

def build(device):
    return Mean()
"""
KILLED_AT_EVERY_STEP = """
import os, pathlib, signal, shutil, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from mmkd.command.settings import parse
from mmkd.train.extract import ExtractSettings, main
import mmkd.encoders.zoo, mmkd.encoders.python

def extract(output):
    arguments = ["--teacher", "mean.yaml", "--pairs", "pairs", "--output", output, "--device", "cpu"]
    main(parse(ExtractSettings, [*arguments, "--batch_size", "3", "--shard_size", "5", "--threads", "1", "--quiet"]))

def in_child(output, survived=None):
    child = os.fork()
    if child == 0:
        if survived is not None:
            left = [survived]
            def counted(function):
                def step(*values, **options):
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left[0] -= 1
                    return function(*values, **options)
                return step
            os.fsync = counted(os.fsync)
            for name in ("replace", "unlink", "mkdir"):
                setattr(pathlib.Path, name, counted(getattr(pathlib.Path, name)))
        extract(output)
        os._exit(0)
    return os.waitpid(child, 0)[1]

def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}

def kill_at_every_step(before):
    def fresh(folder):
        shutil.rmtree(folder, ignore_errors=True)
        if before:
            shutil.copytree(before, folder)
    fresh("whole")
    assert in_child("whole") == 0
    expected, kills, died = contents("whole"), 0, True
    while died:
        fresh("killed")
        status = in_child("killed", kills)
        died = os.WIFSIGNALED(status)
        assert died or status == 0, status
        kills += 1
        assert in_child("killed") == 0
        assert contents("killed") == expected, (kills, sorted(contents("killed")), sorted(expected))
    return kills

print(kill_at_every_step(""), kill_at_every_step("before"))
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("mean_teacher.py").write_text(TEACHER)
    Path("mean.yaml").write_text("name: mean\nform: python\nweights: mean_teacher.build\ndim: 48\nlicense: MIT\n")
    Path("pairs/images").mkdir(parents=True)
    yield tmp_path
    sys.modules.pop("mean_teacher", None)


def pairs_of(captions):
    """Pairs with readable images and the given captions."""
    for k in range(len(captions)):
        pixels = np.random.default_rng(k).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"pairs/images/{k}.png")
    write_manifest(Path("pairs"), [Pair(f"p{k}", f"{k}.png", caption) for k, caption in enumerate(captions)])


def run(*more, output="features"):
    common = ["--teacher", "mean.yaml", "--pairs", "pairs", "--output", output, "--device", "cpu", "--quiet"]
    main(parse(ExtractSettings, [*common, "--batch_size", "3", "--shard_size", "5", *more]))
    return FeatureStore(Path(output) / "mean")


def skipped():
    lines = Path("features/mean/skipped.jsonl").read_text().splitlines()
    return {line["id"]: line["reason"] for line in map(json.loads, lines)}


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_images_of_every_bad_kind(work):
    pairs_of([f"caption {k}" for k in range(12)])
    folder = Path("pairs/images")
    (folder / "0.png").unlink()
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:700])
    (folder / "2.png").write_bytes(b"")
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (folder / "3.png").write_bytes(bomb + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    Image.new("RGB", (3, 3)).save(folder / "4.png")
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(folder / "5.png", format="GIF", save_all=True, append_images=frames[1:])
    deep = np.linspace(0, 65535, 400, dtype=np.uint16).reshape(20, 20)
    Image.fromarray(deep).save(folder / "6.png")
    store = run()
    assert skipped() == {"p0": "missing", "p1": "corrupt", "p2": "unsupported", "p3": "too_large", "p4": "too_small"}
    assert list(store.ids) == [f"p{k}" for k in range(5, 12)]
    red, ramp = store.lookup(["p5", "p6"])[0].reshape(2, 16, 3)
    assert red[:, 0].min() > 100 * red[:, 1].max()  # the first frame
    assert ramp[0].max() < 0.2 * ramp[-1].min()  # all 16 bits count


TEXTS = {
    "spanish": "Radiografía de tórax: opacidad en el lóbulo inferior — ¿neumonía?",
    "chinese": "胸部X线片显示右下肺叶实变",
    "emoji": "chest 🫁🩻 x-ray 👩🏽‍⚕️",
    "nul": "a\0b\0",
    "control": "\x01\x1b[31m\ufeff\u202e",
    "empty": "",
    "blank": " \n\t ",
    "long": "opacity in the lower lobe " * 4000,
    "one word": "x" * 20_000,
}


def test_texts_of_any_length_and_script(work):
    pairs_of([*TEXTS.values(), "plain"])
    store = run()
    assert skipped() == {}
    text, mask = store.lookup([f"p{k}" for k in range(len(TEXTS))])[1:]
    assert mask.all()
    torch.testing.assert_close(text.norm(dim=1), torch.ones(len(TEXTS)), atol=2e-3, rtol=0)
    assert len({tuple(row) for row in text.tolist()}) == len(TEXTS)


def test_an_id_twice_is_refused_before_any_work(work):
    write_manifest(Path("pairs"), [Pair("same", "0.png", "one"), Pair("same", "1.png", "two")])
    with pytest.raises(ValueError, match="lists id 'same' twice"):
        run()
    assert not Path("features").exists()


def test_a_full_disk_keeps_what_is_whole(work, monkeypatch):
    pairs_of([f"caption {k}" for k in range(12)])
    expected = contents(run(output="whole").path)
    written, real = [], os.fsync

    def full(descriptor):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run()
    assert len(contents("features")) == 2 and not Path("features/mean/meta.json").exists()
    monkeypatch.setattr(files.os, "fsync", real)
    assert contents(run().path) == expected


def test_a_shard_cut_in_half_is_made_again_before_and_refused_after(work):
    pairs_of([f"caption {k}" for k in range(12)])
    expected = contents(run(output="whole").path)
    names = sorted(name for name in expected if name.startswith("shard"))
    Path("features/mean").mkdir(parents=True)
    for name in names[:2]:
        (Path("features/mean") / name).write_bytes(expected[name])
    (Path("features/mean") / names[0]).write_bytes(expected[names[0]][: len(expected[names[0]]) // 2])
    assert contents(run().path) == expected
    path = Path("features/mean") / names[1]
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="truncated"):
        run()


def test_kill_9_at_any_step_ends_in_the_same_bytes(work):
    """Every fsync, rename, removal and new folder of a run is once the last thing it does: from nothing and growing."""
    pairs_of([f"caption {k}" for k in range(9)])
    Path("pairs/images/7.png").write_bytes(b"no image")
    pairs = list(open_pairs(Path("pairs")).pairs)
    write_manifest(Path("pairs"), pairs[:3])
    run(output="before")
    write_manifest(Path("pairs"), pairs)
    command = [sys.executable, "-W", "ignore", "-c", KILLED_AT_EVERY_STEP]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    from_nothing, growing = map(int, done.stdout.split())
    assert from_nothing >= 12 and growing >= 12


def test_shards_are_as_large_as_the_work_allows():
    assert [shard_size(pairs) for pairs in (1, 23, 262_144, 262_145, 2_900_000, 20_000_000, 10**9)] == [
        256,
        256,
        256,
        512,
        4096,
        16384,
        16384,
    ]
