"""Tasks of a stage in processes of this machine, in jobs of Slurm or on a Ray cluster.

The work of a data-parallel stage is a list of items, each of which writes its own files whole or not at all: a shard of
features, the part of one tar, the features of one slide. These files are the only record of what is done. A task is a
run of items that one process works through; when all tasks have ended, the items whose files are still missing, because
a process was killed or a node was lost, become new tasks for the others. Two processes may work on one item, since both
write the same bytes. No server is needed on one machine, and one worker is this process itself.

The executors are the standard library's process pool, submitit for Slurm and Ray's remote functions. datatrove, which
has all three, was tried as well: its local pool never returns when a process of it is killed (docs/log.md).
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from tqdm import tqdm

from mmkd.command.launch import allow_open_files, end_with_parent
from mmkd.command.settings import check_limits, setting
from mmkd.files import read_json, remove, write_json

Item = TypeVar("Item")
T = TypeVar("T")
Progress = Callable[[int], object]
Work = Callable[[Sequence[Item], Progress], object]

TASKS_PER_WORKER = 4
TRIES = 3  # rounds without one finished item, after which a stage gives up
CLUSTER = "slurm"  # of submitit
DAY = 24 * 60  # minutes
POLL_SECONDS = 2

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TaskSettings:
    """Where the tasks of a stage run, the same on every stage that has them."""

    GROUPS: ClassVar[dict[str, str]] = {"computing": "executor tasks workers resources"}

    executor: Literal["local", "slurm", "ray"] = setting(
        "local", "processes of this machine, jobs of Slurm, or a Ray cluster; all machines must see the same folders"
    )
    tasks: int = setting(0, f"number of tasks; 0 takes {TASKS_PER_WORKER} for each worker", least=0)
    workers: int = setting(1, "tasks that run at the same time; with executor local, 1 runs in this process", least=1)
    resources: dict[str, Any] = setting(
        factory=dict,
        help="resources of a task, by name of submitit (slurm_partition, timeout_min, gpus_per_node, cpus_per_task, "
        "mem_gb) or Ray (num_cpus, num_gpus, memory)",
    )

    def check_tasks(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            ValueError: a number is out of range, or resources are given that nobody allots.
        """
        check_limits(self, vars(self))
        if self.resources and self.executor == "local":
            raise ValueError("--resources are allotted by slurm and ray: name one as --executor, or leave them out")

    @property
    def is_here(self) -> bool:
        """Whether the work is done by this process."""
        return self.executor == "local" and self.workers == 1


def run_tasks(
    work: Work[Item],
    items: Iterable[Item],
    is_done: Callable[[Item], bool],
    settings: TaskSettings,
    output: Path,
    bar: Callable[..., tqdm],
    size: Callable[[Item], int] = lambda item: 1,
) -> None:
    """Process the items whose files are missing.

    Args:
        work: writes the files of items; called with some of them and with what counts the finished ones. It is pickled,
            and so are the items: a function of a module, or a `functools.partial` of one.
        items: all of them.
        is_done: whether the files of an item are there and whole; asked once, and again only of items that tasks did.
        settings: where tasks run.
        output: what the stage writes; files of Slurm jobs lie beside it meanwhile.
        bar: makes a progress bar of a total.
        size: the length of an item on the bar.

    Raises:
        ValueError: settings that cannot work.
        OSError: processes were killed again and again; the files that are there stay.
        Exception: what ``work`` raised.
    """
    settings.check_tasks()
    left, tries = [item for item in items if not is_done(item)], 0
    while left:
        with bar(total=sum(map(size, left))) as shown:
            if settings.is_here or (settings.executor == "local" and len(left) == 1):
                work(left, shown.update)
                return
            for task in EXECUTORS[settings.executor](work, _divided(left, settings), settings, output):
                shown.update(sum(map(size, task)))
        before, left = len(left), [item for item in left if not is_done(item)]
        tries = tries + 1 if len(left) == before else 0
        if tries == TRIES:
            raise OSError(
                f"processes were killed {TRIES} times before one item was done, perhaps for lack of memory; run the "
                "same command again to resume, with fewer --workers or more --resources"
            )


_resident: dict[str, Any] = {}


def resident(run: str, make: Callable[[], T]) -> T:
    """What `make` returned when this process called it first in a run: models, opened files."""
    if run not in _resident:
        _resident.clear()
        _resident[run] = make()
    found: T = _resident[run]
    return found


def open_parts(output: Path, made_of: dict[str, Any], overwrite: bool) -> Path:
    """Create the folder of an unfinished output's parts, or check that they belong to this run; returns it.

    Args:
        output: the finished output, beside which the folder lies.
        made_of: JSON values on which the parts depend.
        overwrite: remove parts of another run.

    Raises:
        FileExistsError: the folder holds parts of another run.
    """
    parts = output.with_name(f"{output.name}.parts")
    file, expected = parts / "settings.json", json.loads(json.dumps(made_of))
    if file.is_file() and read_json(file) == expected:
        return parts
    if parts.exists() and any(parts.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"{parts} holds parts of a run with other settings or another state of the source; "
                "give the old settings to resume it, or start again with --overwrite true"
            )
        remove(parts)
    write_json(file, expected)
    return parts


def _divided(items: Sequence[Item], settings: TaskSettings) -> list[Sequence[Item]]:
    """The tasks: runs of items of nearly equal length."""
    count = min(len(items), settings.tasks or TASKS_PER_WORKER * settings.workers)
    edges = [round(k * len(items) / count) for k in range(count + 1)]
    return [items[start:stop] for start, stop in itertools.pairwise(edges)]


def _locally(
    work: Work[Item], tasks: Sequence[Sequence[Item]], settings: TaskSettings, output: Path
) -> Iterator[Sequence[Item]]:
    """Run tasks in processes of this machine; yields those that have ended, until a process is killed."""
    context = multiprocessing.get_context("spawn")
    count = min(settings.workers, len(tasks))
    with ProcessPoolExecutor(count, context, _begin, (context.Value("i"), count, os.getpid())) as pool:
        futures = {pool.submit(_run, work, task, str(Path.cwd())): task for task in tasks}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool:
            logger.warning("a process was killed; its tasks are given to others")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _on_slurm(
    work: Work[Item], tasks: Sequence[Sequence[Item]], settings: TaskSettings, output: Path
) -> Iterator[Sequence[Item]]:
    """Run tasks as an array of Slurm jobs; yields those that have ended."""
    import submitit

    folder = output.with_name(f".{output.name}.jobs")
    executor = submitit.AutoExecutor(folder, cluster=CLUSTER)
    named = {"name": f"mmkd-{output.name}", "slurm_array_parallelism": settings.workers, "timeout_min": DAY}
    executor.update_parameters(**named | settings.resources)
    jobs = executor.map_array(partial(_run, work), tasks, [str(Path.cwd())] * len(tasks))
    left = dict(zip(jobs, tasks, strict=True))
    try:
        while left:
            time.sleep(POLL_SECONDS)
            listed = _listed()
            for job in list(left):
                if job.paths.result_pickle.exists():
                    job.result()  # raises what the work raised
                    yield left.pop(job)
                elif job.job_id not in listed if listed is not None else job.done():
                    logger.warning("job %s was killed; its tasks are given to others", job.job_id)
                    del left[job]
    except BaseException:
        for job in left:
            job.cancel(check=False)
        raise
    remove(folder)


def _listed() -> set[str] | None:
    """The jobs of this user that wait or run, as Slurm lists them even without accounting; None if it cannot."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--me", "--array", "--format", "%F_%K"]
    done = subprocess.run(command, capture_output=True, text=True)
    return set(done.stdout.split()) if done.returncode == 0 else None


def _on_ray(
    work: Work[Item], tasks: Sequence[Sequence[Item]], settings: TaskSettings, output: Path
) -> Iterator[Sequence[Item]]:
    """Run tasks on the Ray cluster of ``RAY_ADDRESS`` or of this machine; yields those that have ended."""
    import ray

    ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
    lost = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)
    run: Any = ray.remote(**{"max_retries": TRIES} | settings.resources)(_run)
    left = list(tasks)[::-1]
    running: dict[Any, Sequence[Item]] = {}
    try:
        while left or running:
            while left and len(running) < settings.workers:
                task = left.pop()
                running[run.remote(work, task, str(Path.cwd()))] = task
            for ended in ray.wait(list(running))[0]:
                task = running.pop(ended)
                try:
                    ray.get(ended)
                except lost:
                    logger.warning("a process was killed %d times; its tasks are given to others", TRIES)
                    continue
                yield task
    except BaseException:
        for other in running:
            ray.cancel(other)
        raise


EXECUTORS: dict[str, Callable[..., Iterator[Any]]] = {"local": _locally, "slurm": _on_slurm, "ray": _on_ray}


def _begin(started: Any, count: int, parent: int) -> None:
    """Begin a worker process: its number among those of this machine, which chooses its GPU; ^C is its parent's."""
    end_with_parent()
    if os.getppid() != parent:  # it was killed while this process started
        os._exit(1)
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    with started.get_lock():
        os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = str(started.value), str(count)
        started.value += 1


def _run(work: Work[Item], task: Sequence[Item], folder: str) -> None:
    """Work through a task in the working directory of the command, since paths may be relative."""
    os.chdir(folder)
    allow_open_files()  # also on nodes of a cluster
    work(task, lambda items: None)
