"""Pairs whose pixels state what they show, and encoders that read them well, badly or not at all."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmkd.data.folder import write_manifest
from mmkd.data.table import Pair
from mmkd.encoders.encoder import DualEncoder

MODALITIES = ("CT", "MRI", "X-ray")
LABELS = ("nodule", "cyst", "effusion", "healthy")
STEP = 20


def write_pairs(folder: Path, pairs: list[Pair], unreadable: tuple[str, ...] = ()) -> Path:
    """A folder of pairs; an image's flat color holds the numbers of modality, label and caption."""
    for pair in pairs:
        path = folder / "images" / pair.image
        path.parent.mkdir(parents=True, exist_ok=True)
        if pair.id in unreadable:
            path.write_bytes(b"not an image")
            continue
        color = (_number(pair.modality, MODALITIES), _number(pair.label, LABELS), _serial(pair.caption))
        Image.new("RGB", (16, 16), (color[0] * STEP, color[1] * STEP, color[2])).save(path)
    write_manifest(folder, pairs)
    return folder


def make_pairs(count: int, split: str = "test", start: int = 0) -> list[Pair]:
    """Pairs of all modalities and labels, two images to a group."""
    pairs = []
    for k in range(start, start + count):
        modality, label = MODALITIES[k % 3], LABELS[(k // 3) % 4]
        caption = f"{modality} image number {k} with {label}"
        pairs.append(
            Pair(f"p{k}", f"{k}.png", caption, modality, label, group=f"{split}-{k // 24}-{k % 12}", split=split)
        )
    return pairs


class FakeEncoder(DualEncoder):
    """Reads pixels and words and mixes in ``noise`` times a random unit vector that depends on the input alone."""

    def __init__(self, name: str, noise: float = 0.0, blind_to: tuple[str, ...] = (), nan: bool = False):
        super().__init__(name, 4 + 5 + 32, {"noise": noise, "blind_to": blind_to, "name": name, "nan": nan})
        self.noise, self.blind_to, self.nan = noise, blind_to, nan
        self.calls = 0

    def image_features(self, images):
        rows = []
        for image in images:
            red, green, blue = image.getpixel((0, 0))
            rows.append(self._vector(round(red / STEP), round(green / STEP), blue, f"{red} {green} {blue}"))
        self.calls += len(rows)
        return self._finish(rows)

    def text_features(self, texts):
        self.calls += len(texts)
        return self._finish([self._vector(_word(t, MODALITIES), _word(t, LABELS), _serial(t), t) for t in texts])

    def _vector(self, modality, label, serial, seed):
        vector = np.zeros(self.dim)
        if modality and MODALITIES[modality - 1] not in self.blind_to:
            vector[modality] = 1.0
            vector[4 + label] = 1.0 if label else 0.0
            vector[9:] = _code(serial) if serial else 0.0
        elif not self.blind_to:
            vector[4 + label] = 1.0 if label else 0.0
        digest = hashlib.sha256(f"{self.name} {seed}".encode()).digest()
        random = np.random.default_rng(int.from_bytes(digest[:8], "big")).normal(size=self.dim)
        return vector + (self.noise + 1e-6) * random / np.linalg.norm(random)

    def _finish(self, rows):
        vectors = torch.tensor(np.array(rows), dtype=torch.float32)
        return vectors * float("nan") if self.nan else vectors


class ColourEncoder(DualEncoder):
    """The mean colour before the projection, red alone and a constant after it."""

    def __init__(self):
        super().__init__("colour", 2, {"weights": "none"})
        self.calls = 0

    def image_and_pooled(self, prepared):
        self.calls += len(prepared)
        colours = torch.tensor(np.array([np.asarray(image).mean(axis=(0, 1)) for image in prepared])).float()
        return torch.stack([colours[:, 0], torch.ones(len(colours))], dim=1), colours

    def image_features(self, prepared):
        return self.image_and_pooled(prepared)[0]

    def text_features(self, texts):
        raise AssertionError("tiles have no texts")


COLOURS = ColourEncoder()


def load_colours(source, device):
    """In the place of `load_encoder`, also in other processes."""
    return COLOURS


def _number(name, known):
    return known.index(name) + 1 if name in known else 0


def _word(text, known):
    lowered = text.lower().replace("radiograph", "x-ray").replace("magnetic", "mri").replace("mr ", "mri ")
    lowered = lowered.replace("tomography", "ct").replace("plain film", "x-ray")
    return next((k + 1 for k, name in enumerate(known) if name.lower() in lowered), 0)


def _serial(text):
    words = text.split()
    return int(words[words.index("number") + 1]) if "number" in words else 0


def _code(serial):
    return np.random.default_rng(serial).choice([-0.3, 0.3], size=32)
