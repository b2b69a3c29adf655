"""Extraction: where the time goes, pairs a second on one core, and what nine teachers cost on 1, 8 and 64 GPUs.

    python tests/benchmarks/extraction.py
    python tests/benchmarks/extraction.py --tflops 15 --cores_per_gpu 16 --pairs_total 2900000

Three parts. (1) `mmkd extract` runs over JPEG files with a tiny teacher in memory, one reading thread, with
``--resize fast`` and ``exact``; CPU seconds of each part are measured by thread. (2) Operations of each of the nine
teachers for one pair, counted by torch on their architectures (no weights, no memory). (3) The cost model: on each GPU
the slower of computing (operations / effective TFLOP/s) and of reading (measured CPU seconds a pair / cores of that
GPU: one decoding and four exact preparations), all teachers in one pass over the images. Not in the model: storage that
cannot deliver (2.9 million images of 100 KB are 290 GB), and loading weights once.

The last line is JSON: pairs a second and core of the whole pass (fast) against reading and decoding JPEG alone, its
bound; ``ratio`` is the share of the bound that is reached.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmkd.data.features.writer import FeatureExtraction
from mmkd.data.folder import open_pairs, write_manifest
from mmkd.data.pixels import read_pixels
from mmkd.data.table import Pair, take_rows
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.extraction import encode_shards
from mmkd.encoders.openclip import clip_transform
from mmkd.encoders.teacher_features import FeatureTask

IMAGE_SIZE = 224
BERT_TOKENS = 64  # a caption's mean length, with the special tokens; BERT towers are not padded further
CLIP_TOKENS = 77  # CLIP towers always read all of them
GPUS = (1, 8, 64)
PREPARATIONS = 4  # among nine teachers: open_clip's, transformers', PMC-CLIP's and MedCLIP's


class TinyTeacher(DualEncoder):
    """open_clip's evaluation transform and a linear map of 7 x 7 colours: all but nothing to compute."""

    def __init__(self) -> None:
        """Draw the map."""
        super().__init__("tiny", 64, {"preprocessing": "open_clip"}, 64)
        transform = clip_transform({"size": IMAGE_SIZE})
        self.transform, self.fast_prepare = transform.exact, transform.fast
        self.weight = torch.randn(3 * 49, 64, generator=torch.Generator().manual_seed(0))

    def prepare(self, image: Image.Image) -> Tensor:
        """See `DualEncoder`."""
        return self.transform(image)

    def image_features(self, prepared: list[Tensor]) -> Tensor:
        """See `DualEncoder`."""
        return torch.stack([pixels[:, ::32, ::32] for pixels in prepared]).flatten(1) @ self.weight

    def text_features(self, texts: list[str]) -> Tensor:
        """See `DualEncoder`."""
        return torch.tensor([[float(len(text))] + [1.0] * 63 for text in texts])


def main() -> None:
    """Measure, count, multiply."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--height", type=int, default=576)
    parser.add_argument("--pairs_total", type=float, default=2.9e6)
    parser.add_argument(
        "--tflops", type=float, default=60.0, help="effective: measured on your GPU, or a third of peak"
    )
    parser.add_argument("--cores_per_gpu", type=float, default=8.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    fast: dict[str, float] = {}
    for resize in ("fast", "exact"):
        seconds = profile(options.images, options.width, options.height, resize)
        reading = seconds["read and decode"] + seconds["prepare"]
        fast = fast or seconds
        size = f"{options.width} x {options.height}"
        print(f"\n{options.images} JPEG files of {size}, --resize {resize}, CPU milliseconds a pair:")
        for part, spent in sorted(seconds.items(), key=lambda item: -item[1]):
            print(f"  {part:<26}{1e3 * spent:8.3f}  {100 * spent / sum(seconds.values()):5.1f} %")
        print(f"  {1 / sum(seconds.values()):.0f} pairs/s on one core; reading and preparing alone {1 / reading:.0f}")
    costs(seconds["read and decode"] + PREPARATIONS * seconds["prepare"], options)
    per_core, bound = 1 / sum(fast.values()), 1 / fast["read and decode"]
    result = {"name": "extraction", "ours": round(per_core), "baseline": round(bound), "unit": "pairs/s and core"}
    print(json.dumps({**result, "ratio": round(per_core / bound, 2)}))


def profile(images: int, width: int, height: int, resize: str) -> dict[str, float]:
    """CPU seconds a pair of each part of an extraction, by thread clocks."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any, **named: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*values, **named)
            finally:
                seconds[part] += time.thread_time() - start

        return call

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_pairs(folder / "pairs", images, width, height)
        pairs = open_pairs(folder / "pairs")
        teacher = TinyTeacher()
        teacher.fast = resize == "fast"
        teacher.prepare_any = timed("prepare", teacher.prepare_any)  # type: ignore[method-assign]
        teacher.encode_prepared = timed("encode images", teacher.encode_prepared)  # type: ignore[method-assign]
        teacher.encode_texts = timed("encode texts", teacher.encode_texts)  # type: ignore[method-assign]
        decode = timed("read and decode", read_pixels)
        extraction = FeatureExtraction(folder / "out", "tiny", pairs.pairs, teacher.provenance, "float16")
        extraction.write = timed("write", extraction.write)  # type: ignore[method-assign]
        shards = [(k, list(take_rows(pairs.pairs, extraction.positions(k)))) for k in range(len(extraction))]
        whole = time.process_time()
        encode_shards([FeatureTask(teacher, extraction)], shards, lambda pair: decode(pairs.image_path(pair)), 64, 1)
        extraction.close()
        whole = time.process_time() - whole
    seconds["queues and everything else"] = max(0.0, whole - sum(seconds.values()))
    return {part: spent / images for part, spent in seconds.items()}


def write_pairs(folder: Path, count: int, width: int, height: int) -> None:
    """JPEG figures of smooth noise with some grain, quality 90."""
    (folder / "images").mkdir(parents=True)
    for k in range(count):
        generator = np.random.default_rng(k)
        coarse = Image.fromarray(generator.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = generator.integers(-12, 13, (height, width, 1), dtype=np.int16)
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(
            folder / "images" / f"{k}.jpg", quality=90
        )
    write_manifest(folder, [Pair(f"p{k}", f"{k}.jpg", f"caption number {k}") for k in range(count)])


def costs(reading_seconds: float, options: argparse.Namespace) -> None:
    """Print the operations of each teacher and the hours on each number of GPUs."""
    operations = gflops()
    print(f"\nGFLOP a pair (a multiply-add counts 2), texts of {BERT_TOKENS} BERT or {CLIP_TOKENS} CLIP tokens:")
    for name, (image, text) in operations.items():
        print(f"  {name:<12} image {image:7.1f}  text {text:6.1f}")
    total = sum(image + text for image, text in operations.values())
    print(f"  all nine {total:.0f}")
    print(
        f"\n{options.pairs_total:,.0f} pairs x nine teachers in one pass, at {options.tflops:g} effective TFLOP/s and "
        f"{options.cores_per_gpu:g} cores a GPU:"
    )
    computing = total / (options.tflops * 1e3)
    reading = reading_seconds / options.cores_per_gpu
    for gpus in GPUS:
        hours = options.pairs_total * max(computing, reading) / gpus / 3600
        bound = "computing" if computing > reading else "reading"
        print(f"  {gpus:>3} GPUs {hours:8.2f} h  (bound by {bound}: {1 / max(computing, reading):,.0f} pairs/s a GPU)")
    print(f"  one core alone reads and prepares them all in {options.pairs_total * reading_seconds / 3600:.1f} h\n")


def gflops() -> dict[str, tuple[float, float]]:
    """Operations of image and text tower of each teacher for one pair, in 1e9."""
    import open_clip
    from open_clip.modified_resnet import ModifiedResNet
    from transformers import BertConfig, BertModel, SwinConfig, SwinModel

    torch.backends.mha.set_fastpath_enabled(False)  # its kernel is not counted
    pixels = torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE, device="meta")
    with torch.device("meta"):
        bert = BertModel(BertConfig(attn_implementation="eager")).eval()
        swin = SwinModel(SwinConfig(image_size=IMAGE_SIZE)).eval()
        resnet = ModifiedResNet([3, 4, 6, 3], 768, 32, IMAGE_SIZE, 64).eval()
        clip = {
            name: open_clip.CLIP(**open_clip.get_model_config(name)).eval()
            for name in ("ViT-L-14", "ViT-B-16", "ViT-B-32")
        }
    words = torch.zeros(1, CLIP_TOKENS, dtype=torch.long, device="meta")
    bert_text = counted(lambda: bert(inputs_embeds=torch.empty(1, BERT_TOKENS, 768, device="meta")))
    towers = {
        name: (counted(lambda m=model: m.encode_image(pixels)), counted(lambda m=model: m.encode_text(words)))  # type: ignore[misc]
        for name, model in clip.items()
    }
    vit_b16 = towers["ViT-B-16"][0]
    return {
        "BMCA": towers["ViT-L-14"],
        "BiomedCLIP": (vit_b16, bert_text),
        "UniMedCLIP": (vit_b16, bert_text),
        "QuiltNet": towers["ViT-B-32"],
        "GenMedClip": towers["ViT-B-16"],
        "PLIP": towers["ViT-B-32"],
        "PUBMEDCLIP": towers["ViT-B-32"],
        "PMCCLIP": (counted(lambda: resnet(pixels)), bert_text),
        "MedCLIP": (counted(lambda: swin(pixels)), bert_text),
    }


def counted(run: Callable[[], Any]) -> float:
    """GFLOP of a forward pass on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


if __name__ == "__main__":
    main()
