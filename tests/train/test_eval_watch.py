"""Checkpoints of a training are evaluated as they appear, teachers only once."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from fake_encoder import FakeEncoder, make_pairs, write_pairs
from safetensors.torch import load_file

import mmkd.train.eval as recipe
import mmkd.train.pretrain
from mmkd.command.settings import parse
from mmkd.encoders.zoo import load_with_precision
from mmkd.evaluation import run as suite_run
from mmkd.evaluation import watch as watching
from mmkd.files import read_json
from mmkd.training.checkpoints import RunFolder

TEACHER = FakeEncoder("teacher", 0.3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short training, and what its folder held just before it was finished."""
    tmp_path = tmp_path_factory.mktemp("trained")
    pairs = write_pairs(tmp_path / "pairs", [*make_pairs(24), *make_pairs(24, "train", 24)])
    finish = RunFolder.finish

    def copied(self, write_output):
        shutil.copytree(self.path, tmp_path / "before")
        finish(self, write_output)

    command = ["--vision", "random:tiny", "--text", "random:tiny", "--projection_dim", "16", "--pairs", str(pairs)]
    command += ["--output", str(tmp_path / "done"), "--epochs", "2", "--batch_size", "8", "--warmup_steps", "1"]
    command += ["--checkpoint_every", "2", "--checkpoints_kept", "2", "--workers", "0", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "finish", copied)
        mmkd.train.pretrain.main(parse(mmkd.train.pretrain.PretrainSettings, command))
    return tmp_path


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    for name in ("pairs", "before", "done"):
        shutil.copytree(trained / name, tmp_path / name)
    monkeypatch.setattr(
        suite_run,
        "load_with_precision",
        lambda source, **how: TEACHER if source == "teacher" else load_with_precision(source, **how),
    )
    TEACHER.calls = 0
    return tmp_path


def settings(root, **more):
    more = {"quiet": True, "replicates": 100, "kinds": ["zeroshot", "retrieval"], **more}
    return recipe.EvalSettings(
        encoders=["teacher"], watch=root / "run", pairs=root / "pairs", output=root / "results", **more
    )


def test_checkpoints_as_they_appear_and_the_finished_model(run, monkeypatch):
    shutil.copytree(run / "before", run / "run.partial")
    steps = sorted(path.name for path in (run / "run.partial/checkpoints").glob("step-*"))
    assert len(steps) == 2
    waits = []

    def finished_meanwhile(seconds):
        waits.append(seconds)
        shutil.rmtree(run / "run.partial")
        shutil.copytree(run / "done", run / "run")

    monkeypatch.setattr(watching, "time", SimpleNamespace(sleep=finished_meanwhile))
    recipe.main(settings(run, poll_seconds=3.0))
    assert waits == [3.0]
    lines = [json.loads(line) for line in (run / "results/watch.jsonl").read_text().splitlines()]
    names = [f"step-{int(step.removeprefix('step-'))}" for step in steps] + ["final"]
    assert [line["name"] for line in lines] == names
    assert all(set(line["overall"]) == {"student", "teacher"} for line in lines)
    teachers = {json.dumps(line["overall"]["teacher"]) for line in lines}
    assert len(teachers) == 1 and len({json.dumps(line["tasks"]) for line in lines}) > 1
    summaries = [read_json(run / "results" / name / "summary.json") for name in names]
    assert len({summary["encoders"]["student"]["fingerprint"] for summary in summaries}) == 3
    assert len(list((run / "results/embeddings/teacher").rglob("images-*"))) == 1 and TEACHER.calls < 2 * 24 + 80
    assert not (run / "results/students").exists() and not (run / "results/embeddings/student").exists()
    calls = TEACHER.calls
    recipe.main(settings(run))
    assert TEACHER.calls == calls and len((run / "results/watch.jsonl").read_text().splitlines()) == 3


def test_a_checkpoint_becomes_the_student_it_will_be(run):
    checkpoint = max((run / "before/checkpoints").glob("step-*"))
    watching.write_student(checkpoint, run / "before/settings.yaml", run / "student")
    ours, stored = load_file(run / "student/model.safetensors"), load_file(checkpoint / "objective.safetensors")
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.numpy(), stored[f"model.{name}"].numpy())
    assert read_json(run / "student/config.json") == read_json(run / "done/config.json")


def test_what_cannot_be_watched(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="start the training first"):
        recipe.main(settings(run))
    (tmp_path / "other.yaml").write_text("model: null\npreset: null\nteacher: x\n")
    with pytest.raises(ValueError, match="name no model, preset or towers"):
        watching.write_student(
            max((run / "before/checkpoints").glob("step-*")), tmp_path / "other.yaml", tmp_path / "student"
        )
