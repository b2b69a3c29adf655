import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import regression_run
import torch
from processes import forked
from regression_run import Numbers, Regression, settings, train
from safetensors.torch import load_file, save_file

from mmkd.files import fingerprint
from mmkd.training.loop import start
from mmkd.training.optimizer import build_optimizer, learning_rate

MEASURED = ("samples_per_second", "data_time", "memory_gb")


class Killed(Exception):
    pass


class Interrupted(Numbers):
    """Stops as a kill would, in the middle of the run."""

    def __init__(self, at, **more):
        super().__init__(**more)
        self.at = at

    def epoch(self, epoch, skip=0):
        for number, batch in enumerate(super().epoch(epoch, skip), start=skip):
            if (epoch, number) == self.at:
                raise Killed
            yield batch


def losses(folder):
    lines = [json.loads(line) for line in (folder / "model" / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in MEASURED} for line in lines]


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def test_output_is_whole_and_the_same_bytes_twice(tmp_path):
    for name in ("one", "two"):
        train(settings(tmp_path / name))
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert sorted(p.name for p in (tmp_path / "one" / "model").iterdir()) == [
        "environment.json",
        "log.jsonl",
        "loss.png",
        "model.safetensors",
        "settings.yaml",
    ]
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["model"]


def test_log_has_a_line_a_step(tmp_path):
    train(settings(tmp_path, warmup_steps=5))
    lines = [json.loads(line) for line in (tmp_path / "model" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 16))
    expected = {"step", "epoch", "loss", "error", "gradient_norm", "logit_scale", "learning_rate", *MEASURED}
    assert all(set(line) == expected for line in lines)
    assert 0 <= lines[0]["data_time"] <= 1


@pytest.mark.parametrize("at", [(0, 4), (1, 2), (2, 4)])
def test_resumed_is_uninterrupted(tmp_path, at):
    train(settings(tmp_path / "whole"))
    with pytest.raises(Killed):
        train(settings(tmp_path / "cut"), Interrupted(at))
    assert not (tmp_path / "cut" / "model").exists()
    rest = Numbers()
    train(settings(tmp_path / "cut"), rest)
    steps_done = (at[0] * 5 + at[1]) // 4 * 4
    assert rest.read == [divmod(step, 5) for step in range(steps_done, 15)]
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_killed_process_resumes_to_the_same_bytes(tmp_path):
    """A real SIGKILL, wherever it falls; every run in a process of its own, as a command is."""
    folder = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, regression_run.__file__, str(folder), "0.05"])
    log = folder / "model.partial" / "log.jsonl"
    while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) >= 6):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for name in ("killed", "whole"):
        assert forked(regression_run.__file__, tmp_path / name, 0).returncode == 0
    assert weights(folder) == weights(tmp_path / "whole")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_asked_to_stop_a_run_saves_exits_with_0_and_goes_on(tmp_path, name, caplog):
    class Asked(Numbers):
        def epoch(self, epoch, skip=0):
            for number, batch in enumerate(super().epoch(epoch, skip), start=skip):
                if (epoch, number) == (1, 1):
                    os.kill(os.getpid(), getattr(signal, name))
                yield batch

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(settings(tmp_path / "cut", checkpoint_every=100), Asked())
    assert stopped.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert "saved at step 7" in caplog.text
    rest = Numbers()
    train(settings(tmp_path / "cut", checkpoint_every=100), rest)
    assert rest.read[0] == (1, 2)
    train(settings(tmp_path / "whole", checkpoint_every=100))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_other_data_under_a_resumed_run_are_refused(tmp_path):
    class Others(Numbers):
        def identity(self):
            return {"pairs": 31}

    with pytest.raises(Killed):
        train(settings(tmp_path), Interrupted((2, 0)))
    with pytest.raises(ValueError, match=r"other data: pairs was 30, is now 31.*number of processes"):
        train(settings(tmp_path), Others())
    train(settings(tmp_path))


def test_no_room_for_the_next_checkpoint_is_said_before_the_step(tmp_path, monkeypatch):
    real, left = shutil.disk_usage, []

    def usage(path):
        left.append(path)
        return real(path)._replace(free=10) if len(left) > 1 else real(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    numbers = Numbers()
    with pytest.raises(
        OSError,
        match=r"0.00 GB are free, but the next checkpoint needs 0.07 GB; free some space and run the same command",
    ):
        train(settings(tmp_path), numbers)
    assert numbers.read[-1] == (0, 3), "right after the checkpoint of step 4, so that no step is lost"
    monkeypatch.undo()
    train(settings(tmp_path))
    train(settings(tmp_path / "whole"))
    assert weights(tmp_path) == weights(tmp_path / "whole")


def test_checkpoints_are_safetensors_by_name_of_parameter(tmp_path):
    with pytest.raises(Killed):
        train(settings(tmp_path, ema_decay=0.9), Interrupted((1, 0)))
    newest = tmp_path / "model.partial" / "checkpoints" / "step-00000004"
    assert sorted(path.name for path in newest.iterdir()) == [
        "average.safetensors",
        "checkpoint.json",
        "objective.safetensors",
        "optimizer.safetensors",
    ]
    moments = load_file(newest / "optimizer.safetensors")
    assert {"exp_avg/layers.0.weight", "exp_avg_sq/logit_scale", "step/layers.3.bias"} <= set(moments)
    assert moments["step/logit_scale"].item() == 4
    save_file({"other": torch.zeros(3)}, newest / "objective.safetensors")
    stated = json.loads((newest / "checkpoint.json").read_text())
    stated["sha256"]["objective.safetensors"] = fingerprint([newest / "objective.safetensors"])
    (newest / "checkpoint.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError, match="step-00000004 is a checkpoint of another model"):
        train(settings(tmp_path, ema_decay=0.9))


def cut_off(content):
    return content[:100]


def one_bit_flipped(content):
    return content[:-3] + bytes([content[-3] ^ 4]) + content[-2:]


@pytest.mark.parametrize("damage", [cut_off, one_bit_flipped])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, damage):
    train(settings(tmp_path / "whole"))
    with pytest.raises(Killed):
        train(settings(tmp_path / "cut"), Interrupted((2, 0)))
    checkpoints = tmp_path / "cut" / "model.partial" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000004", "step-00000008"]
    newest = checkpoints / "step-00000008" / "objective.safetensors"
    newest.write_bytes(damage(newest.read_bytes()))
    rest = Numbers()
    with caplog.at_level(logging.WARNING):
        train(settings(tmp_path / "cut"), rest)
    assert "step-00000008 is skipped: objective.safetensors is missing, or not as it was written" in caplog.text
    assert rest.read[0] == (0, 4)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_old_checkpoints_are_removed(tmp_path):
    with pytest.raises(Killed):
        train(settings(tmp_path, checkpoint_every=2, checkpoints_kept=1), Interrupted((2, 4)))
    checkpoints = tmp_path / "model.partial" / "checkpoints"
    assert [p.name for p in checkpoints.iterdir()] == ["step-00000014"]


def test_changed_settings_are_refused_on_resume(tmp_path):
    with pytest.raises(Killed):
        train(settings(tmp_path), Interrupted((2, 0)))
    with pytest.raises(ValueError, match=r"other settings: learning_rate was 0.01, is now 0.5.*remove"):
        train(settings(tmp_path, learning_rate=0.5))
    train(settings(tmp_path, workers=0, checkpoints_kept=5))


def test_existing_output_is_refused_before_work_and_replaced_when_asked(tmp_path):
    train(settings(tmp_path, max_steps=1))
    with pytest.raises(FileExistsError, match="--overwrite"):
        train(settings(tmp_path))
    train(settings(tmp_path, overwrite=True))
    assert len(losses(tmp_path)) == 15


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, caplog):
    wrong = {(1, 2), (2, 1)}
    objective = train(settings(tmp_path / "run"), Numbers(wrong_at=wrong))
    assert all(parameter.isfinite().all() for parameter in objective.parameters())
    lines = losses(tmp_path / "run")
    assert {line["step"]: line["skipped"] for line in lines if "skipped" in line} == {8: 1, 12: 2}
    assert [line["step"] for line in lines if line["loss"] is None] == [8, 12]
    assert "step skipped, not finite: step 8" in caplog.text
    with pytest.raises(Killed):
        train(settings(tmp_path / "cut"), Interrupted((2, 4), wrong_at=wrong))
    train(settings(tmp_path / "cut"), Numbers(wrong_at=wrong))
    assert weights(tmp_path / "cut") == weights(tmp_path / "run")
    assert losses(tmp_path / "cut") == lines


def test_several_in_a_row_stop_the_run_with_the_ids(tmp_path):
    with pytest.raises(ValueError, match=r"not finite: step 8.*pair-1-2-0, pair-1-2-1.*--learning_rate"):
        train(settings(tmp_path, skipped_in_a_row=2), Numbers(wrong_at={(1, 1), (1, 2)}))
    assert not (tmp_path / "model").exists()


def test_statistics_stay_and_scale_is_clamped(tmp_path):
    objective = train(settings(tmp_path, learning_rate=1.0))
    assert torch.equal(objective.layers[1].running_mean, torch.zeros(8))
    assert objective.logit_scale.item() == pytest.approx(math.log(100))
    assert load_file(tmp_path / "model" / "model.safetensors")["logit_scale"].item() == pytest.approx(math.log(100))


def test_schedule_rises_and_falls(tmp_path):
    chosen = settings(tmp_path, warmup_steps=4, learning_rate=2.0)
    rates = [learning_rate(step, 12, chosen) for step in range(12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0)
    assert rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True)
    assert learning_rate(12, 12, chosen) == pytest.approx(0)


def test_vectors_do_not_decay(tmp_path):
    matrices, vectors = build_optimizer(Regression(), settings(tmp_path)).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.2, 0.0)
    assert matrices["betas"] == (0.9, 0.98)
    assert matrices["eps"] == 1e-6
    assert sorted(p.ndim for p in matrices["params"]) == [2, 2]
    assert len(vectors["params"]) == 5


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"batch_size": 1}, {"max_steps": 0}, {"learning_rate": 0.0}, {"clip_norm": 0.0}, {"workers": -1}],
)
def test_settings_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"--{next(iter(wrong))}"):
        start(settings(tmp_path, **wrong))
