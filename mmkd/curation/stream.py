"""A whole curation: process units on any number of processes and machines, then decide over all parts and write.

Parts are collected in ``OUTPUT.parts`` beside the output. They stay when a run is killed, and the next run continues
with them. The output depends on the source and the rules alone. Samples cut in two by the end of a shard are made whole
from the fragments that the parts keep. An archive of which nothing is dropped is linked, not copied; of another the
kept ranges are copied as they are. Memory holds the rows of one part at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from mmkd.command.tasks import Progress, TaskSettings, open_parts, run_tasks
from mmkd.curation.contamination import checksums, read_exclusions
from mmkd.curation.datasheet import write_sheet
from mmkd.curation.decisions import REASONS, Decisions, decide
from mmkd.curation.part import PartWriter, dropped_row, part_checksum
from mmkd.curation.readers import MEMBERS, Members, tar_sample
from mmkd.curation.reports import ReportSource, write_reports
from mmkd.curation.rules import Rules
from mmkd.curation.samples import Item, Refused
from mmkd.curation.sources import ATTRIBUTION_FILE, DICOM, PACKAGED, Unit, attribution, checksum_of, plan_units
from mmkd.data.archives import ArchivedFile, ArchiveWriter, members
from mmkd.data.table import SPLITS, TABLE_FILE, VERSION, map_table, table_schema, write_table
from mmkd.files import (
    atomic_file,
    atomic_write_lines,
    atomic_write_text,
    discard,
    read_json,
    refuse_existing,
    remove,
    rename_folder,
    write_json,
)

if TYPE_CHECKING:
    import pyarrow as pa

SETTINGS_FILE, REPORT_FILE = "settings.json", "report.json"
MORE_COLUMNS = ("key", "article", "study", "panel_type", "labels")  # of the manifest


def curate(
    source: str,
    output: Path,
    rules: Rules,
    *,
    table: Path | None = None,
    salt: Path | None = None,
    columns: Mapping[str, str] | None = None,
    reports: ReportSource | None = None,
    tasks: TaskSettings | None = None,
    exclude: Sequence[Path] = (),
    quiet: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Curate a source into a folder of pairs.

    Args:
        source: see `mmkd.curation.sources.plan_units`.
        output: the folder to write; parts lie beside it in ``OUTPUT.parts`` until it is complete.
        rules: what is kept and how.
        table: a list of the images in the folder ``source``, where it does not lie there as ``labels.csv``.
        salt: file whose content is the key of hashes of patients, see `mmkd.curation.dicom`.
        columns: field -> column of a list of images that names it otherwise.
        reports: of DICOM files.
        tasks: where units are processed; None for this process.
        exclude: evaluation sets that the output must not contain.
        quiet: no progress bars.
        overwrite: start again and replace ``output``.

    Returns:
        The report.

    Raises:
        FileNotFoundError: the source or an evaluation set does not exist.
        FileExistsError: ``output``, or parts made with other settings, exist.
        ValueError: nothing is left of the source, or a rule cannot apply to it.
        OSError: the source cannot be read or the output not written; what is done stays for the next run.
    """
    tasks = tasks or TaskSettings()
    tasks.check_tasks()
    name = source if "://" in source else Path(source).name  # paths of this machine stay private
    units = plan_units(source, table, salt, columns)
    rows = reports.read(units[0].key()) if reports is not None else {}
    _refuse_rules_without_effect(units, rules)
    settings = {"version": VERSION, "source": name, "units": checksum_of(units), "rules": asdict(rules)}
    settings |= {"reports": reports.describe(rows)} if reports is not None else {}
    settings = json.loads(json.dumps(settings | {"exclude": checksums(exclude)}))
    if not overwrite and (output / SETTINGS_FILE).is_file() and read_json(output / SETTINGS_FILE) == settings:
        report: dict[str, Any] = read_json(output / REPORT_FILE)
        return report
    refuse_existing(output, overwrite)
    parts = open_parts(output, settings | {"units": [asdict(unit) for unit in units]}, overwrite)
    if reports is not None:
        write_reports(parts, reports, rows)
    bar = partial(tqdm, desc="curate", unit="shard", disable=quiet)
    work = partial(_curate_units, parts, rules)
    run_tasks(work, units, partial(_is_done, parts), tasks, output, bar)
    return _finish(parts, units, output, source, settings, rules, exclude, tasks, quiet)


def _refuse_rules_without_effect(units: list[Unit], rules: Rules) -> None:
    """Refuse rules for fields that no sample of a source has.

    Raises:
        ValueError: with the option to leave out.
    """
    kinds = {unit.kind for unit in units}
    if rules.mentions and not kinds & {"tar", "hub_tar"}:
        raise ValueError("--mentions: articles (image_context) come with WebDataset tars only; leave it out here")
    if rules.panel_types and kinds <= {"list", "images", DICOM, PACKAGED}:
        raise ValueError("--panel_types: lists and folders of images state no type of panel; leave it out here")


def _is_done(parts: Path, unit: Unit) -> bool:
    """Whether the part of a unit is finished and its checksum matches; otherwise it is written again."""
    base = parts / f"{unit.number:06d}"
    try:
        counts = read_json(base.with_suffix(".json"))
        return bool(counts.pop("sha256") == part_checksum(base, counts))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _curate_units(parts: Path, rules: Rules, units: Sequence[Unit], progress: Progress) -> None:
    """Write the parts of some units; a task of `mmkd.command.tasks`."""
    for unit in units:
        PartWriter(parts, unit.number, rules, unit.key()).write(unit.read(parts / "scratch"))
        progress(1)


def _write_shards(shards: Sequence[tuple[Path, Path, np.ndarray]], progress: Progress) -> None:
    """Write some archives of the output; a task of `mmkd.command.tasks`."""
    for part, tar, kept in shards:
        write_shard(part, tar, kept)
        progress(1)


def _finish(
    parts: Path,
    units: Sequence[Unit],
    output: Path,
    source: str,
    settings: dict[str, Any],
    rules: Rules,
    exclude: Sequence[Path],
    tasks: TaskSettings,
    quiet: bool,
) -> dict[str, Any]:
    """Decide over all parts and write the output."""
    count, key = len(units), units[0].key()
    joined = PartWriter(parts, count, rules, key).write(joined_samples(parts, count))
    files = [parts / f"{number:06d}.arrow" for number in range(count + 1)]
    with ThreadPoolExecutor() as readers:
        exclusions = read_exclusions(exclude, readers)
    decisions = decide(files, rules, exclusions)
    account = _account(parts, count, joined, decisions) | {"test_sets": exclusions.report}
    if not account["kept"]:
        first = next(_listed(files), {})
        discard(parts, output)
        raise ValueError(
            f"nothing is left of the {account['read']} samples of {settings['source']}; dropped: {account['dropped']}"
            + (f", the first {first['row']}" if "row" in first else "")
            + ("; captions come from labels.csv, .jsonl, Parquet or tars" if "no_caption" in account["dropped"] else "")
        )
    folder = parts / f"output-{decisions.fingerprint()[:16]}"
    remove(folder)  # of a killed run, whose archives would be reused unchecked
    (folder / "shards").mkdir(parents=True)
    shards = [(file, folder / "shards" / f"{n:06d}.tar", decisions.kept(n)) for n, file in enumerate(files)]
    bar = partial(tqdm, desc="write", unit="shard", disable=quiet)
    run_tasks(_write_shards, shards, lambda shard: not shard[2].any() or shard[1].exists(), tasks, output, bar)
    _write_manifest(files, decisions, folder, settings["source"])
    dropped = chain(_listed(files), dropped_rows(files, decisions))
    atomic_write_lines(folder / "dropped.jsonl", (json.dumps(row, ensure_ascii=False) + "\n" for row in dropped))
    origin = attribution(source)
    if origin is not None:
        atomic_write_text(folder / ATTRIBUTION_FILE, origin)
    report = write_sheet(folder, output.name, settings["source"], account, settings)
    write_json(folder / SETTINGS_FILE, settings)
    rename_folder(folder, output)
    discard(parts, output)
    return report


def _listed(files: Sequence[Path]) -> Iterator[dict[str, str]]:
    """What was dropped of each part, before the parts were compared."""
    return chain.from_iterable(read_json(file.with_suffix(".json"))["listed"] for file in files)


def _account(parts: Path, count: int, joined: dict[str, Any], decisions: Decisions) -> dict[str, Any]:
    """Counts over all parts: read + added by splitting = kept + dropped."""
    own = [read_json(parts / f"{number:06d}.json") for number in range(count)]
    every = [*own, joined]
    rows = sum(part["kept"] for part in every)
    return {
        "read": sum(part["read"] for part in every),
        "added_by_splitting": rows - sum(part["samples"] for part in every),
        "kept": int((decisions.reasons == 0).sum()),
        "dropped": reason_counts(*(part["dropped"] for part in every), decisions.counts()),
        "fixed": reason_counts(*(part["fixed"] for part in every)),
        "joined_across_shards": joined["samples"],
        "splits": decisions.split_counts,
        "unknown_splits": reason_counts(*(part["unknown_splits"] for part in every)),
        "merged_spellings": decisions.spellings,
    }


def joined_samples(parts: Path, count: int) -> Iterator[Item]:
    """Samples that are complete with the fragments of all parts, and what the others lack.

    Args:
        parts: the folder of parts.
        count: number of parts.
    """
    found: dict[str, tuple[str, Members]] = {}
    for part in range(count):
        fragments = read_json(parts / f"{part:06d}.json")["fragments"]
        archive = parts / f"{part:06d}.fragments.tar"
        for member in members(archive) if fragments else ():
            number, kind, suffix = member.name.split(".", 2)
            key, place, _ = fragments[int(number)]
            known = found.setdefault(key, (place, {}))[1]
            known.setdefault(kind, (suffix, ArchivedFile(archive, member.offset, member.size)))
    for key, (place, own) in found.items():
        missing = next((kind for kind in MEMBERS if kind not in own), None)
        yield Refused(place, f"no_{missing}") if missing else tar_sample(key, place, own)


def write_shard(part: Path, tar: Path, kept: np.ndarray) -> None:
    """Write the kept pairs of a part's archive to ``tar``, which appears whole.

    Args:
        part: the part's Arrow file; its archive lies beside it.
        tar: where to write.
        kept: (m,) bool.
    """
    table, source = map_table(part), part.with_suffix(".tar")
    if kept.all():
        with contextlib.suppress(OSError):  # not every file system has links
            os.link(source, tar)
            return
    with source.open("rb") as old, atomic_file(tar) as new:
        writer = ArchiveWriter(new)
        for start, end in _runs(table["start"].to_numpy()[kept], table["end"].to_numpy()[kept]):
            writer.copy(old, start, end)
        writer.finish()


def _write_manifest(parts: Sequence[Path], decisions: Decisions, folder: Path, source: str) -> None:
    """Write ``manifest.arrow``: a batch of rows for each part, images named by shard, offset and size."""
    import pyarrow as pa

    more = {name: pa.list_(pa.string()) if name == "labels" else pa.string() for name in MORE_COLUMNS}
    schema = table_schema(more, ".")

    def tables() -> Iterator[pa.Table]:
        for number, part in enumerate(parts):
            chosen = decisions.kept(number)
            kept = map_table(part).filter(pa.array(chosen))
            archive = Path(f"shards/{number:06d}.tar")
            starts, ends, offsets = (kept[name].to_numpy() for name in ("start", "end", "offset"))
            new_starts = np.cumsum(ends - starts) - (ends - starts)
            places = zip((offsets - starts + new_starts).tolist(), kept["size"].to_pylist(), strict=True)
            splits = decisions.splits[decisions.bounds[number] : decisions.bounds[number + 1]][chosen]
            columns = {name: kept[name] for name in schema.names if name in kept.column_names}
            columns["image"] = pa.array([str(ArchivedFile(archive, o, s)) for o, s in places], pa.string())
            columns["split"] = pa.array([SPLITS[split] for split in splits.tolist()], pa.string())
            columns["source"] = pa.array([value or source for value in kept["source"].to_pylist()], pa.string())
            for name, spelt in decisions.spellings.items():
                if spelt:
                    values = [spelt.get(value, value) for value in kept[name].to_pylist()]
                    columns[name] = pa.array(values, pa.string())
            yield pa.table([columns[name] for name in schema.names], schema=schema)

    write_table(folder / TABLE_FILE, schema, tables())


def dropped_rows(parts: Sequence[Path], decisions: Decisions) -> Iterator[dict[str, str]]:
    """Every pair that a comparison dropped: its place, key, reason and, if any, the test set."""
    for number, part in enumerate(parts):
        start = int(decisions.bounds[number])
        gone = np.flatnonzero(~decisions.kept(number))
        if gone.size:
            named = map_table(part).select(["place", "key"]).take(gone).to_pylist()
            for names, row in zip(named, (gone + start).tolist(), strict=True):
                reason = REASONS[decisions.reasons[row] - 1]
                _, test_set = decisions.found_in.get(row, ("", ""))
                yield dropped_row(names["place"], names["key"], reason, test_set)


def _runs(starts: np.ndarray, ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """Join ranges (start, end) that follow each other without a gap."""
    if len(starts):
        cuts = np.flatnonzero(starts[1:] != ends[:-1]) + 1
        for run_starts, run_ends in zip(np.split(starts, cuts), np.split(ends, cuts), strict=True):
            yield int(run_starts[0]), int(run_ends[-1])


def reason_counts(*counts: dict[str, int]) -> dict[str, int]:
    """The sum of counts by reason, sorted by name."""
    return dict(sorted(sum(map(Counter, counts), Counter[str]()).items()))
