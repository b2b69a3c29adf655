"""Parquet files with image bytes, as the Hub's image datasets store them, and rows of any dataset in that form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmkd.curation.listings import facts_of, first_of
from mmkd.curation.samples import Item, RawSample, Refused

BATCH_ROWS = 64


def read_parquet(path: Path) -> Iterator[Item]:
    """The samples of a Parquet file: an image column of bytes or ``{bytes, path}``, and captions by any usual name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        for number, batch in enumerate(file.iter_batches(BATCH_ROWS)):
            for row, values in enumerate(batch.to_pylist()):
                yield sample_of_row(values, f"{path.name}:{number * BATCH_ROWS + row}")
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk, not the file
            raise
        yield Refused(path.name, "damaged_shard")


def sample_of_row(row: Mapping[str, Any], place: str) -> Item:
    """A row with image bytes as a sample."""
    image, caption = first_of(row, "image"), first_of(row, "caption")
    name = ""
    if isinstance(image, Mapping):
        name, image = str(image.get("path") or ""), image.get("bytes")
    if image is None:
        return Refused(place, "no_image")
    if not isinstance(image, bytes) or not isinstance(caption, (str, bytes, type(None))):
        return Refused(place, "wrong_type")
    key = str(first_of(row, "key") or name or place)
    facts = facts_of(row, f"{key} {name}")
    if isinstance(facts.get("label"), int):
        facts["label"] = str(facts["label"])
    suffix = name.rpartition(".")[2].lower() if "." in name else ""
    return RawSample(key, place, caption, facts, lambda: image, suffix)
