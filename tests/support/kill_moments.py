"""A training killed at chosen moments and started again: `python kill_moments.py --moments 20 --seed 0`.

A moment is a line of the training about to run: in a step, in a checkpoint, or in writing and renaming files. The
process sends itself SIGKILL there, so that the same moments can be visited again. Each run is then finished by the same
call, and compared bit by bit with one that nothing disturbed.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import tiny_run
import torch

import mmkd

PLACES = {
    "step": ("loop.py", "gradient_cache.py", "objectives.py", "optimizer.py", "log.py"),
    "checkpoint": ("checkpoints.py",),
    "files": ("../files.py",),
}
ROOM = Path(mmkd.__file__).parent / "training"
PLACE_OF = {str((ROOM / file).resolve()): place for place, files in PLACES.items() for file in files}
SETTINGS = {"epochs": 2, "checkpoint_every": 3, "micro_batch_size": 10, "dropout": 0.1, "ema_decay": 0.9}
TIMES = ("samples_per_second", "tokens_per_second", "data_time", "memory_gb", "mfu")


def run(output):
    torch.set_num_threads(1)
    tiny_run.run(output, **SETTINGS)


def moments_of_a_run(output):
    """For each place, the numbers of the lines that an undisturbed run executes there."""
    found = {place: [] for place in PLACES}
    count = 0

    def line(frame, event, _argument):
        nonlocal count
        if event == "line":
            count += 1
            found[PLACE_OF[frame.f_code.co_filename]].append(count)
        return line

    sys.settrace(lambda frame, event, argument: line if frame.f_code.co_filename in PLACE_OF else None)
    try:
        run(output)
    finally:
        sys.settrace(None)
    return found


def killed_at(output, moment):
    """Run in a child that kills itself before line number `moment`; returns what it died of and where."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: a fork of a process with threads
        child = os.fork()
    if child == 0:
        os.close(read)
        count = 0

        def line(frame, event, _argument):
            nonlocal count
            if event == "line":
                count += 1
                if count == moment:
                    os.write(write, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}".encode())
                    os.kill(os.getpid(), signal.SIGKILL)
            return line

        sys.settrace(lambda frame, event, argument: line if frame.f_code.co_filename in PLACE_OF else None)
        run(output)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        where = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), where


def result(output):
    """The weights as bytes, and the log without what the clock says."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    return (output / "model.safetensors").read_bytes(), kept


def survives(output, moment, expected):
    """Kill at a moment, start again, compare; returns where it was and what the checkpoints were then."""
    code, where = killed_at(output, moment)
    assert code == -signal.SIGKILL, f"moment {moment} was never reached"
    partial = output.with_name(f"{output.name}.partial") / "checkpoints"
    left = sorted(path.name for path in partial.iterdir()) if partial.is_dir() else []
    if not output.exists():  # else it was killed after the last rename, and all is there
        run(output)
    weights, log = result(output)
    assert weights == expected[0], f"{where}: other weights"
    assert log == expected[1], f"{where}: another log"
    assert [line["step"] for line in log] == list(range(1, len(log) + 1))
    return where, left


def chosen(found, count, seed):
    """`count` random moments, shared out among the places in turn."""
    generator = random.Random(seed)
    places = list(found)
    return [generator.choice(found[places[k % len(places)]]) for k in range(count)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = moments_of_a_run(Path(folder) / "whole")
        print({place: len(lines) for place, lines in found.items()}, "lines of the training in an undisturbed run")
        expected = result(Path(folder) / "whole")
        for number, moment in enumerate(chosen(found, options.moments, options.seed)):
            where, left = survives(Path(folder) / f"run-{number}", moment, expected)
            print(f"{number + 1:3}  line {moment:6}  {where:24}  {' '.join(left) or '-':44}  identical", flush=True)
