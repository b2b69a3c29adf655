"""Merge parts into one folder of pairs: tars, the manifest and the list of dropped samples.

An archive of which nothing is dropped is linked, not copied; of another the kept ranges are copied as they are. Memory
holds the rows of one part at a time.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmkd.curation.decisions import REASONS, Decisions
from mmkd.curation.part import dropped_row
from mmkd.data.archives import ArchivedFile, ArchiveWriter
from mmkd.data.table import SPLITS, TABLE_FILE, map_table, table_schema, write_table
from mmkd.files import atomic_file

if TYPE_CHECKING:
    import pyarrow as pa

MORE_COLUMNS = ("key", "article", "study", "panel_type", "labels")


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


def write_merged_manifest(parts: Sequence[Path], decisions: Decisions, folder: Path, source: str) -> None:
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
    total: Counter[str] = Counter()
    for some in counts:
        total.update(some)
    return dict(sorted(total.items()))
