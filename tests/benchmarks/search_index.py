"""Opening, latency and recall of a search index, against the exact product with all its vectors.

``python tests/benchmarks/search_index.py [--rows 1000000] [--dim 512] [--queries 200] [--threads 1] [--work FOLDER]``

Vectors are simulated: unit length, around ``rows / 100`` random centres on a shared cone (cosine of about
0.4 between any two, 0.8 within a cluster), as image embeddings of CLIP models lie; real ones differ. Queries are drawn
from the same clusters. The index is built by `SearchIndex.add` and `optimize`, opened by a process of its own, and
answers one query at a time. Each line is JSON: ``ours`` is the index, ``baseline`` the exact product over the same
memory-mapped vectors (1 for recall, the limit of one second for opening).
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mmkd.serving import index as index_module
from mmkd.serving.index import SearchIndex

PART, K = 1 << 16, 10
CONE, SPREAD = 0.8, 0.45


def vectors(seed: int, rows: int, centres: torch.Tensor) -> torch.Tensor:
    """Unit vectors (rows, dim) around random centres."""
    generator = torch.Generator().manual_seed(seed)
    own = centres[torch.randint(len(centres), (rows,), generator=generator)]
    dim = centres.shape[1]
    noise = torch.randn(rows, dim, generator=generator) / dim**0.5
    return torch.nn.functional.normalize(own + SPREAD * noise, dim=1)


def make_centres(count: int, dim: int) -> torch.Tensor:
    """Centres (count, dim) around one direction."""
    generator = torch.Generator().manual_seed(0)
    cone = torch.nn.functional.normalize(torch.randn(dim, generator=generator), dim=0)
    own = torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=1)
    return torch.nn.functional.normalize(CONE * cone + own, dim=1)


def measure(path: str, queries: torch.Tensor, threads: int, exact_queries: int, pipe) -> None:
    """Seconds to open, seconds and ids of each query, and the same of the exact product."""
    torch.set_num_threads(threads)
    began = time.perf_counter()
    index = SearchIndex.open(Path(path))
    opened = time.perf_counter() - began
    found = {"open": opened, "ours": [], "exact": [], "ids": [], "exact_ids": []}
    exact = SearchIndex(Path(path), {**index.meta, "graph": None})
    for own, times, ids, asked in (
        (index, "ours", "ids", queries),
        (exact, "exact", "exact_ids", queries[:exact_queries]),
    ):
        own.search(queries[:1], K)
        for query in asked:
            began = time.perf_counter()
            hits = own.search(query[None], K)[0]
            found[times].append(time.perf_counter() - began)
            found[ids].append([hit.id for hit in hits])
    pipe.send(found)


def line(name: str, ours: float, baseline: float, unit: str) -> None:
    """One result."""
    row = {"name": name, "ours": round(ours, 5), "baseline": round(baseline, 5), "unit": unit}
    print(json.dumps({**row, "ratio": round(baseline / ours, 3)}), flush=True)


def main() -> None:
    """Build, open, search."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--exact", type=int, default=50, help="queries that are also searched exactly")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--graph", type=int, default=index_module.GRAPH_ROWS, help="rows from which a graph is made")
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    index_module.GRAPH_ROWS = options.graph
    centres = make_centres(max(10, options.rows // 100), options.dim)
    with tempfile.TemporaryDirectory() as temporary:
        path = (options.work or Path(temporary)) / f"index-{options.rows}-{options.dim}"
        if not path.exists():
            index = SearchIndex.create(path, {"fingerprint": "simulated"}, options.dim)
            began = time.perf_counter()
            for start in range(0, options.rows, PART):
                count = min(PART, options.rows - start)
                ids = [f"series-{row // 100:06d}/{row:08d}.png" for row in range(start, start + count)]
                index.add(ids, vectors(1 + start, count, centres))
            added = time.perf_counter()
            index.optimize(options.threads)
            times = f"{added - began:.0f} s to add, {time.perf_counter() - added:.0f} s of graph"
            print(f"# {options.rows} rows: {times}", flush=True)
        queries = vectors(987654321, options.queries, centres)
        receive, send = multiprocessing.Pipe(duplex=False)
        arguments = (str(path), queries, options.threads, options.exact, send)
        process = multiprocessing.get_context("spawn").Process(target=measure, args=arguments)
        process.start()
        found = receive.recv()
        process.join()
    ours, exact = np.array(found["ours"]), np.array(found["exact"])
    shared = [len(set(a) & set(b)) / K for a, b in zip(found["ids"], found["exact_ids"], strict=False)]
    line(f"open {options.rows} rows", found["open"], 1.0, "s")
    line(f"median query of {options.rows} rows", float(np.median(ours)) * 1e3, float(np.median(exact)) * 1e3, "ms")
    line(f"95th percentile of {options.rows} rows", *(float(np.percentile(t, 95)) * 1e3 for t in (ours, exact)), "ms")
    line(f"recall@{K} of {options.rows} rows", float(np.mean(shared)), 1.0, "share")


if __name__ == "__main__":
    main()
