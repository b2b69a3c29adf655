"""CPU seconds of a whole step of distillation, data included: the authors' recipe written out against ours.

``python tests/benchmarks/step.py [--batch 32] [--rounds 2] [--threads 2]``

The authors' step as released: Pillow, RandomResizedCrop, ToTensor and Normalize for each image; one small ``.pt`` file
opened for each sample; captions padded to 256 tokens; the task, 50 x feature and interactive losses with full matrices
and one random teacher a sample; anomaly detection left on; AdamW in its default form. Ours: the batches, objective and
optimizer that ``mmkd distill --recipe paper`` runs, on the same pairs, features, losses and precision (bf16 autocast,
as in stage 2). Models are ViT-B/16 and BERT-base with random weights. No worker processes on either side, so that CPU
seconds count everything. Sides alternate; figures are medians. The table says where the time goes.
"""

import argparse
import io
import json
import os
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from loader import AUTHORS, MEAN, STD, drawn_figures
from PIL import Image
from tokens import CONTEXT, SHARED, caption_lengths
from transformers import BertTokenizer, CLIPImageProcessorPil

from mmkd.data.features.lookup import TeacherFeatures
from mmkd.data.features.writer import FeatureWriter
from mmkd.data.folder import open_pairs, write_manifest
from mmkd.data.table import Pair
from mmkd.distillation.objective import DistillObjective
from mmkd.distillation.options import DistillOptions
from mmkd.training.batches import pair_batches
from mmkd.training.objectives import ObjectiveWrapper
from mmkd.training.optimizer import build_optimizer
from mmkd.training.settings import BatchSettings, LoopSettings
from modeling_mmkd import MMKDClipConfig, MMKDClipModel, MMKDClipProcessor

TEACHERS, WORDS = ("a", "b", "c", "d", "e", "f"), 1000


class Clock:
    """CPU seconds of this process, all threads, by name of phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = cpu_seconds()
        yield
        self.seconds[name] += cpu_seconds() - began


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def write_data(folder: Path, count: int) -> None:
    """Figures, captions of real lengths, and the features of six teachers in the authors' form and in ours."""
    draws, figures = np.random.default_rng(0), drawn_figures()
    lengths = draws.choice(caption_lengths(SHARED), count)
    features = {name: F.normalize(torch.randn(2, count, 512), dim=2) for name in TEACHERS}
    (folder / "images").mkdir(parents=True)
    (folder / "published").mkdir()
    pairs = []
    for row, length in enumerate(lengths.tolist()):
        (folder / "images" / f"{row}.jpg").write_bytes(figures[row % len(figures)])
        words = draws.integers(0, WORDS, max(1, length - 2))
        pairs.append(Pair(f"p{row}", f"{row}.jpg", " ".join(f"w{word}" for word in words)))
        one = {
            f"{name}_{side}": both[k, row] for name, both in features.items() for k, side in enumerate(("img", "txt"))
        }
        torch.save({key: tensor.clone() for key, tensor in one.items()}, folder / "published" / f"p{row}.pt")
    write_manifest(folder, pairs)
    for name, both in features.items():
        writer = FeatureWriter(folder / "aligned" / name, name)
        writer.add([pair.id for pair in pairs], both[0], both[1])
        writer.finish({})


def processor() -> MMKDClipProcessor:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *(f"w{k}" for k in range(WORDS))])}
    images = CLIPImageProcessorPil(image_mean=list(MEAN), image_std=list(STD))
    return MMKDClipProcessor(images, BertTokenizer(vocab=vocabulary, model_max_length=CONTEXT))


class AuthorsStep:
    """Stage 2 as released, one step at a time."""

    def __init__(self, model: MMKDClipModel, folder: Path, batch: int, anomaly: bool) -> None:
        self.model, self.folder, self.batch, self.anomaly = model, folder, batch, anomaly
        self.pairs, self.tokenizer = open_pairs(folder).pairs, processor().tokenizer
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
        self.row = 0

    def __call__(self, clock: Clock) -> float:
        chosen = [self.pairs[(self.row + k) % len(self.pairs)] for k in range(self.batch)]
        self.row += self.batch
        with clock("images"):
            opened = (Image.open(io.BytesIO((self.folder / "images" / pair.image).read_bytes())) for pair in chosen)
            pixels = torch.stack([AUTHORS(image) for image in opened])
        with clock("features"):
            targets = [self._target(pair.id) for pair in chosen]
            image_target, text_target = (torch.stack(side) for side in zip(*targets, strict=True))
        with clock("captions"):
            captions = [pair.caption for pair in chosen]
            options = {"padding": "max_length", "truncation": True, "max_length": CONTEXT, "return_tensors": "pt"}
            texts = self.tokenizer(captions, **options)
        with torch.autograd.set_detect_anomaly(self.anomaly, check_nan=True):
            with clock("forward"), torch.autocast("cpu", torch.bfloat16):
                output = self.model(
                    input_ids=texts["input_ids"], attention_mask=texts["attention_mask"], pixel_values=pixels
                )
                image, text = output.image_embeds, output.text_embeds
            with clock("loss"), torch.autocast("cpu", torch.bfloat16):
                scale, labels = self.model.logit_scale.exp(), torch.arange(self.batch)
                task = [F.cross_entropy(scale * a @ b.T, labels) for a, b in ((image, text), (text, image))]
                cross = np.log(1 / 0.07)
                pairs = ((image, text_target), (text, image_target))
                interactive = [F.cross_entropy(cross * a @ b.T, labels) for a, b in pairs]
                feature = F.mse_loss(image, image_target) + F.mse_loss(text, text_target)
                loss = sum(task) / 2 + 50 * feature + sum(interactive) / 2
            with clock("backward"):
                loss.backward()
        with clock("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()

    def _target(self, id: str) -> tuple[torch.Tensor, torch.Tensor]:
        stored = torch.load(self.folder / "published" / f"{id}.pt", weights_only=True)
        name = TEACHERS[int(torch.randint(len(TEACHERS), ()))]
        return stored[f"{name}_img"], stored[f"{name}_txt"]


class OurStep:
    """What ``mmkd distill --recipe paper --precision bf16`` does in a step."""

    def __init__(self, model: MMKDClipModel, folder: Path, batch: int) -> None:
        objective = DistillObjective(model, DistillOptions(recipe="paper"))
        self.trained = ObjectiveWrapper(objective, "cpu", "bf16")
        self.optimizer = build_optimizer(objective, LoopSettings(output=folder / "out"))
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        aligned = TeacherFeatures.open(folder / "aligned")
        settings = BatchSettings(batch_size=batch, workers=0, seed=0)
        self.batches = pair_batches(open_pairs(folder), processor(), settings, {"aligned": aligned})
        self.reader, self.epoch = iter(()), 0

    def __call__(self, clock: Clock) -> float:
        with clock("images"):
            batch = next(self.reader, None)
            if batch is None:
                self.reader, self.epoch = iter(self.batches.epoch(self.epoch)), self.epoch + 1
                batch = next(self.reader)
        batch = {**batch, "epoch": self.epoch}
        with clock("forward"):
            embeddings = self.trained(ObjectiveWrapper.encode, batch)
        with clock("loss"):
            parts = self.trained(ObjectiveWrapper.loss, embeddings, batch)
        with clock("backward"):
            parts["loss"].backward()
        with clock("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return parts["loss"].item()


def without_dropout(model: MMKDClipModel) -> MMKDClipModel:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12, help="of both towers; fewer to try the script out")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    layers = {"num_hidden_layers": arguments.layers}
    model = without_dropout(MMKDClipModel(MMKDClipConfig(vision_config=layers, text_config=layers)).train())
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder) / "pairs", arguments.batch * (arguments.rounds + 1))
        sides = {
            "authors": AuthorsStep(model, Path(folder) / "pairs", arguments.batch, True),
            "authors, no anomaly detection": AuthorsStep(model, Path(folder) / "pairs", arguments.batch, False),
            "ours": OurStep(model, Path(folder) / "pairs", arguments.batch),
        }
        spent: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for _ in range(arguments.rounds):
            for name, step in sides.items():
                clock, wall = Clock(), time.perf_counter()
                loss = step(clock)
                spent[name].append(dict(clock.seconds))
                print(
                    f"{name:<30}{sum(clock.seconds.values()):8.1f} CPU s, {time.perf_counter() - wall:6.1f} s, "
                    f"loss {loss:.3f}",
                    flush=True,
                )
    report(spent, arguments.batch)


def report(spent: dict[str, list[dict[str, float]]], batch: int) -> None:
    """A row a phase; what ours reads in one go (captions and features with images) stands under images."""
    phases = ("images", "features", "captions", "forward", "loss", "backward", "optimizer")
    medians = {
        name: {p: statistics.median(s.get(p, 0.0) for s in steps) for p in phases} for name, steps in spent.items()
    }
    print(f"\nCPU seconds a step of {batch} pairs\n{'':<12}" + "".join(f"{name:>32}" for name in medians))
    for phase in phases:
        print(f"{phase:<12}" + "".join(f"{medians[name][phase]:32.2f}" for name in medians))
    totals = {name: statistics.median(sum(step.values()) for step in steps) for name, steps in spent.items()}
    print(f"{'whole':<12}" + "".join(f"{total:32.2f}" for total in totals.values()))
    print(f"{'x ours':<12}" + "".join(f"{total / totals['ours']:32.2f}" for total in totals.values()) + "\n")
    rates = {name: batch / total for name, total in totals.items()}
    result = {"name": "step", "ours": rates["ours"], "baseline": rates["authors"], "unit": "pairs/s of CPU"}
    print(json.dumps({**result, "ratio": rates["ours"] / rates["authors"]}))


if __name__ == "__main__":
    main()
