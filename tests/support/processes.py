"""Programs in processes of their own, as a user starts them.

An interpreter needs seconds of computing to import torch, torchvision and transformers. `mmkd`, `forked` and
`in_group` therefore fork their processes from a server that imports them once (:mod:`multiprocessing`'s forkserver);
`torchrun` and `in_another_process` start interpreters.
"""

import atexit
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
IMPORTED = ["torch", "torchvision", "transformers", "accelerate", "peft", "pyarrow.parquet", "modeling_mmkd"]
IMPORTED += ["mmkd.training.loop", "mmkd.distillation.objective", "mmkd.encoders.zoo", "mmkd.publishing.publication"]
SERVER.set_forkserver_preload(IMPORTED)
WITHOUT_GPU = {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
HIDE = """
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)
HIDDEN = set(sys.argv[1].split(","))
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


def mmkd(*arguments, cwd=None, env=None, timeout=240):
    """``mmkd ARGUMENTS``: what it printed, its errors and its exit code."""
    return forked("-m", "mmkd.command.cli", *arguments, cwd=cwd, env=env, timeout=timeout)


def forked(*arguments, cwd=None, env=None, timeout=240):
    """``python ARGUMENTS`` of a script or of ``-m MODULE``, in a process that has imported the libraries."""
    (done,) = _run([arguments], cwd, [os.environ if env is None else env], timeout)
    return done


def in_group(*arguments, processes=2):
    """``torchrun ARGUMENTS`` on one machine without a GPU (gloo); returns the errors of all processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {**WITHOUT_GPU, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    group |= {"LOCAL_WORLD_SIZE": str(processes)}
    own = [os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    finished = _run([arguments] * processes, None, own, 120)
    errors = "".join(done.stderr for done in finished)
    assert not any(done.returncode for done in finished), errors[-3000:]
    return errors


def torchrun(*arguments, processes=2):
    """``torchrun ARGUMENTS`` on one machine without a GPU (gloo); returns its errors."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        env=os.environ | WITHOUT_GPU,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the processes that torchrun started, too
        raise
    assert process.returncode == 0, errors[-3000:]
    return errors


def in_another_process(hidden, code, *arguments, **environment):
    """Run ``code`` in an interpreter that lacks the packages ``hidden`` (separated by commas); returns its output."""
    command = [sys.executable, "-c", HIDE + code, hidden, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def stop_while_training(process, log, patience):
    """Send SIGTERM to a training after two lines of ``log``; returns what the process printed and its errors.

    Args:
        process: with pipes of text; killed if anything fails.
        log: file that the training fills.
        patience: seconds until the second line.
    """
    try:
        began = time.monotonic()
        while not (log.is_file() and len(log.read_text().splitlines()) >= 2):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() - began < patience
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        return process.communicate(timeout=100)
    finally:
        process.kill()


def _run(commands, cwd, environments, timeout):
    """Run commands side by side; the first that fails ends the others."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder) / f"{number}.out", Path(folder) / f"{number}.err") for number in range(len(commands))]
        children = [
            SERVER.Process(target=_child, args=(tuple(map(str, command)), cwd or Path.cwd(), dict(given), *paths))
            for command, given, paths in zip(commands, environments, outputs, strict=True)
        ]
        for child in children:
            child.start()
        left, end = {child.sentinel: child for child in children}, time.monotonic() + timeout
        while left and not any(child.exitcode for child in children):
            ready = wait(left, max(0.0, end - time.monotonic()))
            if not ready:
                break
            for sentinel in ready:
                left.pop(sentinel).join()
        timed_out = bool(left) and not any(child.exitcode for child in children)
        for child in left.values():
            child.kill()
            child.join()
        printed = [(out.read_text(), err.read_text()) for out, err in outputs]
    if timed_out:
        raise subprocess.TimeoutExpired(commands[0], timeout, *printed[0])
    return [
        subprocess.CompletedProcess(command, child.exitcode, *texts)
        for command, child, texts in zip(commands, children, printed, strict=True)
    ]


def _child(arguments, cwd, environment, out, err):
    """Become the program: environment, working directory, output, arguments; exits as an interpreter would."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if "HF_ENDPOINT" in environment:  # which the Hub's client reads when it is imported
        importlib.reload(importlib.import_module("huggingface_hub.constants"))
    code = 0
    try:
        if arguments[0] == "-m":
            sys.argv = ["-m", *arguments[2:]]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
