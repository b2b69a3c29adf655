import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmkd.command.settings import parse
from mmkd.data.features.lookup import TeacherFeatures
from mmkd.data.features.store import FeatureStore
from mmkd.data.features.writer import FeatureExtraction
from mmkd.data.folder import open_pairs, write_manifest
from mmkd.data.table import Pair
from mmkd.encoders import teacher_features
from mmkd.encoders.encoder import DualEncoder
from mmkd.train import extract
from mmkd.train.extract import ExtractSettings, main

TEACHER = """
import contextlib
import os
import numpy as np
import torch
from torchvision.transforms.functional import pil_to_tensor

class Tiny(torch.nn.Module):
    def __init__(self, dim, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = torch.nn.Conv2d(3, dim, 8, stride=8)
        self.letters = torch.nn.Embedding(256, dim)

    def encode_images(self, images):
        with contextlib.suppress(FileNotFoundError):  # for one of two processes alone
            os.remove("kill")
            os.kill(os.getpid(), 9)
        pixels = torch.stack([pil_to_tensor(image.resize((32, 32))) for image in images]) / 255
        return self.convolution(pixels).mean(dim=(2, 3))

    def encode_texts(self, texts):
        return torch.stack([self.letters(torch.tensor(list(text.encode()))).mean(dim=0) for text in texts])

def first(device):
    return Tiny(16, 0)

def second(device):
    return Tiny(24, 1)
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """23 pairs, and two teachers as Python functions, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("tiny_teachers.py").write_text(TEACHER)
    for name, dim in (("first", 16), ("second", 24)):
        row = f"name: {name}\nform: python\nweights: tiny_teachers.{name}\ndim: {dim}\nlicense: MIT\n"
        Path(f"{name}.yaml").write_text(row)
    write_pairs(23)
    yield tmp_path
    sys.modules.pop("tiny_teachers", None)


def write_pairs(count):
    Path("pairs/images").mkdir(parents=True, exist_ok=True)
    for k in range(count):
        pixels = np.random.default_rng(k).integers(0, 256, (40, 30 + k, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"pairs/images/{k}.png")
    write_manifest(Path("pairs"), [Pair(f"p{k}", f"{k}.png", f"caption number {k}") for k in range(count)])


def run(output, *more, teacher="first.yaml,second.yaml"):
    common = ["--teacher", teacher, "--pairs", "pairs", "--output", str(output), "--device", "cpu"]
    main(parse(ExtractSettings, [*common, "--batch_size", "3", "--shard_size", "5", "--quiet", *more]))


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_features_are_the_teachers_and_several_share_one_decoding(work, monkeypatch):
    opened = []
    real = teacher_features.read_pixels
    monkeypatch.setattr(teacher_features, "read_pixels", lambda path: opened.append(path) or real(path))
    run("features")
    assert len(opened) == 23
    features = TeacherFeatures.open(Path("features"))
    assert features.dims == {"first": 16, "second": 24}
    found = features.lookup(["p7", "p0"])
    import tiny_teachers

    for name, teacher in (("first", tiny_teachers.first("cpu")), ("second", tiny_teachers.second("cpu"))):
        with torch.no_grad():
            image = teacher.encode_images([Image.open("pairs/images/7.png")])[0]
            text = teacher.encode_texts(["caption number 0"])[0]
        torch.testing.assert_close(found[name]["image"][0], image / image.norm(), atol=1e-3, rtol=0)
        torch.testing.assert_close(found[name]["text"][1], text / text.norm(), atol=1e-3, rtol=0)
    store = FeatureStore(Path("features/first"))
    assert list(store.ids) == [f"p{k}" for k in range(23)]
    assert store.provenance["license"] == "MIT"


def run_until_killed(monkeypatch, survived):
    """Begin ``resumed``, killed when so many shards are written."""
    written = []
    real = FeatureExtraction.write

    def killed(self, *values):
        if len(written) == survived:
            raise KeyboardInterrupt
        written.append(values[0])
        real(self, *values)

    with monkeypatch.context() as patched:
        patched.setattr(FeatureExtraction, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run("resumed")


@pytest.mark.parametrize("survived", [0, 1, 3, 9])
def test_a_killed_run_goes_on_to_the_same_bytes(work, monkeypatch, survived):
    run("whole")
    run_until_killed(monkeypatch, survived)
    assert not Path("resumed/first/meta.json").exists()
    monkeypatch.setattr(teacher_features, "read_pixels", counted := Counted(teacher_features.read_pixels))
    run("resumed")
    assert counted.calls <= 23 - 5 * (survived // 2)
    assert contents("resumed") == contents("whole")


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, path):
        self.calls += 1
        return self.function(path)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (2, 0, 4, 3, 1, 1)])
def test_shards_may_be_written_in_any_order_and_twice(work, monkeypatch, order):
    run("one")
    shuffled = lambda work, missing, *_: [work([shard], lambda pairs: None) for shard in order]  # noqa: E731
    monkeypatch.setattr(extract, "run_tasks", shuffled)
    run("many")
    assert contents("many") == contents("one")
    run("many")
    assert contents("many") == contents("one")


def test_two_processes_one_of_which_is_killed_write_the_same_bytes(work, caplog):
    run("one", teacher="first.yaml")
    Path("kill").touch()
    run("two", "--workers", "2", teacher="first.yaml")
    assert not Path("kill").exists() and "its tasks are given to others" in caplog.text
    assert contents("two") == contents("one")


def test_pairs_added_later_are_the_only_ones_extracted(work, monkeypatch):
    write_pairs(12)
    run("features")
    write_pairs(23)
    run("fresh")
    monkeypatch.setattr(teacher_features, "read_pixels", counted := Counted(teacher_features.read_pixels))
    run("features")
    assert counted.calls == 11
    for name in ("first", "second"):
        grown, fresh = FeatureStore(Path("features") / name), FeatureStore(Path("fresh") / name)
        for one, other in zip(grown.lookup(fresh.ids), fresh.lookup(fresh.ids), strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=0)
    run("features")
    assert counted.calls == 11


def test_a_caption_that_changed_is_refused_finished_and_extracted_anew_unfinished(work, monkeypatch):
    run("features")
    before = list(open_pairs(Path("pairs")).pairs)
    changed = [replace(pair, caption="rewritten since") if pair.id == before[3].id else pair for pair in before]
    write_manifest(Path("pairs"), changed)
    with pytest.raises(ValueError, match=r"features/first holds features of other captions.*1 captions of 23.*p3"):
        run("features")
    run("fresh")
    write_manifest(Path("pairs"), before)
    run_until_killed(monkeypatch, 6)
    write_manifest(Path("pairs"), changed)
    run("resumed")
    assert contents("resumed") == contents("fresh") != contents("features")


def test_images_that_cannot_be_read_are_left_out_and_listed(work, capsys):
    Path("pairs/images/3.png").write_bytes(b"no image")
    Path("pairs/images/22.png").write_bytes(Path("pairs/images/22.png").read_bytes()[:900])
    Path("pairs/images/9.png").unlink()
    run("features", "--quiet", "false")
    store = FeatureStore(Path("features/first"))
    assert len(store.ids) == 20 and not {"p3", "p9", "p22"} & set(store.ids)
    assert store.lookup(["p3", "p4"])[2].tolist() == [False, True]
    lines = [json.loads(line) for line in Path("features/first/skipped.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in lines} == {"p3": "unsupported", "p9": "missing", "p22": "corrupt"}
    assert "20 of 23 pairs; left out: corrupt 1, missing 1, unsupported 1" in capsys.readouterr().out
    before = contents("features")
    run("features")
    assert contents("features") == before
    write_pairs(23)
    run("features")
    assert len(FeatureStore(Path("features/first")).ids) == 23
    assert Path("features/first/skipped.jsonl").read_text() == ""


def test_a_whole_part_may_be_unreadable_but_not_all(work):
    for k in range(5, 10):
        Path(f"pairs/images/{k}.png").write_bytes(b"no image")
    run("features")
    assert len(FeatureStore(Path("features/second")).ids) == 18
    for k in range(23):
        Path(f"pairs/images/{k}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 23 images"):
        run("nothing")


def test_a_store_of_other_weights_or_type_is_refused(work):
    run("features", teacher="first.yaml")
    before = contents("features")
    with pytest.raises(ValueError, match="another dtype"):
        run("features", "--dtype", "float32", teacher="first.yaml")
    with pytest.raises(ValueError, match=r"another fingerprint|another dtype|wide"):
        Path("tiny_teachers.py").write_text(TEACHER.replace("Tiny(16, 0)", "Tiny(16, 5)"))
        run("features", teacher="first.yaml")
    assert contents("features") == before


def test_precision_is_a_setting_and_part_of_what_a_store_is(work):
    run("exact", teacher="first.yaml")
    run("fast", "--precision", "bfloat16", teacher="first.yaml")
    exact, fast = FeatureStore(Path("exact/first")), FeatureStore(Path("fast/first"))
    assert fast.provenance["precision"] == "bfloat16"
    for one, other in zip(exact.lookup(exact.ids)[:1], fast.lookup(exact.ids)[:1], strict=True):
        cosine = torch.nn.functional.cosine_similarity(one, other, dim=1)
        assert cosine.min() > 0.999 and not torch.equal(one, other)
    with pytest.raises(ValueError, match="another precision"):
        run("exact", "--precision", "bfloat16", teacher="first.yaml")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_type_of_storage(work, dtype):
    run("half", teacher="first.yaml")
    run(dtype, "--dtype", dtype, teacher="first.yaml")
    expected, store = FeatureStore(Path("half/first")), FeatureStore(Path(dtype) / "first")
    assert store.dtype == dtype and list(store.ids) == list(expected.ids)
    for one, other in zip(store.lookup(store.ids)[:2], expected.lookup(store.ids)[:2], strict=True):
        assert torch.nn.functional.cosine_similarity(one, other, dim=1).min() > 0.9999


def test_images_are_prepared_once_where_teachers_prepare_alike(work, monkeypatch):
    prepared = []
    real = DualEncoder.prepare
    monkeypatch.setattr(DualEncoder, "prepare", lambda self, image: prepared.append(self.name) or real(self, image))
    run("features")
    assert len(prepared) == 23


def test_settings_that_cannot_work(work):
    for arguments, said in (
        (["--shard_size", "-1"], "at least 0"),
        (["--weights.frist", "x"], "did you mean 'first'"),
        (["--teacher", "biomedclp"], "did you mean 'biomedclip'"),
    ):
        with pytest.raises(ValueError, match=said):
            run("features", *arguments)
    assert not Path("features").exists()
