"""Images a second and core: our training pixels against the authors' Pillow + RandomResizedCrop + ToTensor + Normalize.

``python tests/benchmarks/loader.py [--images FOLDER] [--rounds 7]``

Both sides read the same JPEG files and give a float32 batch of 224-pixel squares. A third line reads the same images
prepared at 256 pixels of shortest side, against the authors' way on the originals. Without a folder, eight figures of a
journal's usual sizes are drawn. Sides alternate; the figure is the ratio of medians of CPU time on one thread, and the
PSNR is that of our square against Pillow's of the same rectangle.
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

from mmkd.data.images import open_image
from mmkd.data.pixels import DRAFT_FACTOR, crop_box, random_crop, read_pixels
from mmkd.embed import PixelStatistics, normalized_pixels

SIZE = 224
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
    error = float(np.square(mine.permute(1, 2, 0).numpy() - theirs).mean())
    return 10 * np.log10(255**2 / max(error, 1e-9))


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


def prepared(data: bytes) -> bytes:
    image = open_image(data)
    scale = min(1, 256 / min(image.size))
    buffer = io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=90
    )
    return buffer.getvalue()


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
    small = [prepared(data) for data in files]
    sides = {"authors": (authors, files), "ours": (ours, files), "ours, 256 px": (ours, small)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, (read, data) in sides.items():
            began = time.process_time()
            read(data)
            seconds[name].append(time.process_time() - began)
    rate = {name: len(files) / statistics.median(times) for name, times in seconds.items()}
    noise = [psnr(data, index) for index, data in enumerate(files)]
    print(f"{len(files)} images, {sum(map(len, files)) / len(files) / 1000:.0f} kB each; {arguments.rounds} rounds")
    for name, value in rate.items():
        print(f"{name:<14}{value:8.0f} images/s and core{value / rate['authors']:8.2f} x")
    print(f"PSNR against Pillow: least {min(noise):.1f} dB, median {statistics.median(noise):.1f} dB")
    result = {"name": "loader", "ours": rate["ours"], "baseline": rate["authors"], "unit": "images/s and core"}
    print(json.dumps({**result, "ratio": rate["ours"] / rate["authors"]}))


if __name__ == "__main__":
    main()
