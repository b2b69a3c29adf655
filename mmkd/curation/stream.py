"""A whole curation: process units on any number of processes and machines, then decide over all parts and write.

Parts are collected in ``OUTPUT.parts`` beside the output. They stay when a run is killed, and the next run continues
with them. The output depends on the source and the rules alone. Samples cut in two by the end of a shard are made whole
from the fragments that the parts keep.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmkd.command.tasks import Progress, TaskSettings, open_parts, run_tasks
from mmkd.curation.contamination import checksums, read_exclusions
from mmkd.curation.datasheet import write_sheet
from mmkd.curation.decisions import Decisions, decide
from mmkd.curation.merge import dropped_rows, reason_counts, write_merged_manifest, write_shard
from mmkd.curation.part import PartWriter, part_checksum
from mmkd.curation.reports import ReportSource, write_reports
from mmkd.curation.rules import Rules
from mmkd.curation.samples import Item, RawSample, Refused
from mmkd.curation.sources import ATTRIBUTION_FILE, DICOM, PACKAGED, Unit, attribution, checksum_of, plan_units
from mmkd.data.archives import ArchivedFile, members
from mmkd.data.table import VERSION
from mmkd.files import (
    atomic_write_lines,
    atomic_write_text,
    discard,
    read_json,
    refuse_existing,
    remove,
    rename_folder,
    write_json,
)

SETTINGS_FILE, REPORT_FILE = "settings.json", "report.json"

KINDS = ("image", "caption", "metadata")


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
    settings = {"version": VERSION, "source": name, "units": checksum_of(units), "rules": rules.as_dict()}
    settings |= {"reports": reports.describe(rows)} if reports is not None else {}
    settings = json.loads(json.dumps(settings | {"exclude": checksums(exclude)}))
    if not overwrite and (output / SETTINGS_FILE).is_file() and read_json(output / SETTINGS_FILE) == settings:
        report: dict[str, Any] = read_json(output / REPORT_FILE)
        return report
    refuse_existing(output, overwrite)
    parts = output.with_name(f"{output.name}.parts")
    open_parts(parts, settings | {"units": [asdict(unit) for unit in units]}, overwrite)
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
        discard(parts, output)
        raise ValueError(
            f"nothing is left of the {account['read']} samples of {settings['source']}; dropped: {account['dropped']}"
        )
    folder = parts / f"output-{decisions.fingerprint()[:16]}"
    remove(folder)  # of a killed run, whose archives would be reused unchecked
    (folder / "shards").mkdir(parents=True)
    shards = [(file, folder / "shards" / f"{n:06d}.tar", decisions.kept(n)) for n, file in enumerate(files)]
    bar = partial(tqdm, desc="write", unit="shard", disable=quiet)
    run_tasks(_write_shards, shards, lambda shard: not shard[2].any() or shard[1].exists(), tasks, output, bar)
    write_merged_manifest(files, decisions, folder, settings["source"])
    dropped = chain(_dropped_in_parts(parts, count), dropped_rows(files, decisions))
    atomic_write_lines(folder / "dropped.jsonl", (json.dumps(row, ensure_ascii=False) + "\n" for row in dropped))
    origin = attribution(source)
    if origin is not None:
        atomic_write_text(folder / ATTRIBUTION_FILE, origin)
    report = write_sheet(folder, output.name, settings["source"], account, settings)
    write_json(folder / SETTINGS_FILE, settings)
    rename_folder(folder, output)
    discard(parts, output)
    return report


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


def _dropped_in_parts(parts: Path, count: int) -> Iterator[dict[str, str]]:
    for number in range(count + 1):
        yield from read_json(parts / f"{number:06d}.json")["listed"]


def joined_samples(parts: Path, count: int) -> Iterator[Item]:
    """Samples that are complete with the fragments of all parts, and what the others lack.

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
    """The members of fragments that parts keep, by part, number and kind."""

    def __init__(self, parts: Path) -> None:
        self.parts = parts
        self.found: dict[int, dict[tuple[int, str], tuple[str, ArchivedFile]]] = {}

    def sample(self, key: str, place: str, where: dict[str, tuple[int, int]]) -> RawSample:
        own = {kind: self._in_part(part)[number, kind] for kind, (part, number) in where.items()}
        caption, metadata = own["caption"][1].read_bytes(), own["metadata"][1].read_bytes()
        suffix, image = own["image"]
        return RawSample(key, place, caption, metadata, image.read_bytes, suffix)

    def _in_part(self, part: int) -> dict[tuple[int, str], tuple[str, ArchivedFile]]:
        if part not in self.found:
            archive = self.parts / f"{part:06d}.fragments.tar"
            self.found[part] = {}
            for member in members(archive):
                number, kind, suffix = member.name.split(".")
                file = ArchivedFile(archive, member.offset, member.size)
                self.found[part][int(number), kind] = suffix, file
        return self.found[part]
