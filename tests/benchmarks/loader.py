"""Images a second and core: our training pixels against the authors' Pillow + RandomResizedCrop + ToTensor + Normalize.

``python tests/benchmarks/loader.py [--images FOLDER] [--rounds 7]``

Both sides read the same JPEG files and give a float32 batch of 224-pixel squares. Further lines read the same images as
``mmkd curate --short_side 256 --jpeg_quality Q`` stores them, against the authors' way on the originals. Without a
folder, eight figures of a journal's usual sizes are drawn. Sides alternate; the figure is the ratio of medians of CPU
time on one thread. The PSNR is that of our square against Pillow's of the same rectangle of the same file; beside it,
for prepared images, that of the stored pixels against those before they were encoded: what preparation loses.
"""

import argparse
import io
import json
import os
import statistics
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from mmkd.data.images import encode, open_image, shrink
from mmkd.data.pixels import DRAFT_FACTOR, crop_box, random_crop, read_pixels
from mmkd.student.embed import PixelStatistics, normalized_pixels

SIZE, PREPARED_SIDE, QUALITIES = 224, 256, (95, 90, 85)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DRAWN = ((800, 293), (472, 354), (660, 665), (743, 434), (600, 483), (754, 357), (773, 618), (689, 325))
REPEATS = 4
AUTHORS = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIZE, scale=(0.9, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        lambda image: image.convert("RGB"),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
)


def authors(files: list[bytes]) -> torch.Tensor:
    return torch.stack([AUTHORS(Image.open(io.BytesIO(data))) for data in files])


def ours(files: list[bytes]) -> torch.Tensor:
    squares = []
    for index, data in enumerate(files):
        generator = np.random.default_rng([0, 0, index])
        squares.append(random_crop(read_pixels(data, draft_side=DRAFT_FACTOR * SIZE), SIZE, generator))
    return normalized_pixels(torch.stack(squares), PixelStatistics(MEAN, STD))


def psnr(data: bytes, index: int) -> float:
    """Of our square against Pillow's antialiased bicubic one, decoded at full size, of the same rectangle."""
    mine = random_crop(read_pixels(data, draft_side=DRAFT_FACTOR * SIZE), SIZE, np.random.default_rng([0, 0, index]))
    image = open_image(data)
    decoded = read_pixels(data, draft_side=DRAFT_FACTOR * SIZE).shape
    scale = round(image.height / decoded[1])
    left, top, width, height = crop_box(decoded[2], decoded[1], np.random.default_rng([0, 0, index]))
    cropped = image.crop(tuple(edge * scale for edge in (left, top, left + width, top + height)))
    theirs = np.asarray(cropped.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=float)
    return decibels(mine.permute(1, 2, 0).numpy() - theirs)


def drawn_figures() -> list[bytes]:
    """Figures with smooth shading, texture and lettering-like edges, as JPEG of quality 85."""
    generator, files = np.random.default_rng(0), []
    for width, height in DRAWN:
        y, x = np.mgrid[0:height, 0:width]
        shade = 120 + 80 * np.sin(x / 60) * np.cos(y / 45)
        texture = generator.normal(0, 8, (height, width)).cumsum(1) / 6
        page = np.clip(shade + texture, 0, 255).astype(np.uint8)
        page[:: height // 7, :] = 0
        page[:, :: width // 9] = 255
        buffer = io.BytesIO()
        Image.merge("RGB", [Image.fromarray(np.roll(page, 40 * k, 1)) for k in range(3)]).save(
            buffer, "JPEG", quality=85
        )
        files.append(buffer.getvalue())
    return files


def prepared(data: bytes, quality: int) -> tuple[bytes, float]:
    """An image as curation stores it, and the PSNR of its pixels against those that were encoded."""
    small = shrink(open_image(data), PREPARED_SIDE)
    content = encode(small, quality)[1]
    return content, decibels(np.asarray(small, dtype=float) - np.asarray(open_image(content), dtype=float))


def decibels(difference: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(float(np.square(difference).mean()), 1e-9)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.images:
        files = [path.read_bytes() for path in sorted(arguments.images.rglob("*.jp*g"))]
    else:
        files = drawn_figures()
    files *= max(1, REPEATS * len(DRAWN) // len(files))
    small = {quality: [prepared(data, quality) for data in files] for quality in QUALITIES}
    sides = {"authors": (authors, files), "ours": (ours, files)}
    sides |= {f"ours, 256 px, quality {q}": (ours, [content for content, _ in stored]) for q, stored in small.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, (read, data) in sides.items():
            began = time.process_time()
            read(data)
            seconds[name].append(time.process_time() - began)
    rate = {name: len(files) / statistics.median(times) for name, times in seconds.items()}
    noise = {name: [psnr(data, k) for k, data in enumerate(files)] for name, (read, files) in sides.items()}
    lost = {f"ours, 256 px, quality {q}": [loss for _, loss in stored] for q, stored in small.items()}
    print(f"{len(files)} images, {sum(map(len, files)) / len(files) / 1000:.0f} kB each; {arguments.rounds} rounds")
    for name, value in rate.items():
        told = "" if name == "authors" else f", against Pillow at least {min(noise[name]):.1f} dB"
        if name in lost:
            told += f"; preparation {min(lost[name]):.1f} to {max(lost[name]):.1f} dB"
        print(f"{name:<26}{value:8.0f} images/s and core{value / rate['authors']:8.2f} x{told}")
    result = {"name": "loader", "ours": rate["ours"], "baseline": rate["authors"], "unit": "images/s and core"}
    print(json.dumps({**result, "ratio": rate["ours"] / rate["authors"]}))


if __name__ == "__main__":
    main()
