"""Throughput and latency of `mmkd serve` against a plain service of the same model, and memory over many requests.

``python tests/benchmarks/serve.py MODEL [--onnx FOLDER] [--resize exact|fast] [--clients 16] [--requests 320]
[--rounds 4] [--memory 10000]``; with ``--onnx`` our side serves this folder of `mmkd export MODEL`.

Both sides serve OpenAI's embeddings from a process of their own, with the same weights and the same number of threads
of torch. The other side is what one writes with FastAPI and transformers: an endpoint that FastAPI runs in its pool of
threads, which decodes the image, calls the processor and the model under ``inference_mode`` and returns a list. Every
client sends its next request when it has the answer to the last one, and writes to its socket itself, since a library
for clients computes longer for a caption than either side. Images are JPEGs of 512 x 512 pixels, or captions.
Sides alternate within a round, and the figures are medians over rounds. ``CPU ms`` is what the process of a side
computes for one request: other load on the machine changes it little, while it gives the side with more threads the
larger share of the cores. ``lowest cosine`` is that between the answers of both sides. The last line is for images, of
which the ratio is smaller; ``lost`` are requests without an answer of 200, and why.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import multiprocessing
import os
import socket
import statistics
import time
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

FORKS = multiprocessing.get_context("forkserver")  # both services start from one import of torch
FORKS.set_forkserver_preload(["torch", "transformers", "fastapi", "uvicorn", "modeling_mmkd", "mmkd.serving.api"])
SIDE, KINDS = 512, ("image", "text")
WORDS = [
    "axial",
    "coronal",
    "T2",
    "weighted",
    "MRI",
    "CT",
    "chest",
    "radiograph",
    "of",
    "the",
    "brain",
    "lung",
    "liver",
    "showing",
    "a",
    "mass",
    "effusion",
    "edema",
]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def plain(model_folder, port):
    """The service that one writes with FastAPI and transformers."""
    import torch
    import uvicorn
    from fastapi import FastAPI
    from transformers import AutoModel, AutoProcessor

    import modeling_mmkd  # noqa: F401  registers the model

    model = AutoModel.from_pretrained(model_folder).eval()
    processor = AutoProcessor.from_pretrained(model_folder)
    app = FastAPI()

    @app.get("/readyz")
    def ready():
        return "ok"

    @app.post("/v1/embeddings")
    def embed(body: dict[str, str]):
        with torch.inference_mode():
            if body["input"].startswith("data:"):
                image = Image.open(io.BytesIO(base64.b64decode(body["input"].partition(",")[2]))).convert("RGB")
                features = model.get_image_features(**processor(images=image, return_tensors="pt"))
            else:
                tokens = processor(text=[body["input"]], return_tensors="pt", truncation=True)
                features = model.get_text_features(**tokens)
            vector = torch.nn.functional.normalize(features.pooler_output, dim=-1)[0].tolist()
        return {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": vector}]}

    uvicorn.run(app, port=port, access_log=False, log_level="warning", timeout_keep_alive=60)


def ours(model_folder, port, resize, onnx):
    """`mmkd serve`."""
    from mmkd.command import cli

    options = ["--port", str(port), "--resize", resize]
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        cli.main(["serve", onnx or model_folder, "--page", "false", *options])


@contextlib.contextmanager
def started(service, port, *arguments):
    """A service in a process of its own; yields its address and process."""
    process = FORKS.Process(target=service, args=arguments)
    process.start()
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/readyz", timeout=30):
                break
            assert process.exitcode is None, f"{service.__name__} ended"
            time.sleep(0.5)
        yield address, process
    finally:
        process.terminate()
        process.join(60)


def bodies(kind, count=16):
    """The requests of one kind: smooth noise as JPEG data URLs, or captions of 5 to 20 words."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        if kind == "text":
            found.append({"input": " ".join(generator.choice(WORDS, generator.integers(5, 20)))})
            continue
        small = Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        found.append({"input": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"})
    return [json.dumps(body).encode() for body in found]


async def answer(reader):
    """Status and body of an answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].split()[0])
    return int(head.split()[1]), await reader.readexactly(length)


async def load(address, kind, clients, requests):
    """Seconds of each request, seconds of all, why some were lost, and the vectors of the first bodies."""
    times, vectors, lost = [], {}, []
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: "
    content = [f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies(kind)]
    waiting = iter(range(requests))

    async def client():
        reader, writer = await asyncio.open_connection(host, int(port))
        for number in waiting:
            began = time.perf_counter()
            try:
                writer.write(content[number % len(content)])
                status, body = await asyncio.wait_for(answer(reader), 120)
            except (OSError, EOFError, asyncio.TimeoutError) as error:
                lost.append(type(error).__name__)
                writer.close()
                reader, writer = await asyncio.open_connection(host, int(port))
                continue
            if status != 200:
                lost.append(f"{status} {body[:200].decode()}")
                continue
            times.append(time.perf_counter() - began)
            if number < len(content):
                vectors[number] = json.loads(body)["data"][0]["embedding"]
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return times, time.perf_counter() - began, lost, vectors


def computed(process):
    """Seconds of computing of a process."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(process):
    """Megabytes of memory that a process holds."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def compare(sides, settings):
    """Requests a second and milliseconds of both sides, by kind."""
    rows = {}
    for kind in KINDS:
        figures = {name: {"rate": [], "cpu": [], "times": []} for name in sides}
        lost, seen = {name: [] for name in sides}, {}
        for number in range(settings.rounds + 1):
            for name in list(sides) if number % 2 else reversed(list(sides)):
                address, process = sides[name]
                before = computed(process)
                times, seconds, missing, seen[name] = asyncio.run(
                    load(address, kind, settings.clients, settings.requests)
                )
                if number:  # one round to warm up
                    figures[name]["rate"].append(len(times) / seconds)
                    figures[name]["cpu"].append(1e3 * (computed(process) - before) / max(1, len(times)))
                    figures[name]["times"] += times
                lost[name] += missing
        a, b = (np.array([vectors[place] for place in sorted(vectors)]) for vectors in seen.values())
        row = {"lost": lost, "lowest_cosine": float((a * b).sum(axis=1).min())}
        for name, own in figures.items():
            cuts = statistics.quantiles(own["times"], n=100)
            row[name] = {kind: statistics.median(own[kind]) for kind in ("rate", "cpu")}
            row[name] |= {"p50": 1e3 * cuts[49], "p99": 1e3 * cuts[98]}
        rows[kind] = row
        for name in sides:
            own = row[name]
            print(
                f"| {kind} | {name} | {own['rate']:.1f} | {own['p50']:.0f} | {own['p99']:.0f} "
                f"| {own['cpu']:.1f} | {len(row['lost'][name])} | {row['lowest_cosine']:.6f} |",
                flush=True,
            )
    return rows


def memory(address, process, clients, requests):
    """Memory after each tenth of many requests, half of them images."""
    found = []
    for _ in range(10):
        for kind in KINDS:
            _, _, lost, _ = asyncio.run(load(address, kind, clients, requests // 20))
            assert not lost, f"{len(lost)} requests were lost: {lost[0]}"
        found.append(resident(process))
    shown = ", ".join(f"{value:.0f}" for value in found)
    print(f"memory after each tenth of {requests} requests [MB]: {shown}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--onnx")
    parser.add_argument("--resize", default="exact")
    for name, default in {"clients": 16, "requests": 320, "rounds": 4, "memory": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    settings = parser.parse_args()
    ports = free_port(), free_port()
    own = started(ours, ports[0], settings.model, ports[0], settings.resize, settings.onnx)
    with own as (address, process), started(plain, ports[1], settings.model, ports[1]) as other:
        print(f"{settings.clients} clients, {settings.requests} requests in each of {settings.rounds} rounds\n")
        print(
            "| kind | side | requests/s | p50 ms | p99 ms | CPU ms | lost | lowest cosine |\n"
            "|---|---|---:|---:|---:|---:|---:|---:|"
        )
        rows = compare({"ours": (address, process), "plain": other}, settings)
        print()
        if settings.memory:
            memory(address, process, settings.clients, settings.memory)
    row = rows["image"]
    figures = {"ours": row["ours"]["rate"], "baseline": row["plain"]["rate"]}
    figures["ratio"] = figures["ours"] / figures["baseline"]
    others = {"text_ratio": rows["text"]["ours"]["rate"] / rows["text"]["plain"]["rate"]}
    others |= {f"{kind}_cpu_ratio": rows[kind]["plain"]["cpu"] / rows[kind]["ours"]["cpu"] for kind in KINDS}
    figures = {key: round(value, 2) for key, value in (figures | others).items()}
    lost = {name: [why for own in rows.values() for why in own["lost"][name]] for name in ("ours", "plain")}
    print(json.dumps({"name": "serve", **figures, "unit": "requests/s", "lost": lost}))


if __name__ == "__main__":
    main()
