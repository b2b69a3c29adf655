"""CPU seconds of encoding images and texts, in fp32 and bf16: ours against open_clip's and transformers' CLIP.

``python tests/benchmarks/encode.py [--images 4] [--texts 32] [--rounds 5] [--layers 12]``

All three have the same sizes and random weights: ViT-B/16 at 224 pixels; text towers of 12 layers, 768 wide. Ours is
`MMKDClipModel` with BERT-base, asked for the pooled output alone as `HFClipEncoder` does; open_clip's its
``VisionTransformer`` and ``HFTextEncoder`` around the same BERT-base, as the authors built theirs; transformers' its
``CLIPModel``. Texts are as many captions of real lengths for all, in one batch: ours and transformers' are padded to
the longest, open_clip's to the context of 256 tokens, as its tokenizer does; the line in brackets gives open_clip the
same padded tokens as ours. One thread, inference mode, sides alternate within a round; figures are medians of CPU time.
A cell's ratio is the faster of the two others over ours, and the last line has the smallest of the four. The roofline
sets the model's FLOP/s against those of bare matrix products of the same shapes.
"""

import argparse
import json
import os
import statistics
import time

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import QuickGELU
from open_clip.transformer import VisionTransformer
from tokens import CONTEXT, SHARED, caption_lengths
from transformers import BertConfig, CLIPConfig, CLIPModel

from modeling_mmkd import MMKDClipConfig, MMKDClipModel

WIDTH, HIDDEN, HEADS, DIM, PATCHES = 768, 3072, 12, 512, 197


def ours(layers):
    towers = {"num_hidden_layers": layers}
    return MMKDClipModel(MMKDClipConfig(vision_config=dict(towers), text_config=dict(towers))).eval()


def open_clips(layers):
    visual = VisionTransformer(224, 16, WIDTH, layers, HEADS, 4, output_dim=DIM, act_layer=QuickGELU)
    options = {"pooler_type": "cls_last_hidden_state_pooler", "proj_type": "mlp", "pretrained": False}
    text = HFTextEncoder("unused", DIM, config=BertConfig(num_hidden_layers=layers), **options)
    text.transformer.pooler = None
    return visual.eval(), text.eval()


def transformers_clip(layers):
    vision = {"hidden_size": WIDTH, "num_hidden_layers": layers, "intermediate_size": HIDDEN}
    vision |= {"num_attention_heads": HEADS, "patch_size": 16}
    text = {**vision, "max_position_embeddings": CONTEXT, "vocab_size": 30522}
    del text["patch_size"]
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)).eval()


def cpu_seconds(function):
    began = time.process_time()
    function()
    return time.process_time() - began


def alternated(sides, rounds):
    """Median CPU seconds of each side; one round to warm up is not counted."""
    times = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides) if number % 2 else reversed(list(sides)):
            seconds = cpu_seconds(sides[name])
            if number:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def text_batch(count):
    lengths = np.random.default_rng(0).choice(caption_lengths(SHARED), count)
    mask = (torch.arange(int(lengths.max()))[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1000, 30000, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return ids, mask


def matmuls(rows, tokens, layers, dtype):
    """The products of a tower's layers, on tensors of the same shapes, and their FLOP."""
    shapes = [(WIDTH, WIDTH)] * 4 + [(WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    inputs = {width: torch.randn(rows * tokens, width, dtype=dtype) for width in (WIDTH, HIDDEN)}
    weights = [torch.randn(wide, narrow, dtype=dtype) for narrow, wide in shapes]
    heads = torch.randn(rows * HEADS, tokens, WIDTH // HEADS, dtype=dtype)
    scores = torch.randn(rows * HEADS, tokens, tokens, dtype=dtype)

    def run():
        for _ in range(layers):
            for (narrow, _), weight in zip(shapes, weights, strict=True):
                torch.nn.functional.linear(inputs[narrow], weight)
            torch.bmm(heads, heads.transpose(1, 2))
            torch.bmm(scores, heads)

    linear = sum(2 * rows * tokens * narrow * wide for narrow, wide in shapes)
    return run, layers * (linear + 4 * rows * tokens * tokens * WIDTH)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in {"images": 4, "texts": 32, "rounds": 5, "layers": 12}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, (visual, text), clip = ours(settings.layers), open_clips(settings.layers), transformers_clip(settings.layers)
    ids, mask = text_batch(settings.texts)
    wide = torch.nn.functional.pad(ids, (0, CONTEXT - ids.shape[1]))
    print(f"{settings.images} images; {len(ids)} texts of {int(mask.sum())} tokens, the longest {ids.shape[1]}\n")
    print("| cell | ours s | open_clip s | transformers s | ratio | GFLOP/s | of plain matmul |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    worst = {}
    for dtype in (torch.float32, torch.bfloat16):
        for side in (model, visual, text, clip):
            side.to(dtype)
        pixels = torch.randn(settings.images, 3, 224, 224).to(dtype)
        cells = {
            "image": {
                "ours": lambda p=pixels: model.get_image_features(p, pooled_only=True),
                "open_clip": lambda p=pixels: visual(p),
                "transformers": lambda p=pixels: clip.get_image_features(p),
            },
            "text": {
                "ours": lambda: model.get_text_features(ids, mask),
                "open_clip": lambda: text(wide),
                "transformers": lambda: clip.get_text_features(ids, mask),
                "open_clip, same tokens": lambda: text(ids),
            },
        }
        sizes = {"image": (settings.images, PATCHES), "text": tuple(ids.shape)}
        for kind, sides in cells.items():
            run, flop = matmuls(*sizes[kind], settings.layers, dtype)
            with torch.inference_mode():
                seconds = alternated({**sides, "matmul": run}, settings.rounds)
            name = f"{kind} {str(dtype).removeprefix('torch.')}"
            best = min(seconds["open_clip"], seconds["transformers"])
            worst[name] = {"ours": seconds["ours"], "baseline": best, "ratio": best / seconds["ours"]}
            print(
                f"| {name} | {seconds['ours']:.2f} | {seconds['open_clip']:.2f} | {seconds['transformers']:.2f} "
                f"| {worst[name]['ratio']:.2f} | {flop / seconds['ours'] / 1e9:.0f} "
                f"| {seconds['matmul'] / seconds['ours']:.0%} |",
                flush=True,
            )
            if "open_clip, same tokens" in seconds:
                print(f"| (open_clip, same tokens) | | {seconds['open_clip, same tokens']:.2f} | | | | |", flush=True)
    name, cell = min(worst.items(), key=lambda item: item[1]["ratio"])
    print(json.dumps({"name": "encode", **{k: round(v, 4) for k, v in cell.items()}, "unit": "s", "cell": name}))


if __name__ == "__main__":
    main()
