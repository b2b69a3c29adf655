import contextlib
import os
import re
import resource
import shlex
import subprocess
import sys

import pytest

from mmkd.command import cli
from mmkd.command.settings import BROKEN_PIPE, ignore_broken_pipe


def test_launcher_options_are_told_apart():
    arguments = ["--config", "a.yaml", "--num_processes", "2", "--epochs", "3", "--main-process-port=29511"]
    launcher, own = cli.split_launcher_options(arguments)
    assert launcher == {"num_processes": "2", "main_process_port": "29511"}
    assert own == ["--config", "a.yaml", "--epochs", "3"]


def test_several_processes_without_gpu_start_through_torchrun_of_this_interpreter(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("PATH", "")
    options = {"num_processes": "2"}
    command, environment = cli.launch_command("mmkd.train.distill", options, ["--epochs", "3"])
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert command[3:] == ["--standalone", "--nproc_per_node=2", "-m", "mmkd.train.distill", "--epochs", "3"]
    assert environment == {"ACCELERATE_USE_CPU": "1"}


def test_several_machines_without_gpu_meet_at_the_first(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = {"num_machines": "2", "machine_rank": "1", "main_process_ip": "10.0.0.1", "main_process_port": "29600"}
    command, _ = cli.launch_command("mmkd.train.distill", options, [])
    assert command[3:-2] == ["--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29600"]


def test_gpus_start_through_accelerate(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    command, _ = cli.launch_command("mmkd.train.distill", {"num_processes": "8"}, [])
    assert command[1:] == ["-m", "accelerate.commands.launch", "--num_processes=8", "-m", "mmkd.train.distill"]


def test_unknown_command_answers_with_the_nearest(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["distil"])
    assert "did you mean 'distill'" in capsys.readouterr().err


def test_recipes_of_one_process_refuse_launcher_options(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["curate", "--num_processes", "2"])
    assert "an option of pretrain, align, distill, finetune; curate may have --workers" in capsys.readouterr().err


def test_help_lists_the_commands(capsys):
    cli.main([])
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.RECIPES)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # the suite has imported some already
@pytest.mark.parametrize("name", sorted(cli.RECIPES))
def test_every_command_tells_its_settings(name, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mmkd"])
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    assert capsys.readouterr().out.lower().startswith(f"usage: mmkd {name} ")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", sorted(cli.RECIPES))
def test_every_command_shows_an_example_that_it_accepts(name, capsys, monkeypatch):
    """Names and types of the example's options are checked by the command itself, required ones are all there."""
    monkeypatch.setattr("sys.argv", ["mmkd"])

    def printed(*arguments):
        with contextlib.suppress(SystemExit):
            cli.main(list(arguments))
        shown = capsys.readouterr()
        assert not shown.err
        return shown.out

    first = printed(name, "--help")
    actions = re.findall(r"^  (\w+) ", first, re.M) if " ACTION " in first else []
    for command in [[name, action] for action in actions] or [[name]]:
        shown = printed(*command, "--help")
        arguments = shlex.split(re.search(r"^Example: mmkd (.+)$", shown, re.M)[1])
        assert arguments[: len(command)] == command
        printed(*arguments, "--check")
        required = re.search(r"^required:\n((?:  .+\n)*)", shown, re.M)
        for option in re.findall(r"^  (.*?--\w+)", required[1] if required else "", re.M):
            is_positional = ", " in option and not arguments[len(command)].startswith("--")
            assert is_positional or option in arguments, option


def test_the_command_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "mmkd.command.cli"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "distill" in done.stdout


def test_a_missing_library_names_the_extra_that_brings_it(monkeypatch, capsys):
    def missing(*_arguments, **_options):
        raise ModuleNotFoundError("No module named 'accelerate.utils'", name="accelerate.utils")

    monkeypatch.setattr("sys.argv", ["mmkd"])
    monkeypatch.setattr(cli.runpy, "run_module", missing)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["curate"])
    assert 'pip install -e ".[train]"' in capsys.readouterr().err


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["datasets", "ls", "--help"], ["datasets", "ls"]])
def test_output_that_nobody_reads_ends_the_command_without_a_word(arguments, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` has left
    command = [sys.executable, "-m", "mmkd.command.cli", *arguments]
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (BROKEN_PIPE, "")


def test_another_broken_pipe_stays_an_error():
    with pytest.raises(BrokenPipeError), ignore_broken_pipe():
        raise BrokenPipeError("of a process that died")


HELP = """
import contextlib, io, sys
from mmkd.command import cli
for name in cli.RECIPES:
    for arguments in ([name, "--help"], [name, "--no_such_setting", "1"]):
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as printed:
            cli.main(arguments)
        heavy = {"torch", "transformers", "pyarrow", "scipy", "matplotlib"} & set(sys.modules)
        assert not heavy, f"mmkd {' '.join(arguments)} imports {heavy}"
"""


def test_help_and_mistakes_are_answered_without_heavy_imports():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(cli.RECIPES)


@pytest.mark.parametrize("arguments", [["--version"], ["distil"], ["curate", "--help"], ["curate", "--sorce", "x"]])
def test_an_answer_takes_less_than_a_second_of_computing(arguments):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "mmkd.command.cli", *arguments], capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
