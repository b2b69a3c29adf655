"""Encoders whose results are known before: one that sees nothing, and one that has been told the answers.

They are teachers of ``form: python`` (``random.yaml``, ``told.yaml``), for looking at a whole evaluation: the first has
to stand at chance, the second near one. The second opens the datasets of the suite ``offline`` under ``MMKD_DATA``, but
those of ``UNTOLD``, remembers the pixels of every image, and lays it at the sum of the classes and captions it has.
"""

import hashlib
from collections import defaultdict

import numpy as np

from mmkd.data.images import UnreadableImage
from mmkd.evaluation.collections import Absent, open_collection
from mmkd.evaluation.registry import load_suite

DIM = 256
UNTOLD = ("medpix2-all", "modality", "nuclei-stain", "covid-cxr")


def vector(key: bytes) -> np.ndarray:
    """A direction that depends on the key alone."""
    numbers = list(hashlib.sha256(key).digest())
    return np.random.default_rng(numbers).normal(size=DIM).astype(np.float32) / DIM**0.5


def pixels(image) -> bytes:
    """What an image shows, as a key."""
    return hashlib.sha256(f"{image.size}".encode() + image.convert("RGB").tobytes()).digest()


class Random:
    """Every image and every text in a direction of its own."""

    def encode_images(self, images):
        return np.stack([vector(pixels(image)) for image in images])

    def encode_texts(self, texts):
        return np.stack([vector(text.encode()) for text in texts])


class Told(Random):
    """Knows the classes and captions of images by their pixels, and the classes that sentences stand for."""

    def __init__(self):
        self.shown, self.named = defaultdict(set), {}
        for manifest in load_suite("offline"):
            if manifest.task not in ("classification", "retrieval") or manifest.id in UNTOLD:
                continue
            for name, sentences in manifest.prompts().items():
                self.named |= dict.fromkeys(sentences, f"{manifest.id} {name}")
            try:
                collection = open_collection(manifest)
            except Absent:
                continue
            for pair in collection.pairs:
                try:
                    key = pixels(collection.image(pair))
                except UnreadableImage:
                    continue
                self.shown[key].add(f"{manifest.id} {pair.label}" if manifest.classes else pair.caption)

    def encode_images(self, images):
        told = [sorted(self.shown[pixels(image)]) or [""] for image in images]
        return np.stack([sum(vector(name.encode()) for name in names) for names in told])

    def encode_texts(self, texts):
        return np.stack([vector(self.named.get(text, text).encode()) for text in texts])


def random_encoder(device):
    return Random()


def told_encoder(device):
    return Told()
