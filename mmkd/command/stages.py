"""Run stages as the commands that a user would type, each in its own process, and skip those that have finished.

``WORK/stages.json`` lists finished stages with a hash of their settings, their inputs and the package's version. If the
system can fork, torch and transformers are imported once for all processes. A request to stop is forwarded to the
running stages: they save, and no other stage starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from mmkd.command import cli
from mmkd.command.launch import StopRequest, blocked_signals, unblock_signals
from mmkd.files import atomic_write_text, fingerprint, read_json, remove, write_json

PRELOADED = ["modeling_mmkd", "torchvision", "accelerate"]
VERSION = importlib.metadata.version("mmkd-clip")
INCREMENTAL = ("extract", "eval")  # the output of the other stages is complete or absent


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        recipe: the command, without ``mmkd``.
        name: unique name in the record.
        output: the file or folder that it writes.
        values: its other settings.
        made_from: further inputs of the result: keys of earlier stages, hashes of files.
    """

    recipe: str
    name: str
    output: Path
    values: dict[str, Any]
    made_from: Sequence[str] = ()
    key: str = field(init=False)

    def __post_init__(self) -> None:
        """Hash everything that the result depends on."""
        parts = [VERSION, self.recipe, str(self.output), self.values, list(self.made_from)]
        content = json.dumps(parts, default=str)
        object.__setattr__(self, "key", hashlib.sha256(content.encode()).hexdigest())


class StageRunner:
    """Runs each stage once; a context in which requests to stop are forwarded to the running stages."""

    def __init__(self, work: Path, quiet: bool = False) -> None:
        """Read the record of earlier runs in `work`."""
        self.work, self.quiet = work, quiet
        self.record = work / "stages.json"
        self.known: dict[str, dict[str, Any]] = read_json(self.record) if self.record.is_file() else {}
        self._processes = _processes()
        self._running: set[int] = set()
        self._request = StopRequest(self._forward)

    def __enter__(self) -> StageRunner:
        self._request.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._request.__exit__(kind, error, trace)

    def finished(self, stage: Stage) -> bool:
        """Whether the output of these settings exists."""
        before = self.known.get(stage.name, {})
        whole = before.get("seconds") is not None or stage.recipe not in INCREMENTAL
        return before.get("key") == stage.key and whole and stage.output.exists()

    def run(self, stage: Stage, heading: str) -> None:
        """Write the stage's settings as YAML and run ``mmkd RECIPE --config`` on it, unless it has finished.

        Raises:
            ValueError: the stage failed or was stopped; it has printed its own message.
            SystemExit: with 0, this process was requested to stop; complete outputs stay.
        """
        self._stop_if_requested(heading)
        if self.finished(stage):
            print(f"{heading}: done before, in {_duration(self.known[stage.name]['seconds'])}", flush=True)
            return
        if self.known.get(stage.name, {}).get("key") != stage.key:
            for name in (stage.output.name, f"{stage.output.name}.partial"):
                remove(stage.output.with_name(name))  # of other settings
        self._remember(stage, None)
        config = self.work / "configs" / f"{stage.name.replace(' ', '-').replace('/', '-')}.yaml"
        values = {"output": str(stage.output), **stage.values}
        atomic_write_text(config, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        print(f"{heading}: mmkd {stage.recipe} --config {config}", flush=True)
        started = time.monotonic()
        code = self.start(stage.recipe, ["--config", str(config), *(["--quiet"] if self.quiet else [])])
        if code != 0 or not stage.output.exists():
            self._stop_if_requested(heading)
        if code != 0:
            raise ValueError(f"stage {stage.name} failed (exit code {code}); fix it and run the command again")
        if not stage.output.exists():
            raise ValueError(f"stage {stage.name} was stopped before its end; run the same command again to resume")
        seconds = round(time.monotonic() - started, 1)
        self._remember(stage, seconds)
        print(f"{heading}: {_duration(seconds)}, {stage.output}", flush=True)

    def start(self, recipe: str, arguments: list[str]) -> int | None:
        """Run ``mmkd RECIPE`` in its own process; returns the exit code."""
        process = self._processes.Process(target=_command, args=([recipe, *arguments],))
        with blocked_signals():  # a signal to the process group must not end the fork server
            process.start()
            self._running.add(process.pid)
        if self._request.requested:  # before the process was registered
            process.terminate()
        process.join()
        self._running.discard(process.pid)
        return process.exitcode

    def check(self, recipe: str, name: str, values: dict[str, Any]) -> None:
        """Check the names and types of a stage's settings.

        Raises:
            ValueError: a setting is wrong; the stage has printed the message.
            SystemExit: with 0, this process was requested to stop.
        """
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / f"{name}.yaml"
            config.write_text(yaml.safe_dump(values), encoding="utf-8")
            code = self.start(recipe, ["--config", str(config), "--check"])
        self._stop_if_requested(f"the settings of {name}")
        if code != 0:
            raise ValueError(f"the settings of {name} are wrong; nothing was started")

    def _forward(self, number: int) -> None:
        for process in tuple(self._running):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def _stop_if_requested(self, heading: str) -> None:
        if self._request.requested:
            print(f"stopped by a signal at {heading}; run the same command to resume", file=sys.stderr)
            raise SystemExit(0)

    def _remember(self, stage: Stage, seconds: float | None) -> None:
        self.known[stage.name] = {"key": stage.key, "output": str(stage.output), "seconds": seconds}
        write_json(self.record, self.known)


def _duration(seconds: float | None) -> str:
    """``53 s``, or ``1 min 31 s``; a stage that was killed before its record was written has no time."""
    minutes, rest = divmod(round(seconds or 0), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s" if seconds is not None else "unknown time"


def hash_of_named(values: Any, own: Sequence[Path]) -> str:
    """SHA-256 over the contents of the files and folders that settings name, other than those that stages write.

    Args:
        values: settings, of any nesting; texts may be of the form ``NAME=PATH``.
        own: outputs of stages, and folders that hold them.
    """
    if isinstance(values, (dict, list, tuple)):
        listed = values.values() if isinstance(values, dict) else values
        return hashlib.sha256("".join(hash_of_named(value, own) for value in listed).encode()).hexdigest()
    text = str(values).rpartition("=")[2] if isinstance(values, (str, Path)) else ""
    path, outputs = Path(text).absolute(), [each.absolute() for each in own]

    def is_output(file: Path) -> bool:
        return any(map(file.is_relative_to, outputs))

    if not text or is_output(path):
        return ""
    with contextlib.suppress(OSError):  # such as a sentence, which is too long for a name
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        return fingerprint(file for file in files if not is_output(file))
    return ""


def _command(arguments: list[str]) -> None:
    """Run ``mmkd`` in a process that was started with blocked signals."""
    unblock_signals()
    cli.main(arguments)


def _processes() -> Any:
    """The context that starts processes: a fork server with torch and transformers imported, or ``spawn``."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # first, because its start unblocks signals in some versions of Python
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
