"""Parts judged against each other and written as one folder of pairs.

Reads of every part only the fixed-width marks, decides for all pairs at once which are repeated or held in a test set,
and then writes part by part: an archive of which nothing goes is linked, not copied; of another the kept stretches are
copied as they are. What one part needs is all that is held beside the marks.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmkd.curation.contamination import Exclusions, find_in_test_sets
from mmkd.curation.duplicates import PERMUTATIONS, Marks, near_repeats, repeats
from mmkd.curation.rules import StreamRules
from mmkd.data.archives import BLOCK, END_BYTES, ArchivedFile
from mmkd.data.table import TABLE_FILE, map_table, table_schema, write_table

if TYPE_CHECKING:
    import pyarrow as pa

COPY_BYTES = 1 << 24
MORE_COLUMNS = ("key", "article", "panel_type", "labels")


@dataclass(frozen=True)
class Verdicts:
    """What becomes of each of n pairs.

    Attributes:
        reasons: (n,) int8, 0 for pairs that stay, else 1 + the position in ``names``.
        names: reasons in use.
        found_in: row -> reason and name of the test set it is in.
        bounds: (parts + 1,) the rows of each part.
    """

    reasons: np.ndarray
    names: tuple[str, ...]
    found_in: dict[int, tuple[str, str]]
    bounds: np.ndarray

    def kept(self, part: int) -> np.ndarray:
        """Which rows (m,) of a part stay."""
        return np.asarray(self.reasons[self.bounds[part] : self.bounds[part + 1]] == 0)

    def fingerprint(self) -> str:
        """Equal for equal verdicts."""
        return hashlib.sha256(self.reasons.tobytes()).hexdigest()

    def counts(self) -> dict[str, int]:
        """Dropped pairs by reason."""
        numbers = np.bincount(self.reasons, minlength=len(self.names) + 1)[1:]
        return {name: int(number) for name, number in zip(self.names, numbers, strict=True) if number}


REASONS = (
    "in_test_set_image", "in_test_set_near_image", "in_test_set_article", "duplicate_key", "duplicate",
    "near_duplicate", "over_max_pairs",
)  # fmt: skip


def decide(parts: Sequence[Path], rules: StreamRules, exclusions: Exclusions) -> Verdicts:
    """Which pairs of all parts stay; the order of the parts is the order in which the first of equals is kept."""
    marks, bounds = read_marks(parts)
    reasons = np.zeros(len(marks.sample), dtype=np.int8)
    found_in = find_in_test_sets(parts, marks, bounds, exclusions, rules.image_distance)
    for row, (reason, _) in found_in.items():
        reasons[row] = 1 + REASONS.index(reason)
    for reason, keys in (("duplicate_key", marks.key), ("duplicate", marks.digest)):
        staying = np.flatnonzero(reasons == 0)
        reasons[staying[repeats(keys[staying], marks.sample[staying])]] = 1 + REASONS.index(reason)
    staying = np.flatnonzero(reasons == 0)
    near = near_repeats(marks, staying, rules.near_duplicates, rules.image_distance, rules.caption_similarity)
    reasons[staying[near]] = 1 + REASONS.index("near_duplicate")
    staying = np.flatnonzero(reasons == 0)
    if rules.max_pairs and len(staying) > rules.max_pairs:
        chosen = np.random.default_rng(rules.seed).permutation(len(staying))[rules.max_pairs :]
        reasons[staying[chosen]] = 1 + REASONS.index("over_max_pairs")
    return Verdicts(reasons, REASONS, found_in, bounds)


def read_marks(parts: Sequence[Path]) -> tuple[Marks, np.ndarray]:
    """The marks of all parts after one another, and where each part's rows begin (parts + 1,)."""
    bounds = np.cumsum([0, *(map_table(part).num_rows for part in parts)])
    count = int(bounds[-1])
    marks = Marks(
        sample=np.empty(count, np.int64),
        digest=np.empty((count, 2), "<u8"),
        perceptual=np.empty(count, np.uint64),
        signature=np.empty((count, PERMUTATIONS), "<u2"),
        key=np.empty(count, np.int64),
    )
    samples = 0
    for part, start, stop in zip(parts, bounds[:-1], bounds[1:], strict=True):
        table = map_table(part)
        local = table["sample"].to_numpy()
        marks.sample[start:stop] = local + samples
        samples += int(local.max(initial=0)) + 1
        marks.digest[start:stop] = _halves(table["sha256"])
        marks.perceptual[start:stop] = table["perceptual"].to_numpy()
        raw = b"".join(table["signature"].to_pylist())
        marks.signature[start:stop] = np.frombuffer(raw, "<u2").reshape(len(local), PERMUTATIONS)
        marks.key[start:stop] = table["key_hash"].to_numpy()
    return marks, bounds


def write_shard(part: Path, tar: Path, kept: np.ndarray) -> np.ndarray:
    """Write the kept pairs of a part's archive to ``tar``.

    Args:
        part: the part's Arrow file; its archive lies beside it.
        tar: where to write; appears whole, and is left alone if it is there.
        kept: (m,) bool.

    Returns:
        (kept,) int64, the new offsets of the images.
    """
    table = map_table(part)
    rows = np.flatnonzero(kept)
    starts, ends = table["start"].to_numpy()[rows], table["end"].to_numpy()[rows]
    offsets = table["offset"].to_numpy()[rows]
    source = part.with_suffix(".tar")
    if not tar.exists() and not (kept.all() and _linked(source, tar)):
        _copy(source, tar, _runs(starts, ends))
    new_starts = np.cumsum(ends - starts) - (ends - starts)
    return np.asarray(offsets - starts + new_starts)


def write_manifest_table(
    parts: Sequence[Path], verdicts: Verdicts, offsets: Sequence[np.ndarray], folder: Path, source: str
) -> None:
    """Write ``manifest.arrow``: a batch of rows for each part, images named by shard, offset and size."""
    import pyarrow as pa

    more = {name: pa.list_(pa.string()) if name == "labels" else pa.string() for name in MORE_COLUMNS}
    schema = table_schema(more, ".")

    def tables() -> Iterator[pa.Table]:
        for number, part in enumerate(parts):
            kept = map_table(part).filter(pa.array(verdicts.kept(number)))
            sizes = kept["size"].to_pylist()
            archive = Path(f"shards/{number:06d}.tar")
            images = [str(ArchivedFile(archive, o, s)) for o, s in zip(offsets[number].tolist(), sizes, strict=True)]
            columns = {name: kept[name] for name in schema.names if name in kept.column_names}
            columns["image"] = pa.array(images, pa.string())
            columns["source"] = pa.array([value or source for value in kept["source"].to_pylist()], pa.string())
            columns["teachers"] = pa.nulls(kept.num_rows, pa.list_(pa.string()))
            yield pa.table([columns[name] for name in schema.names], schema=schema)

    write_table(folder / TABLE_FILE, schema, tables())


def dropped_rows(parts: Sequence[Path], verdicts: Verdicts) -> Iterator[dict[str, Any]]:
    """Every pair that a comparison dropped: its key, the reason, and for test sets which one."""
    for number, part in enumerate(parts):
        start = int(verdicts.bounds[number])
        gone = np.flatnonzero(~verdicts.kept(number))
        if gone.size:
            keys = map_table(part)["key"].take(gone).to_pylist()
            for key, row in zip(keys, (gone + start).tolist(), strict=True):
                reason = verdicts.names[verdicts.reasons[row] - 1]
                found = {"test_set": verdicts.found_in[row][1]} if row in verdicts.found_in else {}
                yield {"key": key, "reason": reason, **found}


def _halves(digests: Any) -> np.ndarray:
    """The first 128 bits of SHA-256 sums in hexadecimal, (n,) texts, as (n, 2) uint64."""
    raw = bytes.fromhex("".join(digest[:32] for digest in digests.to_pylist()))
    return np.frombuffer(raw, "<u8").reshape(len(digests), 2)


def _runs(starts: np.ndarray, ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """Stretches (start, end) that follow each other without a gap, joined."""
    if len(starts):
        cuts = np.flatnonzero(starts[1:] != ends[:-1]) + 1
        for run_starts, run_ends in zip(np.split(starts, cuts), np.split(ends, cuts), strict=True):
            yield int(run_starts[0]), int(run_ends[-1])


def _linked(source: Path, target: Path) -> bool:
    """Whether the file system took a hard link."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _copy(source: Path, target: Path, stretches: Iterator[tuple[int, int]]) -> None:
    """Copy stretches (start, end) of an archive into one that ends as archives end."""
    partial = target.with_name(f"{target.name}.partial")
    with source.open("rb") as old, partial.open("wb") as new:
        for start, end in stretches:
            old.seek(start)
            for position in range(start, end, COPY_BYTES):
                new.write(old.read(min(COPY_BYTES, end - position)))
        new.write(bytes(2 * BLOCK + -(new.tell() + 2 * BLOCK) % END_BYTES))
        new.flush()
        os.fsync(new.fileno())
    partial.replace(target)


def reason_counts(*counts: dict[str, int]) -> dict[str, int]:
    """Counts by reason added up, in the order of names."""
    total: Counter[str] = Counter()
    for some in counts:
        total.update(some)
    return dict(sorted(total.items()))
