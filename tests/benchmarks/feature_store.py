"""Reading teacher features: this project's store against the authors' form, one small ``.pt`` file a pair.

    python tests/benchmarks/feature_store.py                          # shuffled batches, page cache warm
    python tests/benchmarks/feature_store.py --open_pairs 20000000    # and what opening a store of that size takes

Both sides read the same random batches of 1,024 pairs and, for each pair, the image and text feature of one random
teacher among those available for it; sides alternate batch by batch in one process on one thread. The baseline is one
``torch.load`` a pair, as the released training code does; nothing else is counted to it. With a warm page cache both
sides only compute, so rates are by the process' CPU time, which other work on the machine does not change; wall-clock
rates stand beside. The last line is JSON; ``ratio`` is ours over the baseline, by medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from mmkd.data.features.index import fingerprints
from mmkd.data.features.lookup import TeacherFeatures
from mmkd.data.features.shards import NOTES, read_tensors, write_shard
from mmkd.data.features.store import FeatureStore
from mmkd.data.features.writer import SHARD_SIZE, FeatureWriter, finish_store

WIDTHS = {"BMCA": 768, "PMCCLIP": 768} | dict.fromkeys(
    ("BiomedCLIP", "UniMedCLIP", "QuiltNet", "GenMedClip", "PLIP", "PUBMEDCLIP"), 512
)
AVAILABLE = 6  # teachers a pair, the published mean being 6.6
BATCH = 1024


def main() -> None:
    """Write both forms into a temporary folder, read them, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=8192)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--open_pairs", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.open_pairs:
            measure_opening(Path(folder) / "large", options.open_pairs)
        measure_reading(Path(folder), options.pairs, options.batches, options.dtype)


def measure_reading(folder: Path, pairs: int, batches: int, dtype: str) -> None:
    """Alternate the two forms over the same batches, and compare what they give."""
    generator = np.random.default_rng(0)
    ids = [generator.bytes(16).hex() for _ in range(pairs)]
    names = list(WIDTHS)
    available = [sorted(generator.permutation(len(names))[:AVAILABLE].tolist()) for _ in ids]
    write_both(folder, ids, available, dtype)
    features = TeacherFeatures.open(folder / "stores")
    files = {id: str(folder / "published" / id / "clips_output.pt") for id in ids}
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "baseline": []}
    for batch in range(batches + 1):  # the first warms the page cache and is not counted
        rows = generator.integers(0, pairs, BATCH)
        drawn = [(ids[row], names[generator.choice(available[row])]) for row in rows]
        start = clocks()
        theirs = read_published(files, drawn)
        middle = clocks()
        ours = read_store(features, drawn)
        end = clocks()
        compare(drawn, ours, theirs)
        if batch:
            times["baseline"].append((middle[0] - start[0], middle[1] - start[1]))
            times["ours"].append((end[0] - middle[0], end[1] - middle[1]))
    report(folder, times, dtype)


def clocks() -> tuple[float, float]:
    """CPU seconds of this process and wall-clock seconds."""
    return time.process_time(), time.perf_counter()


def read_published(files: dict[str, str], drawn: list[tuple[str, str]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One torch.load a pair."""
    found = []
    for id, name in drawn:
        features = torch.load(files[id], weights_only=True)
        found.append((features[f"{name}_img"], features[f"{name}_txt"]))
    return found


def read_store(
    features: TeacherFeatures, drawn: list[tuple[str, str]]
) -> dict[str, tuple[list[int], torch.Tensor, torch.Tensor]]:
    """The pairs of each teacher together: teacher -> positions in the batch, image and text features."""
    positions: dict[str, list[int]] = {}
    for position, (_, name) in enumerate(drawn):
        positions.setdefault(name, []).append(position)
    found = {}
    for name, chosen in positions.items():
        image, text, _ = features.stores[name].lookup([drawn[position][0] for position in chosen])
        found[name] = (chosen, image, text)
    return found


def compare(drawn, ours, theirs) -> None:  # type: ignore[no-untyped-def]
    """Both sides must have read the same features."""
    seen = 0
    for positions, images, texts in ours.values():
        for row, position in enumerate(positions):
            for mine, other in ((images[row], theirs[position][0]), (texts[row], theirs[position][1])):
                assert torch.nn.functional.cosine_similarity(mine, other.flatten(), dim=0) > 0.9999, drawn[position]
            seen += 1
    assert seen == len(drawn)


def write_both(folder: Path, ids: list[str], available: list[list[int]], dtype: str) -> None:
    """The same random unit vectors as the authors' files and as one store for each teacher."""
    generator = torch.Generator().manual_seed(0)
    names = list(WIDTHS)
    vectors = {
        name: torch.nn.functional.normalize(torch.randn(len(ids), 2, width, generator=generator), dim=-1)
        for name, width in WIDTHS.items()
    }
    for row, id in enumerate(ids):
        file = folder / "published" / id / "clips_output.pt"
        file.parent.mkdir(parents=True)
        sample = {}
        for k in available[row]:
            sample[f"{names[k]}_img"] = vectors[names[k]][row, 0].clone()
            sample[f"{names[k]}_txt"] = vectors[names[k]][row, 1].clone()
        torch.save(sample, file)
    for k, name in enumerate(names):
        rows = [row for row in range(len(ids)) if k in available[row]]
        writer = FeatureWriter(folder / "stores" / name, name, dtype)  # type: ignore[arg-type]
        own = [ids[row] for row in rows]
        stamps = fingerprints((f"caption of {id}" for id in own), ("" for _ in own), own)
        writer.add(own, vectors[name][rows, 0], vectors[name][rows, 1], stamps)
        writer.finish({})


def report(folder: Path, times: dict[str, list[tuple[float, float]]], dtype: str) -> None:
    """Medians, spread, bytes a number, and the JSON line."""
    rates = {side: BATCH / statistics.median(cpu for cpu, _ in measured) for side, measured in times.items()}
    for side, measured in times.items():
        cpu, wall = zip(*measured, strict=True)
        spread = f"{BATCH / max(cpu):,.0f} to {BATCH / min(cpu):,.0f}"
        clock = BATCH / statistics.median(wall)
        print(f"{side}: {rates[side]:,.0f} pairs/s by CPU time ({spread}), {clock:,.0f} by clock")
    stores = [FeatureStore(path) for path in sorted((folder / "stores").iterdir())]
    numbers = sum(2 * store.dim * len(store.ids) for store in stores)
    size = sum(file.stat().st_size for file in (folder / "stores").rglob("*") if file.is_file())
    print(f"{size / numbers:.3f} bytes a number stored as {dtype}, ids, index and headers included")
    result = {"name": "feature_store", "ours": round(rates["ours"]), "baseline": round(rates["baseline"])}
    print(json.dumps({**result, "unit": "pairs/s", "ratio": round(rates["ours"] / rates["baseline"], 1)}))


def measure_opening(folder: Path, pairs: int) -> None:
    """Open a store of that size in a fresh process; its features are holes in sparse files, its ids are real."""
    folder.mkdir(parents=True)
    files = []
    for k, start in enumerate(range(0, pairs, SHARD_SIZE)):
        files.append(folder / f"shard-{k:05d}.safetensors")
        sparse_shard(files[-1], [f"{row:032x}" for row in range(start, min(start + SHARD_SIZE, pairs))], 512)
    finish_store(folder, "large", "float16", files, {})
    script = f"""
import time, resource, numpy as np, torch
from pathlib import Path
from mmkd.data.features.lookup import TeacherFeatures
torch.set_num_threads(1)
def rss():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
before, start = rss(), time.perf_counter()
features = TeacherFeatures.open(Path({str(folder)!r}))
print(f"opening {{len(features.stores['large']):,}} pairs: {{time.perf_counter() - start:.3f}} s, "
      f"{{rss() - before:.0f}} MB")
wanted = [[f"{{row:032x}}" for row in np.random.default_rng(k).integers(0, {pairs}, {BATCH})] for k in range(20)]
for title in ("first touch", "warm"):
    start = time.perf_counter()
    for ids in wanted:
        assert features.stores["large"].lookup(ids)[2].all()
    print(f"batches of {BATCH} of {pairs:,}, {{title}}: {{(time.perf_counter() - start) / 20 * 1e3:.2f}} ms")
"""
    print(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout, end="")


def sparse_shard(path: Path, ids: list[str], dim: int) -> None:
    """A shard whose ids are real, and whose numbers are zeros that take no space on disk."""
    write_shard(path, ids, {"features": torch.zeros(len(ids), 2, 1, dtype=torch.float16)})
    start, tensors, metadata = read_tensors(path)
    data = path.read_bytes()[len(start) :]
    small = [data[slice(*tensors[name]["data_offsets"])] for name in ("id_end", "id_text")]
    ends = np.cumsum([len(ids) * 2 * dim * 2, *map(len, small)]).tolist()
    tensors["features"] |= {"shape": [len(ids), 2, dim], "data_offsets": [0, ends[0]]}
    tensors["id_end"]["data_offsets"], tensors["id_text"]["data_offsets"] = ends[:2], ends[1:]
    text = json.dumps({"__metadata__": {NOTES: metadata[NOTES]}, **tensors}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(ends[0], os.SEEK_CUR)
        file.write(b"".join(small))


if __name__ == "__main__":
    main()
