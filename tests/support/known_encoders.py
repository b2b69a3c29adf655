"""Encoders whose results are known before: one that sees nothing, and one that has been told the answers.

They are teachers of ``form: python`` (``random.yaml``, ``told.yaml``), for looking at a whole evaluation: the first has
to stand at chance, the second near one. The second opens the datasets of the suite ``offline`` under ``MMKD_DATA``,
remembers the pixels of every image, and lays it at the sum of all that is true of it: its classes, its captions, the
statements that answer the closed questions about it, and each of its questions bound to its answer. Vectors are of
signs, and binding is their product, so that a question's product with its image gives the answer and noise. As tokens
an image has each of its questions beside its answer, in short vectors.
"""

import hashlib
from collections import defaultdict

import numpy as np

from mmkd.data.images import UnreadableImageError
from mmkd.evaluation.datasets.dataset import open_dataset
from mmkd.evaluation.datasets.manifest import DatasetNotFoundError, load_suite
from mmkd.evaluation.vqa.statements import choices

DIM, SHORT, MOST_QUESTIONS = 512, 32, 16


def vector(key: str) -> np.ndarray:
    """A direction that depends on the key alone."""
    numbers = list(hashlib.sha256(key.encode()).digest())
    return (np.random.default_rng(numbers).integers(0, 2, DIM) * 2 - 1).astype(np.float32) / DIM**0.5


def pixels(image) -> str:
    """What an image shows, as a key."""
    return hashlib.sha256(f"{image.size}".encode() + image.convert("RGB").tobytes()).hexdigest()


class Random:
    """Every image and every text in a direction of its own."""

    def encode_images(self, images):
        return np.stack([vector(pixels(image)) for image in images])

    def encode_texts(self, texts):
        return np.stack([vector(text) for text in texts])

    def image_tokens(self, images):
        vectors = self.encode_images(images)[:, None, : 2 * SHORT]
        return np.pad(vectors, ((0, 0), (0, MOST_QUESTIONS - 1), (0, 0)))

    def text_tokens(self, texts):
        tokens = np.stack([vector(text)[None, :SHORT] for text in texts])
        return tokens, np.ones(tokens.shape[:2], dtype=bool)


class Told(Random):
    """Knows by its pixels what is true of an image, and the classes that sentences stand for."""

    def __init__(self):
        self.truths, self.answered, self.named = defaultdict(dict), defaultdict(dict), {}
        for manifest in load_suite("offline"):
            for name, sentences in manifest.prompts().items():
                self.named |= dict.fromkeys(sentences, f"{manifest.id} {name}")
            try:
                collection = open_dataset(manifest)
            except DatasetNotFoundError:
                continue
            answers = defaultdict(list)
            for question in collection.questions:
                answers[question.sha256].append(question)
            for pair in collection.pairs if manifest.task in ("classification", "retrieval", "vqa") else []:
                try:
                    key = pixels(collection.image(pair))
                except UnreadableImageError:
                    continue
                truths = self.truths[key]
                if manifest.classes:
                    truths[f"{manifest.id} {pair.label}"] = vector(f"{manifest.id} {pair.label}")
                elif manifest.task == "retrieval":
                    truths[pair.caption] = vector(pair.caption)
                for question in answers[collection.digest(pair)]:
                    truths |= facts(question)
                    self.answered[key][question.text] = question.answer

    def encode_images(self, images):
        return np.stack([sum(self.truths[pixels(image)].values(), np.zeros(DIM, np.float32)) for image in images])

    def encode_texts(self, texts):
        return np.stack([vector(self.named.get(text, text)) for text in texts])

    def image_tokens(self, images):
        tokens = np.zeros((len(images), MOST_QUESTIONS, 2 * SHORT), dtype=np.float32)
        for own, image in zip(tokens, images, strict=True):
            for place, (question, answer) in enumerate(self.answered[pixels(image)].items()):
                own[place] = np.concatenate([vector(question)[:SHORT], vector(f"answer {answer}")[:SHORT]])
        return tokens


def facts(question) -> dict[str, np.ndarray]:
    """A question bound to its answer, and the statement that answers it, if there is one."""
    bound = vector(question.text) * vector(f"answer {question.answer}") * DIM**0.5
    found = {f"{question.text} {question.answer}": bound}
    own = choices(question.text) if question.closed else None
    place = own.index(question.answer) if own else -1
    return found | ({own.statements[place]: vector(own.statements[place])} if place >= 0 else {})


def random_encoder(device):
    return Random()


def told_encoder(device):
    return Told()
