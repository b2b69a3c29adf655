"""Decoding a CT slice of 512 x 512 against the lines one would write: pydicom and NumPy without any check.

    python tests/benchmarks/dicom.py --rounds 200

The slice is uncompressed, or compressed without loss by JPEG 2000 or RLE; the plain side reads the whole header and
windows in float32, ours reads the elements of the pixels, checks sizes and gives Pillow's RGB as everywhere.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.uid import JPEG2000Lossless, RLELossless

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from medical_files import dicom

from mmkd.data.images import open_image
from mmkd.data.pixel_rules import Window


def main() -> None:
    """Time both sides by turns, and print a line for each form of file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    for name, path in files().items():
        plain, ours = [], []
        assert np.abs(np.asarray(plainly(path), int) - np.asarray(open_image(path, window=Window("soft")))).max() <= 1
        for _ in range(rounds):
            for run, times in ((plainly, plain), (lambda p: open_image(p, window=Window("soft")), ours)):
                start = time.process_time()
                run(path)
                times.append(1000 * (time.process_time() - start))
        values = {"plain": statistics.median(plain), "ours": statistics.median(ours)}
        print(json.dumps({"name": name, "unit": "CPU ms a slice", **{k: round(v, 2) for k, v in values.items()}}))


def plainly(path: Path) -> Image.Image:
    """A soft-tissue window as RGB."""
    dataset = pydicom.dcmread(path)
    values = dataset.pixel_array.astype(np.float32) * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    grey = (np.clip((values + 160) / 400, 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def files() -> dict[str, Path]:
    """A smooth body with noise, as a scanner gives it."""
    folder = Path(tempfile.mkdtemp())
    y, x = np.mgrid[-1:1:512j, -1:1:512j]
    body = np.where(x**2 + y**2 < 0.7, 40 + 200 * np.sin(9 * x) * np.cos(7 * y), -1000)
    values = (body + np.random.default_rng(0).normal(0, 12, body.shape) + 1024).clip(0, 4095).astype(np.uint16)
    data = dicom(values, RescaleSlope=1, RescaleIntercept=-1024, BitsStored=12, HighBit=11)
    found = {"plain": folder / "plain.dcm"}
    found["plain"].write_bytes(data)
    for name, syntax in (("JPEG 2000", JPEG2000Lossless), ("RLE", RLELossless)):
        dataset = pydicom.dcmread(io.BytesIO(data))
        dataset.compress(syntax)
        found[name] = folder / f"{name}.dcm"
        dataset.save_as(found[name])
    return found


if __name__ == "__main__":
    main()
