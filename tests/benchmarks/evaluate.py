"""Embedding of an evaluation, and extraction: images a CPU second, against a plain DataLoader + open_clip loop.

    python tests/benchmarks/evaluate.py --images 400 --encoders 2 --rounds 1

JPEG files of 768 x 576 and tiny ViTs of open_clip at 224 pixels, so that reading images and not computing is measured.
Ours reads, decodes and prepares each image once, and embeds it with all encoders: as `mmkd eval` does before its tasks,
images hashed and the cache written, and as `mmkd extract` does, with its captions and at exact pixels, the stores
written. The loop reads the folder once for each encoder, with open_clip's own transform, and keeps the vectors in
memory; against extraction it encodes the captions, too. Sides alternate, and CPU seconds count, so that a busy machine
changes little; the vectors of both sides are compared. The last two lines are JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import open_clip
import torch
from extraction import write_pairs
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mmkd.data.features.store import FeatureStore
from mmkd.data.folder import open_pairs
from mmkd.encoders.settings import ExtractSettings
from mmkd.encoders.zoo import load_encoder
from mmkd.evaluation.datasets.pairs import PairsDataset
from mmkd.evaluation.embeddings.encoders import embed_everything
from mmkd.evaluation.run import inputs_of
from mmkd.evaluation.tasks.task import TaskOptions
from mmkd.train.extract import main as extract

BATCH = 32
PREPARED = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
TINY = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


class Files(Dataset):
    """The images of a folder as open_clip prepares them."""

    def __init__(self, folder, transform):
        self.files, self.transform = sorted((folder / "images").iterdir()), transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        with Image.open(self.files[index]) as image:
            return self.transform(image)


def write_encoder(folder, seed):
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    torch.save(open_clip.CLIP(**TINY).state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": PREPARED}))


@torch.inference_mode()
def loop(folder, encoders, captions=()):
    """Image vectors (n, dim) of each encoder; captions are encoded and left."""
    found = []
    for encoder in encoders:
        model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{encoder}")
        batches = DataLoader(Files(folder, transform), BATCH)
        found.append(torch.cat([model.eval().encode_image(batch, normalize=True) for batch in batches]))
        for start in range(0, len(captions), BATCH):
            tokens = open_clip.get_tokenizer(f"local-dir:{encoder}")(captions[start : start + BATCH])
            model.encode_text(tokens, normalize=True)
    return found


def evaluated(folder, encoders, cache):
    """The same, from the cache of an evaluation."""
    dataset = PairsDataset(open_pairs(folder), "train")
    inputs = inputs_of(dataset, lambda: dataset, ["zeroshot"], "train", TaskOptions())
    known = embed_everything({own.name: str(own) for own in encoders}, [inputs], load_encoder, cache, BATCH, True)
    pairs = sorted(dataset.pairs, key=lambda pair: pair.image)
    return [torch.from_numpy(own.embedded(inputs, dataset).image_matrix(pairs)) for own in known]


def extracted(folder, encoders, output):
    """The same, from feature stores."""
    extract(ExtractSettings(teacher=list(map(str, encoders)), pairs=folder, output=output, quiet=True))
    ids = [pair.id for pair in sorted(open_pairs(folder).pairs, key=lambda pair: pair.image)]
    return [FeatureStore(output / own.name).lookup(ids)[0] for own in encoders]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--encoders", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="evaluate-") as temporary:
        root = Path(temporary)
        write_pairs(root / "pairs", chosen.images, 768, 576)
        encoders = [root / f"encoder{k}" for k in range(chosen.encoders)]
        for k, encoder in enumerate(encoders):
            write_encoder(encoder, k)
        captions = [pair.caption for pair in open_pairs(root / "pairs").pairs]
        results = []
        for name, ours, texts in (("evaluate", evaluated, ()), ("extract", extracted, captions)):
            seconds = {"loop": [], "ours": []}
            for turn in range(chosen.rounds):
                sides = {"loop": (loop, texts), "ours": (ours, root / f"{name}{turn}")}
                found = {}
                for side, (run, more) in sides.items():
                    began = time.process_time()
                    found[side] = run(root / "pairs", encoders, more)
                    seconds[side].append(time.process_time() - began)
                for theirs, own in zip(found["loop"], found["ours"], strict=True):
                    assert torch.allclose(theirs, own, atol=2e-3), (theirs - own).abs().max()
            rates = {side: chosen.images * chosen.encoders / statistics.median(own) for side, own in seconds.items()}
            print(name, {side: [round(value, 2) for value in own] for side, own in seconds.items()})
            result = {"name": name, "ours": round(rates["ours"], 1), "baseline": round(rates["loop"], 1)}
            results.append({**result, "unit": "images/CPU s", "ratio": round(rates["ours"] / rates["loop"], 2)})
    print("\n".join(map(json.dumps, results)))


if __name__ == "__main__":
    main()
