"""Seconds of a whole training step: captions in chunks of like length against captions padded to 256 tokens.

``python tests/benchmarks/tokens.py [--captions FOLDER] [--batch 64] [--rounds 2] [--layers 12]``

ViT-B/16 at 224 pixels and BERT-base with random weights, fp32, one thread, symmetric InfoNCE, forward, backward and
AdamW, with gradient checkpointing in both towers (as the authors' stage 1 has it; a batch of 64 padded to 256 needs 20
GB without). Both sides are the same objective on the same pairs; the baseline's batch says nothing of lengths and is
padded, as the authors' is. Lengths are those of the captions in the ``labels.csv`` files below FOLDER, by default the
images beside the project, cut at 256 tokens; where there are none, log-normal ones like them. Sides alternate; the
figure is the ratio of medians of CPU time. The tower's useful share of tokens is the mean of 100 batches.
"""

import argparse
import csv
import json
import os
import statistics
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

from mmkd.student.embed import PixelStatistics, padding_free_share, text_chunks
from mmkd.student.trainable import enable_gradient_checkpointing
from mmkd.training.contrastive import ContrastiveObjective
from modeling_mmkd import MMKDClipConfig, MMKDClipModel

CONTEXT = 256
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
STATISTICS = PixelStatistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def caption_lengths(folder: Path) -> list[int]:
    """Tokens of every caption below a folder, by the word pieces of BERT; log-normal ones without captions."""
    captions = []
    for path in sorted(folder.rglob("labels.csv")):
        with path.open(encoding="utf-8") as file:
            captions += [row["caption"] for row in csv.DictReader(file) if row.get("caption")]
    if not captions:
        print("no captions: lengths are drawn, log-normal with median 38 and sigma 0.8")
        drawn = np.random.default_rng(0).lognormal(np.log(38), 0.8, 2000)
        return np.clip(drawn.astype(int) + 2, 4, CONTEXT).tolist()
    from mmkd.student.starting_weights import start_text

    tokenizer = start_text("packaged:all-minilm-l6-v2").tokenizer
    return [min(CONTEXT, len(ids)) for ids in tokenizer(captions, truncation=False, verbose=False)["input_ids"]]


def step_batch(lengths: list[int], vocabulary: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    lengths = sorted(lengths, reverse=True)
    mask = (torch.arange(lengths[0])[None] < torch.tensor(lengths)[:, None]).long()
    return {
        "pixel_values": torch.randint(0, 256, (len(lengths), 3, 224, 224), generator=generator, dtype=torch.uint8),
        "pixel_statistics": STATISTICS,
        "input_ids": torch.randint(1000, vocabulary, mask.shape, generator=generator) * mask,
        "attention_mask": mask,
        "text_lengths": lengths,
    }


def padded(batch: dict) -> dict:
    """The same batch as the authors hand it over: every caption 256 tokens long."""
    fill = (0, CONTEXT - batch["input_ids"].shape[1])
    wide = {name: torch.nn.functional.pad(batch[name], fill) for name in ("input_ids", "attention_mask")}
    return {name: value for name, value in {**batch, **wide}.items() if name != "text_lengths"}


def one_step(objective: ContrastiveObjective, optimizer: torch.optim.Optimizer, batch: dict) -> tuple[float, float]:
    began = time.process_time()
    loss = objective(batch)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - began, loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, default=SHARED)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12, help="of both towers; the ratio is that of all twelve")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lengths = caption_lengths(arguments.captions)
    draws = np.random.default_rng(0)
    print(f"{len(lengths)} captions of {np.mean(lengths):.1f} tokens on average, median {np.median(lengths):.0f}")
    for size in sorted({64, 256, 1024, arguments.batch}):
        batches = [sorted(draws.choice(lengths, size).tolist(), reverse=True) for _ in range(100)]
        useful = statistics.mean(map(padding_free_share, batches))
        longest = statistics.mean(sum(batch) / (size * batch[0]) for batch in batches)
        to_context = statistics.mean(sum(batch) / (size * CONTEXT) for batch in batches)
        print(
            f"batch {size:5}: useful tokens {useful:.3f}; padded to the longest {longest:.3f}, to 256 {to_context:.3f}"
        )
    if arguments.rounds == 0:
        return
    torch.manual_seed(0)
    depth = {"num_hidden_layers": arguments.layers}
    model = MMKDClipModel(MMKDClipConfig(vision_config=depth, text_config=depth)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    enable_gradient_checkpointing(model)
    objective = ContrastiveObjective(model)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.0, fused=True)  # the same weights on both sides
    ours = step_batch(draws.choice(lengths, arguments.batch).tolist(), 30522)
    sides = {"padded to 256": padded(ours), "ours": ours}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, float] = {}
    for _ in range(arguments.rounds):
        for name, batch in sides.items():
            spent, losses[name] = one_step(objective, optimizer, batch)
            seconds[name].append(spent)
            print(f"{name:<14}{spent:8.1f} s   loss {losses[name]:.7f}", flush=True)
    difference = abs(losses["ours"] - losses["padded to 256"])
    print(f"chunks {[(stop - start, longest) for start, stop, longest in text_chunks(ours['text_lengths'])]}")
    print(f"difference of the losses {difference:.1e}")
    assert difference < 1e-5, "the losses differ"
    rates = {name: arguments.batch / statistics.median(spent) for name, spent in seconds.items()}
    result = {"name": "tokens", "ours": rates["ours"], "baseline": rates["padded to 256"], "unit": "pairs/s and core"}
    print(json.dumps({**result, "ratio": rates["ours"] / rates["padded to 256"]}))


if __name__ == "__main__":
    main()
