"""Curating tars in BIOMEDICA's form, against the loop one would write: webdataset, json and Pillow.

    python tests/benchmarks/curate.py --data ../shared/data --work /tmp/curate            # 100,000 samples, 11 GB
    python tests/benchmarks/curate.py --data ../shared/data --work /tmp/curate --samples 6000

The tars are simulated from real images: the eight published figures, and images of `--data` at the sizes of these
figures (472 to 800 pixels wide; a real sample has 1.1 MB, ten times as much). Each copy is made distinct by a comment
inside the JPEG. Facts are those of real articles (14 to 136 KB of JSON), labels as frequent as in BIOMEDICA's 2,000
clusters, of which 278 are of the 26 modalities. Both sides read every sample, keep the same ones and write them to
tars; compared is CPU time on one core. The plain loop decodes each image, as `.decode("pil")` does, and then judges;
the careful loop judges by the JSON first and decodes what stays. Ours also checks that files are whole, hashes images
and captions for near duplicates, compares all pairs and writes the datasheet; the loops do none of it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PER_TAR = 10_000
OTHER_IMAGES = 400
WORDS = ["lesion", "biopsy", "axial", "contrast", "stained", "tissue", "margin", "arrow", "scale", "bar", "patient",
         "left", "right", "nodule", "cells", "nuclei", "vessel", "before", "after", "control", "panel"]  # fmt: skip
PAPER_SAMPLES, PAPER_BYTES = 24e6, 27e12


def main() -> None:
    """Make the tars, compare the sides on a part of them, run ours on all and print a cost model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--compare", type=int, default=2_000, help="samples that all three sides are timed on")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    small, few, all_of_it = (options.work / name for name in ("compare", "few", "all"))
    make_tars(options.data, small, options.compare, per_tar=options.compare)
    make_tars(options.data, all_of_it, options.samples, per_tar=min(PER_TAR, max(1, options.samples // 10)))
    few.mkdir(exist_ok=True)
    for tar in sorted(all_of_it.glob("*.tar"))[:2]:
        if not (few / tar.name).exists():
            os.link(tar, few / tar.name)
    times: dict[str, list[float]] = {"plain": [], "careful": [], "ours": []}
    kept = set()
    for _ in range(1 + options.rounds):  # the first round loads libraries and is not counted
        for name, run in (("plain", plain_loop), ("careful", careful_loop), ("ours", ours)):
            start = time.process_time()
            kept.add(run(small, options.work / f"out-{name}"))
            times[name].append(time.process_time() - start)
    assert len(kept) == 1, f"the sides keep different numbers of samples: {kept}"
    rates = {name: options.compare / statistics.median(seconds[1:]) for name, seconds in times.items()}
    print(f"{options.compare} samples, {kept.pop()} kept, {options.rounds} rounds, median samples a CPU second: "
          + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()))  # fmt: skip
    rate, memory = whole_run(few, all_of_it, options)
    cost_model(rate, all_of_it, options.samples)
    print(json.dumps({"name": "curate", "ours": round(rates["ours"], 1), "baseline": round(rates["plain"], 1),
                      "unit": "samples per CPU second", "ratio": round(rates["ours"] / rates["plain"], 2),
                      "careful_baseline": round(rates["careful"], 1), "peak_mb": memory}))  # fmt: skip


def make_tars(data: Path, folder: Path, samples: int, per_tar: int) -> None:
    """Simulated shards, made once."""
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = random.Random(0)
    images = figures(data, generator)
    articles = [
        json.loads(p.read_text()) for p in sorted(data.glob("mmkd_clip_official/MMKDCLIP_DATA/features/*/*/*.json"))
    ]
    modalities = yaml.safe_load((ROOT / "mmkd" / "curation" / "modalities.yaml").read_text())
    label = {cluster: name for name, clusters in modalities.items() for cluster in clusters}
    for start in range(0, samples, per_tar):
        with tarfile.open(folder / f"{start // per_tar:05d}.tar", "w") as tar:
            for number in range(start, min(samples, start + per_tar)):
                cluster = generator.randrange(2000)
                facts = generator.choice(articles) | {
                    "image_label_id": str(cluster),
                    "image_secondary_label": [label.get(cluster, "plot")],
                    "article_accession_id": f"PMC{number // 4}",
                }
                key = f"filelist_commercial_batch_{start}_{number}-PMC{number // 4}-1-fig{number}"
                caption = " ".join(generator.choices(WORDS, k=generator.randint(8, 120))) + f" {number}."
                add(tar, key + ".jpg", with_comment(generator.choice(images), number))
                add(tar, key + ".json", json.dumps(facts).encode())
                add(tar, key + ".txt", caption.encode())
    (folder / "done").touch()


def figures(data: Path, generator: random.Random) -> list[bytes]:
    """The published figures, and other images at their sizes."""
    published = [path.read_bytes() for path in sorted(data.glob("mmkd_clip_official/MMKDCLIP_DATA/features/*/*/*.jpg"))]
    sizes = [Image.open(io.BytesIO(jpeg)).size for jpeg in published]
    others = []
    for path in generator.sample(sorted(data.glob("[a-l]*/**/*.jp*g")), OTHER_IMAGES):
        buffer = io.BytesIO()
        Image.open(path).convert("RGB").resize(generator.choice(sizes), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        others.append(buffer.getvalue())
    return published + others


def with_comment(jpeg: bytes, number: int) -> bytes:
    """The same picture in other bytes: a comment segment after the start of the image."""
    text = f"copy {number}".encode()
    return jpeg[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + jpeg[2:]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member from bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def plain_loop(source: Path, output: Path) -> int:
    """Everything decoded, then judged."""
    return _loop(source, output, decode_first=True)


def careful_loop(source: Path, output: Path) -> int:
    """Judged by the JSON, then decoded."""
    return _loop(source, output, decode_first=False)


def _loop(source: Path, output: Path, decode_first: bool) -> int:
    import webdataset

    modalities = set(yaml.safe_load((ROOT / "mmkd" / "curation" / "modalities.yaml").read_text()))
    shards = sorted(map(str, source.glob("*.tar")))
    output.mkdir(exist_ok=True)
    seen: set[str] = set()
    kept = 0
    with webdataset.TarWriter(str(output / "kept.tar")) as writer:
        for sample in webdataset.WebDataset(shards, shardshuffle=False):
            facts = json.loads(sample["json"])
            if decode_first:
                image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
            if not modalities & set(facts["image_secondary_label"]) or facts["article_license"] != "CC BY":
                continue
            if not decode_first:
                image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
            caption = " ".join(sample["txt"].decode().split())
            digest = hashlib.sha256(sample["jpg"]).hexdigest()
            if min(image.size) < 8 or not 1 <= len(caption.split()) <= 1000 or digest in seen:
                continue
            seen.add(digest)
            row = {"modality": facts["image_secondary_label"][0], "license": facts["article_license"], "sha256": digest}
            writer.write({"__key__": sample["__key__"], "jpg": sample["jpg"], "txt": caption, "json": row})
            kept += 1
    return kept


def ours(source: Path, output: Path) -> int:
    """The same by this project, in this process and on one core."""
    from mmkd.curation.rules import read_rules
    from mmkd.curation.stream import curate

    shutil.rmtree(output, ignore_errors=True)
    report = curate(str(source), output, read_rules("paper"), quiet=True)
    return int(report["kept"]) if report else 0


def whole_run(few: Path, all_of_it: Path, options: argparse.Namespace) -> tuple[float, int]:
    """The command on two tars and on all: samples/s of the whole, and peak memory of each."""
    rate, peaks = 0.0, []
    for source, samples in ((few, 0), (all_of_it, options.samples)):
        output = options.work / f"out-{source.name}"
        shutil.rmtree(output, ignore_errors=True)
        start = time.perf_counter()
        command = [sys.executable, "-m", "mmkd.train.curate", "--source", source, "--output", output, "--quiet"]
        script = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); " + (
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, command)], capture_output=True, text=True, check=True
        )
        seconds, rate = time.perf_counter() - start, samples / (time.perf_counter() - start)
        peaks.append(int(done.stdout) // (1 if sys.platform == "darwin" else 1024))
        print(f"{source.name}: {len(list(source.glob('*.tar')))} tars in {seconds:.1f} s, peak memory {peaks[-1]} MB")
    report = json.loads((options.work / "out-all" / "report.json").read_text())
    print(f"all: {rate:.0f} samples/s on one core, {report['kept']} kept, dropped {report['dropped']}")
    return rate, peaks[-1]


def cost_model(rate: float, folder: Path, samples: int) -> None:
    """What the whole of BIOMEDICA takes, by the core and by the disk."""
    report = json.loads((folder.parent / "out-all" / "report.json").read_text())
    share = report["kept"] / report["read"]
    size = sum(tar.stat().st_size for tar in folder.glob("*.tar")) / samples
    facts = 64e3  # bytes of JSON and caption in a real sample; the image is the rest, and is read of kept ones alone
    read = PAPER_SAMPLES * (facts + share * (PAPER_BYTES / PAPER_SAMPLES - facts))
    hours = PAPER_SAMPLES / rate / 3600
    print(f"24 M samples at {rate:.0f}/s: {hours:.1f} core hours, {60 * hours / 64:.0f} min on 64 cores")
    print(f"simulated samples have {size / 1e3:.0f} KB, real ones {PAPER_BYTES / PAPER_SAMPLES / 1e3:.0f} KB; "
          f"{read / 1e12:.1f} of 27 TB are read")  # fmt: skip
    for speed in (0.5e9, 2e9, 10e9):
        print(
            f"  at {speed / 1e9:g} GB/s: {read / speed / 3600:.1f} h, {PAPER_BYTES / speed / 3600:.1f} h for all bytes"
        )


if __name__ == "__main__":
    main()
