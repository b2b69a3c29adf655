"""Tasks on every executor: killed processes, errors of the work, settings that cannot work."""

import importlib.util
import io
import os
import sys
from functools import partial
from pathlib import Path

import pytest
from numbered_work import FATAL, SLOW, WRONG, WRONG_LATER, wait_for, write_numbers
from tqdm import tqdm

from mmkd.command import tasks
from mmkd.command.tasks import TaskSettings, run_tasks

ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
hidden = partial(tqdm, disable=True)
EXECUTORS = ["local", "slurm", pytest.param("ray", marks=ray)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory; Slurm's jobs are processes that submitit starts on this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "CLUSTER", "local")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    Path("out").mkdir()
    return tmp_path


def run(numbers, settings):
    bars = []

    def bar(total):
        bars.append(tqdm(total=total, file=io.StringIO()))
        return bars[-1]

    run_tasks(
        partial(write_numbers, "out"), numbers, lambda n: Path("out", str(n)).exists(), settings, Path("out"), bar
    )
    return sum(own.n for own in bars)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_tasks_of_a_killed_process_are_done_by_others(here, executor):
    done = run(range(8), TaskSettings(executor=executor, workers=2, tasks=4))
    names = {path.name: path.read_text() for path in Path("out").iterdir() if path.name != "killed"}
    assert names == {str(number): str(number) for number in range(8)}
    assert Path("out/killed").exists() and done <= 8
    assert [path.name for path in here.iterdir()] == ["out"]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_error_of_the_work_ends_the_stage(here, executor):
    with pytest.raises(Exception, match="this number is wrong"):
        run([WRONG, 1, 2], TaskSettings(executor=executor, workers=2))
    run([1, 2], TaskSettings(executor=executor, workers=2))
    assert {path.name for path in Path("out").iterdir()} == {"1", "2"}


@ray
def test_an_error_of_the_work_stops_the_tasks_that_run_on_ray(here):
    with pytest.raises(ValueError, match="this number is wrong"):
        run([SLOW, WRONG_LATER], TaskSettings(executor="ray", workers=2, resources={"num_cpus": 0}))
    wait_for(Path("out/stopped"))
    assert {path.name for path in Path("out").iterdir()} == {"slow", "stopped"}


def test_one_worker_is_this_process_and_does_what_is_missing(here):
    Path("out/2").write_text("before")
    assert run([0, 1, 2, 4], TaskSettings(tasks=2)) == 3
    assert Path("out/2").read_text() == "before"


def test_a_process_that_is_killed_again_and_again_is_an_error(here):
    def is_done(number):
        Path("out/killed").unlink(missing_ok=True)
        return False

    with pytest.raises(OSError, match="killed 3 times before one item was done"):
        run_tasks(partial(write_numbers, "out"), [FATAL, FATAL], is_done, TaskSettings(workers=2), Path("out"), hidden)


def test_tasks_are_runs_of_nearly_equal_length():
    divided = [list(task) for task in tasks._divided(range(10), TaskSettings(tasks=4))]
    assert [number for task in divided for number in task] == list(range(10)) and {len(task) for task in divided} == {
        2,
        3,
    }
    assert len(tasks._divided(range(3), TaskSettings(workers=2))) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"workers": 0}, "at least 1"), ({"tasks": -1}, "at least 0"), ({"resources": {"mem_gb": 4}}, "slurm and ray")],
)
def test_settings_that_cannot_work(here, wrong, message):
    with pytest.raises(ValueError, match=message):
        run([1], TaskSettings(**wrong))
