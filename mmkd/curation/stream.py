"""A whole curation: units worked off by any number of processes and machines, then judged together and written.

Parts are collected in ``OUTPUT.parts`` beside the output. What is there is kept when a run is killed and taken up by
the next; with ``--shard i/n`` machines that share the folder divide the units, and the same command without it writes
the output. The output depends on the source and the settings alone.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmkd.curation.contamination import fingerprints, read_exclusions
from mmkd.curation.datasheet import write_sheet
from mmkd.curation.merge import Verdicts, decide, dropped_rows, reason_counts, write_manifest_table, write_shard
from mmkd.curation.part import PartWriter
from mmkd.curation.rules import StreamRules
from mmkd.curation.samples import Item, RawSample, Refused
from mmkd.curation.sources import Unit, plan_units
from mmkd.data.archives import ArchivedFile, members
from mmkd.data.table import VERSION
from mmkd.files import read_json, refuse_existing, remove, rename_folder, write_json

SETTINGS_FILE, REPORT_FILE = "settings.json", "report.json"

AHEAD = 2

Task = tuple[Any, ...]


def curate_stream(
    source: str,
    output: Path,
    rules: StreamRules,
    *,
    workers: int = 1,
    shard: tuple[int, int] = (1, 1),
    exclude: Sequence[Path] = (),
    quiet: bool = False,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Curate a source into a folder of pairs with images in tars.

    Args:
        source: see `mmkd.curation.sources.plan_units`.
        output: the folder to write; parts lie beside it in ``OUTPUT.parts`` until it is complete.
        rules: what is kept and how.
        workers: processes on this machine.
        shard: (i, n): work off every n-th unit from the i-th on and stop there, unless n is 1.
        exclude: evaluation sets that the output must not contain.
        quiet: no progress bars.
        overwrite: begin anew and replace ``output``.

    Returns:
        The report, None where units of other shards are still to be worked off.

    Raises:
        FileNotFoundError: the source or an evaluation set does not exist.
        FileExistsError: ``output``, or parts made with other settings, are there.
        ValueError: nothing is left of the source.
        OSError: the source cannot be read or the output not written; what is done stays for the next run.
    """
    name = source if "://" in source else Path(source).name  # a path of this machine is nobody else's business
    settings = {"version": VERSION, "source": name, "rules": rules.as_dict(), "exclude": fingerprints(exclude)}
    settings = json.loads(json.dumps(settings))
    if not overwrite and (output / SETTINGS_FILE).is_file() and read_json(output / SETTINGS_FILE) == settings:
        report: dict[str, Any] = read_json(output / REPORT_FILE)
        return report
    refuse_existing(output, overwrite)
    units = plan_units(source)
    parts = output.with_name(f"{output.name}.parts")
    _open_parts(parts, settings, units, overwrite)
    number, total = shard
    own = [unit for unit in units if unit.number % total == number - 1 and not _is_done(parts, unit)]
    tasks = [(unit, parts, rules) for unit in own]
    _work(_work_unit, tasks, workers, partial(tqdm, total=len(tasks), desc="curate", unit="shard", disable=quiet))
    if total > 1 or not all(_is_done(parts, unit) for unit in units):
        return None
    return _finish(parts, len(units), output, name, settings, rules, exclude, workers, quiet)


def _open_parts(parts: Path, settings: dict[str, Any], units: list[Unit], overwrite: bool) -> None:
    """Make the folder of parts, or see that the one there belongs to this run."""
    wanted = settings | {"units": [asdict(unit) for unit in units]}
    file = parts / SETTINGS_FILE
    if file.is_file() and read_json(file) == wanted:
        return
    if parts.exists() and any(parts.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"{parts} holds parts of a run with other settings or another state of the source; "
                "give the old settings to go on with it, or begin anew with --overwrite true"
            )
        remove(parts)
    parts.mkdir(parents=True, exist_ok=True)
    write_json(file, wanted)


def _is_done(parts: Path, unit: Unit) -> bool:
    return (parts / f"{unit.number:06d}.json").is_file()


def _work_unit(unit: Unit, parts: Path, rules: StreamRules) -> None:
    """Write one unit's part; runs in worker processes."""
    PartWriter(parts, unit.number, rules).write(unit.read(parts / "scratch"))


def _work(function: Any, tasks: Sequence[Task], workers: int, bar: Any) -> list[Any]:
    """``function`` of every task, in their order, on ``workers`` processes.

    Raises:
        OSError: a worker process was killed.
    """
    if workers <= 1 or len(tasks) <= 1:
        with bar() as progress:
            return [_counted(function(*task), progress) for task in tasks]
    results: list[Any] = [None] * len(tasks)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), context, _quiet_on_interrupt) as pool, bar() as progress:
        waiting: dict[Any, int] = {}
        for number, task in enumerate(tasks):
            waiting[pool.submit(function, *task)] = number
            if len(waiting) >= AHEAD * workers:
                _collect(waiting, results, progress)
        while waiting:
            _collect(waiting, results, progress)
    return results


def _collect(waiting: dict[Any, int], results: list[Any], progress: tqdm) -> None:
    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in done:
        try:
            results[waiting.pop(future)] = _counted(future.result(), progress)
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process was killed, perhaps for want of memory; finished shards stay, run the same command "
                "again, with fewer --workers if it happens again"
            ) from error


def _counted(result: Any, progress: tqdm) -> Any:
    progress.update()
    return result


def _quiet_on_interrupt() -> None:
    """^C reaches every process of a terminal; the first one says what there is to say."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def _finish(
    parts: Path,
    count: int,
    output: Path,
    source: str,
    settings: dict[str, Any],
    rules: StreamRules,
    exclude: Sequence[Path],
    workers: int,
    quiet: bool,
) -> dict[str, Any]:
    """Judge the parts together and write the output."""
    joined = PartWriter(parts, count, rules).write(joined_samples(parts, count))
    files = [parts / f"{number:06d}.arrow" for number in range(count + 1)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _quiet_on_interrupt) as pool:
        exclusions = read_exclusions(exclude, pool if workers > 1 else None)
    verdicts = decide(files, rules, exclusions)
    folder = parts / f"output-{verdicts.fingerprint()[:16]}"
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    tasks = [(file, folder / "shards" / f"{n:06d}.tar", verdicts.kept(n)) for n, file in enumerate(files)]
    filled = [task for task in tasks if task[2].any()]
    if not filled:
        reasons = _account(parts, count, joined, verdicts)["dropped"]
        raise ValueError(f"nothing is left of {source}; dropped: {reasons}. Other rules need --overwrite true")
    bar = partial(tqdm, total=len(filled), desc="write", unit="shard", disable=quiet)
    written = dict(zip((task[0] for task in filled), _work(write_shard, filled, workers, bar), strict=True))
    offsets = [written.get(file, np.zeros(0, np.int64)) for file in files]
    write_manifest_table(files, verdicts, offsets, folder, source)
    account = _account(parts, count, joined, verdicts) | {"test_sets": exclusions.report}
    _write_lists(folder, files, verdicts, rules, _listed(parts, count))
    report = write_sheet(folder, output.name, source, account, settings)
    write_json(folder / SETTINGS_FILE, settings)
    rename_folder(folder, output)
    shutil.rmtree(parts, ignore_errors=True)
    return report


def _account(parts: Path, count: int, joined: dict[str, Any], verdicts: Verdicts) -> dict[str, Any]:
    """Counts of all parts together: read + added by splitting = kept + dropped."""
    own = [read_json(parts / f"{number:06d}.json") for number in range(count)]
    every = [*own, joined]
    rows = sum(part["kept"] for part in every)
    return {
        "read": sum(part["read"] for part in every),
        "added_by_splitting": rows - sum(part["samples"] for part in every),
        "kept": int((verdicts.reasons == 0).sum()),
        "dropped": reason_counts(*(part["dropped"] for part in every), verdicts.counts()),
        "mended": reason_counts(*(part["mended"] for part in every)),
        "joined_across_shards": joined["samples"],
    }


def _listed(parts: Path, count: int) -> Iterator[dict[str, str]]:
    for number in range(count + 1):
        for place, reason in read_json(parts / f"{number:06d}.json")["listed"]:
            yield {"row": place, "reason": reason}


def _write_lists(
    folder: Path, files: Sequence[Path], verdicts: Verdicts, rules: StreamRules, listed: Iterator[dict[str, str]]
) -> None:
    """``contamination.jsonl``, and every dropped sample in ``dropped.jsonl`` if that is asked for."""
    with (folder / "contamination.jsonl").open("w", encoding="utf-8") as file:
        for row in dropped_rows(files, verdicts):
            if "test_set" in row:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if rules.list_dropped:
        with (folder / "dropped.jsonl").open("w", encoding="utf-8") as file:
            for line in listed:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            for row in dropped_rows(files, verdicts):
                file.write(json.dumps({"row": row["key"], "reason": row["reason"]}, ensure_ascii=False) + "\n")


# Section: Samples cut in two by the end of a shard, made whole from the fragments that the parts kept.


KINDS = ("image", "caption", "facts")


def joined_samples(parts: Path, count: int) -> Iterator[Item]:
    """What the fragments of all parts make together: whole samples, and what is missing of the others.

    Args:
        parts: the folder of parts.
        count: number of parts.
    """
    pieces: dict[str, list[tuple[int, int, list[str], str]]] = defaultdict(list)
    for part in range(count):
        for number, (key, place, kinds) in enumerate(read_json(parts / f"{part:06d}.json")["fragments"]):
            pieces[key].append((part, number, kinds, place))
    files = _FragmentFiles(parts)
    for key, found in pieces.items():
        where: dict[str, tuple[int, int]] = {}
        for part, number, kinds, _ in found:
            for kind in kinds:
                where.setdefault(kind, (part, number))
        missing = [kind for kind in KINDS if kind not in where]
        place = found[0][3]
        yield Refused(place, f"no_{missing[0]}") if missing else files.sample(key, place, where)


class _FragmentFiles:
    """The members that parts keep of their fragments, by part, number and kind."""

    def __init__(self, parts: Path) -> None:
        self.parts = parts
        self.known: dict[int, dict[tuple[int, str], tuple[str, ArchivedFile]]] = {}

    def sample(self, key: str, place: str, where: dict[str, tuple[int, int]]) -> RawSample:
        found = {kind: self._in_part(part)[number, kind] for kind, (part, number) in where.items()}
        caption, facts = found["caption"][1].read_bytes(), found["facts"][1].read_bytes()
        suffix, image = found["image"]
        return RawSample(key, place, caption, facts, image.read_bytes, suffix)

    def _in_part(self, part: int) -> dict[tuple[int, str], tuple[str, ArchivedFile]]:
        if part not in self.known:
            archive = self.parts / f"{part:06d}.fragments.tar"
            self.known[part] = {}
            for member in members(archive):
                number, kind, suffix = member.name.split(".")
                file = ArchivedFile(archive, member.offset, member.size)
                self.known[part][int(number), kind] = suffix, file
        return self.known[part]
