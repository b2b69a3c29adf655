"""A manifest of some of the pairs of another one, written while they pass by, in the form the other has."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mmkd.data.pair import Pair
from mmkd.data.pair_table import TABLE_FILE, PairTable, map_table
from mmkd.data.records import FOLDER_FILE, VERSION, PairFolder, write_manifest
from mmkd.files import write_json

CHUNK = 4096
Choice = tuple[np.ndarray, list[Pair]]  # positions in the source, (n,), and the pairs with their teachers


def in_chunks(pairs: Sequence[Pair]) -> Iterator[tuple[int, list[Pair]]]:
    """All pairs, some thousands at a time, each chunk with the position it begins at."""
    for start in range(0, len(pairs), CHUNK):
        yield start, list(pairs[start : start + CHUNK])


def ids_of(pairs: Sequence[Pair]) -> list[str]:
    """The ids of all pairs; of a table only this column is read."""
    return pairs.column("id").to_pylist() if isinstance(pairs, PairTable) else [pair.id for pair in pairs]


def pairs_at(pairs: Sequence[Pair], positions: np.ndarray) -> list[Pair]:
    """The pairs at some positions, (n,)."""
    return list(pairs.take(positions)) if isinstance(pairs, PairTable) else [pairs[k] for k in positions.tolist()]


def write_choice(output: Path, source: PairFolder, choices: Iterable[Choice]) -> None:
    """Write the chosen pairs with the teachers they were given; images stay where they are.

    Args:
        output: the folder.
        source: where the pairs come from, all splits; a table (``manifest.arrow``) gives a table with all its columns.
        choices: the pairs in the order of the source.
    """
    if isinstance(source.pairs, PairTable):
        _write_table(output, source.pairs, choices)
        root = os.path.relpath(source.image_root, output)
        write_json(output / FOLDER_FILE, {"version": VERSION, "images": Path(root).as_posix()})
    else:
        write_manifest(output, (pair for _, chosen in choices for pair in chosen), images=source.image_root)


def _write_table(output: Path, table: PairTable, choices: Iterable[Choice]) -> None:
    import pyarrow as pa

    whole = map_table(table.path)
    column = whole.schema.get_field_index("teachers")
    field = pa.field("teachers", pa.list_(pa.string()))
    schema = whole.schema.set(column, field)
    with pa.OSFile(str(output / TABLE_FILE), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for positions, pairs in choices:
            if len(positions):
                teachers = pa.array([pair.teachers for pair in pairs], field.type)
                rows = whole.take(positions).set_column(column, field, teachers)
                writer.write_table(rows, max_chunksize=CHUNK)
