"""What a run leaves beside its output: lines by name, trackers, environment, curve, profile."""

import json
import re
import subprocess

import pytest
import torch
from captioned_batches import batch, descending, model
from safetensors.torch import save_file

from mmkd.data.provenance import git_commit
from mmkd.training.checkpoints import RunFolder
from mmkd.training.contrastive import ContrastiveObjective
from mmkd.training.log import StepLog, draw_losses, environment, memory_gb, plain_settings, teacher_use
from mmkd.training.loop import fit, start
from mmkd.training.settings import LoopSettings, chosen_trackers


class Batches:
    def __len__(self):
        return 6

    def identity(self):
        return {"pairs": 6 * 20}

    def epoch(self, epoch, skip=0):
        for number in range(skip, len(self)):
            mask = torch.tensor([[True, False], [True, True]] * 10)
            teachers = {name: {"mask": mask[:, k]} for k, name in enumerate(("plip", "bmca"))}
            yield {
                **batch(descending(20, seed=number), seed=number),
                "ids": [f"{number}-{row}" for row in range(20)],
                "teachers": teachers,
            }


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A run with everything switched on."""
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("run") / "model"
    settings = LoopSettings(output=folder, quiet=True, peak_tflops=0.001, profile_steps=2)
    objective = ContrastiveObjective(model())
    accelerator = start(settings)
    fit(accelerator, objective, Batches(), settings, lambda path: save_file({}, path / "model.safetensors"))
    return folder


def test_lines_have_losses_speed_and_teachers_by_name(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    for line in lines:
        assert set(line) == {
            *("step", "epoch", "loss", "task", "gradient_norm", "logit_scale", "learning_rate"),
            *("samples_per_second", "tokens_per_second", "useful_tokens", "data_time", "mfu", "memory_gb"),
            *("teacher_use/plip", "teacher_use/bmca"),
        }
        assert (line["teacher_use/plip"], line["teacher_use/bmca"]) == (0.75, 0.25)
        assert 0.5 < line["useful_tokens"] <= 1 and 0 <= line["data_time"] <= 1
        tokens = sum(descending(20, seed=line["step"] - 1))
        assert line["tokens_per_second"] / line["samples_per_second"] == pytest.approx(tokens / 20, rel=0.01)
    assert lines[0]["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-4)


def test_mfu_is_the_formula_over_time_and_peak(tmp_path):
    settings = LoopSettings(output=tmp_path / "model", peak_tflops=2.0)
    log = StepLog(RunFolder(settings.output), settings, model())
    given = batch(descending(20))
    speed = log._speed({**given, "ids": ["a"] * 20}, waited=0.1, seconds=1e-3)
    assert speed["mfu"] == pytest.approx(log.cost.of(given["text_lengths"]) / 1e-3 / 2e12, abs=1e-4)
    assert speed["mfu"] > 0


def test_trackers_get_the_same_numbers(output):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard" / "mmkd"))
    events.Reload()
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    seen = {event.step: event.value for event in events.Scalars("loss")}
    assert seen == pytest.approx({line["step"]: line["loss"] for line in lines}, rel=1e-6)
    assert {"mfu", "teacher_use/plip", "logit_scale"} <= set(events.Tags()["scalars"])


def test_environment_says_versions_and_cost_and_no_places(output):
    text = (output / "environment.json").read_text()
    found = json.loads(text)
    assert torch.__version__.startswith(found["packages"]["torch"])
    assert found["training_cost"].startswith("training one pair with a caption of n tokens: 3 x")
    assert found["peak_flops"] == 1e9
    assert str(output.parent) not in text
    assert re.fullmatch("[0-9a-f]{40}", found["package_commit"] or "0" * 40)


def test_curve_and_profile_are_there(output):
    pytest.importorskip("matplotlib")
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    trace = json.loads((output / "profile" / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"ProfilerStep#2", "ProfilerStep#3"} <= names and "ProfilerStep#4" not in names
    assert "aten::" in (output / "profile" / "operators.txt").read_text()


def test_a_curve_needs_two_steps(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "epoch": 0, "loss": 1.0, "gradient_norm": 1.0}\n')
    assert not draw_losses(log, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_tracker_names():
    assert chosen_trackers(["none"]) == []
    assert chosen_trackers(["auto"]) in ([], ["tensorboard"])
    with pytest.raises(ValueError, match="did you mean 'tensorboard'"):
        chosen_trackers(["tensorbord"])
    with pytest.raises(ValueError, match="pip install swanlab"):
        chosen_trackers(["swanlab"])
    with pytest.raises(ValueError, match="none alone"):
        chosen_trackers(["none", "tensorboard"])


def test_settings_are_flat_for_trackers(tmp_path):
    flat = plain_settings({"losses": {"task": 1.0}, "freeze": ["a"], "model": None, "steps": 3})
    assert flat == {"losses.task": 1.0, "freeze": "['a']", "model": "None", "steps": 3}
    assert environment({"more": 1})["more"] == 1


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_of_a_folder_is_read_without_starting_git(tmp_path, monkeypatch):
    assert git_commit(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    assert git_commit(tmp_path) is None  # no commit yet
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    started = tmp_path / "started"
    config = tmp_path / ".git" / "config"
    config.write_text(f"{config.read_text()}[core]\n\tfsmonitor = touch {started}\n")
    assert git_commit(tmp_path) == commit
    git(tmp_path, "pack-refs", "--all")
    assert git_commit(tmp_path) == commit
    git(tmp_path, "worktree", "add", "--quiet", "--detach", str(tmp_path / "tree"))
    assert git_commit(tmp_path / "tree") == commit
    started.unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)
    assert environment({})["folder_commit"] == commit
    assert not started.exists()


@pytest.mark.parametrize("head", ["", "ref: ../../../etc/hostname", "\0", "0" * 39])
def test_a_forged_head_has_no_commit(tmp_path, head):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text(head)
    assert git_commit(tmp_path) is None


def test_teacher_use_counts_available_teachers_equally():
    masks = {"a": [True, True, False, False], "b": [True, False, False, True]}
    use = teacher_use({"aligned": {name: {"mask": torch.tensor(mask)} for name, mask in masks.items()}})
    assert use == {"teacher_use/a": 0.375, "teacher_use/b": 0.375}
    assert teacher_use({"ids": ["x"]}) == {}
    assert memory_gb() > 0.01
