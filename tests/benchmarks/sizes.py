"""Parameters, FLOPs and CPU latency of the named sizes, as the table of docs/model.md.

``python tests/benchmarks/sizes.py [--rounds 5] [--write]``

FLOPs are counted by torch for one image and for one text of 32 tokens, a multiplication and an addition counting two.
Latency is the median CPU time of one image or text on one thread in fp32, random weights, eager. ``--write`` puts the
table between its marks in docs/model.md.
"""

import argparse
import os
import re
import statistics
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_mmkd import PRESETS, MMKDClipConfig, MMKDClipModel

PAGE = Path(__file__).resolve().parents[2] / "docs" / "model.md"
BEGIN, END = "<!-- sizes: python tests/benchmarks/sizes.py --write -->", "<!-- end of sizes -->"
HEAD = (
    "| preset | vision tower | text tower | width | parameters | image GFLOPs | text GFLOPs | image ms | text ms |",
    "|---|---|---|---:|---:|---:|---:|---:|---:|",
)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def milliseconds(function, rounds):
    times = []
    for _ in range(rounds + 1):
        began = time.process_time()
        function()
        times.append(1000 * (time.process_time() - began))
    return statistics.median(times[1:])


def tower(config):
    if config.model_type == "timm_wrapper":
        return config.architecture
    patch = f", patch {config.patch_size}" if hasattr(config, "patch_size") else ""
    return f"{config.num_hidden_layers} x {config.hidden_size}{patch}"


@torch.inference_mode()
def row(name, rounds):
    config = MMKDClipConfig.from_preset(name)
    model = MMKDClipModel(config).eval()
    pixels, ids = torch.randn(1, 3, 224, 224), torch.randint(1000, 30000, (1, 32))
    sides = (lambda: model.get_image_features(pixels), lambda: model.get_text_features(ids))
    counted = " | ".join(f"{flops(side) / 1e9:.2f}" for side in sides)
    timed = " | ".join(f"{milliseconds(side, rounds):.0f}" for side in sides)
    parameters = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M"
    towers = f"{tower(config.vision_config)} | {tower(config.text_config)} | {config.projection_dim}"
    return f"| `{name}` | {towers} | {parameters} | {counted} | {timed} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    table = "\n".join([*HEAD, *(row(name, settings.rounds) for name in PRESETS)])
    print(table)
    if settings.write:
        text = PAGE.read_text(encoding="utf-8")
        found = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", f"{BEGIN}\n{table}\n{END}", text, flags=re.DOTALL)
        assert BEGIN in text, f"{PAGE} has no {BEGIN}"
        PAGE.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
