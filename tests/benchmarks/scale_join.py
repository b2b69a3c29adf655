"""Memory and time of curation's join: exact and near duplicates among all pairs of all parts, out of core.

    python tests/benchmarks/scale_join.py --work /tmp/join                       # 2.4 M pairs, a tenth of BIOMEDICA
    python tests/benchmarks/scale_join.py --work /tmp/join --pairs 24000000      # 12 GB of parts and fingerprints
    python tests/benchmarks/scale_join.py --work /tmp/join --validation_share 0.005      # as in pipeline_paper.yaml

Parts are simulated: fingerprints of random bits, of which one in a hundred pairs is a near duplicate of the one before
it (three bits of the image, four of 64 values of the caption differ), and one in a hundred has an equal image.
`decide` then reads them as at the end of a curation. Counted is the memory that the kernel cannot take back (RssAnon),
since the fingerprints are files; the slope between a quarter of the pairs and all gives the memory of 24 M.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from private_memory import PrivateMemory

PER_PART, EVERY, FULL, BAR = 100_000, 100, 24_000_000, 4096


def main() -> None:
    """Measure a quarter and the whole, each in a process of its own, and print the slope."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=FULL // 10)
    parser.add_argument("--validation_share", type=float, default=0.0, help="of the groups, four pairs each")
    parser.add_argument("--alone", action="store_true", help="one size in this process")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(join(options.work, options.pairs, options.validation_share)))
        return
    sizes, found = (options.pairs // 4, options.pairs), []
    for pairs in sizes:
        command = [sys.executable, __file__, "--alone", "--work", str(options.work), "--pairs", str(pairs)]
        command += ["--validation_share", str(options.validation_share)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{pairs} pairs: {found[-1]}", flush=True)
    slope = (found[1]["anonymous_mb"] - found[0]["anonymous_mb"]) / (sizes[1] - sizes[0])
    at_full = found[1]["anonymous_mb"] + slope * (FULL - sizes[1])
    print(json.dumps({"name": "scale_join", "ours": round(at_full), "baseline": BAR, "unit": "MB at 24 million pairs",
                      "ratio": round(BAR / at_full, 2), "pairs": sizes[1], **found[1],
                      "bytes_a_pair": round(slope * 2**20, 1)}))  # fmt: skip


def join(work: Path, pairs: int, validation_share: float) -> dict[str, float]:
    """Simulate the parts, join them, check what was found and return memory and time."""
    from mmkd.curation.contamination import Exclusions
    from mmkd.curation.decisions import decide
    from mmkd.curation.rules import read_rules

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    files = [write_part(work, number, min(PER_PART, pairs - number * PER_PART))
             for number in range(-(-pairs // PER_PART))]  # fmt: skip
    rules = read_rules("paper", near_duplicates="both", validation_share=validation_share)
    decide(files[:1], rules, Exclusions())  # libraries are loaded
    start = time.process_time()
    with PrivateMemory() as memory:
        decisions = decide(files, rules, Exclusions())
    seconds = time.process_time() - start
    dropped = decisions.counts()
    assert dropped == {"duplicate": pairs // EVERY, "near_duplicate": pairs // EVERY}, dropped
    shutil.rmtree(work)
    return {"anonymous_mb": round(memory.peak / 2**20), "cpu_seconds": round(seconds, 1)}


def write_part(folder: Path, number: int, rows: int) -> Path:
    """A part's table of random fingerprints with planted duplicates."""
    from mmkd.curation.part import row_schema

    noise = np.random.default_rng(number)
    digests = noise.integers(0, 256, (rows, 32), dtype=np.uint8)
    perceptual = noise.integers(0, 2**64, rows, dtype=np.uint64)
    signatures = noise.integers(0, 2**16, (rows, 64), dtype=np.uint16)
    near = np.arange(1, rows, EVERY)
    perceptual[near] = perceptual[near - 1] ^ np.uint64(0b10000000000000001000001)
    signatures[near] = signatures[near - 1]
    signatures[near, :4] ^= 1
    equal = near + 50
    digests[equal] = digests[equal - 1]
    identity = np.arange(number * PER_PART, number * PER_PART + rows)
    names = pa.array(identity).cast(pa.string())
    fields = {
        "sha256": pa.array([digest.tobytes().hex() for digest in digests]),
        "perceptual": pa.array(perceptual),
        "signature": pa.FixedSizeBinaryArray.from_buffers(pa.binary(128), rows, [None, pa.py_buffer(signatures)]),
        "key_hash": pa.array(identity),
        "sample": pa.array(np.arange(rows)),
        **dict.fromkeys(("id", "caption", "key"), names),
        **dict.fromkeys(("group", "article"), pa.array(identity // 4).cast(pa.string())),
    }
    schema = row_schema()
    empty = {field.name: pa.array([""] * rows) for field in schema if field.type == pa.string()}
    zeros = {field.name: pa.nulls(rows, field.type).fill_null(0) for field in schema if pa.types.is_integer(field.type)}
    lists = {field.name: pa.array([[]] * rows, field.type) for field in schema if pa.types.is_list(field.type)}
    columns = empty | zeros | lists | fields
    table = pa.table([columns[field.name].cast(field.type) for field in schema], schema=schema)
    path = folder / f"{number:06d}.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_table(table)
    return path


if __name__ == "__main__":
    main()
