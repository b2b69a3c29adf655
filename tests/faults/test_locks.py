"""One run at a time writes an output; a lock ends with the process that holds it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmkd.command.settings import run
from mmkd.files import OutputInUseError, discard, exclusive
from mmkd.train import curate

HOLDER = """
import sys, time
from pathlib import Path
from mmkd.files import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(output):
    """A process that holds an output."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(output)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_output_is_held_until_its_run_ends_however_it_ends(tmp_path, number):
    output = tmp_path / "pairs"
    with holder(output) as process:
        with (
            pytest.raises(OutputInUseError, match=rf"pairs is being written by .*process {process.pid} on "),
            exclusive(output),
        ):
            pass
        with exclusive(tmp_path / "other"):
            pass
        process.send_signal(number)
        process.wait()
    with exclusive(output):
        pass


def test_what_a_killed_run_left_beside_the_output_is_removed(tmp_path):
    output = tmp_path / "pairs"
    (tmp_path / ".pairs.0123abcd.tmp").mkdir()
    (tmp_path / ".pairs.0123abcd.tmp" / "half").write_text("x")
    (tmp_path / ".pairs.89abcdef.tmp").write_text("x")
    kept = (".pairs2.0123abcd.tmp", ".pairs.notes.tmp", "pairs.0123abcd.tmp")
    for name in kept:
        (tmp_path / name).write_text("x")
    (output / "tasks").mkdir(parents=True)
    (output / "tasks" / ".task.json.0123abcd.tmp").write_text("x")
    (output / "tasks" / ".task.json").write_text("x")
    for name in (".other.0123abcd.tmp", ".other.lock"):  # of a run that holds its own output
        (output / name).write_text("x")
    with exclusive(output):
        assert {path.name for path in tmp_path.iterdir()} == {*kept, ".pairs.lock", "pairs"}
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "pairs"}
    assert [path.name for path in (output / "tasks").iterdir()] == [".task.json"]
    assert {path.name for path in output.iterdir()} == {"tasks", ".other.0123abcd.tmp", ".other.lock"}


def test_the_working_directory_can_be_an_output(tmp_path, monkeypatch):
    (tmp_path / "pairs").mkdir()
    monkeypatch.chdir(tmp_path / "pairs")
    with exclusive(Path()):
        assert (tmp_path / ".pairs.lock").is_file()


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path):
    with exclusive(tmp_path / "a" / "b" / "pairs"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with exclusive(tmp_path / "a" / "b" / "pairs"):
        (tmp_path / "a" / "kept").write_text("x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_a_folder_that_is_discarded_goes_at_once(tmp_path, monkeypatch):
    (tmp_path / "pairs.parts").mkdir()
    (tmp_path / "pairs.parts" / "half").write_text("x")
    monkeypatch.setattr("mmkd.files.remove", lambda path: None)  # as if the process were killed here
    discard(tmp_path / "pairs.parts", tmp_path / "pairs")
    assert not (tmp_path / "pairs.parts").exists() and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    with exclusive(tmp_path / "pairs"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_second_curation_of_the_same_output_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "source").mkdir()
    output = tmp_path / "pairs"
    arguments = ["--source", str(tmp_path / "source"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["mmkd curate", *arguments])
    with exclusive(output), pytest.raises(SystemExit, match="1"):
        run(curate.CurateSettings, curate.main)
    errors = capsys.readouterr().err
    assert f"process {os.getpid()}" in errors and "choose another output" in errors
    assert not output.exists()


PARENT = """
import subprocess, sys
from mmkd.command.launch import launch
launch([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"], {}, "none")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the signal of a parent's death is Linux's")
def test_the_processes_of_a_killed_command_die_with_it():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as command:
        child = int(command.stdout.readline())
        command.kill()
        command.wait()
        for _ in range(100):
            if not is_running(child):
                break
            time.sleep(0.1)
        else:
            os.kill(child, signal.SIGKILL)
            pytest.fail("the launcher outlived the command")


def is_running(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="ascii")
        return state.rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
